"""Moving blocks from one tier to the next, so that their slots are free for others."""

from __future__ import annotations

from collections.abc import Sequence

from ..blocks import Move
from ..index import Index
from ..named import Named
from ..room import Room
from ..types import Key, TierState
from .transfer import Transfer


class Moves:
    """Carries out the moves of all movement.

    Attributes:
        under_way: Blocks on their way down.
    """

    def __init__(self, index: Index, room: Room, transfer: Transfer) -> None:
        self.under_way = 0
        self._index = index
        self._room = room
        self._transfer = transfer

    async def run(
        self, moves: Sequence[Move], evicted: list[Key], named: Named | None = None
    ) -> None:
        """Carry out moves, a batch for each pair of tiers, in the order that they wait for.

        The keys of blocks that could not be moved, and are lost, are appended to `evicted`. Those
        that the call has `named` are nobody's victims.
        """
        waiting = moves
        self.under_way += len(moves)
        try:
            while waiting:
                batch, waiting = _next_batch(waiting)
                written = await self._run_batch(batch, evicted, named)
                for move in batch:
                    self.under_way -= 1
                    if self._room.finish_move(move, move in written):
                        evicted.append(move.entry.key)
        finally:
            # A hard close: nothing more will be written.
            for move in moves:
                if move.done is None:
                    self.under_way -= 1
                    self._room.finish_move(move, written=False)

    # Inside

    async def _run_batch(
        self, moves: Sequence[Move], evicted: list[Key], named: Named | None
    ) -> set[Move]:
        """Carry out moves between two tiers, but those whose slot is not empty; return them.

        Where the lower tier turns out to be full, what it has gives way.
        """
        index = self._index
        moves = [move for move in moves if move.after is None or move.after.done]
        if not moves:
            return set()
        outcomes = await self._transfer.move(moves)
        written = {move for move, done in zip(moves, outcomes, strict=True) if done}
        number = moves[0].target_level
        level = index.levels[number]
        failed = [move for move in moves if move not in written]
        self._room.look()
        if not failed or level.state is not TierState.FULL or moves[0].is_ahead:
            return written
        if named is not None:
            named.hold()  # what became ready while the disk was busy
        slots = self._room.take_now(number, len(failed), evicted, whom=moves[0].whom)
        again = failed[len(failed) - len(slots) :]  # the hottest
        for move, slot in zip(again, slots, strict=True):
            level.slots.give_back([move.target_slot])
            move.target_slot = slot
        if again:
            outcomes = await self._transfer.move(again)
            written.update(move for move, done in zip(again, outcomes, strict=True) if done)
        return written


def _next_batch(moves: Sequence[Move]) -> tuple[list[Move], list[Move]]:
    """Return the moves that can be made now between the tiers of the first, and the others."""
    batch: list[Move] = []
    rest: list[Move] = []
    ends = moves[0].source_level, moves[0].target_level
    for move in moves:
        is_free = move.after is None or move.after.done is not None
        fits = is_free and (move.source_level, move.target_level) == ends
        (batch if fits else rest).append(move)
    return batch, rest
