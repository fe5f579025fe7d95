"""Managers from a few numbers."""

from __future__ import annotations

from pathlib import Path

from ..checks import check_count
from ..config import ManagerSettings
from ..remote.engines import remote_tier
from ..tiers.disk import DiskTier
from ..tiers.memory import MemoryTier
from ..types import BlockSource, OffloadingManager
from .async_lru_manager import AsyncLRUManager
from .lru_offload_manager import LRUOffloadManager
from .prefetching_lru_manager import PrefetchingLRUManager
from .tiered_lru_manager import TieredLRUManager
from .weighted_lru_manager import WeightedLRUManager


class LRUManagerFactory:
    """Makes each manager with the tiers it usually has.

    `block_tokens` says how many tokens the caller puts in a block; a manager counts blocks and
    bytes alone, so it is checked and otherwise left to the caller (see `hash_blocks`).
    """

    @staticmethod
    def create_simple(
        num_blocks: int = 1000, block_tokens: int = 16, *, block_bytes: int = 65536
    ) -> LRUOffloadManager:
        """Make an `LRUOffloadManager` over memory.

        Raises:
            ConfigError: A number is no positive integer.
        """
        check_count("block_tokens", block_tokens)
        return LRUOffloadManager(MemoryTier(num_blocks, block_bytes))

    @staticmethod
    def create_weighted(
        num_blocks: int = 1000,
        block_tokens: int = 16,
        frequency_weight: float = 1.0,
        *,
        block_bytes: int = 65536,
    ) -> WeightedLRUManager:
        """Make a `WeightedLRUManager` over memory.

        Raises:
            ConfigError: A number is no positive integer, or the weight is negative.
        """
        check_count("block_tokens", block_tokens)
        return WeightedLRUManager(
            MemoryTier(num_blocks, block_bytes), frequency_weight=frequency_weight
        )

    @staticmethod
    def create_tiered(
        hot_blocks: int = 200,
        warm_blocks: int = 500,
        cold_blocks: int = 1000,
        block_tokens: int = 16,
        *,
        block_bytes: int = 65536,
        cold_path: str | Path,
    ) -> TieredLRUManager:
        """Make a `TieredLRUManager` over memory, memory and disk.

        Raises:
            ConfigError: A number is no positive integer.
        """
        check_count("block_tokens", block_tokens)
        return TieredLRUManager(
            MemoryTier(hot_blocks, block_bytes, name="hot"),
            MemoryTier(warm_blocks, block_bytes, name="warm"),
            DiskTier(cold_path, cold_blocks, block_bytes, name="cold"),
        )

    @staticmethod
    def create_prefetching(
        num_blocks: int = 1000,
        block_tokens: int = 16,
        prefetch_lookahead: int = 4,
        *,
        block_bytes: int = 65536,
        source: BlockSource | OffloadingManager,
    ) -> PrefetchingLRUManager:
        """Make a `PrefetchingLRUManager` over memory.

        Raises:
            ConfigError: A number is no positive integer, or the source is none.
        """
        check_count("block_tokens", block_tokens)
        return PrefetchingLRUManager(
            MemoryTier(num_blocks, block_bytes),
            source=source,
            prefetch_lookahead=prefetch_lookahead,
        )

    @staticmethod
    def create_async(settings: ManagerSettings | None = None) -> AsyncLRUManager:
        """Make an `AsyncLRUManager` from settings.

        Raises:
            ConfigError: A setting is wrong; says which and what is allowed.
        """
        settings = ManagerSettings() if settings is None else settings
        size = settings.block_bytes
        warm = cold = remote = None
        if settings.warm_blocks:
            warm = MemoryTier(settings.warm_blocks, size, name="warm")
        if settings.cold_path is not None:
            cold = DiskTier(
                settings.cold_path,
                settings.cold_blocks,
                size,
                name="cold",
                fsync=settings.fsync,
                direct_io=settings.direct_io,
                io_timeout_s=settings.io_timeout_s,
                min_free_bytes=settings.min_free_bytes,
                encryption_key=settings.encryption_key,
            )
        if settings.remote_url is not None:
            remote = remote_tier(settings.remote_url, layout=settings.remote_layout)
        return AsyncLRUManager(
            hot=MemoryTier(settings.hot_blocks, size, name="hot"),
            warm=warm,
            cold=cold,
            remote=remote,
            policy=settings.policy,
            prefetch_lookahead=settings.prefetch_lookahead,
            promote_threshold=settings.promote_threshold,
            namespace=settings.namespace,
            staging_bytes=settings.staging_bytes,
            reservation_ttl_s=settings.reservation_ttl_s,
            cold_admission=settings.cold_admission,
            watermarks=settings.watermarks,
            when_full=settings.when_full,
            write_policy=settings.write_policy,
            close_timeout_s=settings.close_timeout_s,
            shares=settings.shares,
            remote_timeout_s=settings.remote_timeout_s,
            remote_ttl_s=settings.remote_ttl_s,
            remote_queue_bytes=settings.remote_queue_bytes,
            remote_admission=settings.remote_admission,
        )
