"""Removing blocks from every tier, so that they don't come back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from ..blocks import BlockEntry
from ..errors import TierError
from ..index import Index
from ..jobs import Jobs
from ..shares import namespace_of
from ..slicing import SLICE_BLOCKS, slices
from ..types import Key
from .durability import Durability
from .remote.part import Remote

log = logging.getLogger("kvoffload")


class Removal:
    """Removes blocks that nobody holds; those on their way between tiers are waited for.

    What has begun to leave leaves for good, whatever becomes of the caller.
    """

    def __init__(
        self,
        index: Index,
        durability: Durability,
        remote: Remote | None,
        jobs: Jobs,
        is_open: Callable[[], bool],
    ) -> None:
        self._index = index
        self._durability = durability
        self._remote = remote
        self._jobs = jobs
        self._is_open = is_open

    async def evict(self, keys: Sequence[Key]) -> list[Key]:
        """Remove blocks; return what left.

        Raises:
            TierError: A tier could not erase some; they left, but may come back after a restart.
        """
        return await self._jobs.start(lambda _: self._evict(keys)).result()

    async def evict_coldest(
        self, count: int, namespace: str | None, *, everywhere: bool
    ) -> list[BlockEntry]:
        """Remove so many blocks of one namespace, or of all; return what left.

        Raises:
            TierError: As `evict`.
        """
        return await self._jobs.start(
            lambda _: self._evict_coldest(count, namespace, everywhere=everywhere)
        ).result()

    async def clear(self, namespace: str | None, *, everywhere: bool, names: Sequence[str]) -> None:
        """Remove all blocks of one namespace, or of all; of those with these names there too.

        Raises:
            TierError: As `evict`.
        """

        async def clear() -> None:
            try:
                await self._clear(namespace, everywhere=everywhere)
            finally:  # whatever this machine's disk says
                if self._remote is not None:
                    await self._remote.clear(names)

        await self._jobs.start(lambda _: clear()).result()

    async def forget(self, keys: Sequence[Key]) -> list[BlockEntry]:
        """Remove the end of a chain that no other shares; return what left.

        What is used meanwhile stays.

        Raises:
            TierError: As `evict`.
        """
        uses = self._uses_of_own_end(keys)
        return await self._jobs.start(lambda _: self._drop_unused(uses)).result()

    def forget_soon(self, keys: Sequence[Key]) -> None:
        """Remove the end of a chain that no other shares; what takes I/O goes on behind."""
        self._drop_soon(self._uses_of_own_end(keys))

    def drop_soon(self, keys: Sequence[Key]) -> None:
        """Remove blocks, unless they are used meanwhile; what takes I/O goes on behind."""
        self._drop_soon({entry: entry.access_count for entry in self._entries_of(keys)})

    # Inside

    async def _evict(self, keys: Sequence[Key]) -> list[Key]:
        left = [entry.key for entry in await self._drop(self._entries_of(keys))]
        here = {*left}
        try:
            await self._durability.erase(keys)
        finally:  # whatever this machine's disk says
            if self._remote is not None:
                left += [key for key in await self._remote.delete(keys) if key not in here]
        return left

    async def _evict_coldest(
        self, count: int, namespace: str | None, *, everywhere: bool
    ) -> list[BlockEntry]:
        index = self._index
        left: list[BlockEntry] = []
        step = SLICE_BLOCKS if index.has_order_of(namespace, everywhere=everywhere) else count
        waited = False
        while (missing := count - len(left)) > 0:
            found = index.coldest(min(step, missing), namespace, everywhere=everywhere)
            if found:
                left += await self._drop(found)
                await asyncio.sleep(0)
            elif waited:
                break
            else:
                pinned = [index.ready[key] for key in index.pinned]
                await self._wait_for_moves(
                    [entry for entry in pinned if everywhere or entry.namespace == namespace]
                )
                waited = True
        await self._durability.erase([entry.key for entry in left])
        return left

    async def _clear(self, namespace: str | None, *, everywhere: bool) -> None:
        index = self._index
        if everywhere or any(level.has_any(namespace) for level in index.levels):
            async for part in slices(list(index.ready.values())):
                mine = [entry for entry in part if everywhere or entry.namespace == namespace]
                await self._wait_for_moves(mine)
                self._drop_now(mine)
        stale: list[Key] | None = None
        if not everywhere:
            old = {key for level in index.levels for key in level.stale}
            stale = [key for key in old if namespace_of([key]) == namespace]
        await self._durability.erase(stale)

    async def _drop(self, entries: Sequence[BlockEntry]) -> list[BlockEntry]:
        left: list[BlockEntry] = []
        async for part in slices(entries):
            await self._wait_for_moves(part)
            left += self._drop_now(part)
        return left

    def _drop_now(self, entries: Iterable[BlockEntry]) -> list[BlockEntry]:
        """Remove those of the blocks that are there still, and not pinned; return them."""
        ready = self._index.ready
        left = [each for each in entries if ready.get(each.key) is each and not each.pin_count]
        self._index.drop(left)
        return left

    def _drop_soon(self, uses: Mapping[BlockEntry, int]) -> None:
        if not self._is_open():
            return
        self._drop_now(uses)
        waiting = any(entry.busy for entry in uses)
        stale = self._index.stale([entry.key for entry in uses])
        if waiting or self._remote is not None or stale:
            self._jobs.start(lambda _: self._drop_behind(uses))

    async def _drop_behind(self, uses: Mapping[BlockEntry, int]) -> None:
        try:
            await self._drop_unused(uses)
        except TierError as exc:  # an event and a counter tell; nobody waits
            log.warning("blocks that were let go may come back after a restart: %s", exc)

    async def _drop_unused(self, uses: Mapping[BlockEntry, int]) -> list[BlockEntry]:
        """Remove blocks for good that are not used meanwhile."""
        await self._wait_for_moves(uses)
        left = self._drop_now(entry for entry, count in uses.items() if entry.access_count == count)
        try:
            await self._durability.erase([entry.key for entry in uses])
        finally:  # whatever this machine's disk says
            if self._remote is not None:
                ready = self._index.ready
                await self._remote.delete([each.key for each in uses if each.key not in ready])
        return left

    async def _wait_for_moves(self, entries: Collection[BlockEntry]) -> None:
        """Wait for transfers of the manager's own, where nothing else pins these blocks."""
        while any(0 < entry.busy == entry.pin_count for entry in entries):
            await self._index.changed.wait()

    def _entries_of(self, keys: Iterable[Key]) -> list[BlockEntry]:
        ready = self._index.ready
        return [ready[key] for key in dict.fromkeys(keys) if key in ready]

    def _uses_of_own_end(self, keys: Sequence[Key]) -> dict[BlockEntry, int]:
        """Return the blocks of a chain that no other shares, with how often each was used."""
        own = self._entries_of(self._index.own_end(keys))
        return {entry: entry.access_count for entry in own}
