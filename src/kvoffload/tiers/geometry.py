"""The settings that every tier has."""

from __future__ import annotations

from ..errors import ConfigError


def check_geometry(num_blocks: int, block_bytes: int, name: str) -> None:
    """Check a tier's slots, bytes of a slot and name.

    Raises:
        ConfigError: Says which is wrong, what was given and what is allowed.
    """
    for setting, value in (("num_blocks", num_blocks), ("block_bytes", block_bytes)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{setting} must be an integer of at least 1, not {value!r}")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"a tier's name must be a str that is not empty, not {name!r}")
