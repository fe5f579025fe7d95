"""Checks of settings and arguments, before anything changes."""

from __future__ import annotations

import math
from collections.abc import Sequence

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


COLD_ADMISSIONS = ("all", "likely", "reused")
WHEN_FULL = ("reject", "wait")
WRITE_POLICIES = ("back", "through")


def check_choice(setting: str, value: str, choices: Sequence[str]) -> str:
    """Return a choice as it is.

    Raises:
        ConfigError: No such choice.
    """
    if value not in choices:
        *others, last = map(repr, choices)
        raise ConfigError(f"{setting} must be {', '.join(others)} or {last}, not {value!r}")
    return value


def check_watermarks(value: tuple[float, float]) -> tuple[float, float]:
    """Return the watermarks as they are.

    Raises:
        ConfigError: Not two shares, the lower first, both below 1.
    """
    try:
        low, high = value
        good = 0 <= low <= high < 1
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ConfigError(
            "watermarks are two shares of a tier's slots, 0 <= low <= high < 1, as in "
            f"(0.02, 0.05), not {value!r}"
        )
    return value
