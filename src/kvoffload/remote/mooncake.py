"""The fastest tier past one machine: the pooled memory of a Mooncake store."""

from __future__ import annotations

import asyncio
import contextlib
import re
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

from ..aligned import ALIGNMENT
from ..checks import check_count
from ..errors import ClosedError, ConfigError, CorruptBlockError, TierError, TierUnavailableError
from ..keys import check_namespace, decode_key
from ..types import Medium
from .envelope import VERSION, added_bytes, layout_fingerprint
from .lanes import Call
from .mooncake_client import Client, Connection, Room, connect, knock, parse_url, start
from .mooncake_library import (
    ALREADY_THERE,
    NO_ROOM,
    NOT_THERE,
    NOT_WHOLE,
    OVER_QUOTA,
    WRONG_ARGUMENTS,
    Store,
    StoreError,
    meaning_of,
)
from .outcomes import Outcome, delete_corrupt, misfits
from .protocol import RemoteOutcome
from .staged import VALUE_ALIGNMENT, Got, Values, place_bytes, sizes_of

STAGING_BYTES = 132 * 1024 * 1024
"""By default: a thread takes a batch of 32 MiB in one piece, which hands over the least."""
SHARED_POOLS = 4
"""Tiers that a connection through shared memory has memory for at a time."""
PART_BLOCKS = 256
"""Most blocks of a call of the library's: of some thousands at once to one node, it fails some."""

T = TypeVar("T")


class MooncakeTier:
    """A `RemoteTier` on a Mooncake store; needs the extra `mooncake` and `libibverbs1`.

    Each block is one value, under a name made of the format's version, the layout and the block's
    canonical key. Payloads go through memory of the tier's own, for a call of Mooncake's can't be
    stopped: one that is given up keeps its part of that memory and its thread until it returns.

    Args:
        url: `mooncake://master:port`, with settings after a `?`: `protocol=` `tcp` or `rdma`;
            `devices=` for RDMA; `metadata=` a metadata server, `P2PHANDSHAKE` by default;
            `hostname=` of this machine; `segment=` memory that the store may fill here, `4GiB` or
            so, 0 by default; `buffer=` for the library. Or `mooncake+shm://host:port`, a
            `mooncake_client` on this machine, through shared memory.
        name: Name of the tier.
        layout: What the payloads look like (model, number format, parallel ranks), where the
            namespace does not say so: blocks of another layout are not there.
        pool: Threads for payloads.
        staging_bytes: Memory that payloads go through, of all threads together at most; each takes
            its share when it is first needed.

    Raises:
        ConfigError: The URL is none of these, or a number is out of range.
    """

    medium = Medium.REMOTE

    def __init__(
        self,
        url: str,
        *,
        name: str = "remote",
        layout: str = "",
        pool: int = 4,
        staging_bytes: int = STAGING_BYTES,
    ) -> None:
        self.name = name
        self._pool = check_count("pool", pool)
        self._room_bytes = check_count("staging_bytes", staging_bytes, least=pool * ALIGNMENT)
        self._room_bytes //= pool
        self._layout = layout_fingerprint(layout)
        self._prefix = f"kvoffload:{VERSION}:{self._layout:x}:"
        self._address = parse_url(url)
        self._is_open = False
        self._client: Client | None = None
        self._connecting: asyncio.Future[Client | Exception] | None = None

    def __repr__(self) -> str:
        return f"<MooncakeTier {self.name!r}: {self._address}>"

    # Life

    async def open(self) -> None:
        """Connect, to see that the store is there.

        Raises:
            ConfigError: Mooncake is not installed.
            TierUnavailableError: It does not answer; later calls try again.
        """
        self._is_open = True
        await self.check()

    async def close(self) -> None:
        """Give up the client; idempotent. What it is in the middle of ends in the background."""
        self._is_open = False
        self._give_up_client()

    async def check(self) -> None:
        """Make sure that the master answers, and that a node takes a value if any has room.

        Raises:
            TierUnavailableError: They do not.
        """
        if self._client is not None and self._client.connection.is_broken:
            self._give_up_client()
        await self._reach()
        client = await self._connected()
        probe = f"{self._prefix}probe:{uuid.uuid4().hex}"

        def check(call: Call, room: Room) -> int:
            _, address = room.take(VALUE_ALIGNMENT)
            (code,) = client.store.batch_put_from([probe], [address], [VALUE_ALIGNMENT])
            client.store.batch_remove([probe], True)
            return code

        try:
            code = await client.data.run(check)
        except StoreError as exc:
            raise self._unavailable(exc) from exc
        if code not in (0, NO_ROOM, OVER_QUOTA):
            raise self._unavailable(code)

    # Blocks

    async def find(self, keys: Sequence[bytes]) -> list[int | None]:
        """Return the payload bytes of each block, `None` where it is not there.

        Raises:
            TierUnavailableError: The store does not answer.
        """
        sizes = await self._sizes(keys)
        return [None if size is None or size < 0 else size for size in sizes]

    async def get(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> list[Outcome]:
        """Fill each buffer with its block; what does not check is deleted.

        Raises:
            TierUnavailableError: The store does not answer.
        """
        outcomes = await self._move(keys, into, Values.get, self._outcome)
        await delete_corrupt(keys, outcomes, self.delete)
        return outcomes

    async def put(self, keys: Sequence[bytes], payloads: Sequence[memoryview]) -> list[Outcome]:
        """Write the blocks that are not there yet.

        Raises:
            TierUnavailableError: The store does not answer.
        """
        found = await self._sizes(keys)
        sizes = [payload.nbytes for payload in payloads]
        wrong = misfits(keys, found, sizes)
        if wrong:
            await self.delete(wrong)
        new = [n for n, (there, size) in enumerate(zip(found, sizes, strict=True)) if there != size]
        outcomes: list[Outcome] = [RemoteOutcome.PRESENT] * len(keys)
        written = await self._move(
            [keys[n] for n in new], [payloads[n] for n in new], Values.put, self._written
        )
        for number, outcome in zip(new, written, strict=True):
            outcomes[number] = outcome
        return outcomes

    async def delete(self, keys: Sequence[bytes]) -> list[bool]:
        """Delete blocks; say of each whether it was there.

        Raises:
            TierUnavailableError: The store does not answer.
        """
        names = self._names(keys)
        codes = await self._ask(lambda store: store.batch_remove(names, True)) if names else []
        for code in codes:
            if code not in (0, NOT_THERE, NOT_WHOLE):
                raise self._unavailable(code)
        return [code == 0 for code in codes]

    async def clear(self, namespace: str) -> AsyncIterator[int]:
        """Delete all blocks of a namespace, of this layout; see `RemoteTier.clear`.

        The master does it in one step, which takes it some 4 us for each block that it has of any.

        Raises:
            TierUnavailableError: The store does not answer.
        """
        name = check_namespace(namespace).encode()
        own = bytes([len(name)]) + name
        # Of names that are hexadecimal, no character means anything else to it.
        pattern = f"^{re.escape(self._prefix)}[0-9a-f][0-9a-f]{own.hex()}"
        count = await self._ask(lambda store: store.remove_by_regex(pattern, True))
        if count < 0:
            raise self._unavailable(count)
        yield count

    # Inside: calls

    async def _ask(self, work: Callable[[Store], T]) -> T:
        client = await self._connected()
        return await client.control.run(lambda call, room: work(client.store))

    async def _sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """Return the payload bytes of what has the keys' names, negative where it is no block."""
        if not keys:
            return []
        names = self._names(keys)
        in_one = not self._address.shared_memory
        found = await self._ask(lambda store: sizes_of(store, names, in_one=in_one))
        sizes: list[int | None] = []
        for key, size in zip(keys, found, strict=True):
            if size < 0 and size not in (NOT_THERE, NOT_WHOLE):
                raise self._unavailable(size)
            sizes.append(size - added_bytes(key) if size >= 0 else None)
        return sizes

    async def _move(
        self,
        keys: Sequence[bytes],
        buffers: Sequence[memoryview],
        work: Callable[[Values, Store, Call, Room], Sequence[Got]],
        outcome_of: Callable[[bytes, Got], Outcome],
    ) -> list[Outcome]:
        """Move payloads, as many at a time as a thread has memory for."""
        outcomes: list[Outcome] = []
        names, sizes = self._names(keys), [buffer.nbytes for buffer in buffers]
        for part in self._parts(keys, sizes):
            client = await self._connected()
            values = Values(names[part], keys[part], sizes[part], self._layout)
            try:
                got = await client.data.run(partial(work, values, client.store), buffers[part])
            except StoreError as exc:
                outcomes += [self._refused(key, exc) for key in keys[part]]
            else:
                outcomes += map(outcome_of, keys[part], got)
        return outcomes

    def _parts(self, keys: Sequence[bytes], sizes: Sequence[int]) -> Iterator[slice]:
        first = taken = 0
        seen: set[bytes] = set()
        for number, (key, size) in enumerate(zip(keys, sizes, strict=True)):
            place = place_bytes(key, size)
            is_full = taken + place > self._room_bytes or len(seen) == PART_BLOCKS
            # Of a key that is there twice, the library reads one and says that it read both.
            if seen and (is_full or key in seen):
                yield slice(first, number)
                first, taken = number, 0
                seen.clear()
            taken += place
            seen.add(key)
        if seen:
            yield slice(first, len(keys))

    def _names(self, keys: Sequence[bytes]) -> list[str]:
        return [self._prefix + key.hex() for key in keys]

    # Inside: the client

    async def _connected(self) -> Client:
        """Return the client; make one if there is none.

        Cancelled, it goes on being made, for the next one who asks.

        Raises:
            ClosedError: The tier is not open.
            ConfigError: Mooncake is not installed.
            TierUnavailableError: There is nobody.
        """
        if not self._is_open:
            raise self._closed()
        if self._client is not None:
            return self._client
        if self._connecting is None:
            # Where nobody listens, the library would try again and again, for minutes.
            hostname = await self._reach()
            if not self._is_open:
                raise self._closed()
            if self._client is not None:  # another was faster
                return self._client
        connecting = self._connecting
        if connecting is None:
            connecting = self._connecting = self._connect(hostname)
        await asyncio.wait([connecting])
        result = connecting.result()
        if isinstance(result, Client):
            return result
        raise result if isinstance(result, ClosedError | ConfigError) else self._unavailable(result)

    def _connect(self, hostname: str) -> asyncio.Future[Client | Exception]:
        """Have a thread make a client."""
        loop = asyncio.get_running_loop()
        connecting: asyncio.Future[Client | Exception] = loop.create_future()
        address, pool_bytes = self._address, SHARED_POOLS * self._pool * self._room_bytes

        def work() -> None:
            result: tuple[Connection, list[str]] | Exception
            try:
                result = connect(address, hostname, pool_bytes)
            except Exception as exc:  # noqa: BLE001  # it belongs to who waits
                result = exc
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
                loop.call_soon_threadsafe(connected, result)

        def connected(result: tuple[Connection, list[str]] | Exception) -> None:
            if self._connecting is connecting:
                self._connecting = None
            if isinstance(result, Exception):
                if not connecting.done():
                    connecting.set_result(result)
                return
            client = Client(*result, self._pool, self._room_bytes, self.name)
            if connecting.done():  # closed meanwhile
                client.close()
            else:
                self._client = client
                connecting.set_result(client)

        start(work, "mooncake-connect")
        return connecting

    def _give_up_client(self) -> None:
        client, self._client = self._client, None
        connecting, self._connecting = self._connecting, None
        if client is not None:
            client.close()
        if connecting is not None and not connecting.done():
            connecting.set_result(self._closed())

    async def _reach(self) -> str:
        """Make sure that somebody answers there; return the address that we have for them."""
        try:
            return await knock(self._address)
        except (OSError, StoreError) as exc:
            raise self._unavailable(exc) from exc

    # Inside: what went wrong

    def _outcome(self, key: bytes, got: Got) -> Outcome:
        if isinstance(got, RemoteOutcome):
            return got
        if isinstance(got, int):
            return self._unavailable(got)
        return CorruptBlockError(
            f"what mooncake at {self._address} has for the block does not check: {got}",
            tier=self.name,
            block_hash=decode_key(key)[1],
        )

    def _written(self, key: bytes, got: Got) -> Outcome:
        if got == 0:
            return RemoteOutcome.DONE
        if got == ALREADY_THERE:
            return RemoteOutcome.PRESENT
        refused = (NO_ROOM, OVER_QUOTA)
        assert isinstance(got, int)
        if got not in (refused if self._address.shared_memory else (*refused, WRONG_ARGUMENTS)):
            return self._unavailable(got)
        return self._refused(key, meaning_of(got))

    def _refused(self, key: bytes, why: object) -> TierError:
        return TierError(
            f"mooncake at {self._address} refused: {why}",
            tier=self.name,
            block_hash=decode_key(key)[1],
        )

    def _unavailable(self, what: int | Exception) -> TierUnavailableError:
        if self._address.shared_memory and isinstance(what, int) and self._client is not None:
            # It doesn't find the memory again that it shared with one that was restarted.
            self._client.connection.is_broken = True
        why = meaning_of(what) if isinstance(what, int) else what
        return TierUnavailableError(f"mooncake at {self._address}: {why}", tier=self.name)

    def _closed(self) -> ClosedError:
        return ClosedError(f"{self!r} is not open")
