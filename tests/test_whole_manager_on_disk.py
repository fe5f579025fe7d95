"""The whole manager in any order of calls on a disk that is full, broken, stuck or lies.

The driver of `test_whole_manager_machine`, with cold tiers that are real: their files fail, hang,
run out of space, come back damaged, and are closed and opened again. What it checks at any moment
is also what a kill of the process would leave in them. `KVOFFLOAD_DISK_EXAMPLES` says how many
runs; there are few by default.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from tests.lockstep import Lockstep, LockstepLoop
from tests.test_whole_manager_machine import (
    MOVEMENTS,
    NAMESPACES,
    OTHER,
    POLICIES,
    SHARES,
    TURNS,
    WholeManager,
)

from kvoffload import (
    AsyncLRUManager,
    BlockHash,
    BlockState,
    CorruptBlockError,
    DiskTier,
    MemoryTier,
    OffloadError,
    Tier,
    TierError,
)
from kvoffload.keys import decode_key
from kvoffload.levels import Level
from kvoffload.storage.blocks import AtOnce
from kvoffload.storage.breaker import Breaker
from kvoffload.storage.cipher import Cipher
from kvoffload.storage.files import FileLayer
from kvoffload.storage.recovery import Store, recover
from kvoffload.testing import FaultyFileLayer, FileHang
from kvoffload.testing.faults import Operation
from kvoffload.testing.file_faults import FileCall, Move
from kvoffload.types import Key

pytestmark = [
    pytest.mark.filterwarnings("ignore::kvoffload.DerivedViewWarning"),
    pytest.mark.timeout(3600),  # for more examples, and to shrink what fails
]

EXAMPLES = int(os.environ.get("KVOFFLOAD_DISK_EXAMPLES", "150"))
BLOCK_BYTES = 4096  # of which each takes space of its own
IO_TIMEOUT_S = 80.0
LONG_S = 1000.0
KEY = bytes(range(32))
SIZES = (0, 4096, 100, 4095, 4096, 1, 4096, 512, 3000, 4096)

LAYOUTS = {
    "disk": [("cold", 3)],
    "hot and cold": [("", 2), ("cold", 4)],
    "little hot and cold": [("", 1), ("cold", 2)],
    "three": [("", 2), ("", 2), ("cold", 3)],
    "two disks": [("hot", 2), ("cold", 3)],
    "three with two disks": [("", 2), ("warm", 2), ("cold", 3)],
}
CALLS: list[FileCall] = ["sync", "open", "links", "free_bytes"]
CALLS += ["pwritev", "pwritev", "pwritev", "pwritev", "preadv", "preadv", "preadv"]  # most are
OPENING: list[FileCall] = ["pwritev", "preadv", "open", "lock", "size", "truncate", "sync"]
FILES = st.sampled_from(["*", "slab-*", "records", "records"])
TIMES = st.sampled_from([1, 1, 2, 3, None])
FIRST = st.integers(0, 9)
THEN = st.sampled_from(["", "store", "store", "load", "evict", "flush"])
AFTER = st.sampled_from([0, 0, 0, 1, 2])


class NeverSynced(FileLayer):
    """The operating system's files; nothing here loses power."""

    def sync(self, fd: int, *, names: bool = False) -> None:
        pass


@dataclass(eq=False)
class Disk:
    """One directory, its files and what was done to them."""

    path: Path
    num_blocks: int
    files: FaultyFileLayer
    tier: DiskTier
    damaged: bool = False  # since it is there
    unsynced: bool = False  # since it was opened

    @property
    def is_released(self) -> bool:
        session = self.tier._session
        return session is None or session.released


class WholeManagerOnDisk(WholeManager):
    """Every call of the contract, overlapping, on tiny tiers of which some are directories."""

    block_bytes = BLOCK_BYTES

    def __init__(self) -> None:
        self.lockstep = Lockstep()
        self.lockstep.install()
        self.place = Path(tempfile.mkdtemp(prefix="kvoffload-"))
        self.disks: dict[str, Disk] = {}
        self.hangs: list[FileHang] = []
        self.found: dict[Disk, dict[int, tuple[str, BlockHash]]] = {}
        self.elsewhere = ThreadPoolExecutor(1)
        super().__init__()

    def make_loop(self) -> asyncio.AbstractEventLoop:
        return LockstepLoop(self.lockstep)

    @initialize(
        layout=st.sampled_from(sorted(LAYOUTS)),
        policy=st.sampled_from(sorted(POLICIES)),
        staging=st.integers(1, 6),
        threshold=st.integers(1, 2),
        io_threads=st.integers(1, 2),
        direct_io=st.sampled_from(["off", "auto"]),
        fsync=st.sampled_from(["flush", "flush", "always"]),
        key=st.sampled_from([None, None, KEY]),
        min_free_blocks=st.sampled_from([0, 0, 1]),
        close_timeout_s=st.sampled_from([1.0, LONG_S]),
        movement=st.sampled_from(sorted(MOVEMENTS)),
        shares=st.sampled_from(["none", *sorted(SHARES)]),
    )
    def open(
        self,
        layout: str,
        policy: str,
        staging: int,
        threshold: int,
        io_threads: int,
        direct_io: str,
        fsync: str,
        key: bytes | None,
        min_free_blocks: int,
        close_timeout_s: float,
        movement: str,
        shares: str,
    ) -> None:
        self.movement = movement
        self.shares = SHARES[shares](BLOCK_BYTES)
        self.layout = LAYOUTS[layout]
        self.faulty = []
        self.staging_bytes, self.promote_threshold = staging * BLOCK_BYTES, threshold
        self.policy = policy
        self.key = key
        self.close_timeout_s = close_timeout_s
        self.options: dict[str, Any] = {
            "io_threads": io_threads,
            "direct_io": direct_io,
            "fsync": fsync,
            "encryption_key": key,
            "min_free_bytes": min_free_blocks * BLOCK_BYTES,
            "io_timeout_s": IO_TIMEOUT_S,
        }
        for name, num_blocks in self.layout:
            if name:
                path = self.place / name
                files = FaultyFileLayer(NeverSynced())
                self.disks[name] = Disk(path, num_blocks, files, DiskTier(path, 1, 1))
        self.open_manager()
        self.opened = True

    def new_tiers(self) -> list[Tier]:
        names = iter(("hot", "warm", "cold"))
        tiers: list[Tier] = []
        for directory, num_blocks in self.layout:
            name = next(names)
            if not directory:
                tiers.append(MemoryTier(num_blocks, BLOCK_BYTES, name=name))
                continue
            disk = self.disks[directory]
            tier = DiskTier(disk.path, disk.num_blocks, BLOCK_BYTES, name=name, **self.options)
            tier.file_layer = disk.files
            tier.write_breaker = Breaker(2, clock=self.lockstep.clock)
            tier.growth_breaker = Breaker(1, clock=self.lockstep.clock)
            disk.tier = tier
            tiers.append(tier)
        return tiers

    def open_manager(self) -> None:
        self.tiers = self.new_tiers()
        self.kv = self.make_manager()
        self.loop.run_until_complete(self.enter(self.kv))
        self.closed = False
        for disk in self.disks.values():
            disk.unsynced = False

    # More that reaches the disk

    @precondition(lambda self: not self.closed)
    @rule(what=st.sampled_from(["store", "load", "evict"]), first=FIRST, namespace=NAMESPACES)
    def much(self, what: str, first: int, namespace: str) -> None:
        self.do_much(what, first, namespace)

    def do_much(self, what: str, first: int, namespace: str = "") -> None:
        chain = [number % 10 for number in range(first, first + 5)]
        if what == "store":
            self.store(chain, namespace, 30)
        elif what == "load":
            for one in chain:
                self.load([one], namespace, None, derive=False, turns=15)
                self.end_a_call(-1, "let go", 3)
        elif what == "evict":
            self.evict(chain, namespace, 20)
        elif what == "flush":
            self.clear_or_flush(namespace, "flush", 20)

    # Trouble

    @precondition(lambda self: not self.closed)
    @rule(
        which=st.integers(0, 1),
        call=st.sampled_from(CALLS),
        error=st.sampled_from([errno.EIO, errno.EIO, errno.ENOSPC, errno.EROFS]),
        times=TIMES,
        after=AFTER,
        files=FILES,
        late=st.booleans(),
        then=THEN,
        first=FIRST,
    )
    def file_calls_fail(
        self,
        which: int,
        call: FileCall,
        error: int,
        times: int | None,
        after: int,
        files: str,
        late: bool,
        then: str,
        first: int,
    ) -> None:
        disk = self.disk(which)
        late = late and call in ("pwritev", "truncate", "sync")
        disk.files.fail(call, error, times=times, after=after, files=files, late=late)
        disk.unsynced |= call in ("sync", "links")
        self.do_much(then, first)

    @precondition(lambda self: not self.closed)
    @rule(
        which=st.integers(0, 1),
        call=st.sampled_from(CALLS),
        times=TIMES,
        after=AFTER,
        files=FILES,
        then=THEN,
        first=FIRST,
        give_up=st.booleans(),
    )
    def file_calls_hang(
        self,
        which: int,
        call: FileCall,
        times: int | None,
        after: int,
        files: str,
        then: str,
        first: int,
        give_up: bool,
    ) -> None:
        hang = self.disk(which).files.hang(
            call, times=times, after=after, files=files, give_up_s=600
        )
        self.hangs.append(hang)
        self.do_much(then, first)
        if give_up:
            self.time_passes(IO_TIMEOUT_S + 1, 10)

    @precondition(lambda self: not self.closed)
    @rule(which=st.integers(0, 1), hangs=st.booleans(), first=FIRST)
    def records_can_not_be_undone(self, which: int, hangs: bool, first: int) -> None:
        """A record is written, but its writer is told otherwise, and fails to take it back."""
        files = self.disk(which).files
        files.fail("pwritev", files="records", after=1)
        if hangs:
            self.file_calls_hang(which, "pwritev", 1, 0, "records", "store", first, give_up=True)
        else:
            files.fail("pwritev", files="records", late=True)
            self.do_much("store", first)

    @rule(which=st.integers(0, 9), turns=TURNS)
    def let_go_of_file_calls(self, which: int, turns: int) -> None:
        if self.hangs:
            self.hangs.pop(which % len(self.hangs)).stop()
            self.loop.run_until_complete(self.turn(turns))

    @precondition(lambda self: not self.closed)
    @rule(
        which=st.integers(0, 1),
        call=st.sampled_from(["pwritev", "preadv"]),
        what=st.sampled_from(["flip", "flip", "lose", "cut"]),
        times=st.sampled_from([1, 2]),
    )
    def payloads_are_damaged(self, which: int, call: Move, what: str, times: int) -> None:
        disk = self.disk(which)
        if what == "cut":  # which is no damage, for who is told so goes on
            disk.files.cut_short(call, keep_bytes=40, times=times, files="slab-*")
            return
        disk.damaged = True
        if what == "lose":
            disk.files.lose("pwritev", times=times, files="slab-*")
        else:
            disk.files.flip_bit(call, times=times, files="slab-*")

    @precondition(lambda self: not self.closed)
    @rule(which=st.integers(0, 1), free_blocks=st.sampled_from([0, 0, 1, 2, 10**6]))
    def disk_is_full(self, which: int, free_blocks: int) -> None:
        """Or has space again."""
        self.disk(which).files.fill(free_blocks * BLOCK_BYTES)

    @precondition(lambda self: not self.closed)
    @rule(turns=TURNS)
    def heal(self, turns: int) -> None:
        async def call() -> None:
            self.heal_tiers()
            await self.turn(turns)

        self.loop.run_until_complete(call())

    @rule(seconds=st.sampled_from([1.5, IO_TIMEOUT_S + 1, 2 * IO_TIMEOUT_S]), turns=TURNS)
    def time_passes(self, seconds: float, turns: int) -> None:
        """What hangs is given up, and what was refused for a while is tried again."""
        self.lockstep.now += seconds
        self.loop.run_until_complete(self.turn(turns))

    # Looking from outside, and starting again

    @precondition(lambda self: not self.closed)
    @rule()
    def process_could_be_killed(self) -> None:
        self.check_records()

    @precondition(lambda self: not self.closed)
    @rule(
        settled=st.sampled_from([False, False, True]),
        hang=st.sampled_from([None, None, "pwritev", "preadv", "sync", "open"]),
        resize=st.sampled_from([0, 0, 0, -1, 1]),
        at_open=st.sampled_from([None] * 4 + OPENING),
        after=st.integers(0, 6),
    )
    def start_again(
        self,
        settled: bool,
        hang: FileCall | None,
        resize: int,
        at_open: FileCall | None,
        after: int,
    ) -> None:
        """Close the manager, in good order or in the middle of everything, and open another."""
        ready: set[tuple[str, BlockHash]] | None = None
        if settled:
            self.settle()
            hang = None
            ready = self.loop.run_until_complete(self.make_durable())
        clean = self.shut_down(hang, heal=settled)
        self.blocks_before = [disk.num_blocks for disk in self.disks.values()]
        for disk in self.disks.values():
            disk.num_blocks = max(1, disk.num_blocks + resize)
        if at_open is not None:
            for disk in self.disks.values():
                disk.files.fail(at_open, after=after)
        with suppress(TierError):
            self.open_manager()
        self.heal_tiers()
        if self.closed:
            assert at_open is not None
            self.loop.run_until_complete(self.until(self.all_released, "it stays locked"))
            self.open_manager()
        # What the disk can't read when it is opened is lost.
        whole = clean and at_open != "preadv"
        self.loop.run_until_complete(self.check_opened(ready if whole else None))

    def close(self, hang: Operation | None) -> None:
        """No rule: it is opened again each time, and the run goes on."""
        self.shut_down(None, heal=True)

    def nothing_more(self) -> None:
        """No rule either."""

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            self.heal_tiers()
            self.lockstep.wait()
            for disk in self.disks.values():
                session = disk.tier._session
                if session is not None:  # after a failure
                    session.threads.retire()
            self.lockstep.uninstall()
            self.elsewhere.shutdown()
            shutil.rmtree(self.place)

    # Inside

    def disk(self, which: int) -> Disk:
        return list(self.disks.values())[which % len(self.disks)]

    def size_of(self, number: int) -> int:
        return SIZES[number]

    def heal_tiers(self) -> None:
        for disk in self.disks.values():
            disk.files.heal()
        self.hangs.clear()

    async def turn(self, turns: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
            self.lockstep.wait()

    def all_released(self) -> bool:
        return all(disk.is_released for disk in self.disks.values())

    async def make_durable(self) -> set[tuple[str, BlockHash]] | None:
        """Flush on a healthy disk; return what must be there after a restart, if all of it must."""
        self.lockstep.now += LONG_S
        persistent = [disk.num_blocks for disk in self.disks.values()]
        try:
            result = await self.kv.flush()
        except TierError:
            assert any(disk.unsynced for disk in self.disks.values())
            return None
        ready = self.ready_blocks()
        assert result.durable + result.not_durable == len(ready)
        if len(persistent) == 1:
            assert result.durable == min(len(ready), persistent[0])
        return None if result.not_durable else ready

    def ready_blocks(self) -> set[tuple[str, BlockHash]]:
        keys = self.kv._core.index.ready
        return {key if isinstance(key, tuple) else ("", key) for key in keys}

    def shut_down(self, hang: FileCall | None, *, heal: bool) -> bool:
        """Close the manager; return whether that went well."""

        async def call() -> bool:
            if heal:
                self.heal_tiers()
            if hang is not None:
                for disk in self.disks.values():
                    disk.files.hang(hang, give_up_s=600)
            self.closed = True
            clean = True
            try:
                await self.kv.__aexit__(None, None, None)
            except OffloadError:
                clean = False
                assert not heal or any(disk.unsynced for disk in self.disks.values())
            self.check_records()
            self.heal_tiers()
            for one in self.calls:
                one.let_go.set()
            await self.until(lambda: not self.calls, "calls go on after the close")
            await self.until(self.all_released, "it stays locked")
            assert asyncio.all_tasks() == {asyncio.current_task()}
            self.stores.clear()
            self.loads.clear()
            self.check_records()
            return clean

        if not self.can_jump:
            self.heal_tiers()
            hang = None
        return self.loop.run_until_complete(call())

    can_jump = True

    async def check_opened(self, expected: set[tuple[str, BlockHash]] | None) -> None:
        self.kv.check_invariants()
        found = self.ready_blocks()
        assert not found & self.gone
        total = sum(disk.num_blocks for disk in self.disks.values())
        assert len(found) <= total
        damaged = any(disk.damaged for disk in self.disks.values())
        if expected is not None and not damaged:
            # There may be more: what only gave way is not erased, and comes back if there is room.
            assert len(found) >= min(total, len(expected)) or len(self.disks) > 1
            assert found >= expected or total < sum(self.blocks_before)
        await self.check_bytes(self.kv)

    async def check_bytes(self, kv: AsyncLRUManager) -> None:
        damaged = any(disk.damaged for disk in self.disks.values())
        for namespace in ("", OTHER):
            view = self.view(namespace, kv)
            for one in range(len(SIZES)):
                if not await view.lookup([one]):
                    continue
                assert (namespace, one) not in self.gone
                try:
                    async with view.load([one]) as lease:
                        assert bytes(lease[0]) == self.payload(namespace, one)
                except CorruptBlockError:
                    assert damaged
                    assert view.locate([one])[0].state is BlockState.ABSENT

    async def settled(self) -> None:
        await super().settled()
        await self.until(lambda: not self.kv._core.jobs.running, "jobs go on")
        self.check_records()
        for level in self.kv._core.index.levels:
            for disk in self.disks.values():
                if disk.tier is level.tier:
                    self.check_known(level, self.found[disk])

    def check_known(self, level: Level, found: dict[int, tuple[str, BlockHash]]) -> None:
        """Each record is of a block that is there, or kept in mind: else none could erase it."""
        known: dict[int, set[Key]] = {slot: set(keys) for slot, keys in level.stale_slots.items()}
        for key, entry in self.kv._core.index.ready.items():
            places = {entry.level: entry.slot, **(entry.copies or {})}
            if level.number in places:
                known.setdefault(places[level.number], set()).add(key)
        for slot, name in found.items():
            keys = known.get(slot, set())
            assert name in [key if isinstance(key, tuple) else ("", key) for key in keys]

    def check_records(self) -> None:
        """What a kill at this moment would leave are the right bytes, and nothing that is gone."""
        self.lockstep.wait()
        for disk in self.disks.values():
            copy = self.place / "copy"
            if not disk.path.exists():
                continue
            shutil.copytree(disk.path, copy)
            try:
                # Not here, where a loop may run, which kvoffload would block.
                self.elsewhere.submit(self.check_copy, disk, copy).result()
            finally:
                shutil.rmtree(copy)

    def check_copy(self, disk: Disk, copy: Path) -> None:
        cipher = None if self.key is None else Cipher(self.key)
        store = Store(NeverSynced(), copy, BLOCK_BYTES, cipher=cipher)
        recovered = recover(store, disk.num_blocks)
        try:
            seen: dict[int, tuple[str, BlockHash]] = {}
            for block in recovered.found:
                key = decode_key(block.key)
                assert key not in seen.values()
                seen[block.slot] = key
                assert key not in self.gone, f"{key} is back"
                payload = bytearray(block.size)
                outcomes: list[OSError | None] = [None]
                recovered.blocks.read([block.slot], [memoryview(payload)], outcomes, AtOnce())
                if outcomes[0] is None:
                    assert payload == self.payload(*key)
                else:
                    assert outcomes[0].errno == errno.EBADMSG
                    assert disk.damaged
            self.found[disk] = seen
        finally:
            store.close()


class WholeManagerOnDiskAndUvloop(WholeManagerOnDisk):
    """Time does not pass on this loop, so what hangs does so until it is let go."""

    can_jump = False

    def make_loop(self) -> asyncio.AbstractEventLoop:
        return uvloop.new_event_loop()


def new_settings(max_examples: int) -> settings:
    return settings(
        max_examples=max_examples,
        # The same walks each time, unless somebody asks for more of them.
        derandomize="KVOFFLOAD_DISK_EXAMPLES" not in os.environ,
        stateful_step_count=50,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


TestOnAsyncio = WholeManagerOnDisk.TestCase
TestOnAsyncio.settings = new_settings(EXAMPLES)
TestOnUvloop = WholeManagerOnDiskAndUvloop.TestCase
TestOnUvloop.settings = new_settings(max(1, EXAMPLES // 3))
