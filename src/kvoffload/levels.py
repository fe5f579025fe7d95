"""One tier as the index sees it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from .blocks import BlockEntry
from .meter import Meter
from .metrics import TIER_COUNTERS, TierStats
from .slots import Slots
from .types import BlockState, Clock, Key, Tier, TierState


class Level:
    """One tier as the index sees it: its slots and what lies in them."""

    __slots__ = (
        "blocks",
        "bytes",
        "claimed",
        "copied_bytes",
        "copies",
        "counters",
        "high",
        "is_short",
        "low",
        "meter",
        "number",
        "reading",
        "slots",
        "stale",
        "stale_slots",
        "state",
        "stuck",
        "tier",
        "under_way",
        "usage",
    )

    def __init__(self, number: int, tier: Tier) -> None:
        self.number = number
        self.tier = tier
        self.slots = Slots(tier.num_blocks)
        self.counters = dict.fromkeys(TIER_COUNTERS, 0)
        self.blocks = 0  # whose highest tier this is
        self.stuck = 0  # of those, the pinned ones
        self.bytes = 0  # copies included
        # Blocks and bytes of the namespaces that are not the manager's own.
        self.usage: dict[str, list[int]] = {}
        # Clean copies of blocks that also lie further up: the first to give way.
        self.copies: OrderedDict[Key, BlockEntry] = OrderedDict()
        self.copied_bytes = 0
        # Records of a persistent tier that nobody wants any more, in slots that are free or that
        # were promised again and not written yet: they would come back on reopening.
        # Tuples, nearly all of them of one: there are as many as slots, and the garbage collector
        # looks at each set again and again.
        self.stale: dict[Key, tuple[int, ...]] = {}
        self.stale_slots: dict[int, tuple[Key, ...]] = {}  # both keys of a failed write
        # Slots that are being written or erased: one at a time.
        self.claimed: set[int] = set()
        self.state = TierState.SERVING
        # Free slots below which room is made ahead, and how many there are to be then.
        self.low = self.high = 0
        self.is_short = False  # fewer were, and more are being made
        self.meter = Meter()
        self.reading = 0  # bytes that are being read now
        # Calls of the tier that are not back yet.
        self.under_way: set[TierCall] = set()

    def look(self) -> bool:
        """See what the tier can do now; say whether that has changed."""
        state: TierState = getattr(self.tier, "state", TierState.SERVING)
        if state is self.state:
            return False
        self.state = state
        if state is TierState.FULL:
            self.slots.grows = False
        elif not self.slots.grows:
            self.slots.grow()
        return True

    @property
    def room(self) -> int:
        """Slots that a caller could get: free, or holding what may give way."""
        if self.state is TierState.READ_ONLY:
            return 0
        room = self.slots.free + len(self.copies) + self.blocks - self.stuck
        if self.slots.held:
            # A block without a pin whose slot an outliving view shows does not give way either.
            room -= sum(
                entry.state is BlockState.READY
                and not entry.pin_count
                and (entry.level, entry.slot) == (self.number, slot)
                for slot, entry in self.slots.held_blocks()
            )
        return room

    @property
    def _tier_state(self) -> TierState:
        return getattr(self.tier, "state", TierState.SERVING)

    def has_any(self, namespace: str | None) -> bool:
        """Whether a namespace has blocks at home here; `True` where that is not known at once."""
        return namespace is None or self.usage.get(namespace, (0, 0))[0] > 0

    def keep_copy(self, entry: BlockEntry) -> None:
        """Note a clean copy, the newest."""
        self.copies[entry.key] = entry
        self.bytes += entry.size
        self.copied_bytes += entry.size

    def drop_copy(self, entry: BlockEntry) -> None:
        """Note that a clean copy is none any more."""
        del self.copies[entry.key]
        self.bytes -= entry.size
        self.copied_bytes -= entry.size

    def free(self, slots: Sequence[int], keys: Sequence[Key]) -> None:
        """Take back slots whose blocks left without being erased."""
        self.leave(slots, keys)
        self.slots.give_back(slots)

    def leave(self, slots: Sequence[int], keys: Sequence[Key]) -> None:
        """Note that slots hold what nobody wants any more."""
        if self.tier.persistent:
            self.renew(slots)
            for slot, key in zip(slots, keys, strict=True):
                self.doubt(slot, key)

    def renew(self, slots: Iterable[int]) -> None:
        """Note that slots were overwritten or erased."""
        if self.stale_slots:
            for slot in slots:
                for key in self.stale_slots.pop(slot, ()):
                    left = self.stale.pop(key)
                    if len(left) > 1:
                        self.stale[key] = tuple(other for other in left if other != slot)

    def doubt(self, slot: int, key: Key) -> None:
        """Note that a slot may show a block that nobody wants, beside what it may show already."""
        if self.tier.persistent:
            slots, keys = self.stale.get(key, ()), self.stale_slots.get(slot, ())
            if slot not in slots:
                self.stale[key] = (*slots, slot)
                self.stale_slots[slot] = (*keys, key)

    def call(self, blocks: int, size: int, clock: Clock, *, reads: bool) -> TierCall:
        """Note a call of the tier for as long as the body takes, and how long a read took."""
        return TierCall(self, blocks, size, clock, reads)

    def stats(self, now: float) -> TierStats:
        """Return a snapshot."""
        blocks = self.blocks + len(self.copies)
        return TierStats(
            self.tier.medium,
            self.slots.capacity,
            blocks=blocks,
            bytes=self.bytes,
            free_blocks=self.slots.free + self.slots.useless,
            pending_blocks=self.slots.in_use - blocks,
            retired_blocks=self.slots.retired,
            state=self._tier_state,
            queue_bytes=sum(call.size for call in self.under_way),
            wait_s=max((now - call.began for call in self.under_way), default=0.0),
            read_latency_s=self.meter.latency_s,
            read_bytes_per_s=self.meter.bytes_per_s,
            **self.counters,
        )

    def stats_of(self, namespace: str | None, all_namespaces: Iterable[str | None]) -> TierStats:
        """Return what a namespace has here: blocks at home, their bytes; and the tier's state."""
        if namespace is None:
            others = [self.usage.get(name, (0, 0)) for name in all_namespaces if name is not None]
            blocks = self.blocks - sum(usage[0] for usage in others)
            size = self.bytes - self.copied_bytes - sum(usage[1] for usage in others)
        else:
            blocks, size = self.usage.get(namespace, (0, 0))
        return TierStats(
            self.tier.medium, self.slots.capacity, blocks=blocks, bytes=size, state=self._tier_state
        )


class TierCall:
    """One call of a tier, in the books while the body runs.

    Attributes:
        size: Bytes that it moves.
        began: When it began.
    """

    __slots__ = ("_blocks", "_clock", "_level", "_queued", "_reads", "began", "size")

    def __init__(self, level: Level, blocks: int, size: int, clock: Clock, reads: bool) -> None:
        self._level = level
        self._blocks = blocks
        self.size = size
        self._clock = clock
        self._reads = reads
        self.began = 0.0
        self._queued = 0

    def __enter__(self) -> None:
        level = self._level
        self.began = self._clock()
        level.under_way.add(self)
        level.counters["queue_depth"] += self._blocks
        level.reading += self.size * self._reads
        self._queued = level.reading

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        level = self._level
        if self._reads and kind is None:
            level.meter.note(self._queued, self._clock() - self.began)
        level.reading -= self.size * self._reads
        level.counters["queue_depth"] -= self._blocks
        level.under_way.discard(self)
