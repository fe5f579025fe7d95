"""One tier that is filled ahead of need from a source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from ..checks import check_count
from ..errors import ConfigError
from ..keys import check_chain, check_hashes
from ..payloads import check_payloads
from ..policy.lru import LRUPolicy
from ..prefetch import Prefetcher
from ..types import BlockHash, BlockSource, Clock, Key, OffloadingManager, Tier
from .contract import CLOSE_TIMEOUT_S, RESERVATION_TTL_S, STAGING_BYTES, Manager


class PrefetchingLRUManager(Manager):
    """Keeps blocks in one tier, least recently used, and fetches hinted ones in the background.

    Tasks of the manager's own run the hints: they read from the source into the tier. `load` never
    reads through: what was not fetched in time is a miss.

    Args:
        tier: Where the blocks go; the manager opens and closes it.
        source: An object with `async read(block_hash) -> payload` (`KeyError`: not there), or
            another manager, which its owner opens and closes.
        prefetch_lookahead: Blocks read from the source at a time.
        namespace: Isolation domain that is part of every key.
        staging_bytes: Budget of the buffers for blocks that have no address of their own.
        reservation_ttl_s: Seconds until a two-phase holder that never completes is given up.
        clock: Time; tests inject `kvoffload.testing.ManualClock`.
        close_timeout_s: Seconds for draining and flushing at close, and as much for the tiers.

    Raises:
        ConfigError: A setting is wrong; says which and what is allowed.
    """

    def __init__(
        self,
        tier: Tier,
        *,
        source: BlockSource | OffloadingManager,
        prefetch_lookahead: int = 4,
        namespace: str = "",
        staging_bytes: int = STAGING_BYTES,
        reservation_ttl_s: float = RESERVATION_TTL_S,
        clock: Clock | None = None,
        close_timeout_s: float = CLOSE_TIMEOUT_S,
    ) -> None:
        check_count("prefetch_lookahead", prefetch_lookahead)
        if not (hasattr(source, "read") or hasattr(source, "load")):
            raise ConfigError(
                f"source must have `async read(block_hash)` or be a manager, not {source!r}"
            )
        super().__init__(
            [tier],
            LRUPolicy(),
            namespace=namespace,
            staging_bytes=staging_bytes,
            reservation_ttl_s=reservation_ttl_s,
            clock=clock,
            close_timeout_s=close_timeout_s,
        )
        self._source = source
        self._prefetcher = Prefetcher(
            self._core.index,
            self._is_absent,
            self._fetch,
            batch_blocks=1,
            workers=prefetch_lookahead,
        )
        self._core.prefetchers.append(self._prefetcher)

    def hint_prefetch(self, block_hashes: Sequence[BlockHash]) -> int:
        """Queue absent blocks to be fetched in the background; return how many were queued.

        Never waits. A full queue drops its oldest and counts them in `prefetch_dropped`.

        Raises:
            TypeError: A hash is no `bytes`, `str` or `int`.
            ConfigError: A hash is too long.
        """
        self._core.check()
        hashes = check_chain(block_hashes, self._name_of_keys)
        return len(self._prefetcher.hint(self._keys(hashes)))

    def cancel_prefetch(self, block_hashes: Sequence[BlockHash]) -> int:
        """Take blocks back out of the queue; return how many. What is being read goes on.

        Raises:
            TypeError: A hash is no `bytes`, `str` or `int`.
        """
        self._core.check()
        return self._prefetcher.cancel(self._keys(check_hashes(block_hashes)))

    # Inside

    def _is_absent(self, key: Key) -> bool:
        return key not in self._core.index.ready and key not in self._core.index.pending

    async def _fetch(self, keys: Sequence[Key]) -> Sequence[Key]:
        index = self._core.index
        for key in keys:
            index.prefetched.add(key)  # now, for it may be used before this task's next turn
            try:
                await self._fetch_one(key)
            except KeyError:
                pass  # the source does not have it
            except Exception as exc:
                index.fail(index.levels[0], [key], f"source: {exc!r}")
                raise
            finally:
                if key not in index.ready:
                    index.prefetched.discard(key)
        return [key for key in keys if key in index.ready]

    async def _fetch_one(self, key: Key) -> None:
        block_hash = cast(BlockHash, key)  # keys of the own namespace are bare hashes
        core = self._core
        if not hasattr(self._source, "load"):
            payload = await self._source.read(block_hash)
            await core.store([key], check_payloads([payload], core.block_bytes))
            return
        async with self._source.load([block_hash]) as lease:
            data = check_payloads(lease, core.block_bytes)
            try:
                await core.store([key], data)
            finally:
                data.clear()  # or it would outlive the lease
