"""The records of the index: a block, its way down, and the promise of a slot."""

from __future__ import annotations

from dataclasses import dataclass

from .lru_entry import LRUEntry
from .shares import NOBODY, Whom
from .types import Key


class BlockEntry(LRUEntry):
    """A block as the index keeps it.

    Attributes:
        key: The hash, with the namespace where it is not the manager's own.
        size: Payload bytes.
        level: Number of the highest tier that has it; `slot` is the slot there.
        copies: Slots of clean copies further down, by level.
        busy: Transfers that read the block now: a demotion, a promotion, a read, a flush. Each pins
            it for as long.
        move: The demotion under way, if any.
        shown: Holders that know the slot: leased views of it, and two-phase loads. Their block is
            not promoted, for its slot would be the first to give way afterwards.
        uses_below: Uses since the block last came to a tier below the hottest.
        follower: A remainder of the hash of the block that was seen to follow it in a chain, `None`
            for none so far, negative for several.
    """

    __slots__ = (
        "busy",
        "copies",
        "follower",
        "key",
        "level",
        "move",
        "shown",
        "size",
        "uses_below",
    )

    size_weight = 1.0  # equal blocks; no field of its own in a million of them

    key: Key
    size: int
    level: int
    busy: int
    copies: dict[int, int] | None
    move: Move | None
    shown: int
    uses_below: int
    follower: int | None

    @property
    def namespace(self) -> str | None:
        """The namespace, or `None` for the manager's own."""
        return self.key[0] if isinstance(self.key, tuple) else None


@dataclass(slots=True, eq=False)
class Move:
    """A block on its way down: its bytes go from a slot it leaves to one that is reserved.

    Attributes:
        entry: The block.
        source_level, source_slot: What it leaves; the slot is promised to whoever asked for room.
        target_level, target_slot: Where it goes.
        after: The move that empties the target slot, where another block still lies in it.
        done: Whether it took place; `None` while it is under way.
        is_ahead: Nobody waits for the slot yet: if it can't take place, the block stays.
        whom: The namespace that waits for the slot.
        is_stuck: It can't take place, nor may the block leave: the slot will not be free.
    """

    entry: BlockEntry
    source_level: int
    source_slot: int
    target_level: int
    target_slot: int
    after: Move | None
    done: bool | None = None
    is_ahead: bool = False
    whom: Whom = NOBODY
    is_stuck: bool = False


@dataclass(slots=True, eq=False)
class Grant:
    """A slot given to a caller: at once, or as soon as a move has emptied it."""

    slot: int
    after: Move | None = None

    @property
    def usable(self) -> bool:
        """Whether nothing lies in the slot any more."""
        return self.after is None or bool(self.after.done)

    @property
    def is_hopeless(self) -> bool:
        """Whether the block in the slot can neither be moved nor evicted."""
        return self.after is not None and self.after.is_stuck
