"""How much a service takes on."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..checks import check_count, check_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a service refuses, or gives up on.

    Attributes:
        max_body_bytes: Longest body of a batch.
        max_json_bytes: Longest body of JSON, and longest header of a batch: reading it holds the
            event loop.
        max_batch_blocks: Most block hashes in one call.
        max_concurrent: Calls that are served at once; more get 429. Streams, and calls that only
            look at the service, don't count. One token has three quarters of them at most.
        max_sessions: Sessions that are open at once, and as many streams of events; one token has
            three quarters of them at most.
        max_held: Blocks that one session has pinned, reserved or in requests.
        session_ttl_s: Seconds after which a session without stream and calls ends.
        body_timeout_s: Seconds that a body may take to arrive, and an answer to be taken.
        drain_timeout_s: Seconds that calls under way have when the service is told to stop.

    Raises:
        ConfigError: A number is not positive.
    """

    max_body_bytes: int = 512 * 1024 * 1024
    max_json_bytes: int = 1024 * 1024
    max_batch_blocks: int = 4096
    max_concurrent: int = 64
    max_sessions: int = 1024
    max_held: int = 262_144
    session_ttl_s: float = 60.0
    body_timeout_s: float = 30.0
    drain_timeout_s: float = 30.0

    def share_of(self, most: int) -> int:
        """Return how many of so many one token may have: so that none shuts the others out."""
        return max(1, most * 3 // 4)

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name.endswith("_s"):
                check_seconds(each.name, value, positive=True)
            else:
                check_count(each.name, value)
