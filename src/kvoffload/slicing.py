"""Bookkeeping over any number of blocks, a slice at a time, so that the event loop goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

SLICE_BLOCKS = 512
"""Blocks looked at in one turn of the event loop: of most bookkeeping, about a millisecond."""

T = TypeVar("T")


async def slices(items: Sequence[T]) -> AsyncIterator[Sequence[T]]:
    """Yield the items in slices, and let other tasks run in between.

    What they change has to be looked at anew with each slice.
    """
    for start in range(0, len(items), SLICE_BLOCKS):
        if start:
            await asyncio.sleep(0)
        yield items[start : start + SLICE_BLOCKS]
