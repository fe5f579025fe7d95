"""Kill -9 at any moment: what was confirmed is there, what was evicted stays away, bytes are right.

Children work on one directory, round after round, until they are killed, so that damage would add
up. `kill_child.py` is what they do. More rounds, and the dice of a failed run:

    KVOFFLOAD_KILL_ROUNDS=1000 KVOFFLOAD_KILL_SEED=42 pytest tests/storage/test_kill.py
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import pytest
import uvloop
from tests.storage import kill_child
from tests.storage.kill_child import HOT_BLOCKS, Report, Round, hash_of, new_tier, size_of

from kvoffload import AsyncLRUManager, BlockState, DiskTier, MemoryTier
from kvoffload.keys import encode_key

ROUNDS = int(os.environ.get("KVOFFLOAD_KILL_ROUNDS", "40"))
SEED = int(os.environ.get("KVOFFLOAD_KILL_SEED", random.randrange(2**32)))
FOREVER = 10**9

payload_of = lru_cache(256)(kill_child.payload_of)


class Forker:
    """Starts children at little cost, hears what they say, and kills them."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.settimeout(60)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(kill_child.__file__), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                # Or NumPy would start threads, which a fork leaves behind.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )
        self._child = 0

    def start(self, spec: Round) -> None:
        """Start a child; one at a time."""
        self._child = 0
        self._channel.send(json.dumps(asdict(spec)).encode())

    def reports(self) -> Iterator[Report]:
        """Yield what the child says, until it is dead and all was heard."""
        while True:
            report = Report(**json.loads(self._channel.recv(kill_child.PACKET_BYTES)))
            if report.kind == "over":
                return
            if report.kind == "forked":
                self._child = int(report.what)
            assert report.kind != "broken", report.what
            yield report

    def kill(self) -> None:
        """Kill the child; one that is dead keeps its number until the next one is started."""
        if self._child:
            os.kill(self._child, signal.SIGKILL)

    def close(self) -> None:
        """End it all."""
        self.kill()
        self._channel.close()
        self._process.kill()
        self._process.wait()


class Ledger:
    """What must be on disk, and what may be, as far as children have told.

    Attributes:
        sure: Blocks that must be there, but for as many as may have given way.
        doubt: Blocks that may be there. No others may.
        newest: Those of the sure ones that were written last, in this order.
        clean: Whether the directory was closed in good order; `None` where that is not known.
        flushes: How many were confirmed.
    """

    def __init__(self, found: set[int], num_blocks: int, *, clean: bool | None) -> None:
        self.sure = set(found)
        self.doubt: set[int] = set()
        self.newest: Sequence[int] = ()
        self.clean = clean
        self.flushes = 0
        self.history: list[Report] = []
        self._room = min(0, num_blocks - len(found))  # fewer slots drop the rest
        self._calls: dict[int, Report] = {}

    @property
    def losses(self) -> int:
        """How many of the sure ones may have given way to others."""
        calls = self._calls.values()
        written = sum(begun.may_write for begun in calls)
        return sum(begun.may_lose for begun in calls) + max(0, written - self._room)

    def note(self, report: Report) -> None:
        """Take a report."""
        self.history.append(report)
        match report.kind:
            case "opening":
                # The calls of the child before will never end.
                self._room, self._calls = -self.losses, {}
                self.clean = self.clean and None  # the opening may have got far enough, or not
            case "opened":
                self.check(set(report.there))
                self.doubt.clear()
                self._end(report)
                self.clean = False
            case "begin":
                self._calls[report.call] = report
                self.doubt |= {*report.may_come} - self.sure
                self._doubt(report.may_go)
                self.clean = None if report.what == "close" else self.clean
            case "end" | "confirmed" | "closed":
                self.clean = True if report.kind == "closed" else self.clean
                if report.kind == "confirmed" and self._calls[report.call].what == "flush":
                    self.flushes += 1
                self._end(report)

    def check(self, found: set[int]) -> None:
        """Compare with what an opening found."""
        unexpected = found - self.sure - self.doubt
        assert not unexpected, f"{sorted(unexpected)} came back"
        missing = self.sure - found
        assert len(missing) <= self.losses, f"of {sorted(missing)} {self.losses} may have left"

    def check_order(self, found: list[int]) -> None:
        """Compare with the order, coldest first, in which an opening found them."""
        if all(begun.what != "move" for begun in self._calls.values()):
            newest = [name for name in self.newest if name in self.sure]
            sure = [name for name in found if name in self.sure]
            assert sure[len(sure) - len(newest) :] == newest

    def _end(self, report: Report) -> None:
        self._calls.pop(report.call, None)
        self._room = report.room
        self._doubt(report.doubtful)
        self.sure.difference_update(report.gone)
        self.doubt.difference_update(report.gone)
        if report.kind != "end":
            self._doubt(self.sure.difference(report.there))
            self.sure = set(report.there)
            self.doubt -= self.sure
            self.newest = report.newest

    def _doubt(self, names: Iterable[int]) -> None:
        uncertain = self.sure.intersection(names)
        self.sure -= uncertain
        self.doubt |= uncertain


class Game:
    """Rounds on one directory, and the dice."""

    def __init__(
        self, path: Path, forker: Forker, block_bytes: int, least: int, *, encrypted: bool
    ) -> None:
        self.dice = random.Random(f"{SEED} {block_bytes} {encrypted}")
        self.path = path
        (path / "cold").mkdir()
        self.forker = forker
        self.least = least
        self.spec = Round(
            path=str(path / "cold"),
            num_blocks=2 * least,
            block_bytes=block_bytes,
            num_names=6 * least,
            target="manager",
            encrypted=encrypted,
            fsync="flush",
            direct_io="auto",
            policy="lru",
            loop="asyncio",
            num_steps=FOREVER,
            seed=0,
        )
        self.ledger = Ledger(set(), self.spec.num_blocks, clean=None)
        self.found: set[int] = set()
        self.told = 0
        """Rounds in which something had to be there."""
        self.strict = 0
        """Rounds in which all that a flush had confirmed, and was not evicted, had to be there."""

    def play(self) -> None:
        """Kill a child at some moment, and see what it left."""
        dice = self.dice
        before = self.spec.num_blocks
        if dice.random() < 0.3:
            self.resize(dice.randint(self.least, 3 * self.least))
        if dice.random() < (0.5 if self.spec.num_blocks < before else 0.2):
            self.kill_while_opening()
            self.check(copy=True)
        self.throw_dice()
        if dice.random() < 0.15:
            self.spec = replace(self.spec, num_steps=dice.randrange(8))
        self.kill_child(after=dice.choice((0, 1, 3, 10, 30)))
        self.check(copy=dice.random() < 0.3)

    def throw_dice(self) -> None:
        """Choose how the next child works."""
        dice = self.dice
        self.spec = replace(
            self.spec,
            target="manager" if dice.random() < 0.7 else "tier",
            fsync=dice.choice(("flush", "flush", "always")),
            direct_io=dice.choice(("auto", "off")),
            policy=dice.choice(("lru", "weighted")),
            loop=dice.choice(("asyncio", "uvloop")),
            num_steps=FOREVER,
            seed=dice.randrange(2**32),
        )

    def resize(self, num_blocks: int) -> None:
        """Give the tier more slots, or fewer, from the next opening on."""
        self.spec = replace(self.spec, num_blocks=num_blocks)
        self.ledger = Ledger(self.found, num_blocks, clean=self.ledger.clean)

    def kill_child(self, *, after: int) -> None:
        """Let a child work until a flush was confirmed, hear so many reports more, and kill it."""
        self.forker.start(self.spec)
        before, killed = self.ledger.flushes, False
        for report in self.forker.reports():
            self.ledger.note(report)
            if self.ledger.flushes > before and not killed:
                if after == 0:
                    self.kill_soon()
                    killed = True
                after -= 1
        assert self.ledger.flushes > before
        assert killed or self.ledger.clean, "the child died of itself"

    def kill_while_opening(self) -> None:
        """Kill children as they open the directory, until one had not got so far as to say so."""
        for _ in range(50):
            self.throw_dice()
            self.forker.start(self.spec)
            opened = False
            for report in self.forker.reports():
                self.ledger.note(report)
                opened = opened or report.kind == "opened"
                if report.kind == "opening":
                    self.kill_soon()
            if not opened:
                return
        raise AssertionError("every child had opened before it was killed")

    def kill_soon(self) -> None:
        """Kill the child now or a little later, when it may be in the middle of a call."""
        if self.dice.random() < 0.5:
            time.sleep(self.dice.random() * 0.004)
        self.forker.kill()

    def check(self, *, copy: bool) -> None:
        """Open what was left, or a copy of it in another place, and compare it with the ledger."""
        ledger, spec = self.ledger, self.spec
        if copy:
            spec = replace(spec, path=str(self.path / "copy"))
            shutil.copytree(self.spec.path, spec.path)
        new_loop = uvloop.new_event_loop if spec.loop == "uvloop" else asyncio.new_event_loop
        with asyncio.Runner(loop_factory=new_loop) as runner:
            if self.dice.random() < 0.5:
                found = runner.run(inspect_with_tier(spec, ledger.clean))
                ledger.check_order(found)
            else:
                found = runner.run(inspect_with_manager(spec, ledger.clean))
        self.found = set(found)
        ledger.check(self.found)
        self.told += bool(ledger.flushes and len(ledger.sure) > ledger.losses)
        self.strict += bool(ledger.flushes and ledger.sure and not ledger.losses)
        clean = ledger.clean if copy else True
        if copy:
            shutil.rmtree(spec.path)
        self.ledger = Ledger(self.found, spec.num_blocks, clean=clean)


def check_recovery(tier: DiskTier, clean: bool | None, blocks: int) -> None:
    assert tier.recovery is not None
    assert tier.recovery.blocks == blocks <= tier.num_blocks
    if clean is not None:
        assert tier.recovery.clean is clean


def check_size(tier: DiskTier) -> None:
    """The slots, their records and the order are all the disk that a tier uses."""
    files = [file.stat() for file in tier.path.iterdir()]
    bound = tier.num_blocks * (tier.block_bytes + 512 + 4) + 2**16  # headers, lock, whole pages
    assert sum(file.st_blocks * 512 for file in files) <= bound
    assert sum(file.st_size for file in files) <= bound


async def inspect_with_tier(spec: Round, clean: bool | None) -> list[int]:
    """Open, check each block's bytes, close, and return the blocks, coldest first."""
    keys = [encode_key(hash_of(name), "") for name in range(spec.num_names)]
    tier = new_tier(spec)
    found = await tier.open()
    names = [keys.index(block.key) for block in found]
    slots = [block.slot for block in found]
    assert len(set(names)) == len(set(slots)) == len(found)
    assert [block.size for block in found] == [size_of(name, spec.block_bytes) for name in names]
    buffers = [bytearray(block.size) for block in found]
    assert await tier.read(slots, [memoryview(buffer) for buffer in buffers]) == [None] * len(found)
    for name, buffer in zip(names, buffers, strict=True):
        assert buffer == payload_of(name, spec.block_bytes), f"block {name} has other bytes"
    check_recovery(tier, clean, len(found))
    await tier.close(slots)
    check_size(tier)
    return names


async def inspect_with_manager(spec: Round, clean: bool | None) -> list[int]:
    """Do the same as an engine would, in no order, and see that the manager's books balance."""
    hashes = [hash_of(name) for name in range(spec.num_names)]
    cold = new_tier(spec)
    hot = MemoryTier(HOT_BLOCKS, spec.block_bytes)
    async with AsyncLRUManager(hot=hot, cold=cold) as manager:
        places = manager.locate(hashes)
        names = [name for name, at in enumerate(places) if at.state is BlockState.READY]
        check_recovery(cold, clean, len(names))
        for name in names:
            async with manager.load([hashes[name]]) as (view,):
                assert view == payload_of(name, spec.block_bytes), f"block {name} has other bytes"
        manager.check_invariants()
        stats = manager.get_stats()
        assert (stats.io_errors, stats.corrupt, stats.evictions) == (0, 0, 0)
        tier = stats.tiers["cold"]
        assert tier.capacity_blocks == spec.num_blocks == tier.blocks + tier.free_blocks
        assert tier.blocks == len(names)
        assert tier.bytes == sum(size_of(name, spec.block_bytes) for name in names)
    check_size(cold)
    return names


@pytest.fixture
def forker() -> Iterator[Forker]:
    forker = Forker()
    yield forker
    forker.close()


@pytest.mark.skipif(sys.platform != "linux", reason="needs packets between processes, and waitid")
@pytest.mark.timeout(120 + 10 * ROUNDS)
@pytest.mark.parametrize(
    ("block_bytes", "least", "encrypted"),
    [
        (4096, 16, False),
        (5000, 16, False),
        (2**16, 16, False),
        (2**16, 16, True),
        (2**20, 8, False),
    ],
    ids=["4KiB", "5000B", "64KiB", "64KiB-encrypted", "1MiB"],
)
def test_kill_dash_nine_costs_nothing_that_was_promised(
    tmp_path: Path, forker: Forker, block_bytes: int, least: int, encrypted: bool
) -> None:
    """A server is killed at some moment, over and over, and goes on with the same directory."""
    if encrypted:
        pytest.importorskip("cryptography")
    game = Game(tmp_path, forker, block_bytes, least, encrypted=encrypted)
    for number in range(ROUNDS):
        try:
            game.play()
        except BaseException as exc:
            exc.add_note(f"KVOFFLOAD_KILL_SEED={SEED}, round {number}: {game.spec}")
            exc.add_note("\n".join(map(str, game.ledger.history[-12:])))
            raise
    assert game.told >= ROUNDS // 2
    assert game.strict >= ROUNDS // 4
