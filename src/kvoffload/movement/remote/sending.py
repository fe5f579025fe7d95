"""Writes behind: what becomes ready here is sent to the engine, when there is time."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Container, Sequence

from ...aligned import aligned_empty
from ...blocks import BlockEntry
from ...errors import TierError
from ...index import Index
from ...jobs import Jobs
from ...remote.protocol import RemoteOutcome
from ...signals import Signal
from ...types import BlockState, ByteArray, ForecastingPolicy, Key, TierState
from ..transfer import Transfer
from .engine import Engine
from .sightings import Sightings

BATCH_BYTES = 32 * 1024 * 1024
"""Most payload bytes sent at a time, and under one deadline; so few are pinned for it."""
BATCH_BLOCKS = 256
"""Most blocks."""
FIRST_RETRY_S = 1.0
"""Seconds without a write after one that the engine refused."""
MOST_RETRY_S = 60.0
"""The same after many: it doubles with each."""

log = logging.getLogger("kvoffload")


class Sending:
    """A bounded queue of blocks that others may want, and the task that sends them.

    The queue holds no bytes and no pins: a block that leaves every tier before its turn is dropped.
    A block is pinned only while its bytes are being sent.
    """

    def __init__(
        self,
        engine: Engine,
        sightings: Sightings,
        index: Index,
        transfer: Transfer,
        jobs: Jobs,
        *,
        queue_bytes: int,
        admission: str,
    ) -> None:
        self._engine = engine
        self._sightings = sightings
        self._index = index
        self._transfer = transfer
        self._jobs = jobs
        self._most_bytes = queue_bytes
        self._admission = admission
        self._queue: deque[BlockEntry] = deque()
        self._wake = Signal()
        self._sending = 0
        self._refusal: TierError | None = None  # of what was sent last
        self.backlog_bytes = 0
        self.dropped = 0
        self.fetched: Container[Key] = ()
        """Blocks that become ready since they came from there."""

    def attach(self) -> None:
        """Be told of blocks from now on."""
        if self._admission == "all":
            self._index.on_ready = self._offer
        else:
            self._index.users.append(self._note_use)

    async def run(self) -> None:
        """Send what is queued, batch by batch, until cancelled."""
        sleep, delay = self._index.clock.sleep, FIRST_RETRY_S
        while True:
            while not self._queue:
                await self._wake.wait()
            while self._engine.is_down:
                await self._engine.changed.wait()
            # In a job, which a close lets end.
            changes = self._index.changed.times
            sent = await self._jobs.start(lambda _: self._send_batch()).result()
            if self._refusal is not None:
                await sleep(delay)
                delay = min(2 * delay, MOST_RETRY_S)
            elif sent:
                delay = FIRST_RETRY_S
            elif self._queue and not self._engine.is_down and self._index.changed.times == changes:
                await self._index.changed.wait()  # all of them are moving

    async def drain(self) -> None:
        """Send what is queued now; ends early where the engine does not take it.

        Each batch has a deadline, and the queue is bounded, so this is.
        """
        while (self._queue or self._sending) and self._refusal is None:
            changes = self._index.changed.times
            sent = False
            if self._engine.is_down:
                return
            if not self._sending:
                sent = await self._jobs.start(lambda _: self._send_batch()).result()
            if sent or self._engine.is_down:  # it may be down since the job was started
                continue
            if (self._queue or self._sending) and self._index.changed.times == changes:
                await self._index.changed.wait()  # for what is being sent, or is moving

    # Inside

    def _offer(self, entries: Sequence[BlockEntry]) -> None:
        fetched = self.fetched
        for entry in entries:
            if entry.key in fetched:
                continue
            if self.backlog_bytes + entry.size > self._most_bytes:
                self.dropped += 1
                continue
            self.backlog_bytes += entry.size
            self._queue.append(entry)
        if self._queue:
            self._wake.fire()

    def _note_use(self, keys: Sequence[Key]) -> None:
        """Offer what is used beyond the use that stored it, and with `"likely"` what will be."""
        ready = self._index.ready
        entries = [entry for key in keys if (entry := ready.get(key)) is not None]
        again = [entry for entry in entries if entry.access_count == 1]
        if self._admission == "likely":
            policy = self._index.policy
            assert isinstance(policy, ForecastingPolicy)
            likely = policy.likely([entry.key for entry in entries if not entry.access_count])
            again += [ready[key] for key in likely]
        self._offer(again)

    def _take(self) -> list[BlockEntry]:
        """Take a batch out of the queue; what is moving stays in it, and what left is dropped."""
        batch: list[BlockEntry] = []
        size = 0
        for _ in range(len(self._queue)):
            entry = self._queue.popleft()
            if self._index.ready.get(entry.key) is not entry:
                self.backlog_bytes -= entry.size
                self.dropped += 1
            elif entry.move is not None:
                self._queue.append(entry)
            elif batch and size + entry.size > BATCH_BYTES:
                self._queue.appendleft(entry)
                break
            else:
                self.backlog_bytes -= entry.size
                batch.append(entry)
                size += entry.size
                if len(batch) == BATCH_BLOCKS:
                    break
        return batch

    async def _send_batch(self) -> bool:
        """Send some blocks; say whether there were any to send."""
        if self._sending or self._engine.is_down:
            return False
        index = self._index
        batch = self._take()
        if not batch:
            return False
        self._sending = len(batch)
        index.begin_transfer(batch)
        for entry in batch:
            entry.shown += 1  # a promotion would let the slot that is read here give way
        outcomes: list[RemoteOutcome | TierError] = []
        try:
            outcomes = await self._send(batch)
        finally:
            self._sending = 0
            for entry in batch:
                entry.shown -= 1
            index.end_transfer(batch)
            good = sum(isinstance(outcome, RemoteOutcome) for outcome in outcomes)
            self.dropped += len(batch) - good
        return True

    async def _send(self, batch: Sequence[BlockEntry]) -> list[RemoteOutcome | TierError]:
        index, engine, level = self._index, self._engine, self._engine.level
        outcomes: dict[BlockEntry, RemoteOutcome | TierError] = {}
        payloads: list[tuple[BlockEntry, ByteArray]] = []
        for source in index.levels:
            group = [entry for entry in batch if entry.level == source.number]
            if source.tier.addressable:
                payloads += [(entry, source.tier.view(entry.slot, entry.size)) for entry in group]
            elif group:
                into = [aligned_empty(entry.size) for entry in group]
                slots, keys = [entry.slot for entry in group], [entry.key for entry in group]
                read = await self._transfer.read(source, slots, into, keys)
                for entry, array, error in zip(group, into, read, strict=True):
                    if error is None:
                        payloads.append((entry, array))
                    else:
                        outcomes[entry] = error
        entries = [entry for entry, _ in payloads]
        keys = [entry.key for entry in entries]
        names = [self._transfer.canonical_key(key) for key in keys]
        data = [array.data for _, array in payloads]
        if entries:
            sent: Sequence[RemoteOutcome | TierError]
            try:
                size = sum(entry.size for entry in entries)
                with level.call(len(entries), size, index.clock, reads=False):
                    sent = await engine.call(lambda: engine.tier.put(names, data))
            except TierError as exc:
                sent = [exc] * len(entries)
            engine.note_failures(keys, sent)
            self._note_refusal([outcome for outcome in sent if isinstance(outcome, TierError)])
            outcomes |= zip(entries, sent, strict=True)
        for entry, outcome in outcomes.items():
            if isinstance(outcome, RemoteOutcome):
                there = index.state(entry.key) is BlockState.READY
                self._sightings.note(entry.key, entry.size if there else None)
            if outcome is RemoteOutcome.DONE:
                self._transfer.count_written(level, 1, entry.size)
        return list(outcomes.values())

    def _note_refusal(self, bad: Sequence[TierError]) -> None:
        """An engine that answers, but does not take what it is given, may be full."""
        self._refusal = bad[0] if bad and not self._engine.is_down else None
        if self._refusal is not None:
            self._engine.set_state(TierState.READ_ONLY, str(self._refusal))
        elif not self._engine.is_down:
            self._engine.set_state(TierState.SERVING)
