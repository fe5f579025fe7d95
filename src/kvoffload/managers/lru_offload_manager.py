"""One tier, least recently used."""

from __future__ import annotations

from ..policy.lru import LRUPolicy
from ..types import Clock, Tier
from .contract import CLOSE_TIMEOUT_S, RESERVATION_TTL_S, STAGING_BYTES, Manager


class LRUOffloadManager(Manager):
    """Keeps blocks in one tier and evicts what was used longest ago, tail before head.

    Args:
        tier: Where the blocks go; the manager opens and closes it.
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
        namespace: str = "",
        staging_bytes: int = STAGING_BYTES,
        reservation_ttl_s: float = RESERVATION_TTL_S,
        clock: Clock | None = None,
        close_timeout_s: float = CLOSE_TIMEOUT_S,
    ) -> None:
        super().__init__(
            [tier],
            LRUPolicy(),
            namespace=namespace,
            staging_bytes=staging_bytes,
            reservation_ttl_s=reservation_ttl_s,
            clock=clock,
            close_timeout_s=close_timeout_s,
        )
