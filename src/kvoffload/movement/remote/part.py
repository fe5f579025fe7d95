"""A manager's remote tier, as the rest of the manager sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ...index import Index
from ...jobs import Jobs
from ...levels import Level
from ...metrics import TierStats
from ...remote.protocol import RemoteTier
from ...types import BlockState, Key
from ..loading import Loading
from ..storing import Storing
from ..transfer import Transfer
from .engine import Engine
from .fetching import Fetching
from .sending import Sending
from .sightings import UNKNOWN, Sightings

DELETE_BLOCKS = 1024
"""Most blocks deleted at a time, and under one deadline."""


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """What a manager is told of its remote tier.

    Attributes:
        tier: The tier.
        timeout_s: Seconds that a call to it may take.
        ttl_s: Seconds that what it said of a block is believed.
        queue_bytes: Payload bytes of blocks that wait to be sent.
        admission: Which blocks are sent, as `cold_admission`.
    """

    tier: RemoteTier
    timeout_s: float
    ttl_s: float
    queue_bytes: int
    admission: str


class Remote:
    """Looks blocks up on the engine, fetches them, sends what is new, and deletes."""

    def __init__(
        self,
        options: RemoteOptions,
        index: Index,
        transfer: Transfer,
        storing: Storing,
        loading: Loading,
        jobs: Jobs,
    ) -> None:
        self.name = options.tier.name
        self._tier = options.tier
        self._index = index
        self._jobs = jobs
        self._name_of = transfer.canonical_key
        self._engine = engine = Engine(options.tier, index, options.timeout_s)
        self._sightings = sightings = Sightings(
            engine, index, jobs, transfer.canonical_key, ttl_s=options.ttl_s
        )
        self._fetching = Fetching(engine, sightings, index, transfer, storing, loading, jobs)
        self._sending = Sending(
            engine,
            sightings,
            index,
            transfer,
            jobs,
            queue_bytes=options.queue_bytes,
            admission=options.admission,
        )
        sightings.coming = self._sending.fetched = self._fetching.under_way
        self.prefix = sightings.prefix
        self.sizes = sightings.sizes
        self.bring = self._fetching.bring
        self.bring_ahead = self._fetching.bring_ahead
        self.drain = self._sending.drain

    @property
    def level(self) -> Level:
        """Its counters and meter."""
        return self._engine.level

    @property
    def demand(self) -> int:
        """Blocks being fetched that somebody waited for from the start."""
        return self._fetching.demand

    @property
    def tasks(self) -> Sequence[Callable[[], Coroutine[Any, Any, None]]]:
        """What runs in the background while the manager is open."""
        return self._engine.probe, self._sending.run

    async def open(self) -> None:
        """Open the tier, and have what becomes ready sent to it.

        Raises:
            ConfigError: It can't be used as it was set up.
        """
        self._sending.attach()
        await self._engine.open()

    async def close(self) -> None:
        """Close the tier."""
        await self._tier.close()

    def knows(self, key: Key) -> bool:
        """Tell whether a block that is not here was seen there a moment ago, or is on its way."""
        if self._index.state(key) is not BlockState.ABSENT:
            return key in self._fetching.under_way
        size = self._sightings.size_of(key)
        return size is not None and size != UNKNOWN

    def may_have(self, key: Key) -> bool:
        """Tell whether a block is not known not to be there."""
        return self._sightings.size_of(key) is not None

    def size_of(self, key: Key) -> int | None:
        """Return the payload bytes of a block that was hit there, `None` if it is gone.

        What is not known any more counts as a full block.
        """
        size = self._sightings.size_of(key)
        return self._index.levels[0].tier.block_bytes if size == UNKNOWN else size

    async def delete(self, keys: Sequence[Key]) -> list[Key]:
        """Delete blocks, but those that are pinned or pending here; return what was there.

        Raises:
            TierError: The engine does not answer, or refuses; they may be there still.
        """
        index = self._index
        kept = index.pinned | index.pending.keys()
        keys = [key for key in dict.fromkeys(keys) if key not in kept]
        self._sightings.forget(keys)
        return await self._jobs.start(lambda _: self._delete(keys)).result() if keys else []

    async def clear(self, namespaces: Sequence[str]) -> None:
        """Delete all blocks of namespaces, as far as they are of this tier's layout.

        Raises:
            TierError: The engine does not answer, or refuses; some may be there still.
        """
        self._sightings.forget_all()
        await self._jobs.start(lambda _: self._clear(namespaces)).result()

    def stats(self, now: float) -> TierStats:
        """Return a snapshot."""
        sending = self._sending
        return replace(
            self.level.stats(now),
            backlog_bytes=sending.backlog_bytes,
            dropped_blocks=sending.dropped,
        )

    # Inside

    async def _delete(self, keys: Sequence[Key]) -> list[Key]:
        left: list[Key] = []
        for start in range(0, len(keys), DELETE_BLOCKS):
            part = keys[start : start + DELETE_BLOCKS]
            names = [self._name_of(key) for key in part]
            found = await self._engine.call(partial(self._tier.delete, names), may_refuse=True)
            left += [key for key, there in zip(part, found, strict=True) if there]
        self._sightings.forget(keys)
        return left

    async def _clear(self, namespaces: Sequence[str]) -> None:
        for namespace in namespaces:
            steps = self._tier.clear(namespace)
            while await self._engine.call(partial(_step, steps), may_refuse=True):
                pass
        self._sightings.forget_all()


async def _step(steps: AsyncIterator[int]) -> bool:
    return await anext(steps, None) is not None
