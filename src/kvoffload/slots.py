"""The numbered places of one tier: free, in use, retired, or useless for want of space."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Sequence

from .blocks import BlockEntry
from .types import ByteArray


class Slots:
    """Hands out slot numbers, and keeps those out of reuse that an outliving view still shows.

    free + in use + retired + useless = capacity, always.

    One that could not be written is useless until as many others were written as there are: the
    disk may be bad in that place for good, and each trial may cost a block.

    Attributes:
        capacity: How many there are.
        grows: Whether slots that were never taken can be; while not, nor can those that turned
            out to be without space.
    """

    __slots__ = (
        *("_free", "_fresh", "_gone", "_held", "_retired", "_shown", "_spaceless", "_watches"),
        *("_failed", "_parked", "_shunned", "_until_retry", "capacity", "grows"),
    )

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.grows = True
        self._spaceless: set[int] = set()  # slots that the tier had no space for
        self._parked: list[int] = []  # of those, the ones given back since
        self._failed: set[int] = set()  # slots in use that could not be written
        self._shunned: list[int] = []  # the ones of those that were given back
        self._until_retry = 0  # slots to write until they can be taken again
        self._fresh = 0  # slots from here on were never taken, and cost nothing yet
        # Given back and taken from the end, so that a batch gets neighbours in ascending order.
        self._free: list[int] = []
        # Slots that outliving views show: how many views, and the block that they show.
        self._held: dict[int, int] = {}
        self._shown: dict[int, BlockEntry | None] = {}
        self._retired: set[int] = set()
        # By the reference's own identity: its hash would be that of the array, which has none.
        self._watches: dict[int, tuple[weakref.ref[ByteArray], int]] = {}
        # Views die on any thread; the loop's thread collects what they leave here.
        self._gone: deque[weakref.ref[ByteArray]] = deque()

    @property
    def free(self) -> int:
        """Slots that can be taken."""
        if self._gone:
            self._collect()
        return len(self._free) + (self.capacity - self._fresh if self.grows else 0)

    @property
    def useless(self) -> int:
        """Free slots that can't be taken: there is no space for them, or they failed."""
        shunned = len(self._shunned)
        if self.grows:
            return shunned
        return self.capacity - self._fresh + len(self._parked) + shunned

    @property
    def retired(self) -> int:
        """Slots given back that a view still shows."""
        if self._gone:
            self._collect()
        return len(self._retired)

    @property
    def in_use(self) -> int:
        """Slots taken and not given back."""
        return self.capacity - self.free - len(self._retired) - self.useless

    @property
    def held(self) -> int:
        """Slots in use that a view shows which outlived its lease."""
        if self._gone:
            self._collect()
        return len(self._held) - len(self._retired)

    def held_blocks(self) -> list[tuple[int, BlockEntry]]:
        """Return the slots in use that such views show, each with its block."""
        if self._gone:
            self._collect()
        return [
            (slot, entry)
            for slot, entry in self._shown.items()
            if entry is not None and slot not in self._retired
        ]

    def is_held(self, slot: int) -> bool:
        """Whether such a view shows this slot."""
        if self._gone:
            self._collect()
        return slot in self._held

    def take(self, count: int) -> list[int]:
        """Take up to `count` free slots."""
        if self._gone:
            self._collect()
        free = self._free
        start = max(0, len(free) - count)
        taken = free[start:]
        del free[start:]
        taken.reverse()
        if len(taken) < count and self._fresh < self.capacity and self.grows:
            first = self._fresh
            self._fresh = min(self.capacity, first + count - len(taken))
            taken += range(first, self._fresh)
        return taken

    def take_these(self, slots: Iterable[int]) -> list[int]:
        """Take those of these very slots that are free; return them."""
        wanted = set(slots)
        last = max(wanted, default=-1)
        if last >= self._fresh:
            self._free[:0] = range(last, self._fresh - 1, -1)
            self._fresh = last + 1
        taken = [slot for slot in self._free if slot in wanted]
        self._free = [slot for slot in self._free if slot not in wanted]
        return taken

    def give_back(self, slots: Sequence[int]) -> None:
        """Give slots back: free again, retired while a view shows them, or useless."""
        if self._gone:
            self._collect()
        if self._held or self._spaceless or self._failed:
            for slot in reversed(slots):
                if slot in self._held:
                    self._retired.add(slot)
                else:
                    self._release(slot)
        else:
            self._free.extend(reversed(slots))

    def failed(self, slot: int) -> None:
        """Note that a slot in use could not be written."""
        if not self._failed and not self._shunned:
            self._until_retry = self.capacity
        self._failed.add(slot)

    def tried(self, count: int) -> None:
        """Note that so many slots were written, or failed."""
        if self._failed or self._shunned:
            self._until_retry -= count
            if self._until_retry <= 0:
                self.retry()

    def retry(self) -> None:
        """Let slots that could not be written be taken again, after all others."""
        self._failed.clear()
        self._free[:0] = self._shunned
        self._shunned.clear()

    def lacks_space(self, slot: int) -> None:
        """Note that the tier had no space for a slot in use."""
        self._spaceless.add(slot)

    def grow(self) -> None:
        """Note that the tier may have space again."""
        self.grows = True
        self._free += self._parked
        self._parked.clear()
        self._spaceless.clear()

    def hold(self, slot: int, exporter: ByteArray, entry: BlockEntry | None = None) -> None:
        """Keep a slot out of reuse until `exporter` is gone.

        Args:
            slot: The slot.
            exporter: An array over its memory, or what a call that is stuck reads or writes.
            entry: The block in it, if it has one.
        """
        self._held[slot] = self._held.get(slot, 0) + 1
        self._shown[slot] = entry
        watch = weakref.ref(exporter, self._gone.append)
        self._watches[id(watch)] = (watch, slot)

    def _collect(self) -> None:
        while self._gone:
            _, slot = self._watches.pop(id(self._gone.popleft()))
            self._held[slot] -= 1
            if not self._held[slot]:
                del self._held[slot]
                del self._shown[slot]
                if slot in self._retired:
                    self._retired.remove(slot)
                    self._release(slot)

    def _release(self, slot: int) -> None:
        if slot in self._failed:
            self._failed.discard(slot)
            self._shunned.append(slot)
        elif slot in self._spaceless and not self.grows:
            self._parked.append(slot)
        else:
            self._spaceless.discard(slot)
            self._free.append(slot)
