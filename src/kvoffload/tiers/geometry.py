"""The settings that every tier has."""

from __future__ import annotations

from ..checks import check_count
from ..errors import ConfigError


def check_geometry(num_blocks: int, block_bytes: int, name: str) -> None:
    """Check a tier's slots, bytes of a slot and name.

    Raises:
        ConfigError: Says which is wrong, what was given and what is allowed.
    """
    check_count("num_blocks", num_blocks)
    check_count("block_bytes", block_bytes)
    if not isinstance(name, str) or not name:
        raise ConfigError(f"a tier's name must be a str that is not empty, not {name!r}")
