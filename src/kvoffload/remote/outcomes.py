"""What becomes of blocks in a call to any engine, and of values that are none of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

from ..errors import CorruptBlockError, TierError
from .protocol import RemoteOutcome

Outcome: TypeAlias = RemoteOutcome | TierError


def misfits(
    keys: Sequence[bytes], found: Sequence[int | None], sizes: Sequence[int]
) -> list[bytes]:
    """Return the keys of what has a block's name and another size: it is no block of ours."""
    return [
        key
        for key, there, size in zip(keys, found, sizes, strict=True)
        if there not in (None, size)
    ]


async def delete_corrupt(
    keys: Sequence[bytes],
    outcomes: Sequence[object],
    delete: Callable[[Sequence[bytes]], Awaitable[object]],
) -> None:
    """Delete what did not check; where that fails, whoever reads it next finds the same."""
    bad = [
        key
        for key, outcome in zip(keys, outcomes, strict=True)
        if isinstance(outcome, CorruptBlockError)
    ]
    if bad:
        with contextlib.suppress(TierError):
            await delete(bad)
