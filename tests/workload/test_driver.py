"""The replay driver, on a manager of a dozen lines that can be told to misbehave."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from time import perf_counter

import anyio
import pytest

from kvoffload.errors import (
    BlockNotFoundError,
    CapacityError,
    ClosedError,
    ConfigError,
    LoadTimeoutError,
    OffloadError,
    TierError,
)
from kvoffload.metrics import ManagerStats, TierStats
from kvoffload.types import BlockHash, Buffer, Lease, Medium, RejectReason, StoreResult
from kvoffload.workload import PayloadBuffer, PayloadCodec, TraceRequest, Workload, replay

BLOCK_BYTES = 100


class PlainManager:
    """Keeps everything in a dictionary."""

    def __init__(self) -> None:
        self.blocks: dict[BlockHash, bytes] = {}
        self.load_error: OffloadError | None = None
        self.reject: RejectReason | None = None
        self.on_enter: Callable[[], None] = lambda: None
        self.gate: anyio.Event | None = None
        self.inside = self.most_inside = 0
        self.store_calls: list[int] = []
        self.loads = 0
        self.evictions = 7

    async def lookup(self, block_hashes: Sequence[BlockHash]) -> int:
        for count, block_hash in enumerate(block_hashes):
            if block_hash not in self.blocks:
                return count
        return len(block_hashes)

    @asynccontextmanager
    async def request(self, block_hashes: Sequence[BlockHash]) -> AsyncIterator[PlainRequest]:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        self.on_enter()
        if self.gate is not None:
            await self.gate.wait()
        yield PlainRequest(self, block_hashes, await self.lookup(block_hashes))
        self.inside -= 1

    def get_stats(self) -> ManagerStats:
        size = sum(map(len, self.blocks.values()))
        tier = TierStats(Medium.CPU, 1000, blocks=len(self.blocks), bytes_written=size)
        return ManagerStats(evictions=self.evictions, tiers={"hot": tier})


class PlainRequest:
    def __init__(self, manager: PlainManager, block_hashes: Sequence[BlockHash], hit: int) -> None:
        self.manager = manager
        self.block_hashes = block_hashes
        self.hit = self.next = hit

    @asynccontextmanager
    async def load(self, *, timeout_s: float | None = None) -> AsyncIterator[Lease]:
        if self.manager.load_error is not None:
            raise self.manager.load_error
        self.manager.loads += 1
        hashes = self.block_hashes[: self.hit]
        yield Lease(hashes, [memoryview(self.manager.blocks[key]) for key in hashes])

    async def store(self, payloads: Sequence[Buffer]) -> StoreResult:
        self.manager.store_calls.append(len(payloads))
        hashes = self.block_hashes[self.next : self.next + len(payloads)]
        assert len(hashes) == len(payloads)
        self.next += len(payloads)
        if self.manager.reject is not None:
            return StoreResult(rejected=dict.fromkeys(hashes, self.manager.reject))
        self.manager.blocks.update(
            (key, bytes(payload)) for key, payload in zip(hashes, payloads, strict=True)
        )
        return StoreResult(stored=tuple(hashes))


def workload(*chains: Sequence[int]) -> Workload:
    return Workload("w", [TraceRequest(1000.0 * i, tuple(ids)) for i, ids in enumerate(chains)])


async def test_hits_are_loaded_and_the_rest_is_stored() -> None:
    manager = PlainManager()
    work = workload((1, 2, 3), (1, 2, 4), (1, 2, 3), ())
    done: list[int] = []
    report = await replay(
        manager,
        work,
        block_bytes=BLOCK_BYTES,
        concurrency=1,
        on_request=lambda: done.append(len(manager.blocks)),
    )
    assert done == [3, 4, 4, 4]
    assert (report.requests, report.blocks, report.hit_blocks) == (4, 9, 5)
    assert report.prefix_hit_ratio == 5 / 9
    assert (report.wrong_bytes, report.verified_bytes) == (0, 5 * BLOCK_BYTES)
    assert manager.store_calls == [3, 1]
    assert (report.lookup.calls, report.load.calls, report.store.calls) == (4, 2, 2)
    assert 0 < report.store.p50 <= report.store.p99 < report.seconds * 1e6
    assert set(manager.blocks) == {key for chain in work.chains for key in chain}
    codec = PayloadCodec(BLOCK_BYTES)
    stored = [memoryview(manager.blocks[key]) for key in work.chains[0]]
    assert codec.wrong_bytes(work.chains[0], stored) == 0


async def test_stats_are_those_of_the_replay_not_of_what_was_before() -> None:
    manager = PlainManager()
    await replay(manager, workload((1, 2)), block_bytes=BLOCK_BYTES)
    manager.on_enter = lambda: setattr(manager, "evictions", 9)
    report = await replay(manager, workload((1, 2, 3)), block_bytes=BLOCK_BYTES)
    assert report.evictions == 2
    hot = report.tiers["hot"]
    assert (hot.medium, hot.capacity_blocks, hot.blocks) == ("cpu", 1000, 3)
    assert hot.bytes_written == BLOCK_BYTES
    assert hot.write_gb_per_s == BLOCK_BYTES / report.seconds / 1e9


async def test_every_wrong_byte_is_counted() -> None:
    manager = PlainManager()
    work = workload((1, 2, 3))
    await replay(manager, work, block_bytes=BLOCK_BYTES)
    first, second, third = work.chains[0]
    blocks = manager.blocks
    blocks[first] = bytes(b ^ 1 if at in (0, 50, 99) else b for at, b in enumerate(blocks[first]))
    blocks[second], blocks[third] = blocks[third], blocks[second]
    swapped = sum(a != b for a, b in zip(blocks[second], blocks[third], strict=True))
    report = await replay(manager, work, block_bytes=BLOCK_BYTES)
    assert report.wrong_bytes == 3 + 2 * swapped
    assert swapped > BLOCK_BYTES // 2


async def test_wrong_bytes_of_requests_under_way_at_once_add_up() -> None:
    """All requests are checked at the same time; none may overwrite what another one found."""
    manager = PlainManager()
    chains = [[n, n + 100] for n in range(8)]
    work = workload(*chains)
    await replay(manager, work, block_bytes=BLOCK_BYTES)
    for chain in work.chains[::2]:
        manager.blocks[chain[1]] = bytes(b ^ 255 for b in manager.blocks[chain[1]])
    manager.gate = gate = anyio.Event()
    manager.on_enter = lambda: gate.set() if manager.inside == 8 else None
    report = await replay(manager, work, block_bytes=BLOCK_BYTES)
    assert manager.most_inside == 8
    assert report.wrong_bytes == 4 * BLOCK_BYTES


@pytest.mark.parametrize(
    "error",
    [
        CapacityError("full"),
        LoadTimeoutError("late"),
        TierError("broken", tier="cold"),
        BlockNotFoundError("gone", block_hashes=[b"x"]),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_failed_load_is_counted_and_the_next_request_goes_on(error: OffloadError) -> None:
    manager = PlainManager()
    await replay(manager, workload((1,)), block_bytes=BLOCK_BYTES)
    manager.load_error = error
    report = await replay(manager, workload((1, 2), (3, 4)), block_bytes=BLOCK_BYTES, concurrency=1)
    assert (report.requests, report.failed_loads, report.load.calls) == (2, 1, 0)
    assert (report.hit_blocks, report.verified_bytes) == (1, 0)
    assert report.load == type(report.load)(0, 0.0, 0.0)
    assert len(manager.blocks) == 3


async def test_a_rejection_ends_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvoffload.workload.driver.STORE_BYTES", 2 * BLOCK_BYTES)
    manager = PlainManager()
    manager.reject = RejectReason.FULL
    report = await replay(manager, workload(range(7)), block_bytes=BLOCK_BYTES)
    assert manager.store_calls == [2]
    assert report.rejected == 2


async def test_a_long_chain_is_stored_in_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvoffload.workload.driver.STORE_BYTES", 3 * BLOCK_BYTES + 1)
    manager = PlainManager()
    work = workload(range(1), range(8))
    await replay(manager, work, block_bytes=BLOCK_BYTES, concurrency=1)
    assert manager.store_calls == [1, 3, 3, 1]
    report = await replay(manager, work, block_bytes=BLOCK_BYTES)
    assert (report.prefix_hit_ratio, report.wrong_bytes) == (1.0, 0)


async def test_a_block_larger_than_one_call_is_stored_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvoffload.workload.driver.STORE_BYTES", BLOCK_BYTES - 1)
    manager = PlainManager()
    await replay(manager, workload(range(3)), block_bytes=BLOCK_BYTES)
    assert manager.store_calls == [1, 1, 1]


async def test_as_many_requests_as_asked_for_are_under_way_at_once() -> None:
    manager = PlainManager()
    manager.gate = gate = anyio.Event()

    def open_when_all_are_here() -> None:
        if manager.inside == 3:
            gate.set()

    manager.on_enter = open_when_all_are_here
    report = await replay(
        manager, workload(*([n] for n in range(20))), block_bytes=BLOCK_BYTES, concurrency=3
    )
    assert report.requests == 20
    assert manager.most_inside == 3


async def test_requests_wait_for_their_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    """At speed 4 a request a second comes every quarter of a second; the clock is ours."""
    now = 50.0
    slept: list[float] = []

    async def sleep_until(deadline: float) -> None:
        nonlocal now
        slept.append(deadline)
        now = max(now, deadline) + 0.125

    monkeypatch.setattr(anyio, "current_time", lambda: now)
    monkeypatch.setattr(anyio, "sleep_until", sleep_until)
    report = await replay(
        PlainManager(), workload((1,), (2,), (3,)), block_bytes=8, concurrency=1, speed=4
    )
    assert slept == [50.0, 50.25, 50.5]
    assert report.late_max_s == 0.125


async def test_payloads_are_made_and_checked_off_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: list[tuple[str, int]] = []
    fill, wrong_bytes = PayloadBuffer.fill, PayloadCodec.wrong_bytes

    def fill_here(buffer: PayloadBuffer, block_hashes: Sequence[bytes]) -> list[memoryview]:
        threads.append(("fill", threading.get_ident()))
        return fill(buffer, block_hashes)

    def check_here(
        codec: PayloadCodec, block_hashes: Sequence[bytes], payloads: Sequence[memoryview]
    ) -> int:
        threads.append(("check", threading.get_ident()))
        return wrong_bytes(codec, block_hashes, payloads)

    monkeypatch.setattr(PayloadBuffer, "fill", fill_here)
    monkeypatch.setattr(PayloadCodec, "wrong_bytes", check_here)
    await replay(PlainManager(), workload((1, 2), (1, 2, 3)), block_bytes=8, concurrency=1)
    assert [what for what, _ in threads] == ["fill", "check", "fill"]
    assert threading.get_ident() not in {thread for _, thread in threads}


async def test_the_probe_sees_the_event_loop_held_up() -> None:
    manager = PlainManager()

    def hold_the_loop() -> None:
        until = perf_counter() + 0.03
        while perf_counter() < until:
            pass

    manager.on_enter = hold_the_loop
    report = await replay(manager, workload((1,)), block_bytes=8)
    assert 20 < report.loop_lag_max_ms <= report.seconds * 1e3
    assert report.loop_lag_p99_ms <= report.loop_lag_max_ms


async def test_a_bug_in_the_manager_is_not_counted_but_raised() -> None:
    manager = PlainManager()
    await replay(manager, workload((1,)), block_bytes=BLOCK_BYTES)
    manager.load_error = ClosedError("closed")
    with pytest.raises(ExceptionGroup) as caught:
        await replay(manager, workload((1,)), block_bytes=BLOCK_BYTES)
    matched, rest = caught.value.split(ClosedError)
    assert matched is not None
    assert rest is None


async def test_nothing_to_replay_gives_an_empty_report() -> None:
    report = await replay(PlainManager(), Workload("w", []), block_bytes=BLOCK_BYTES)
    assert (report.requests, report.blocks, report.prefix_hit_ratio) == (0, 0, 0.0)


@pytest.mark.parametrize(
    "options",
    [
        {"block_bytes": 0},
        {"concurrency": 0},
        {"speed": -1.0},
        {"speed": float("nan")},
        {"speed": float("inf")},
    ],
    ids=str,
)
async def test_numbers_out_of_range_are_refused(options: dict[str, float]) -> None:
    arguments = {"block_bytes": 8, "concurrency": 1, "speed": 0.0, **options}
    with pytest.raises(ConfigError, match=next(iter(options))):
        await replay(PlainManager(), workload((1,)), **arguments)  # type: ignore[arg-type]
