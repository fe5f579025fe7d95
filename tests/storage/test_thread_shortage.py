"""The system starts no more threads: what can't be run is told, and is not run later."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvoffload import AsyncLRUManager, DiskTier, MemoryTier, TierError, TierUnavailableError
from kvoffload.storage.calls import Call
from kvoffload.storage.threads import Threads
from kvoffload.testing import eventually, payload_for

NAME = "scarce"  # no other test's tier has it, whose threads may be idle still
BLOCK = 4096
GROUP = 2**21


@contextmanager
def no_more_threads() -> Iterator[None]:
    """Be a system at its limit of threads, as far as those of tiers go."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if is_a_tiers(thread):
            raise RuntimeError("can't start new thread")
        start(thread)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        yield


def is_a_tiers(thread: threading.Thread) -> bool:
    return thread.name == f"kvoffload-{NAME}"


async def threads_ended() -> None:
    await eventually(lambda: not any(map(is_a_tiers, threading.enumerate())))


@pytest.fixture(autouse=True)
def idle_threads_end_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvoffload.storage.threads.IDLE_S", 0.01)


@pytest.fixture
def tier(tmp_path: Path) -> DiskTier:
    return DiskTier(tmp_path / "cold", 8, BLOCK, name=NAME, io_threads=2)


async def put(tier: DiskTier, *slots: int) -> list[TierError | None]:
    size = tier.block_bytes
    payloads = [memoryview(payload_for(slot, size)) for slot in slots]
    return await tier.write(slots, payloads, [b"k%d" % slot for slot in slots])


async def run(threads: Threads, function: Callable[[], object]) -> None:
    call = Call(threads)
    await call.submit(function)
    loop, back = asyncio.get_running_loop(), asyncio.Event()
    call.when_back(lambda: (loop.call_soon_threadsafe(back.set), None)[1])
    await back.wait()


async def test_a_call_without_a_thread_is_not_left_in_the_queue() -> None:
    """Its caller is told that it failed: it must not run with the next one, which has a thread."""
    told: list[str] = []
    threads = Threads(2, NAME, lambda: told.append("idle"))
    refused = Call(threads)
    with no_more_threads(), pytest.raises(OSError, match="no more threads"):
        refused.submit(told.append, "refused")
    assert refused.is_back
    await run(threads, lambda: told.append("next"))
    threads.retire()
    assert told == ["next", "idle"]


async def test_a_call_waits_for_the_threads_that_there_are() -> None:
    """With one thread at work, a second call is late and not lost."""
    threads = Threads(2, NAME, lambda: None)
    go_on = threading.Event()
    first = Call(threads).submit(go_on.wait, 30)
    with no_more_threads():
        second = Call(threads).submit(lambda: "done")
    assert not second.done()
    go_on.set()
    assert await first
    assert await second == "done"
    threads.retire()


async def test_a_batch_without_helpers_is_done_by_one_thread(tmp_path: Path) -> None:
    """A helper's thread could not be started, and the batch had failed; the helper ran later.

    By then the caller had its buffers back and used them for something else.
    """
    tier = DiskTier(tmp_path / "cold", 4, GROUP, name=NAME, io_threads=4, direct_io="off")
    await tier.open()
    await put(tier, 0)
    for slot in range(1, 4):
        await put(tier, slot)
    buffers = [bytearray(GROUP) for _ in range(4)]
    with no_more_threads():
        outcomes = await tier.read(range(4), [memoryview(buffer) for buffer in buffers])
    assert outcomes == [None] * 4
    assert buffers == [payload_for(slot, GROUP) for slot in range(4)]
    await tier.close()


async def test_every_operation_tells_that_there_is_no_thread(tier: DiskTier) -> None:
    """As a tier that is not available for now, not as a bare error of the interpreter's."""
    with no_more_threads(), pytest.raises(TierUnavailableError, match="no more threads"):
        await tier.open()
    await tier.open()
    assert await put(tier, 0) == [None]
    await threads_ended()
    buffer = bytearray(BLOCK)
    with no_more_threads():
        outcomes = [*await tier.read([0], [memoryview(buffer)]), *await put(tier, 1)]
        assert [type(outcome) for outcome in outcomes] == [TierUnavailableError] * 2
        with pytest.raises(TierUnavailableError):
            await tier.erase([0])
        with pytest.raises(TierUnavailableError):
            await tier.flush()
    assert await tier.read([0], [memoryview(buffer)]) == [None]
    assert buffer == payload_for(0, BLOCK)
    await tier.close()


async def test_a_close_without_a_thread_lets_go_all_the_same(
    tier: DiskTier, tmp_path: Path
) -> None:
    """It counts as a crash; the directory must not stay locked by a tier that nobody can close."""
    await tier.open()
    await put(tier, 0)
    await threads_ended()
    with no_more_threads(), pytest.raises(TierUnavailableError, match="in good order"):
        await tier.close()
    again = DiskTier(tmp_path / "cold", 8, BLOCK)
    assert [block.slot for block in await again.open()] == [0]
    await again.close()


async def test_a_load_that_failed_leaves_the_next_block_alone(tmp_path: Path) -> None:
    """A load found no thread and failed, but its read stayed queued.

    It ran when there were threads again, into a slot that another block had got meanwhile: who
    loaded that one got the bytes of the first.
    """
    cold = DiskTier(tmp_path / "cold", 4, BLOCK, name=NAME)
    async with AsyncLRUManager(
        hot=MemoryTier(1, BLOCK), cold=cold, policy="lru", promote_threshold=1
    ) as manager:
        for name in (b"a", b"b", b"c"):
            await manager.store([name], [payload_for(name, BLOCK)])
        assert {where.tier for where in manager.locate([b"a", b"b"])} == {NAME}
        await manager.evict([b"c"])
        await threads_ended()
        with no_more_threads(), pytest.raises(TierUnavailableError, match="no more threads"):
            async with manager.load([b"a"]):
                pass
        await manager.store([b"d"], [payload_for(b"d", BLOCK)])
        await cold.erase([3])  # a thread comes, for whatever is queued
        await threads_ended()
        async with manager.load([b"d"]) as lease:
            assert bytes(lease[0]) == payload_for(b"d", BLOCK)
