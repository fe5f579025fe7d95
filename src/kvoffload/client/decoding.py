"""From what the service sends to the library's own records and errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..errors import (
    AccessDeniedError,
    BlockNotFoundError,
    CapacityError,
    ClosedError,
    ConfigError,
    CorruptBlockError,
    LoadTimeoutError,
    NotPinnedError,
    OffloadError,
    TierError,
    TierLockedError,
    TierTimeoutError,
    TierUnavailableError,
)
from ..events import EventKind, OffloadingEvent
from ..metrics import ManagerStats, TierStats
from ..retention import Retention
from ..service.wire import hashes_from_text
from ..types import BlockLocation, BlockState, Medium, RejectReason, StoreResult, TierState

TIER = "service"
"""What the service itself is called where an error names a tier."""

_PLAIN: dict[str, type[OffloadError]] = {
    each.__name__: each
    for each in (CapacityError, ClosedError, ConfigError, LoadTimeoutError, NotPinnedError)
}
_OF_TIERS: dict[str, type[TierError]] = {
    each.__name__: each
    for each in (
        *(TierError, TierUnavailableError, TierTimeoutError),
        *(TierLockedError, CorruptBlockError),
    )
}


class SessionLostError(Exception):
    """The service does not know the session, or what it held, any more."""


def error_of(status: int, body: bytes) -> OffloadError | SessionLostError:
    """Return the error that an answer stands for."""
    try:
        problem = json.loads(body)
        name, message = problem["error"], problem["message"]
        hashes = hashes_from_text(problem.get("block_hashes") or ())
    except (ValueError, KeyError, TypeError, AttributeError):
        # Not the service's own words: a proxy's, or those of another server.
        return TierUnavailableError(f"the service answered with status {status}", tier=TIER)
    if name == "SessionNotFound":
        return SessionLostError(message)
    if name == "BlockNotFoundError":
        return BlockNotFoundError(message, block_hashes=hashes)
    if name in _PLAIN:
        return _PLAIN[name](message)
    if name in _OF_TIERS:
        tier = problem.get("tier") or TIER
        return _OF_TIERS[name](message, tier=tier, block_hash=hashes[0] if hashes else None)
    if status in (401, 403):
        return AccessDeniedError(message)
    if status in (413, 415, 422):
        return ConfigError(message)
    return TierUnavailableError(f"the service refused: {message}", tier=TIER)


def stats_from_json(body: Mapping[str, Any]) -> ManagerStats:
    """Return counters."""
    tiers = {
        name: TierStats(
            **{**tier, "medium": Medium(tier["medium"]), "state": TierState(tier["state"])}
        )
        for name, tier in body["tiers"].items()
    }
    return ManagerStats(**{**body, "tiers": tiers})


def event_from_json(body: Mapping[str, Any]) -> OffloadingEvent:
    """Return an event."""
    return OffloadingEvent(
        EventKind(body["kind"]),
        tuple(hashes_from_text(body["block_hashes"])),
        body["tier"],
        Medium(body["medium"]),
        body["namespace"],
        body["sequence"],
        body["missed"],
        body["detail"],
    )


def location_from_json(state: str, tier: str | None) -> BlockLocation:
    """Return where a block is."""
    return BlockLocation(BlockState(state), tier)


def result_from_json(body: Mapping[str, Any]) -> StoreResult:
    """Return what became of the blocks of a store."""
    return StoreResult(
        stored=tuple(hashes_from_text(body["stored"])),
        present=tuple(hashes_from_text(body["present"])),
        rejected=dict(
            zip(
                hashes_from_text(list(body["rejected"])),
                map(RejectReason, body["rejected"].values()),
                strict=True,
            )
        ),
        evicted=tuple(hashes_from_text(body["evicted"])),
        waited_s=body["waited_s"],
    )


def retention_to_json(retention: Retention | None) -> dict[str, float | None] | None:
    """Return what a caller says of a chain's future as JSON."""
    if retention is None:
        return None
    within_s = retention.within_s
    return {
        "likelihood": retention.likelihood,
        "within_s": None if within_s is None else min(within_s, 1e9),
    }
