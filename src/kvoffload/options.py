"""What the core of a manager is told when it is made."""

from __future__ import annotations

from dataclasses import dataclass

from .movement.remote.part import RemoteOptions
from .shares import Shares
from .types import Clock


@dataclass(frozen=True, slots=True)
class CoreOptions:
    """What a core is told beside its tiers and its policy.

    Attributes:
        clock: Time.
        namespace: The manager's own namespace.
        staging_bytes: Budget of the buffers for blocks that have no address of their own.
        reservation_ttl_s: Seconds until a two-phase holder that never completes is given up.
        promote_threshold: Uses below the hottest tier that promote a block; `None` for never.
        close_timeout_s: Seconds for draining and flushing at close, and as much for the tiers.
        cold_admission: What is written to a persistent tier below another.
        watermarks: Shares of the slots of a tier above another: where fewer are free than the first
            one, room is made until as many are as the second.
        may_wait: Whether a store may wait for a lower tier.
        writes_through: Whether a store also writes to the persistent tier.
        shares: What namespaces may have, where any has a share; with the manager's policy.
        remote: The tier that is shared with other managers, where there is one.
    """

    clock: Clock
    namespace: str
    staging_bytes: int
    reservation_ttl_s: float
    promote_threshold: int | None
    close_timeout_s: float
    cold_admission: str = "all"
    watermarks: tuple[float, float] = (0.0, 0.0)
    may_wait: bool = True
    writes_through: bool = False
    shares: Shares | None = None
    remote: RemoteOptions | None = None
