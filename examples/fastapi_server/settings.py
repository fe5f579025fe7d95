"""Settings of the service, from the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from pydantic_settings import BaseSettings, SettingsConfigDict

from kvoffload import ManagerSettings


class ServiceSettings(BaseSettings):
    """What the service is made from: `KVOFFLOAD_HOT_BLOCKS=1000` sets `hot_blocks`.

    Attributes:
        hot_blocks: Slots of the hot tier, in memory.
        warm_blocks: Slots of the warm tier, in memory; 0 for none.
        cold_path: Directory of the cold tier; without one there is no cold tier.
        cold_blocks: Slots of the cold tier.
        block_bytes: Bytes of a slot; a directory keeps the size that it was made with.
        policy: Eviction policy.
        staging_bytes: Budget of the buffers for cold blocks on their way to clients.
        load_timeout_s: Seconds until a read is given up; by then, recomputing is quicker.
        transfer_timeout_s: Seconds that a client may take to send, or to receive, one body.
        max_batch_bytes: Longest body of a batch.
    """

    model_config = SettingsConfigDict(env_prefix="KVOFFLOAD_")

    hot_blocks: PositiveInt = 1000
    warm_blocks: NonNegativeInt = 0
    cold_path: Path | None = None
    cold_blocks: PositiveInt = 10_000
    block_bytes: PositiveInt = 65536
    policy: Literal["weighted", "lru"] = "weighted"
    staging_bytes: NonNegativeInt = 256 * 1024 * 1024
    load_timeout_s: PositiveFloat = 5.0
    transfer_timeout_s: PositiveFloat = 30.0
    max_batch_bytes: PositiveInt = 64 * 1024 * 1024

    def for_manager(self) -> ManagerSettings:
        """Return the manager's part of the settings."""
        return ManagerSettings(
            hot_blocks=self.hot_blocks,
            warm_blocks=self.warm_blocks,
            cold_blocks=0 if self.cold_path is None else self.cold_blocks,
            cold_path=self.cold_path,
            block_bytes=self.block_bytes,
            policy=self.policy,
            staging_bytes=self.staging_bytes,
        )
