"""Power losses at any moment of a disk tier's life, with any part of the unsynced on the disk.

And kills of its process, which are the power losses that lose nothing.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from kvoffload import CorruptBlockError, DiskTier, TierError
from kvoffload.testing import (
    FaultyFileLayer,
    PowerLoss,
    Unsynced,
    keep_all,
    keep_changes,
    keep_nothing,
    keep_only,
    keep_sectors,
    payload_for,
)
from kvoffload.types import StoredBlock

T = TypeVar("T")
Keep = Callable[[Unsynced], int]
SLOTS = 5


@dataclass(frozen=True, slots=True)
class Block:
    """One write; its payload is its own, unless it is empty."""

    number: int
    slot: int
    key: bytes
    payload: bytes = field(repr=False)


def newest_of_each_key(blocks: Iterable[Block]) -> frozenset[Block]:
    """Of two slots with one key, the later write counts when a tier is opened."""
    newest = {block.key: block for block in sorted(blocks, key=lambda block: block.number)}
    return frozenset(newest.values())


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What is known of a directory.

    Attributes:
        written: All that was ever written.
        blocks: What the tier holds, by slot.
        exact: They are what is in the files, whole. After a power loss that's unknown.
        sure: Confirmed by a flush, and neither its slot nor its key was touched since.
        gone: Erased or replaced, and that confirmed by a flush.
    """

    written: tuple[Block, ...] = ()
    blocks: dict[int, Block] = field(default_factory=dict)
    exact: bool = True
    sure: frozenset[Block] = frozenset()
    gone: frozenset[Block] = frozenset()

    def after_writing(self, batch: Sequence[Block]) -> Knowledge:
        slots, keys = {block.slot for block in batch}, {block.key for block in batch}
        untouched = {
            block for block in self.sure if block.slot not in slots and block.key not in keys
        }
        return replace(
            self,
            written=(*self.written, *batch),
            blocks=self.blocks | {block.slot: block for block in batch},
            sure=frozenset(untouched),
        )

    def after_erasing(self, slots: Iterable[int]) -> Knowledge:
        return replace(
            self,
            blocks={slot: block for slot, block in self.blocks.items() if slot not in slots},
            sure=frozenset(block for block in self.sure if block.slot not in slots),
        )

    def after_flushing(self) -> Knowledge:
        return replace(
            self,
            sure=newest_of_each_key(self.blocks.values()),
            gone=frozenset(self.written) - frozenset(self.blocks.values()),
        )

    def after_power_loss(self, later: Knowledge) -> Knowledge:
        """What is known if the power fails between this and `later`."""
        return Knowledge(
            later.written,
            exact=False,
            sure=self.sure & later.sure,
            gone=self.gone & later.gone,
        )

    def after_kill(self, later: Knowledge) -> Knowledge:
        """What is known if the process is killed between this and `later`.

        All that it did is on the disk, and nothing is damaged.
        """
        if not (self.exact and later.exact):
            return self.after_power_loss(later)
        before, after = set(self.blocks.values()), set(later.blocks.values())
        changing = {block.key for block in before ^ after}
        return replace(
            later,
            sure=frozenset(b for b in newest_of_each_key(before & after) if b.key not in changing),
            gone=frozenset(later.written) - before - after,
        )


class Life:
    """A disk tier in one directory, what is known of it, and what a power loss would leave.

    Opening reads every block, and checks it against what is known.
    """

    def __init__(
        self, path: Path, block_bytes: int, fsync: str, known: Knowledge = Knowledge()
    ) -> None:
        self.path = path
        self.block_bytes = block_bytes
        self.fsync = fsync
        self.disk = PowerLoss()
        self.files = FaultyFileLayer(self.disk)
        self.known = known
        # Before the last step, and the moment at which that began.
        self.known_before = known
        self.step_began = 0
        self.is_open = False
        self.restarted_exactly = False

    @contextmanager
    def step(self) -> Iterator[None]:
        known, began = self.known, self.disk.moment
        yield
        self.known_before, self.step_began = known, began

    async def open(self) -> None:
        with self.step():
            self.tier = DiskTier(self.path, SLOTS, self.block_bytes, fsync=self.fsync, io_threads=2)
            self.tier.file_layer = self.files
            found = await self.tier.open()
            self.is_open = True
            blocks, damaged = await self._read(found)
            assert self.known.sure <= blocks, "what a flush confirmed is lost"
            if self.known.exact:
                assert not damaged, "a process was killed, and left a record without its payload"
            if self.restarted_exactly:
                assert blocks == newest_of_each_key(self.known.blocks.values())
            await self.tier.erase(damaged)
            self.restarted_exactly = False
            by_slot = {block.slot: block for block in blocks}
            self.known = replace(self.known, blocks=by_slot, exact=True)

    async def _read(self, found: Sequence[StoredBlock]) -> tuple[set[Block], list[int]]:
        buffers = [bytearray(block.size) for block in found]
        outcomes = await self.tier.read(
            [block.slot for block in found], [memoryview(buffer) for buffer in buffers]
        )
        blocks, damaged = set(), []
        for stored, outcome, buffer in zip(found, outcomes, buffers, strict=True):
            if outcome is None:
                blocks.add(self._identify(stored, bytes(buffer)))
            else:
                assert isinstance(outcome, CorruptBlockError)
                damaged.append(stored.slot)
        return blocks, damaged

    def _identify(self, stored: StoredBlock, payload: bytes) -> Block:
        candidates = [
            block
            for block in self.known.written
            if (block.slot, block.key, block.payload) == (stored.slot, stored.key, payload)
        ]
        assert candidates, "these bytes were never written under this key"
        candidates = [block for block in candidates if block not in self.known.gone]
        assert candidates, "an erased block is back"
        return candidates[-1]

    def batch(self, wanted: dict[int, tuple[bytes, int]]) -> list[Block]:
        """Make blocks of a key and a size for each slot."""
        first = len(self.known.written)
        return [
            Block(number, slot, key, payload_for(number, min(size, self.block_bytes)))
            for number, (slot, (key, size)) in enumerate(wanted.items(), first)
        ]

    async def write(self, wanted: dict[int, tuple[bytes, int]]) -> None:
        with self.step():
            batch = self.batch(wanted)
            await self._write(batch)
            self.known = self.known.after_writing(batch)
            self._confirm_always()

    async def _write(self, batch: Sequence[Block]) -> None:
        outcomes = await self.tier.write(
            [block.slot for block in batch],
            [memoryview(block.payload) for block in batch],
            [block.key for block in batch],
        )
        assert outcomes == [None] * len(batch)

    async def erase(self, slots: Sequence[int]) -> None:
        with self.step():
            await self.tier.erase(slots)
            self.known = self.known.after_erasing(slots)
            self._confirm_always()

    def _confirm_always(self) -> None:
        if self.fsync == "always":
            self.known = self.known.after_flushing()

    async def flush(self) -> None:
        with self.step():
            await self.tier.flush()
            self.known = self.known.after_flushing()

    async def flush_while_writing(self, wanted: dict[int, tuple[bytes, int]]) -> None:
        """The flush is for what was written before it; the write may be in it or not."""
        with self.step():
            batch = self.batch(wanted)
            await asyncio.gather(self._write(batch), self.tier.flush())
            self.known = self.known.after_flushing().after_writing(batch)

    async def close(self) -> None:
        with self.step():
            await self.tier.close(sorted(self.known.blocks))
            self.known = self.known.after_flushing()
            self._ended()

    async def kill(self) -> None:
        """End as by `kill -9`: the system has what was written, and nobody has synced it."""
        for call in ("pwritev", "truncate", "sync", "unlink"):
            self.files.fail(call, times=None)
        with pytest.raises(TierError):
            await self.tier.close()
        self.files.heal()
        self._ended()

    def _ended(self) -> None:
        self.is_open = False
        self.restarted_exactly = True

    def after_power_loss(self, target: Path, keep: Keep, moment: int) -> Life:
        """The power fails at a moment of the last step; return the life that goes on from there."""
        self.disk.surviving(self.path, target, keep, moment=moment)
        before = self.known if moment == self.disk.moment else self.known_before
        loss = before.after_kill if keep is keep_all else before.after_power_loss
        return Life(target, self.block_bytes, self.fsync, loss(self.known))


def lose_names(part: Unsynced) -> int:
    return 0 if part.part == "name" else part.newest


def lose_lengths(part: Unsynced) -> int:
    return 0 if part.part == "length" else part.newest


MODES: dict[str, Callable[[int], Keep]] = {
    "nothing": lambda seed: keep_nothing,
    "all": lambda seed: keep_all,
    "records": lambda seed: keep_only("records"),
    "slabs": lambda seed: keep_only("slab-*"),
    "headers": lambda seed: keep_only("header-*"),
    "no names": lambda seed: lose_names,
    "no lengths": lambda seed: lose_lengths,
    "changes": keep_changes,
    "sectors": keep_sectors,
    "torn records": lambda seed: keep_only("records", keep_sectors(seed)),
    "torn headers": lambda seed: keep_only("header-*", keep_sectors(seed)),
}


# Any history

keys = st.sampled_from([b"a", b"b", b"c", b"d", b"e", b"f"])
sizes = st.sampled_from([0, 16, 500, 512, 513, 4096])
batches = st.dictionaries(st.integers(0, SLOTS - 1), st.tuples(keys, sizes), min_size=1)
while_open = precondition(lambda self: self.life.is_open)
while_closed = precondition(lambda self: not self.life.is_open)


class History(RuleBasedStateMachine):
    """Writes, erasures, flushes, closes, kills and power losses, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.home = Path(tempfile.mkdtemp(prefix="kvoffload-test-"))
        self.lives = 0

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(call)

    @initialize(
        block_bytes=st.sampled_from([700, 1024, 4096]),
        fsync=st.sampled_from(["flush", "flush", "always"]),
    )
    def begin(self, block_bytes: int, fsync: str) -> None:
        self.life = Life(self.home / "0", block_bytes, fsync)
        self.open()

    @while_closed
    @rule()
    def open(self) -> None:
        self.run(self.life.open())

    @while_open
    @rule(batch=batches)
    def write(self, batch: dict[int, tuple[bytes, int]]) -> None:
        self.run(self.life.write(batch))

    @while_open
    @rule(slots=st.sets(st.integers(0, SLOTS - 1), min_size=1))
    def erase(self, slots: set[int]) -> None:
        self.run(self.life.erase(sorted(slots)))

    @while_open
    @rule()
    def flush(self) -> None:
        self.run(self.life.flush())

    @while_open
    @rule(batch=batches)
    def flush_while_writing(self, batch: dict[int, tuple[bytes, int]]) -> None:
        self.run(self.life.flush_while_writing(batch))

    @while_open
    @rule()
    def close(self) -> None:
        self.run(self.life.close())

    @while_open
    @rule()
    def kill(self) -> None:
        self.run(self.life.kill())

    @rule(mode=st.sampled_from(sorted(MODES)), seed=st.integers(0, 2**32), back=st.integers(0, 100))
    def lose_power(self, mode: str, seed: int, back: int) -> None:
        """During the last step, or after it."""
        now = self.life.disk.moment
        moment = now - back % (now - self.life.step_began + 1)
        self.lives += 1
        target = self.home / f"{self.lives}"
        survivor = self.life.after_power_loss(target, MODES[mode](seed), moment)
        self.end()
        self.life = survivor
        self.open()

    def end(self) -> None:
        if hasattr(self, "life") and self.life.is_open:
            self.run(self.life.kill())

    def teardown(self) -> None:
        self.end()
        self.runner.close()
        shutil.rmtree(self.home)


TestHistory = History.TestCase
TestHistory.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)


# One history, all moments


async def everything_happens(life: Life) -> AsyncIterator[None]:
    """Do all that a tier does, and pause after every step."""
    await life.open()
    yield
    await life.write({0: (b"a", 4096), 3: (b"b", 513), 4: (b"c", 0)})
    yield
    await life.flush()
    yield
    await life.write({0: (b"d", 4096), 1: (b"e", 600), 2: (b"b", 513)})
    yield
    await life.erase([3, 4])
    yield
    await life.kill()
    await life.open()
    yield
    await life.write({3: (b"f", 4096)})
    yield
    await life.close()
    yield
    await life.open()
    yield
    await life.erase([0])
    yield
    await life.close()
    yield


@pytest.mark.parametrize("mode", MODES)
def test_power_lost_at_any_moment_and_again_when_it_is_back(tmp_path: Path, mode: str) -> None:
    """All the moments of opening, also after a crash, of writing, erasing, flushing and closing.

    The first opening afterwards is cut off as well, each time at another moment.
    """
    losses = 0
    with asyncio.Runner() as runner:
        life = Life(tmp_path / "life", 4096, "flush")
        history = everything_happens(life)
        while runner.run(anext(history, "over")) != "over":
            for moment in range(life.step_began, life.disk.moment + 1):
                losses += 1
                target = tmp_path / f"{losses}"
                survivor = life.after_power_loss(target, MODES[mode](losses), moment)
                runner.run(survivor.open())
                moments = survivor.disk.moment - survivor.step_began
                again = survivor.after_power_loss(
                    target.with_suffix(".again"),
                    MODES[mode](losses + 1),
                    survivor.step_began + losses % (moments + 1),
                )
                runner.run(survivor.kill())
                runner.run(again.open())
                runner.run(again.close())
    assert losses > 60


@pytest.mark.parametrize("mode", MODES)
def test_power_lost_while_blocks_move_to_fewer_slots(tmp_path: Path, mode: str) -> None:
    """Whatever was copied by then: the most recent blocks are there, as if it began anew."""
    contents = {slot: (b"key %d" % slot, payload_for(slot, 1024)) for slot in (0, 6, 1, 5, 4, 2)}

    async def make() -> None:
        tier = DiskTier(tmp_path / "before", 7, 1024)
        await tier.open()
        for slot, (key, payload) in contents.items():
            assert await tier.write([slot], [memoryview(payload)], [key]) == [None]
        await tier.close(list(contents))

    async def shrink(path: Path, disk: PowerLoss) -> dict[bytes, bytes]:
        tier = DiskTier(path, 3, 1024)
        tier.file_layer = disk
        found = await tier.open()
        buffers = [bytearray(block.size) for block in found]
        slots = [block.slot for block in found]
        outcomes = await tier.read(slots, [memoryview(buffer) for buffer in buffers])
        await tier.close(slots)
        assert outcomes == [None] * len(slots)
        return {block.key: bytes(b) for block, b in zip(found, buffers, strict=True)}

    expected = dict(list(contents.values())[-3:])
    asyncio.run(make())
    disk = PowerLoss()
    assert asyncio.run(shrink(tmp_path / "before", disk)) == expected
    for moment in range(disk.moment + 1):
        target = tmp_path / f"{moment}"
        disk.surviving(tmp_path / "before", target, MODES[mode](moment), moment=moment)
        assert asyncio.run(shrink(target, PowerLoss())) == expected, f"after {moment} changes"
