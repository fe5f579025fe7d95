"""Settings of a manager as plain data, for `LRUManagerFactory.create_async`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .checks import (
    COLD_ADMISSIONS,
    WHEN_FULL,
    WRITE_POLICIES,
    check_choice,
    check_count,
    check_seconds,
    check_watermarks,
)
from .errors import ConfigError
from .shares import NamespaceShare


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagerSettings:
    """What an `AsyncLRUManager` is made from.

    Attributes:
        hot_blocks: Slots of the hot tier.
        warm_blocks: Slots of the warm tier; 0 for none.
        cold_blocks: Slots of the cold tier; 0 for none.
        cold_path: Directory of the cold tier; needed with `cold_blocks`.
        block_tokens: Tokens a block.
        block_bytes: Bytes of a slot.
        policy: Name of the eviction policy.
        prefetch_lookahead: Hinted blocks that are read at a time.
        promote_threshold: Uses in a lower tier that promote a block.
        namespace: Isolation domain that is part of every key.
        staging_bytes: Budget of the buffers for blocks that have no address of their own.
        reservation_ttl_s: Seconds until a two-phase holder that never completes is given up.
        cold_admission: What is written to the cold tier: `"all"`, only what was `"reused"`, or
            that and what is `"likely"` to be.
        watermarks: Shares of a tier's slots: where fewer are free than the first, room is made
            ahead until as many are as the second.
        when_full: What a store does that meets no room made ahead: `"wait"` or `"reject"`.
        write_policy: When blocks are written to the cold tier: `"back"` or `"through"`.
        close_timeout_s: Seconds for draining and flushing at close, and as much for the tiers.
        fsync: When the cold tier makes sure of its writes, see `DiskTier`; so for the others below.
        direct_io: Whether the cold tier bypasses the page cache.
        io_timeout_s: Seconds that one of its file operations may take.
        min_free_bytes: Bytes that it leaves free on the file system.
        encryption_key: Key of an encrypted cold tier; shows in no `repr`.
        shares: What namespaces may have at most, and what is kept for them, by name.
        remote_url: Engine that other managers share, see `remote_tier`; `None` for none. It may
            have a password, so it shows in no `repr`.
        remote_layout: What the payloads look like, where the namespace does not say so.
        remote_timeout_s: Seconds that a call to the engine may take; see `AsyncLRUManager`, also
            for the others below.
        remote_ttl_s: Seconds that its answer to a lookup is believed.
        remote_queue_bytes: Payload bytes of blocks that wait to be sent to it.
        remote_admission: Which blocks are sent to it.

    Raises:
        ConfigError: A number is out of range, or there is a cold tier without a path or a path
            without a cold tier. What depends on more is checked when the manager is made.
    """

    hot_blocks: int = 1000
    warm_blocks: int = 0
    cold_blocks: int = 0
    cold_path: str | Path | None = None
    block_tokens: int = 16
    block_bytes: int = 65536
    policy: str = "weighted"
    prefetch_lookahead: int = 4
    promote_threshold: int = 3
    namespace: str = ""
    staging_bytes: int = 256 * 1024 * 1024
    reservation_ttl_s: float = 600.0
    cold_admission: Literal["all", "likely", "reused"] = "all"
    watermarks: tuple[float, float] = (0.02, 0.05)
    when_full: Literal["reject", "wait"] = "wait"
    write_policy: Literal["back", "through"] = "back"
    close_timeout_s: float = 30.0
    fsync: Literal["flush", "always"] = "flush"
    direct_io: Literal["auto", "on", "off"] = "auto"
    io_timeout_s: float | None = 30.0
    min_free_bytes: int = 0
    encryption_key: bytes | None = field(default=None, repr=False)
    shares: Mapping[str, NamespaceShare] | None = None
    remote_url: str | None = field(default=None, repr=False)
    remote_layout: str = ""
    remote_timeout_s: float = 0.5
    remote_ttl_s: float = 1.0
    remote_queue_bytes: int = 256 * 1024 * 1024
    remote_admission: Literal["all", "likely", "reused"] = "all"

    def __post_init__(self) -> None:
        check_count("hot_blocks", self.hot_blocks)
        check_count("warm_blocks", self.warm_blocks, least=0)
        check_count("cold_blocks", self.cold_blocks, least=0)
        check_count("block_tokens", self.block_tokens)
        check_count("block_bytes", self.block_bytes)
        check_choice("cold_admission", self.cold_admission, COLD_ADMISSIONS)
        check_choice("when_full", self.when_full, WHEN_FULL)
        check_choice("write_policy", self.write_policy, WRITE_POLICIES)
        check_choice("remote_admission", self.remote_admission, COLD_ADMISSIONS)
        check_seconds("remote_timeout_s", self.remote_timeout_s, positive=True)
        check_seconds("remote_ttl_s", self.remote_ttl_s)
        check_count("remote_queue_bytes", self.remote_queue_bytes, least=0)
        check_watermarks(self.watermarks)
        if self.fsync not in ("flush", "always"):
            raise ConfigError(f"fsync must be 'flush' or 'always', not {self.fsync!r}")
        if bool(self.cold_blocks) != (self.cold_path is not None):
            raise ConfigError(
                "cold_blocks and cold_path belong together, not "
                f"cold_blocks={self.cold_blocks!r} with cold_path={self.cold_path!r}"
            )
