"""Storing a chain whose payloads arrive little by little, as from a network."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from .core import Core
from .named import Named
from .open_store import Outcome
from .payloads import check_sizes
from .retention import Retention
from .types import Key, RejectReason

GROUP_BYTES = 8 * 1024 * 1024
"""Payload bytes that are stored at a time; no more are in memory beside the tiers."""
GROUP_BLOCKS = 256
"""Blocks of a group at most: their slots are out of use until the bytes have come."""
SPARE_BUFFERS: deque[bytearray] = deque(maxlen=4)
"""Buffers of groups that were used before: fresh memory is slower to touch than to copy to."""


class Source(Protocol):
    """Where payloads come from."""

    async def fill(self, views: Sequence[memoryview]) -> None:
        """Fill each view with the next payload; the views are not to be kept."""

    async def end(self) -> None:
        """Make sure that there are no more."""


async def store_from_source(
    core: Core,
    keys: Sequence[Key],
    sizes: Sequence[int],
    source: Source,
    *,
    chain: Sequence[Key] = (),
    retention: Retention | None = None,
    is_chain: bool = False,
) -> Outcome:
    """Store blocks group by group, without counting a use: all of them, or none that are new.

    If the source raises, or the call is cancelled, what it stored leaves again, for good. Where the
    keys are told to be a chain, a rejection ends it.

    Raises:
        ConfigError: Not as many sizes as keys, or one that is negative or longer than a block.
        TypeError: A size is no integer.
    """
    check_sizes(sizes, len(keys), core.block_bytes)
    stored: dict[Key, None] = {}
    present: dict[Key, None] = {}
    rejected: dict[Key, RejectReason] = {}
    evicted: dict[Key, None] = {}
    waited_s = 0.0
    ended: RejectReason | None = None
    named = Named(core.index, list(dict.fromkeys(keys)))
    try:
        named.hold()
        for start, stop in _parts(sizes):
            part = keys[start:stop]
            if ended is not None:
                rejected |= dict.fromkeys(part, ended)
                await _skip(source, sizes[start:stop])
                continue
            outcome = await _store_part(core, part, sizes[start:stop], source, chain, retention)
            stored |= dict.fromkeys(outcome.stored)
            present |= dict.fromkeys(outcome.present)
            rejected |= outcome.rejected
            evicted |= dict.fromkeys(outcome.evicted)
            waited_s += outcome.waited_s
            named.hold()
            if is_chain and outcome.rejected:
                ended = next(iter(outcome.rejected.values()))
        await source.end()
    except BaseException:
        named.release()
        core.removal.drop_soon(list(stored))
        raise
    named.release()
    # A hash that was given twice may have come in two groups.
    return Outcome(
        stored=list(stored),
        present=[key for key in present if key not in stored],
        rejected={k: why for k, why in rejected.items() if k not in stored and k not in present},
        evicted=list(evicted),
        waited_s=waited_s,
    )


async def skip_source(source: Source, sizes: Sequence[int]) -> None:
    """Take payloads that nobody wants."""
    for start, stop in _parts(sizes):
        await _skip(source, sizes[start:stop])
    await source.end()


async def _store_part(
    core: Core,
    keys: Sequence[Key],
    sizes: Sequence[int],
    source: Source,
    chain: Sequence[Key],
    retention: Retention | None,
) -> Outcome:
    """Store one group: straight into its slots where those are free memory, else by a buffer."""
    opened = core.open_store(keys, sizes, chain, retention)
    if opened is not None:
        try:
            await source.fill(opened.views)
            core.check()
        except BaseException:
            opened.abort()
            raise
        return await opened.commit()
    spare = _spare(sum(sizes))
    views = _divide(spare, sizes)
    await source.fill(views)
    payloads = [np.frombuffer(view, np.uint8) for view in views]
    outcome = await core.store(keys, payloads, chain, retention)
    SPARE_BUFFERS.append(spare)  # not after a failure: a copy from it may be under way still
    return outcome


async def _skip(source: Source, sizes: Sequence[int]) -> None:
    buffer = bytearray(max(sizes, default=0))
    for size in sizes:
        await source.fill(_divide(buffer, [size]))


def _divide(buffer: bytearray, sizes: Sequence[int]) -> list[memoryview]:
    views: list[memoryview] = []
    start = 0
    whole = memoryview(buffer)
    for size in sizes:
        views.append(whole[start : start + size])
        start += size
    return views


def _parts(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Divide payloads into groups; yield where each starts and stops."""
    start = total = 0
    for number, size in enumerate(sizes):
        if number > start and (total + size > GROUP_BYTES or number - start == GROUP_BLOCKS):
            yield start, number
            start, total = number, 0
        total += size
    if start < len(sizes):
        yield start, len(sizes)


def _spare(size: int) -> bytearray:
    """Return a buffer of at least this size."""
    while SPARE_BUFFERS:
        buffer = SPARE_BUFFERS.pop()
        if len(buffer) >= size:
            return buffer
    return bytearray(max(size, GROUP_BYTES))
