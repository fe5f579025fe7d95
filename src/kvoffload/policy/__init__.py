"""Eviction order and admission; see `kvoffload.types.EvictionPolicy` for the seam."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeGuard

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


def make_policy(policy: str | EvictionPolicy | Callable[[], EvictionPolicy]) -> EvictionPolicy:
    """Return a new policy of this name or made by this callable, or the object itself.

    Raises:
        ConfigError: No policy of this name, or neither an `EvictionPolicy` nor what makes one.
    """
    if _is_object(policy):
        return policy
    return policy_maker(policy)()


def policy_maker(
    policy: str | EvictionPolicy | Callable[[], EvictionPolicy],
) -> Callable[[], EvictionPolicy]:
    """Return what makes policies of this name, or the callable itself.

    Raises:
        ConfigError: No policy of this name, or an object, of which there can be but one. When
            called: what it made is no `EvictionPolicy`.
    """
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ConfigError(f"unknown policy {policy!r}: choose from {sorted(POLICIES)}")
        return POLICIES[policy]
    if _is_object(policy):
        raise ConfigError(
            "with shares= there is a policy for each namespace that has one: instead of the "
            f"object {policy!r} pass a name, or a callable that makes one, as its class"
        )
    if not callable(policy):
        raise ConfigError(
            f"policy must be a name, an EvictionPolicy, or what makes one, not {policy!r}"
        )
    return partial(_made_by, policy)


def _is_object(
    policy: str | EvictionPolicy | Callable[[], EvictionPolicy],
) -> TypeGuard[EvictionPolicy]:
    # A class has every method too.
    return not isinstance(policy, type) and isinstance(policy, EvictionPolicy)


def _made_by(make: Callable[[], EvictionPolicy]) -> EvictionPolicy:
    made = make()
    if not _is_object(made):
        raise ConfigError(f"{make!r} was to make an EvictionPolicy, and made {made!r}")
    return made
