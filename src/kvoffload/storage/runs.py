"""Neighbouring slots of one file, moved by as few calls as it takes."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence

from ..aligned import ALIGNMENT, aligned_empty

RUN_SLOTS = 512
"""Most slots of one vectored call: two buffers each, and Linux and macOS take 1024 of them."""

MOST_GAP = 65536
"""Bytes between two payloads that are moved too, for that is cheaper than another call."""

Transfer = Callable[[int, list[memoryview], int], int]
"""A vectored read or write of a file at an offset; returns the bytes moved."""


def join_runs(
    positions: Sequence[int],
    slots: Sequence[int],
    sizes: Sequence[int],
    *,
    slot_bytes: int,
    slots_per_file: int,
    most_slots: int = RUN_SLOTS,
) -> list[list[int]]:
    """Group positions whose slots are neighbours in one file, for a call each.

    Args:
        positions: Which of the slots, in rising order of these.
        slots: Slots.
        sizes: Bytes to move of each; those of none are in no group.
        slot_bytes: Bytes from one slot to the next.
        slots_per_file: Slots in each file.
        most_slots: Most slots in a group.
    """
    runs: list[list[int]] = []
    run: list[int] = []
    previous = -2
    for position in positions:
        size = sizes[position]
        if not size:
            continue
        slot = slots[position]
        if slot == previous + 1 and slot % slots_per_file and len(run) < most_slots:
            run.append(position)
        else:
            run = [position]
            runs.append(run)
        previous = slot if slot_bytes - size <= MOST_GAP else -2
    return runs


def filled(views: Sequence[memoryview], slot_bytes: int, filler: memoryview) -> list[memoryview]:
    """Put as much of the filler behind each view but the last as it is shorter than a slot."""
    buffers: list[memoryview] = []
    for view in views:
        buffers.append(view)
        if len(view) < slot_bytes:
            buffers.append(filler[: slot_bytes - len(view)])
    if len(views[-1]) < slot_bytes:
        buffers.pop()
    return buffers


def new_filler() -> memoryview:
    """Return zeros for the gaps between payloads."""
    zeros = aligned_empty(MOST_GAP)
    zeros[:] = 0
    return zeros.data


def move_run(
    transfer: Transfer,
    fd: int,
    buffers: list[memoryview],
    offset: int,
    *,
    sizes: Sequence[int],
    slot_bytes: int,
    direct: bool = False,
) -> list[OSError | None]:
    """Move buffers that lie one after the other, a slot each and maybe less of the last.

    An error stops the slot that it met, and the next one goes on.

    Args:
        transfer: The call.
        fd: The file.
        buffers: Flat views of bytes, without a gap.
        offset: Where the first one starts in the file.
        sizes: The bytes of each slot that matter; what is beyond may be missing from the file.
        slot_bytes: Bytes from one slot to the next.
        direct: Go on, after a short call, at a multiple of the alignment.

    Returns:
        One outcome a slot; `errno.ENODATA` where the file ends too early.
    """
    outcomes: list[OSError | None] = [None] * len(sizes)
    last = len(sizes) - 1
    done = 0  # bytes from the start of the run
    at = 0  # the slot to go on with
    while at <= last:
        start = done
        try:
            moved = transfer(fd, _from(buffers, start), offset + start)
        except OSError as exc:
            outcomes[at] = exc
            at += 1
            done = at * slot_bytes
            continue
        done += moved
        ended = not moved
        if direct and done % ALIGNMENT:
            # Cut short, or the end of the file: the next call tells.
            done -= done % ALIGNMENT
            if done <= start:
                done = start + moved
                ended = True
        while at <= last and done >= at * slot_bytes + (slot_bytes if at < last else sizes[at]):
            at += 1
        if ended and at <= last:
            if done < at * slot_bytes + sizes[at]:
                outcomes[at] = OSError(errno.ENODATA, "the file ends before the payload does")
            at += 1
            done = at * slot_bytes
    return outcomes


def _from(buffers: list[memoryview], start: int) -> list[memoryview]:
    """Return the buffers without the first bytes."""
    if not start:
        return buffers
    for number, buffer in enumerate(buffers):
        if start < len(buffer):
            return [buffer[start:], *buffers[number + 1 :]]
        start -= len(buffer)
    return []
