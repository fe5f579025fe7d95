"""What callers of a trace's requests could have said of them, for simulations."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

from ..errors import ConfigError
from ..retention import Retention

RETURNS, ENDS = Retention(0.9), Retention(0.1)
"""What is said of a chain that goes on, and of one that does not."""


def goes_on(chains: Sequence[Sequence[Hashable]]) -> list[bool]:
    """Tell of each request whether a later one shares its end.

    The last block may be an incomplete one, which never returns: then it is the one before.
    """
    later: set[Hashable] = set()
    found = []
    for chain in reversed(chains):
        found.append(not later.isdisjoint(chain[-2:]))
        later.update(chain)
    return found[::-1]


def foretell(
    chains: Sequence[Sequence[Hashable]], accuracy: float = 1.0, *, seed: int = 0
) -> list[Retention]:
    """Return what callers say of whether each chain goes on, right with this chance.

    At 0.5 they guess.

    Raises:
        ConfigError: `accuracy` is not from 0 to 1.
    """
    if not 0 <= accuracy <= 1:
        raise ConfigError(f"an accuracy is a number from 0 to 1, not {accuracy!r}")
    rng = random.Random(seed)
    return [RETURNS if truth is (rng.random() < accuracy) else ENDS for truth in goes_on(chains)]
