"""The classes of blocks whose returns are learned apart."""

from __future__ import annotations

import math

from ..retention import Retention
from .returns import ReturnLaw

USE_CLASSES = 5
"""Never used since they came; once; twice; 3 to 5 times; more often."""
END_CLASSES = 3
"""The last block of the prompt that used them last; the one before; any other."""
SIZE_CLASSES = 9
"""Binary magnitude of how many blocks of that prompt were new."""
LIKELIHOODS = 10
"""Steps in which a likelihood is told apart."""
TIME_OCTAVES = 3
"""Times are of one kind within a factor of two to the power of this: 8, 64, 512 seconds."""
LONGEST_TIME = 5


class BlockClasses:
    """Numbers the classes, and makes new ones of the law's when a caller says something new.

    So what a caller says is no command: it tells blocks apart, and what each kind is worth is
    learned. Until then its likelihood is believed.
    """

    def __init__(self, law: ReturnLaw) -> None:
        """Make the classes of blocks of which nothing is said."""
        self._law = law
        self._first_of: dict[tuple[int, int], int] = {}
        self._add(None)

    def first_of(self, retention: Retention | None) -> int:
        """Return the number of the first class for what is said; 0 where that is nothing."""
        if retention is None:
            return 0
        kind = _kind(retention)
        first = self._first_of.get(kind)
        if first is None:
            first = self._first_of[kind] = self._add(retention.likelihood)
        return first

    def _add(self, likelihood: float | None) -> int:
        """Make all classes for one kind of thing said; return the number of the first."""
        return self._law.add_groups(USE_CLASSES, END_CLASSES * SIZE_CLASSES, likelihood)


def class_of(first: int, uses: int, end: int, new_blocks: int) -> int:
    """Return the class of a block.

    Args:
        first: Of the classes for what its caller said.
        uses: How often it was used.
        end: Blocks of its prompt that follow it.
        new_blocks: Blocks of its prompt that were new.
    """
    use_class = uses if uses <= 2 else 3 if uses <= 5 else 4
    end_class = end if end < END_CLASSES else END_CLASSES - 1
    magnitude = new_blocks.bit_length()
    size_class = magnitude if magnitude < SIZE_CLASSES else SIZE_CLASSES - 1
    return first + (use_class * END_CLASSES + end_class) * SIZE_CLASSES + size_class


def _kind(retention: Retention) -> tuple[int, int]:
    likelihood = -1
    if retention.likelihood is not None:
        likelihood = round(retention.likelihood * LIKELIHOODS)
    time = -1
    if retention.within_s is not None:
        octaves = math.log2(max(1.0, retention.within_s)) / TIME_OCTAVES
        time = min(LONGEST_TIME, math.ceil(octaves))
    return likelihood, time
