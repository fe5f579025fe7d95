"""Eviction order and admission; see `kvoffload.types.EvictionPolicy` for the seam."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import ConfigError
from ..types import EvictionPolicy
from .arc import ARCPolicy as ARCPolicy
from .fifo import FIFOPolicy as FIFOPolicy
from .lru import LRUPolicy as LRUPolicy
from .s3fifo import S3FIFOPolicy as S3FIFOPolicy
from .weighted import WeightedPolicy as WeightedPolicy

POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    "arc": ARCPolicy,
    "fifo": FIFOPolicy,
    "lru": LRUPolicy,
    "s3fifo": S3FIFOPolicy,
    "weighted": WeightedPolicy,
}
"""Policies that can be asked for by name."""


def make_policy(policy: str | EvictionPolicy) -> EvictionPolicy:
    """Return a new policy of this name, or the object itself.

    Raises:
        ConfigError: No policy of this name.
    """
    if not isinstance(policy, str):
        if isinstance(policy, EvictionPolicy):
            return policy
        raise ConfigError(f"policy must be a name or an EvictionPolicy, not {policy!r}")
    if policy not in POLICIES:
        raise ConfigError(f"unknown policy {policy!r}: choose from {sorted(POLICIES)}")
    return POLICIES[policy]()
