"""Making room for new blocks, moving what gives way, and copying the payloads in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from time import monotonic

from ..blocks import BlockEntry, Grant, Move
from ..copying import INLINE_COPY_BYTES
from ..errors import TierError
from ..index import Index
from ..jobs import Job, Jobs
from ..levels import Level
from ..named import Named
from ..room import Room
from ..shares import namespace_of
from ..sharing import Sharing
from ..types import ByteArray, Key, RejectReason, TierState
from .moves import Moves
from .transfer import Transfer, lacks_space

WAIT_S = 30.0
"""Seconds that a call waits for room that moves of others may bring, again and again if not."""
WRITE_BYTES = 64 * 1024 * 1024
"""Most bytes copied and written at a time to a tier without addresses."""


@dataclass(slots=True)
class Stored:
    """What became of the new blocks of one call."""

    stored: list[BlockEntry] = field(default_factory=list)
    rejected: dict[Key, RejectReason] = field(default_factory=dict)
    evicted: list[Key] = field(default_factory=list)
    waited_s: float = 0.0


@dataclass(slots=True)
class Plan:
    """Slots found for pending blocks, and the moves that empty them.

    Attributes:
        granted: Each block with its level and slot.
        unplaced: The blocks for which there is no room now, and why.
        moves: What has to move first, each behind those it waits for.
    """

    granted: list[tuple[BlockEntry, int, Grant]] = field(default_factory=list)
    unplaced: list[tuple[BlockEntry, RejectReason]] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)

    @property
    def entries(self) -> list[BlockEntry]:
        """The blocks."""
        return [entry for entry, _, _ in self.granted] + [entry for entry, _ in self.unplaced]

    @property
    def hopeless(self) -> list[BlockEntry]:
        """Blocks whose slots will never be empty."""
        return [entry for entry, _, grant in self.granted if grant.is_hopeless]


class Storing:
    """Stores new blocks."""

    def __init__(
        self,
        index: Index,
        room: Room,
        transfer: Transfer,
        moves: Moves,
        jobs: Jobs,
        *,
        may_wait: bool = True,
    ) -> None:
        """Take the parts, and whether a store may wait for a lower tier."""
        self._may_wait = may_wait
        self._moves = moves
        self._index = index
        self._room = room
        self._transfer = transfer
        self._jobs = jobs

    async def store(
        self, keys: Sequence[Key], payloads: Sequence[ByteArray], named: Named
    ) -> Stored:
        """Store blocks that are neither ready nor pending, head of the chain first.

        Those that the call names besides are never their victims.

        What is little and lies in memory is done at once. Else a job does it; the caller's
        cancellation makes the job give the blocks up, for nobody vouches for the buffers then.
        """
        outcome = Stored()
        entries = self._index.reserve(keys, [data.nbytes for data in payloads], pins=1)
        try:
            plan = self._plan(entries, outcome.evicted, named)
        except BaseException:
            self._index.abort(entries)
            raise
        bytes_of = dict(zip(keys, payloads, strict=True))
        if self._is_instant(plan):
            self._apply_now(plan, bytes_of, outcome)
            return outcome
        job = self._jobs.start(partial(self._apply, plan, bytes_of, outcome, named))
        await job.result()
        return outcome

    def open_now(
        self, keys: Sequence[Key], sizes: Sequence[int], named: Named
    ) -> list[BlockEntry] | None:
        """Reserve slots of the hottest tier for new blocks whose bytes are yet to come.

        They are pending until `commit_open`, or until the index aborts them. `None` where that
        takes more than free memory: nobody is to give way to bytes that may never come. Then
        nothing was changed.
        """
        index, hottest = self._index, self._index.levels[0]
        if not hottest.tier.addressable or len(keys) > hottest.slots.free:
            return None
        if not self.has_left(namespace_of(keys), sum(sizes)):
            return None
        admitted = index.policy.admit(
            keys, 0, chain=named.chain, pinned=index.pinned, retention=named.retention
        )
        if len(admitted) < len(keys):
            return None
        entries = index.reserve(keys, sizes, pins=1)
        for entry, slot in zip(entries, hottest.slots.take(len(keys)), strict=True):
            entry.slot = slot
        return entries

    def commit_open(self, entries: Sequence[BlockEntry]) -> None:
        """Publish blocks of `open_now` whose bytes have come."""
        for level, group in self._index.by_level(entries):
            size = sum([entry.size for entry in group])
            self._transfer.count_written(level, len(group), size)
        self._index.commit(entries)

    def reserve_now(self, keys: Sequence[Key], sizes: Sequence[int]) -> Stored | None:
        """Reserve slots of the hottest tier where that takes no I/O; `None` if it does."""
        level = self._index.levels[0]
        count = len(keys)
        if len(self._index.levels) > 1 and count > level.slots.free + len(level.copies):
            return None
        outcome = Stored()
        whom = namespace_of(keys)
        sharing = self._room.sharing
        if sharing is not None:
            if sharing.fitting(whom, sizes) < count or self._room.most(count, whom) < count:
                return None
            sharing.make_way(whom, sum(sizes), outcome.evicted)
        slots = self._room.take_now(0, count, outcome.evicted, whom=whom)
        if len(slots) < count:
            level.slots.give_back(slots)
            return None
        outcome.stored = self._index.reserve(keys, sizes)
        for entry, slot in zip(outcome.stored, slots, strict=True):
            entry.slot = slot
        return outcome

    async def reserve(
        self, keys: Sequence[Key], sizes: Sequence[int], named: Named
    ) -> Stored | None:
        """Reserve slots of the hottest tier, moving down what gives way; `None` if none are left.

        Cancelled, what was reserved is given up.
        """
        outcome = Stored()
        entries = self._index.reserve(keys, sizes, pins=1)
        if self._room.sharing is not None:
            self._room.sharing.hold_back(entries)
        job = self._jobs.start(lambda job: self._reserve(job, entries, outcome, named))
        try:
            return outcome if await job.result() else None
        except BaseException:
            # Cancelled between the end of the job and this task's turn.
            self._index.abort_pending(outcome.stored)
            raise

    def hold_back(self, entries: Sequence[BlockEntry]) -> None:
        """Let blocks that are pending without a slot count for no share yet."""
        if self._room.sharing is not None:
            self._room.sharing.hold_back(entries)

    def has_left(self, namespace: str | None, size: int) -> bool:
        """Tell whether a namespace may have so many bytes more with nothing of its own leaving."""
        sharing = self._room.sharing
        return sharing is None or sharing.has_left(namespace, size)

    async def take_room(self, entries: Sequence[BlockEntry]) -> bool:
        """Get slots of the hottest tier for pending blocks that the manager itself fills.

        Where there are none, the blocks are given up.
        """
        if not await self._reserve(Job(), entries, Stored(), Named(self._index, [])):
            return False
        for entry in entries:
            entry.pin_count = 1  # nobody else completes them
        return True

    # Inside

    def _plan(self, entries: Sequence[BlockEntry], evicted: list[Key], named: Named) -> Plan:
        plan = Plan()
        named.hold()
        wanted: dict[int, list[BlockEntry]] = {}
        keys = [entry.key for entry in entries]
        places = self._room.place(keys, len(named), named.chain, named.retention)
        waits = False
        for entry, place in zip(entries, places, strict=True):
            if isinstance(place, RejectReason):
                plan.unplaced.append((entry, self._reason(place)))
                continue
            # A chain has no use for what comes after a block that isn't there.
            waits = waits or not (self._may_wait or self._is_near(place))
            if waits:
                plan.unplaced.append((entry, RejectReason.THROTTLED))
            else:
                wanted.setdefault(place, []).append(entry)
        if waits:
            self._index.short.fire()  # so that there is room when the caller comes back
        if self._room.sharing is not None:
            self._keep_to_quota(self._room.sharing, entries, wanted, plan, evicted)
        whom = namespace_of(keys)
        grants: dict[int, list[Grant]] = {}
        try:
            # The deepest first: what the chain spills down comes before what it pushes down.
            for number in sorted(wanted, reverse=True):
                count = len(wanted[number])
                grants[number] = self._room.make_room(
                    number, count, plan.moves, evicted, may_wait=self._may_wait, whom=whom
                )
        except BaseException:
            # A policy that raises: what was planned so far is undone, and everything stays.
            for move in plan.moves:
                move.is_ahead = True
                self._room.finish_move(move, written=False)
            for number, got in grants.items():
                self._room.release(number, got)
            raise
        self._assign(entries, wanted, grants, plan)
        if self._room.sharing is not None:
            self._room.sharing.hold_back([entry for entry, _ in plan.unplaced])
        return plan

    def _keep_to_quota(
        self,
        sharing: Sharing,
        entries: Sequence[BlockEntry],
        wanted: dict[int, list[BlockEntry]],
        plan: Plan,
        evicted: list[Key],
    ) -> None:
        """Leave the blocks of a chain unplaced from the first that its namespace's quota stops.

        For those before it, colder blocks of the namespace's give way.
        """
        namespace = namespace_of([entry.key for entry in entries[:1]])
        sharing.hold_back(entries)
        placed = {entry for group in wanted.values() for entry in group}
        chain = [entry for entry in entries if entry in placed]
        sizes = [entry.size for entry in chain]
        fitting = sharing.fitting(namespace, sizes)
        if fitting < len(chain):
            reason = RejectReason.QUOTA
            if self._moves.under_way and sharing.may_fit_soon(namespace):
                reason = self._reason(RejectReason.PINNED)
            plan.unplaced += [(entry, reason) for entry in chain[fitting:]]
            over = set(chain[fitting:])
            for number, group in wanted.items():
                wanted[number] = [entry for entry in group if entry not in over]
        sharing.let_in(chain[:fitting], evicted)

    def _assign(
        self,
        entries: Sequence[BlockEntry],
        wanted: dict[int, list[BlockEntry]],
        grants: dict[int, list[Grant]],
        plan: Plan,
    ) -> None:
        """Give the slots to a chain, head hottest; where there are too few, its end has none."""
        left: list[BlockEntry] = []
        for number in sorted(wanted):
            group = wanted[number]
            if left:
                rank = {entry: place for place, entry in enumerate(entries)}
                group = sorted(left + group, key=rank.__getitem__)
            got = grants[number]
            plan.granted += zip(group, [number] * len(got), got, strict=False)
            left = group[len(got) :]
        if left:
            reason = RejectReason.PINNED if self._may_wait else RejectReason.THROTTLED
            plan.unplaced += [(entry, reason) for entry in left]
            self._index.short.fire()

    def _waits_for_room(self, plan: Plan) -> bool:
        """Tell whether there may be room soon for blocks that found none: others are moving."""
        return bool(self._moves.under_way and self._may_wait) and any(
            reason is RejectReason.PINNED for _, reason in plan.unplaced
        )

    def _is_near(self, number: int) -> bool:
        """Tell whether blocks of a level are stored without waiting for a lower tier."""
        return not number or self._index.levels[number].tier.addressable

    def _reason(self, reason: RejectReason) -> RejectReason:
        """Return why a block has no place: room may be on its way, and not to be waited for."""
        on_its_way = reason is RejectReason.PINNED and self._moves.under_way and not self._may_wait
        return RejectReason.THROTTLED if on_its_way else reason

    def _is_instant(self, plan: Plan) -> bool:
        """Whether a plan needs neither I/O nor a copy beyond what the loop may be held for."""
        levels = self._index.levels
        if self._waits_for_room(plan):
            return False
        total = sum([entry.size for entry, _, _ in plan.granted])
        total += sum([move.entry.size for move in plan.moves])
        used = {number for _, number, _ in plan.granted}
        used |= {move.source_level for move in plan.moves} | {
            move.target_level for move in plan.moves
        }
        return total <= INLINE_COPY_BYTES and all(levels[n].tier.addressable for n in used)

    def _apply_now(self, plan: Plan, bytes_of: dict[Key, ByteArray], outcome: Stored) -> None:
        for move in plan.moves:
            self._transfer.move_now(move)
            self._room.finish_move(move, written=True)
        for number, group in self._take_granted(plan)[0].items():
            self._transfer.copy_in_now(
                self._index.levels[number],
                [entry.slot for entry in group],
                [bytes_of[entry.key] for entry in group],
            )
        placed = [entry for entry, _, _ in plan.granted]
        self._index.commit(placed)
        outcome.stored += placed
        self._reject(plan.unplaced, outcome)

    async def _apply(
        self,
        plan: Plan,
        bytes_of: dict[Key, ByteArray],
        outcome: Stored,
        named: Named,
        job: Job[None],
    ) -> None:
        todo = plan.entries
        try:
            while True:
                by_level = await self._settle(job, plan, outcome, named)
                spaceless: list[BlockEntry] = []
                for number, group in by_level.items():
                    spaceless += await self._write(job, number, group, bytes_of, outcome)
                if not spaceless or job.abandoned:
                    return
                # The tier is full, and its free slots are useless: what it has may give way.
                for entry in spaceless:
                    self._index.levels[entry.level].slots.give_back([entry.slot])
                    entry.slot = -1
                plan = self._plan(spaceless, outcome.evicted, named)
        finally:
            # Whatever got no further: abandoned, cut off by a hard close, or failed.
            self._index.abort_pending(todo)

    async def _settle(
        self, job: Job[None], plan: Plan, outcome: Stored, named: Named
    ) -> dict[int, list[BlockEntry]]:
        """Give each block of a plan its slot; what is called off or busy is planned again."""
        placed: dict[int, list[BlockEntry]] = {}
        order = plan.entries
        deadline = monotonic() + WAIT_S
        while True:
            await self._wait_for_moves(plan.moves, outcome, named)
            got, missed = self._take_granted(plan)
            for number, group in got.items():
                placed.setdefault(number, []).extend(group)
            if job.abandoned:
                return {}
            hopeless = plan.hopeless
            if hopeless:
                self._reject([(entry, RejectReason.FAILED) for entry in hopeless], outcome)
                missed = [*dict.fromkeys(missed).keys() - hopeless]
            if not self._waits_for_room(plan) or monotonic() > deadline:
                self._reject(plan.unplaced, outcome)
                plan.unplaced = []
            missed += [entry for entry, _ in plan.unplaced]
            if not missed:
                return placed
            if plan.unplaced:
                began = monotonic()
                await self._index.changed.wait()
                outcome.waited_s += monotonic() - began
            missed.sort(key={entry: number for number, entry in enumerate(order)}.__getitem__)
            plan = self._plan(missed, outcome.evicted, named)

    async def _wait_for_moves(self, moves: Sequence[Move], outcome: Stored, named: Named) -> None:
        began = monotonic()
        await self._moves.run(moves, outcome.evicted, named)
        if not all(map(self._is_near, [move.target_level for move in moves])):
            outcome.waited_s += monotonic() - began

    async def _write(
        self,
        job: Job[None],
        number: int,
        entries: Sequence[BlockEntry],
        bytes_of: dict[Key, ByteArray],
        outcome: Stored,
    ) -> list[BlockEntry]:
        """Write blocks to a tier; return those that it has no space for."""
        level = self._index.levels[number]
        spaceless: list[BlockEntry] = []
        step = len(entries)
        if not level.tier.addressable:
            step = max(1, WRITE_BYTES // level.tier.block_bytes)
        for start in range(0, len(entries), step):
            group = entries[start : start + step]
            keys = [entry.key for entry in group]
            payloads = list(map(bytes_of.__getitem__, keys))
            if not level.tier.addressable:
                # A write that the caller's cancellation leaves behind must not see its buffers,
                # which are its own again then: the record would check, and show other bytes.
                payloads = await self._transfer.private_copies(payloads)
                if job.abandoned:
                    return []
            slots = [entry.slot for entry in group]
            outcomes = await self._transfer.write(level, slots, payloads, keys)
            good = [entry for entry, error in zip(group, outcomes, strict=True) if error is None]
            if job.abandoned:
                level.leave([entry.slot for entry in good], [entry.key for entry in good])
                return []
            self._index.commit(good)
            outcome.stored += good
            self._room.look()
            if len(good) < len(group):
                spaceless += self._sort_out(level, group, outcomes, outcome)
        return spaceless

    def _sort_out(
        self,
        level: Level,
        group: Sequence[BlockEntry],
        outcomes: Sequence[TierError | None],
        outcome: Stored,
    ) -> list[BlockEntry]:
        """Reject what could not be written, but for what a full tier has no space for."""
        errors = [
            (entry, error)
            for entry, error in zip(group, outcomes, strict=True)
            if error is not None
        ]
        spaceless: list[BlockEntry] = []
        if level.state is TierState.FULL:
            spaceless = [entry for entry, error in errors if lacks_space(error)]
        bad = [(entry, RejectReason.FAILED) for entry, _ in errors if entry not in spaceless]
        self._reject(bad, outcome)
        return spaceless

    async def _reserve(
        self, job: Job[bool], entries: Sequence[BlockEntry], outcome: Stored, named: Named
    ) -> bool:
        index, sharing = self._index, self._room.sharing
        todo = list(entries)
        whom = namespace_of([entry.key for entry in entries[:1]])
        complete = False
        deadline = monotonic() + WAIT_S
        try:
            while todo:
                named.hold()
                fits = sharing is None or sharing.can_let_in(entries)
                if self._room.most(len(todo), whom) < len(todo) or not fits:
                    soon = sharing is None or fits or sharing.may_fit_soon(whom)
                    soon = soon and monotonic() < deadline
                    if not (self._moves.under_way and self._may_wait and soon):
                        index.short.fire()
                        return False
                    await index.changed.wait()
                    continue
                if not (self._may_wait or self._room.has_now(0, len(todo), whom=whom)):
                    index.short.fire()
                    return False
                if sharing is not None:
                    sharing.let_in(entries, outcome.evicted)
                moves: list[Move] = []
                grants = self._room.make_room(
                    0, len(todo), moves, outcome.evicted, may_wait=self._may_wait, whom=whom
                )
                await self._moves.run(moves, outcome.evicted, named)
                if len(grants) < len(todo):
                    self._room.release(0, grants)
                    return False
                plan = Plan([(entry, 0, grant) for entry, grant in zip(todo, grants, strict=True)])
                todo = self._take_granted(plan)[1]
                if any(grant.is_hopeless for grant in grants):
                    return False
            complete = not job.abandoned
            return complete
        finally:
            if complete:
                now = index.clock()
                for entry in entries:
                    entry.pin_count = 0  # from here on the caller completes them, in its time
                    entry.access_time = now
                outcome.stored += entries
            else:
                index.abort(entries)

    def _take_granted(self, plan: Plan) -> tuple[dict[int, list[BlockEntry]], list[BlockEntry]]:
        placed: dict[int, list[BlockEntry]] = {}
        missed: list[BlockEntry] = []
        for entry, number, grant in plan.granted:
            if grant.usable:
                entry.level, entry.slot = number, grant.slot
                placed.setdefault(number, []).append(entry)
            else:
                missed.append(entry)
        return placed, missed

    def _reject(self, unplaced: Sequence[tuple[BlockEntry, RejectReason]], outcome: Stored) -> None:
        if unplaced:
            outcome.rejected |= {entry.key: reason for entry, reason in unplaced}
            self._index.abort([entry for entry, _ in unplaced])
            self._index.count("rejected", [entry.key for entry, _ in unplaced])
