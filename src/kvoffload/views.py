"""Views of slots that can be taken back.

CPython can release a `memoryview`, but not what was derived from it (a slice, an array). So each
view is made over an array of its own: when that array outlives the view, something derived from it
still shows the slot, which then stays out of reuse until the array is gone.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from .aligned import aligned_empty
from .blocks import BlockEntry
from .errors import DerivedViewWarning
from .keys import show_hash
from .slots import Slots
from .types import BlockHash, ByteArray


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Memory that can be shown: a slot of an addressable tier, or a staging buffer."""

    slots: Slots
    show: Callable[[int, int], ByteArray]
    slot: int


Lent: TypeAlias = tuple[memoryview, "weakref.ref[ByteArray]", Slots, int, BlockEntry]
"""One view given out: with the array that it is over, the slot, and the block that it shows."""


def lend(
    slots: Slots,
    show: Callable[[int, int], ByteArray],
    slot: int,
    entry: BlockEntry,
    *,
    writable: bool = False,
) -> Lent:
    """Make a view of a slot's block that can be taken back."""
    exporter = show(slot, entry.size)
    view = exporter.data
    return view if writable else view.toreadonly(), weakref.ref(exporter), slots, slot, entry


def take_back(lent: list[Lent]) -> list[BlockHash]:
    """Make views unusable; return the blocks of which something derived lives on."""
    derived: list[BlockHash] = []
    for view, exporter_of, slots, slot, entry in lent:
        try:  # noqa: SIM105  # a context manager takes as long as all the rest
            view.release()
        except BufferError:  # an array over this very view holds the exporter
            pass
        exporter = exporter_of()
        if exporter is not None:
            slots.hold(slot, exporter, entry)
            derived.append(entry.block_hash)
    lent.clear()
    return derived


def warn_derived(
    block_hashes: list[BlockHash], *, writable: bool = False, stacklevel: int = 3
) -> None:
    """Warn of what outlived its view; called last, for a warning may be an error."""
    if block_hashes:
        names = ", ".join(map(show_hash, block_hashes[:4])) + (", ..." if block_hashes[4:] else "")
        message = (
            f"a slice or array over the writable view of {names} outlived complete_store: writing "
            "through it changes a published block; drop it (`del`) before you complete"
            if writable
            else f"a slice or array over a leased view of {names} outlived its lease: it stays "
            "readable, but the slot is out of use until it is gone; copy what you keep"
        )
        warnings.warn(message, DerivedViewWarning, stacklevel=stacklevel)


class Staging:
    """Buffers of one block each, for bytes on their way from or to a tier that has no views.

    The memory is reserved on first use and touched as buffers are used; a buffer that was used
    before goes first, for its pages are there.
    """

    def __init__(self, budget_bytes: int, block_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.block_bytes = block_bytes
        self.slots = Slots(budget_bytes // block_bytes)
        self._arena: ByteArray | None = None

    def show(self, slot: int, size: int) -> ByteArray:
        """Return a fresh array over the first `size` bytes of a buffer."""
        if self._arena is None:
            self._arena = aligned_empty(self.slots.capacity * self.block_bytes)
        start = slot * self.block_bytes
        return self._arena[start : start + size]
