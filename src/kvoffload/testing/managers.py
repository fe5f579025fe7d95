"""A small manager of each kind, in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias, overload

from .. import (
    AsyncLRUManager,
    DiskTier,
    LRUOffloadManager,
    MemoryTier,
    PrefetchingLRUManager,
    TieredLRUManager,
    WeightedLRUManager,
)
from ..clock import SystemClock
from ..types import BlockSource, Tier
from .clock import ManualClock
from .payloads import DictSource

ManagerKind: TypeAlias = Literal["lru", "weighted", "tiered", "prefetching", "async"]
"""One of the five managers."""

SmallManager: TypeAlias = (
    LRUOffloadManager
    | WeightedLRUManager
    | TieredLRUManager
    | PrefetchingLRUManager
    | AsyncLRUManager
)
"""What `small_manager` makes."""


@overload
def small_manager(
    kind: Literal["lru"],
    *,
    hot: int | Tier = ...,
    block_bytes: int = ...,
    clock: ManualClock | None = ...,
) -> LRUOffloadManager: ...
@overload
def small_manager(
    kind: Literal["weighted"],
    *,
    hot: int | Tier = ...,
    block_bytes: int = ...,
    clock: ManualClock | None = ...,
) -> WeightedLRUManager: ...
@overload
def small_manager(
    kind: Literal["tiered"],
    *,
    hot: int | Tier = ...,
    warm: int | Tier | None = ...,
    cold: int | Tier | None = ...,
    cold_path: Path | None = ...,
    block_bytes: int = ...,
    clock: ManualClock | None = ...,
) -> TieredLRUManager: ...
@overload
def small_manager(
    kind: Literal["prefetching"],
    *,
    hot: int | Tier = ...,
    block_bytes: int = ...,
    clock: ManualClock | None = ...,
    source: BlockSource | None = ...,
) -> PrefetchingLRUManager: ...
@overload
def small_manager(
    kind: Literal["async"] = ...,
    *,
    hot: int | Tier = ...,
    warm: int | Tier | None = ...,
    cold: int | Tier | None = ...,
    cold_path: Path | None = ...,
    block_bytes: int = ...,
    clock: ManualClock | None = ...,
) -> AsyncLRUManager: ...
def small_manager(
    kind: ManagerKind = "async",
    *,
    hot: int | Tier = 8,
    warm: int | Tier | None = None,
    cold: int | Tier | None = None,
    cold_path: Path | None = None,
    block_bytes: int = 64,
    clock: ManualClock | None = None,
    source: BlockSource | None = None,
) -> SmallManager:
    """Make a manager small enough that a test fills it by hand.

    Enter it with `async with`::

        async with small_manager(hot=4, cold=FaultyTier(MemoryTier(8, 64, name="cold"))) as kv:
            ...

    A yield fixture may hold it too, on the event loop that the test runs on.

    Args:
        kind: `"lru"`, `"weighted"`, `"tiered"`, `"prefetching"` or `"async"`, as in the names of
            the five managers.
        hot: Blocks of the hot tier in memory, or a tier.
        warm: The same for the tier below it; a tiered manager has one of 8 unless told otherwise.
        cold: The same for the coldest tier. A number, 16 unless told otherwise, needs `cold_path`.
        cold_path: Directory of a cold tier on disk.
        block_bytes: Bytes of a block in the tiers made here.
        clock: The time to go by; real time if `None`.
        source: Where a prefetching manager fetches from; an empty `DictSource` if `None`.

    Raises:
        ValueError: There is no such kind, or it has no such tier.
    """
    time = SystemClock() if clock is None else clock
    hot_tier = _tier(hot, "hot", block_bytes)
    if kind in ("lru", "weighted", "prefetching") and (warm, cold, cold_path) != (None,) * 3:
        raise ValueError(f"a {kind!r} manager has one tier, its hot one")
    if source is not None and kind != "prefetching":
        raise ValueError(f"a {kind!r} manager fetches from no source")
    match kind:
        case "lru":
            return LRUOffloadManager(hot_tier, clock=time)
        case "weighted":
            return WeightedLRUManager(hot_tier, clock=time)
        case "prefetching":
            return PrefetchingLRUManager(hot_tier, source=source or DictSource(), clock=time)
        case "tiered":
            return TieredLRUManager(
                hot_tier,
                _tier(8 if warm is None else warm, "warm", block_bytes),
                _cold_tier(cold, cold_path, block_bytes),
                clock=time,
            )
        case "async":
            return AsyncLRUManager(
                hot=hot_tier,
                warm=None if warm is None else _tier(warm, "warm", block_bytes),
                cold=_cold_tier(cold, cold_path, block_bytes),
                clock=time,
            )
    raise ValueError(f"there is no {kind!r} manager; choose from {ManagerKind}")


def _tier(given: int | Tier, name: str, block_bytes: int) -> Tier:
    if isinstance(given, int):
        return MemoryTier(given, block_bytes, name=name)
    return given


def _cold_tier(given: int | Tier | None, path: Path | None, block_bytes: int) -> Tier | None:
    if path is None:
        if isinstance(given, int):
            raise ValueError(f"a cold tier of {given} blocks needs a cold_path")
        return given
    if given is not None and not isinstance(given, int):
        raise ValueError(f"cold={given!r} brings its own place, so cold_path is one too many")
    return DiskTier(path, 16 if given is None else given, block_bytes)
