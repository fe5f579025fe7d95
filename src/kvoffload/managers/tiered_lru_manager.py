"""Hot, warm and cold: blocks move down as they are evicted and up as they are used."""

from __future__ import annotations

from ..policy.lru import LRUPolicy
from ..types import Clock, Tier
from .contract import CLOSE_TIMEOUT_S, RESERVATION_TTL_S, STAGING_BYTES, WATERMARKS, Manager


class TieredLRUManager(Manager):
    """Keeps blocks in two or three tiers, each least recently used.

    What is evicted from a tier goes to the next one down, and leaves only from the last. A block
    that was used `promote_threshold` times since it came to a lower tier moves up to the hot one
    when it is loaded; its copy below stays, and is the first to give way.

    Args:
        hot: First tier; the manager opens and closes all of them.
        warm: Second tier.
        cold: Third tier, often a `DiskTier`.
        promote_threshold: Uses in a lower tier that promote a block.
        namespace: Isolation domain that is part of every key.
        staging_bytes: Budget of the buffers for blocks that have no address of their own.
        reservation_ttl_s: Seconds until a two-phase holder that never completes is given up.
        watermarks: Shares of the slots of a tier above another. Where fewer are free than the
            first, the coldest blocks are moved down in the background until as many are free as
            the second, so that a store seldom waits for a lower tier. `(0, 0)` for never.
        when_full: What a store does that needs room in a lower tier nevertheless: `"wait"` (its
            result says for how long), or `"reject"` (`RejectReason.THROTTLED`).
        write_policy: `"back"` writes a block to disk when it leaves memory, and at `flush` and
            close; `"through"` also before the `store` returns that brings it.
        clock: Time; tests inject `kvoffload.testing.ManualClock`.
        close_timeout_s: Seconds for draining and flushing at close, and as much for the tiers.

    Raises:
        ConfigError: A setting is wrong, or the tiers differ in `block_bytes` or share a name.
    """

    def __init__(
        self,
        hot: Tier,
        warm: Tier,
        cold: Tier | None = None,
        *,
        promote_threshold: int = 3,
        namespace: str = "",
        staging_bytes: int = STAGING_BYTES,
        reservation_ttl_s: float = RESERVATION_TTL_S,
        watermarks: tuple[float, float] = WATERMARKS,
        when_full: str = "wait",
        write_policy: str = "back",
        clock: Clock | None = None,
        close_timeout_s: float = CLOSE_TIMEOUT_S,
    ) -> None:
        super().__init__(
            [hot, warm] if cold is None else [hot, warm, cold],
            LRUPolicy(),
            namespace=namespace,
            staging_bytes=staging_bytes,
            reservation_ttl_s=reservation_ttl_s,
            clock=clock,
            promote_threshold=promote_threshold,
            close_timeout_s=close_timeout_s,
            watermarks=watermarks,
            when_full=when_full,
            write_policy=write_policy,
        )
