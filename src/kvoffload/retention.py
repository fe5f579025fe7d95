"""What a caller knows about when its blocks return."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .errors import ConfigError


@dataclass(frozen=True, slots=True)
class Retention:
    """How likely, and how soon, the chain of a request is used again, as its caller sees it.

    A hint. `WeightedPolicy` takes it as a mark that tells blocks apart, believes it at first, and
    learns what it is worth, so that wrong ones cost little; other policies don't look at it. Only
    `Retention.SESSION_OVER` is an order: when its request ends, the blocks that no other chain was
    seen to share are freed at once.

    Attributes:
        likelihood: From 0 (never) to 1 (surely); `None` where that is not known.
        within_s: Seconds until it most likely is, if it is at all; `None` where not known.

    Raises:
        ConfigError: A likelihood not from 0 to 1, or a time that is not positive and finite.
    """

    likelihood: float | None = None
    within_s: float | None = None

    SESSION_OVER: ClassVar[Retention]
    """Never again: a likelihood of 0."""

    def __post_init__(self) -> None:
        likelihood, within_s = self.likelihood, self.within_s
        if likelihood is not None and not (_is_real(likelihood) and 0 <= likelihood <= 1):
            raise ConfigError(f"a likelihood is a number from 0 to 1, not {likelihood!r}")
        if within_s is not None and not (_is_real(within_s) and 0 < within_s < math.inf):
            raise ConfigError(f"within_s is a positive number of seconds, not {within_s!r}")

    @property
    def is_over(self) -> bool:
        """Whether the chain is said never to be used again."""
        return self.likelihood == 0


def as_retention(retention: Retention | float | None) -> Retention | None:
    """Return what a caller says as a `Retention`; a number is a likelihood.

    Raises:
        ConfigError: It is neither, or not from 0 to 1.
    """
    if retention is None or isinstance(retention, Retention):
        return retention
    return Retention(likelihood=retention)


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


Retention.SESSION_OVER = Retention(likelihood=0.0)
