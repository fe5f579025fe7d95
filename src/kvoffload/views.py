"""Views of slots that can be taken back.

CPython can release a `memoryview`, but not what was derived from it (a slice, an array). So each
view is made over an array of its own: when that array outlives the view, something derived from it
still shows the slot, which then stays out of reuse until the array is gone.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass

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


class LentView:
    """One view given out, until it is taken back."""

    __slots__ = ("_entry", "_exporter", "_place", "view")

    def __init__(self, place: Place, entry: BlockEntry, *, writable: bool) -> None:
        exporter = place.show(place.slot, entry.size)
        view = exporter.data
        self.view = view if writable else view.toreadonly()
        self._entry = entry
        self._place = place
        self._exporter = weakref.ref(exporter)

    @property
    def block_hash(self) -> BlockHash:
        """The block that it shows."""
        return self._entry.block_hash

    def take_back(self) -> bool:
        """Make the view unusable; return whether something derived from it lives on."""
        with contextlib.suppress(BufferError):  # an array over this very view holds the exporter
            self.view.release()
        self.view = RELEASED
        exporter = self._exporter()
        if exporter is None:
            return False
        self._place.slots.hold(self._place.slot, exporter, self._entry)
        return True


RELEASED = memoryview(b"")
RELEASED.release()


def take_back(lent: list[LentView]) -> list[BlockHash]:
    """Take views back; return the blocks of which something derived lives on."""
    return [one.block_hash for one in lent if one.take_back()]


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
