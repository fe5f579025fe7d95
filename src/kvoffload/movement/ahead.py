"""Working ahead: room is made before anybody waits for it."""

from __future__ import annotations

import logging

from ..blocks import Grant, Move
from ..index import Index
from ..jobs import Jobs
from ..room import Room
from ..types import Key
from .moves import Moves

ROUND_BYTES = 32 * 1024 * 1024
"""Most bytes moved at a time: so few are pinned for it, and a close waits for."""
ROUND_BLOCKS = 64
"""Most blocks: planning and publishing as many holds the event loop for a millisecond."""
PAUSE_S = 1.0
"""Seconds after a round that moved nothing, for what it evicted to try it is gone all the same."""

log = logging.getLogger("kvoffload")


class WorkingAhead:
    """The background task that moves the coldest blocks down while there is room still.

    Where fewer slots of a tier are free than its low watermark, as many blocks are moved to the
    tiers below as it takes for the high one. What could be moved without waiting, for a copy of it
    is below already, stays; so does what the tiers below would not take.
    """

    def __init__(self, index: Index, room: Room, moves: Moves, jobs: Jobs) -> None:
        self._index = index
        self._room = room
        self._moves = moves
        self._jobs = jobs
        self._failed = False

    async def run(self) -> None:
        """Make room whenever it is short, until cancelled."""
        clock, not_before = self._index.clock, 0.0
        short = self._index.short
        while True:
            moved = True
            fired = short.times
            if clock() >= not_before:
                try:
                    # In a job, which a close lets end: a move that is cut off loses its block.
                    moved = await self._jobs.start(lambda _: self._make_round()).result()
                except Exception:  # of a policy, say; stores that come later try again
                    log.exception("making room ahead failed")
                    moved = False
                if self._failed:
                    not_before = clock() + PAUSE_S
            if clock() < not_before or (not moved and short.times == fired):
                await short.wait()

    async def _make_round(self) -> bool:
        """Move some blocks down, the lowest tiers first; say whether any was."""
        levels = self._index.levels
        most = max(1, min(ROUND_BLOCKS, ROUND_BYTES // levels[0].tier.block_bytes))
        moved = self._failed = False
        for level in levels[-2::-1]:
            moves: list[Move] = []
            evicted: list[Key] = []
            grants: list[Grant] = self._room.work_ahead(level.number, most, moves, evicted)
            if moves:
                await self._moves.run(moves, evicted)
                self._room.release(level.number, grants)
                done = any(move.done for move in moves)
                moved = moved or done
                self._failed = self._failed or not done
        return moved
