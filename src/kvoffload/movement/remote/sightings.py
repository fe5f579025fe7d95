"""What is known of the blocks on a remote tier, for a moment; asked once for many callers."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

import anyio

from ...errors import TierError
from ...index import Index
from ...jobs import Jobs
from ...types import Key
from .engine import Engine, again

ASK_BLOCKS = 512
"""Blocks of a chain asked for in one round trip; as many tokens as most prompts have."""
MOST_KNOWN = 65_536
"""Blocks that something is known of at a time; the oldest are forgotten."""

UNKNOWN = -1
"""In place of a payload's bytes: nobody asked, or it is too long ago."""


class Ask:
    """One question under way, for any number of callers."""

    __slots__ = ("error", "found", "landed", "void")

    def __init__(self) -> None:
        self.landed = anyio.Event()
        self.found: dict[Key, int | None] = {}
        self.error: TierError | None = None
        self.void: set[Key] = set()
        """Deleted while the question was under way: the answer says nothing of them."""


class Sightings:
    """Sizes of the blocks that the engine has, and which ones it doesn't have."""

    def __init__(
        self,
        engine: Engine,
        index: Index,
        jobs: Jobs,
        name_of: Callable[[Key], bytes],
        *,
        ttl_s: float,
    ) -> None:
        self._engine = engine
        self._index = index
        self._jobs = jobs
        self._name_of = name_of
        self._ttl_s = ttl_s
        # All are known for as long, so that the first ones expire first.
        self._known: dict[Key, tuple[int | None, float]] = {}
        self._asking: dict[Key, Ask] = {}
        self.coming: Container[Key] = ()
        """Blocks that are pending since they are being fetched."""

    def size_of(self, key: Key) -> int | None:
        """Return a block's payload bytes, `None` for one that isn't there, or `UNKNOWN`."""
        known = self._known.get(key)
        if known is None:
            return UNKNOWN
        size, until = known
        if self._index.clock() >= until:
            del self._known[key]
            return UNKNOWN
        return size

    def note(self, key: Key, size: int | None) -> None:
        """Note what the engine said of a block."""
        self._known.pop(key, None)
        if len(self._known) >= MOST_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[key] = size, self._index.clock() + self._ttl_s

    def forget(self, keys: Sequence[Key]) -> None:
        """Note that blocks are being deleted."""
        for key in keys:
            self._known.pop(key, None)
            ask = self._asking.get(key)
            if ask is not None:
                ask.void.add(key)

    def forget_all(self) -> None:
        """Note that any block may be deleted."""
        self._known.clear()
        for key, ask in self._asking.items():
            ask.void.add(key)

    async def prefix(self, keys: Sequence[Key]) -> int:
        """Return how many leading blocks of a chain are ready here or on the engine.

        Where it does not answer in time, those that are ready here, and what is known.
        """
        told: dict[Key, int | None] = {}
        with anyio.move_on_after(self._engine.timeout_s):
            while True:
                hit, is_end = self._walk(keys, told)
                if is_end or self._engine.is_down:
                    return hit
                await self._ask(keys[hit : hit + ASK_BLOCKS], told)
        self._engine.took_too_long()  # so that the next one does not wait as long
        return self._walk(keys, told)[0]

    async def sizes(self, keys: Sequence[Key], ahead: Sequence[Key] = ()) -> dict[Key, int | None]:
        """Return the payload bytes of blocks that are not here, `None` for one that isn't there.

        Where it has to ask, it asks for those `ahead` too, which will be wanted next.

        Raises:
            TierUnavailableError: The engine does not answer.
        """
        told: dict[Key, int | None] = {}
        while True:
            for key in keys:
                if key not in told and (size := self.size_of(key)) != UNKNOWN:
                    told[key] = size
            unknown = [key for key in keys if key not in told]
            if not unknown:
                return told
            if self._ttl_s:
                unknown += ahead
            await self._ask(unknown[:ASK_BLOCKS], told, must=True)

    # Inside

    def _walk(self, keys: Sequence[Key], told: dict[Key, int | None]) -> tuple[int, bool]:
        """Return how many leading blocks can be loaded, and whether no more can for sure."""
        ready, pending, coming = self._index.ready, self._index.pending, self.coming
        for number, key in enumerate(keys):
            if key in ready or key in coming:
                continue
            if key in pending:
                return number, True
            size = told[key] if key in told else self.size_of(key)
            if size is None or size == UNKNOWN:
                return number, size is None
        return len(keys), True

    async def _ask(
        self, keys: Sequence[Key], told: dict[Key, int | None], *, must: bool = False
    ) -> None:
        """Ask for blocks of which the first is unknown, or join who asks for it already."""
        ask = self._asking.get(keys[0])
        if ask is None:
            index = self._index
            new = [
                key
                for key in dict.fromkeys(keys)
                if key not in index.ready
                and key not in index.pending
                and key not in self._asking
                and key not in told
                and self.size_of(key) == UNKNOWN
            ]
            # The first one may have come here meanwhile, and is wanted of the engine still.
            new = new or [keys[0]]
            ask = Ask()
            self._asking.update(dict.fromkeys(new, ask))
            started = ask
            self._jobs.start(lambda _: self._run(started, new))
        await ask.landed.wait()
        told.update(ask.found)
        if must and ask.error is not None:
            raise again(ask.error)

    async def _find(self, names: Sequence[bytes]) -> list[int | None]:
        sizes = await self._engine.tier.find(names)
        if not 0 < len(sizes) <= len(names):  # or who asks would ask again and again
            raise ValueError(f"find() said {len(sizes)} sizes of {len(names)} blocks")
        return sizes

    async def _run(self, ask: Ask, keys: Sequence[Key]) -> None:
        most = self._index.levels[0].tier.block_bytes
        names = [self._name_of(key) for key in keys]
        try:
            sizes = await self._engine.call(lambda: self._find(names))
            for key, size in zip(keys, sizes, strict=False):
                found = None if size is None or size > most else size
                ask.found[key] = found
                if key not in ask.void:
                    self.note(key, found)
        except TierError as exc:
            ask.error = exc
        finally:
            for key in keys:
                del self._asking[key]
            ask.landed.set()
