"""Checks of settings and arguments, before anything changes."""

from __future__ import annotations

import math

from .errors import ConfigError


def check_count(setting: str, value: int, *, least: int = 1) -> int:
    """Return a count as it is.

    Raises:
        ConfigError: Not an integer of at least `least`.
    """
    if type(value) is not int or value < least:
        raise ConfigError(f"{setting} must be an integer of at least {least}, not {value!r}")
    return value


def check_seconds(setting: str, value: float, *, positive: bool = False) -> float:
    """Return a time as it is.

    Raises:
        ConfigError: Not a finite number of at least 0 seconds, or of more with `positive`.
    """
    wrong = type(value) not in (int, float) or not math.isfinite(value) or value < 0
    if wrong or (positive and not value):
        least = "more than 0" if positive else "at least 0"
        raise ConfigError(f"{setting} must be finite and {least} seconds, not {value!r}")
    return value


def check_cold_admission(value: str) -> str:
    """Return what is written to the cold tier as it is.

    Raises:
        ConfigError: No such choice.
    """
    if value not in ("all", "likely", "reused"):
        raise ConfigError(f"cold_admission must be 'all', 'likely' or 'reused', not {value!r}")
    return value
