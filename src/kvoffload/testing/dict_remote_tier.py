"""A remote tier in the memory of the test, with trouble on demand."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Literal, TypeAlias

import anyio
from anyio.lowlevel import checkpoint

from ..errors import CorruptBlockError, TierError, TierUnavailableError
from ..keys import decode_key
from ..remote.protocol import RemoteOutcome
from ..types import Medium

RemoteOperation: TypeAlias = Literal["open", "check", "find", "get", "put", "delete", "clear"]
"""A coroutine of a `RemoteTier` that can meet trouble."""


class RemoteHang:
    """Calls that don't return until `release`; as a context manager it releases on leaving.

    Attributes:
        entered: Set as soon as the first call hangs.
    """

    def __init__(self) -> None:
        self.entered = anyio.Event()
        self._released = anyio.Event()

    def release(self) -> None:
        """Let the calls that hang go on, and later ones pass."""
        self._released.set()

    def __enter__(self) -> RemoteHang:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    async def wait(self) -> None:
        """Hold a call up."""
        if not self._released.is_set():
            self.entered.set()
            await self._released.wait()


class DictRemoteTier:
    """A `RemoteTier` in memory: what engines do, without one.

    Several may share one `store`, as the managers of several machines do::

        engine = {}
        here, there = DictRemoteTier(store=engine), DictRemoteTier(store=engine)

    It goes wrong as a test says: `is_dead` makes all calls fail, `hang` makes them wait, `fail`
    makes blocks fail; and what the engine does on its own is done to `store`.

    Args:
        store: Payloads by canonical key.
        name: Name of the tier.
        most_blocks: Blocks that the engine keeps; the oldest are evicted. 0 keeps none, `None` all.

    Attributes:
        is_dead: Whether each call fails as a whole.
        corrupt: Keys whose values do not check.
        calls: How often each operation was called.
    """

    medium = Medium.REMOTE

    def __init__(
        self,
        *,
        store: dict[bytes, bytes] | None = None,
        name: str = "remote",
        most_blocks: int | None = None,
    ) -> None:
        self.store = {} if store is None else store
        self.name = name
        self.is_dead = False
        self.corrupt: set[bytes] = set()
        self.calls: Counter[str] = Counter()
        self._most_blocks = most_blocks
        self._hangs: dict[str, list[RemoteHang]] = {}
        self._failures: dict[str, tuple[type[TierError], Collection[bytes] | None]] = {}

    def __repr__(self) -> str:
        return f"<DictRemoteTier {self.name!r}: {len(self.store)} blocks>"

    # Trouble

    def hang(self, operation: RemoteOperation) -> RemoteHang:
        """Make calls wait until the hang is released."""
        hang = RemoteHang()
        self._hangs.setdefault(operation, []).append(hang)
        return hang

    def fail(
        self,
        operation: Literal["get", "put"],
        error: type[TierError] = TierError,
        *,
        keys: Collection[bytes] | None = None,
    ) -> None:
        """Make blocks of calls fail, those of `keys` or all, until `heal`."""
        self._failures[operation] = error, keys

    def heal(self) -> None:
        """Be well again; hangs are released."""
        self.is_dead = False
        self._failures.clear()
        for hangs in self._hangs.values():
            for hang in hangs:
                hang.release()
        self._hangs.clear()

    # The tier

    async def open(self) -> None:
        """Get ready."""
        await self._begin("open")

    async def close(self) -> None:
        """Do nothing: the blocks are the engine's."""

    async def check(self) -> None:
        """Fail while it is dead."""
        await self._begin("check")

    async def find(self, keys: Sequence[bytes]) -> list[int | None]:
        """Return the sizes of blocks."""
        await self._begin("find")
        found = [self.store.get(key) for key in keys]
        return [None if payload is None else len(payload) for payload in found]

    async def get(
        self, keys: Sequence[bytes], into: Sequence[memoryview]
    ) -> list[RemoteOutcome | TierError]:
        """Fill buffers."""
        await self._begin("get")
        return [self._get(key, buffer) for key, buffer in zip(keys, into, strict=True)]

    async def put(
        self, keys: Sequence[bytes], payloads: Sequence[memoryview]
    ) -> list[RemoteOutcome | TierError]:
        """Keep what is not there."""
        await self._begin("put")
        return [self._put(key, payload) for key, payload in zip(keys, payloads, strict=True)]

    async def delete(self, keys: Sequence[bytes]) -> list[bool]:
        """Delete blocks."""
        await self._begin("delete")
        return [self.store.pop(key, None) is not None for key in keys]

    async def clear(self, namespace: str) -> AsyncIterator[int]:
        """Delete the blocks of a namespace."""
        await self._begin("clear")
        own = [key for key in self.store if decode_key(key)[0] == namespace]
        for key in own:
            del self.store[key]
        yield len(own)

    # Inside

    async def _begin(self, operation: RemoteOperation) -> None:
        self.calls[operation] += 1
        await checkpoint()
        for hang in list(self._hangs.get(operation, ())):
            await hang.wait()
        if self.is_dead:
            raise TierUnavailableError("the test says that it is dead", tier=self.name)

    def _failure(self, operation: str, key: bytes) -> TierError | None:
        error, keys = self._failures.get(operation, (TierError, ()))
        if keys is not None and key not in keys:
            return None
        return error(
            f"{operation} fails, for the test says so",
            tier=self.name,
            block_hash=decode_key(key)[1],
        )

    def _get(self, key: bytes, buffer: memoryview) -> RemoteOutcome | TierError:
        failure = self._failure("get", key)
        if failure is not None:
            return failure
        payload = self.store.get(key)
        if payload is None or len(payload) != buffer.nbytes:
            return RemoteOutcome.ABSENT
        if key in self.corrupt:
            buffer[:] = bytes(buffer.nbytes)
            self.corrupt.discard(key)
            del self.store[key]
            return CorruptBlockError(
                "it does not check", tier=self.name, block_hash=decode_key(key)[1]
            )
        buffer[:] = payload
        return RemoteOutcome.DONE

    def _put(self, key: bytes, payload: memoryview) -> RemoteOutcome | TierError:
        failure = self._failure("put", key)
        if failure is not None:
            return failure
        if key in self.store:
            return RemoteOutcome.PRESENT
        self.store[key] = bytes(payload)
        while self._most_blocks is not None and len(self.store) > self._most_blocks:
            del self.store[next(iter(self.store))]
        return RemoteOutcome.DONE
