"""Least recently used, the tail of a chain before its head."""

from __future__ import annotations

from .per_level import PerLevelPolicy
from .recency import RecencyQueue


class LRUPolicy(PerLevelPolicy):
    """Evict what was used longest ago; admits everything."""

    name = "lru"

    def __init__(self) -> None:
        super().__init__(lambda _: RecencyQueue())
