from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import anyio
import pytest
from anyio.lowlevel import checkpoint

from kvoffload import (
    ConfigError,
    CorruptBlockError,
    DiskTier,
    MemoryTier,
    TierError,
    TierLockedError,
    TierUnavailableError,
)
from kvoffload.keys import encode_key
from kvoffload.testing import (
    CountingTier,
    FaultyTier,
    ManualClock,
    RestartableTier,
    cancel_everywhere,
    payload_for,
)
from kvoffload.testing.faults import OPERATIONS, Operation

SIZE = 16


def memory() -> FaultyTier:
    return FaultyTier(MemoryTier(8, SIZE))


async def write(tier: FaultyTier, slots: Sequence[int]) -> list[TierError | None]:
    payloads = [memoryview(payload_for(slot, SIZE)) for slot in slots]
    return await tier.write(slots, payloads, [encode_key(f"block{slot}", "") for slot in slots])


async def read(
    tier: FaultyTier, slots: Sequence[int]
) -> tuple[list[TierError | None], list[bytes]]:
    buffers = [bytearray(SIZE) for _ in slots]
    outcomes = await tier.read(slots, [memoryview(buffer) for buffer in buffers])
    return outcomes, [bytes(buffer) for buffer in buffers]


async def call(tier: FaultyTier, operation: Operation) -> object:
    match operation:
        case "open":
            return await tier.open()
        case "read":
            return (await read(tier, [1]))[0][0]
        case "write":
            return (await write(tier, [1]))[0]
        case "erase":
            await tier.erase([1])
        case "flush":
            await tier.flush()
        case "close":
            await tier.close()
    return None


async def error_of(tier: FaultyTier, operation: Operation) -> BaseException | None:
    """The error of a call, whether it was raised or reported."""
    try:
        outcome = await call(tier, operation)
    except Exception as error:  # noqa: BLE001 - whatever it is
        return error
    return outcome if isinstance(outcome, BaseException) else None


# Failures


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_an_os_error_is_reported_as_a_tier_does(operation: Operation) -> None:
    tier = memory()
    if operation != "open":
        await tier.open()
    full = OSError(errno.ENOSPC, "disk full")
    fault = tier.fail(operation, full)
    error = await error_of(tier, operation)
    assert type(error) is TierError
    assert error.tier == "hot"
    assert error.__cause__ is full
    assert "disk full" in str(error)
    assert fault.triggered == 1
    assert await error_of(tier, operation) is None


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_a_class_of_tier_errors_is_enough(operation: Operation) -> None:
    tier = memory()
    if operation != "open":
        await tier.open()
    tier.fail(operation, TierUnavailableError)
    error = await error_of(tier, operation)
    assert type(error) is TierUnavailableError
    assert error.tier == "hot"


async def test_a_tier_error_is_reported_as_it_is() -> None:
    tier = memory()
    locked = TierLockedError("pid 1 has it", tier="hot")
    tier.fail("open", locked)
    with pytest.raises(TierLockedError) as caught:
        await tier.open()
    assert caught.value is locked


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_any_other_error_is_a_bug_in_the_tier(operation: Operation) -> None:
    """A manager must survive it, so it has to get it as it would: raised."""
    tier = memory()
    if operation != "open":
        await tier.open()
    tier.fail(operation, ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        await call(tier, operation)


async def test_the_nth_call_fails() -> None:
    tier = memory()
    await tier.open()
    tier.fail("write", after=2, times=2)
    errors = [(await write(tier, [slot]))[0] is not None for slot in range(6)]
    assert errors == [False, False, True, True, False, False]


async def test_every_call_fails_until_stopped() -> None:
    tier = memory()
    await tier.open()
    with tier.fail("flush", times=None) as fault:
        for _ in range(5):
            with pytest.raises(TierError):
                await tier.flush()
    assert fault.triggered == 5
    await tier.flush()


async def test_chosen_slots_fail_and_the_others_are_done() -> None:
    """The block of a failed slot is named by its outcome."""
    tier = memory()
    await tier.open()
    tier.fail("write", slots={2, 5})
    assert await write(tier, [1, 3]) == [None, None]  # not concerned, so not counted
    outcomes = await write(tier, [1, 2, 3, 5])
    assert [outcome is None for outcome in outcomes] == [True, False, True, False]
    assert outcomes[1] is not None
    assert outcomes[1].block_hash == "block2"
    tier.fail("read", slots=[3])
    outcomes, payloads = await read(tier, [3, 1])
    assert outcomes[1] is None
    assert payloads[1] == payload_for(1, SIZE)
    assert outcomes[0] is not None
    assert outcomes[0].block_hash == "block3"


async def test_a_failed_write_leaves_what_was_there() -> None:
    tier = memory()
    await tier.open()
    await write(tier, [1])
    tier.fail("write")
    await tier.write([1], [memoryview(bytes(SIZE))], [encode_key("other", "")])
    assert await read(tier, [1]) == ([None], [payload_for(1, SIZE)])


async def test_a_failing_close_closes(tmp_path: Path) -> None:
    """Or every test of a failing close would leak the inner tier's files."""
    tier = FaultyTier(DiskTier(tmp_path / "cold", 8, SIZE))
    await tier.open()
    tier.fail("close", OSError(errno.EIO, "input/output error"))
    with pytest.raises(TierError):
        await tier.close()
    again = DiskTier(tmp_path / "cold", 8, SIZE)
    await again.open()
    await again.close()


async def test_a_failing_erase_erases_the_other_slots() -> None:
    inner = CountingTier(MemoryTier(8, SIZE))
    tier = FaultyTier(inner)
    await tier.open()
    tier.fail("erase", slots={2})
    with pytest.raises(TierError):
        await tier.erase([1, 2, 3])
    assert [call.slots for call in inner.log if call.operation == "erase"] == [(1, 3)]


async def test_hashes_are_known_after_a_restart() -> None:
    inner = RestartableTier(8, SIZE)
    first = FaultyTier(inner)
    await first.open()
    await write(first, [4])
    await first.close()
    second = FaultyTier(inner)
    await second.open()
    second.fail("read")
    [outcome], _ = await read(second, [4])
    assert outcome is not None
    assert outcome.block_hash == "block4"


async def test_heal_ends_everything() -> None:
    tier = memory()
    await tier.open()
    tier.fail("write", times=None)
    tier.flip_byte("write", times=None)
    hang = tier.hang("write")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write, tier, [1])
        await hang.entered.wait()
        tier.heal()
    assert await write(tier, [1]) == [None]
    assert await read(tier, [1]) == ([None], [payload_for(1, SIZE)])


# Hangs and delays


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_a_hang_lasts_until_it_is_released(operation: Operation) -> None:
    tier = memory()
    if operation != "open":
        await tier.open()
    done = False

    async def work() -> None:
        nonlocal done
        await call(tier, operation)
        done = True

    hang = tier.hang(operation)
    async with anyio.create_task_group() as tasks:
        assert not hang.entered.is_set()
        tasks.start_soon(work)
        await hang.entered.wait()
        await anyio.wait_all_tasks_blocked()
        assert (hang.waiting, done) == (1, False)
        hang.release()
    assert (hang.waiting, done) == (0, True)
    await call(tier, operation)  # released: later calls pass


async def test_leaving_the_hang_releases_it() -> None:
    tier = memory()
    await tier.open()
    async with anyio.create_task_group() as tasks:
        with tier.hang("read") as hang:
            tasks.start_soon(read, tier, [1])
            tasks.start_soon(read, tier, [2])
            await anyio.wait_all_tasks_blocked()
            assert hang.waiting == hang.triggered == 2


async def test_one_call_hangs_and_the_next_passes() -> None:
    tier = memory()
    await tier.open()
    async with anyio.create_task_group() as tasks:
        with tier.hang("write", times=1, after=1):
            await write(tier, [1])
            tasks.start_soon(write, tier, [2])
            await anyio.wait_all_tasks_blocked()
            await write(tier, [3])


async def test_a_hung_call_can_be_cancelled() -> None:
    tier = memory()
    await tier.open()
    hang = tier.hang("read")
    with anyio.move_on_after(0.001) as scope:
        await read(tier, [1])
    assert scope.cancelled_caught
    assert hang.waiting == 0


@pytest.mark.parametrize("how", ["scope", "task"])
async def test_a_stubborn_hang_outlasts_cancellation(how: Literal["scope", "task"]) -> None:
    """As a thread that is stuck in the kernel: the cancellation arrives once it comes back."""
    tier = memory()
    await tier.open()
    hang = tier.hang("read", stubborn=True)
    ended: list[str] = []

    async def stuck() -> None:
        try:
            await read(tier, [1])
            ended.append("read")
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async with anyio.create_task_group() as tasks:
        if how == "scope":
            tasks.start_soon(stuck)
            await hang.entered.wait()
            tasks.cancel_scope.cancel()
        else:
            task = asyncio.ensure_future(stuck())
            await hang.entered.wait()
            task.cancel()
        with anyio.CancelScope(shield=True):
            for _ in range(5):
                await checkpoint()
            assert (hang.waiting, ended) == (1, [])
            hang.release()
            if how == "task":
                await asyncio.wait([task])
    assert ended == ["cancelled"]
    assert hang.waiting == 0


async def test_a_hang_and_a_failure_add_up() -> None:
    """First it hangs, then it fails: a disk that times out."""
    tier = memory()
    await tier.open()
    hang = tier.hang("write")
    tier.fail("write", OSError(errno.EIO, "gone"))
    outcomes: list[TierError | None] = []

    async def work() -> None:
        outcomes.extend(await write(tier, [1]))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(work)
        await hang.entered.wait()
        assert outcomes == []
        hang.release()
    assert isinstance(outcomes[0], TierError)


async def test_a_delay_goes_by_the_clock() -> None:
    tier = memory()
    await tier.open()
    clock = ManualClock()
    tier.delay("write", 5.0, clock=clock, times=1)
    done = anyio.Event()

    async def work() -> None:
        await write(tier, [1])
        done.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(work)
        await clock.wait_for_sleepers()
        clock.advance(4.9)
        await anyio.wait_all_tasks_blocked()
        assert not done.is_set()
        clock.advance(0.1)
    assert done.is_set()
    await write(tier, [2])  # only once


# Damage


async def test_a_short_read() -> None:
    tier = memory()
    await tier.open()
    await write(tier, [1, 2])
    tier.cut_short("read", keep_bytes=5, slots=[1])
    outcomes, payloads = await read(tier, [1, 2])
    assert isinstance(outcomes[0], CorruptBlockError)
    assert outcomes[0].block_hash == "block1"
    assert payloads == [payload_for(1, SIZE)[:5] + bytes(SIZE - 5), payload_for(2, SIZE)]
    assert outcomes[1] is None
    assert await read(tier, [1]) == ([None], [payload_for(1, SIZE)])  # nothing was lost


@pytest.mark.parametrize("kind", ["memory", "disk"])
async def test_a_short_write(kind: str, tmp_path: Path) -> None:
    """The write says so, and what was in the slot is lost."""
    inner = MemoryTier(8, SIZE) if kind == "memory" else DiskTier(tmp_path / "cold", 8, SIZE)
    tier = FaultyTier(inner)
    await tier.open()
    await write(tier, [1])
    tier.cut_short("write", keep_bytes=5)
    [outcome] = await write(tier, [1])
    assert type(outcome) is TierError
    assert outcome.block_hash == "block1"
    [outcome], _ = await read(tier, [1])
    assert isinstance(outcome, CorruptBlockError)
    assert await write(tier, [1]) == [None]
    assert await read(tier, [1]) == ([None], [payload_for(1, SIZE)])
    await tier.close()


async def test_a_byte_flipped_on_the_way_in_is_found_by_every_read() -> None:
    tier = memory()
    await tier.open()
    tier.flip_byte("write", offset=3)
    assert await write(tier, [1]) == [None]
    for _ in range(2):
        [outcome], [payload] = await read(tier, [1])
        assert isinstance(outcome, CorruptBlockError)
        differing = [at for at in range(SIZE) if payload[at] != payload_for(1, SIZE)[at]]
        assert differing == [3]
    assert await write(tier, [1]) == [None]
    assert await read(tier, [1]) == ([None], [payload_for(1, SIZE)])


async def test_a_byte_flipped_on_the_way_out_is_found_once() -> None:
    tier = memory()
    await tier.open()
    await write(tier, [1])
    tier.flip_byte("read", offset=-1)
    [outcome], [payload] = await read(tier, [1])
    assert isinstance(outcome, CorruptBlockError)
    assert payload[:-1] == payload_for(1, SIZE)[:-1]
    assert payload[-1] != payload_for(1, SIZE)[-1]
    assert await read(tier, [1]) == ([None], [payload_for(1, SIZE)])


@pytest.mark.parametrize("operation", ["read", "write"])
async def test_silent_damage(operation: Literal["read", "write"]) -> None:
    """A tier without checksums: nobody is told."""
    tier = memory()
    await tier.open()
    tier.flip_byte(operation, silent=True)
    assert await write(tier, [1]) == [None]
    [outcome], [payload] = await read(tier, [1])
    assert outcome is None
    assert payload != payload_for(1, SIZE)


async def test_damage_does_not_touch_the_callers_buffer() -> None:
    tier = memory()
    await tier.open()
    payload = bytearray(payload_for(1, SIZE))
    tier.flip_byte("write")
    await tier.write([1], [memoryview(payload)], [encode_key("block1", "")])
    assert payload == payload_for(1, SIZE)


async def test_erasing_ends_the_damage() -> None:
    tier = memory()
    await tier.open()
    tier.flip_byte("write")
    await write(tier, [1])
    await tier.erase([1])
    [outcome], _ = await read(tier, [1])
    assert outcome is None


async def test_an_empty_payload_can_be_damaged() -> None:
    tier = memory()
    await tier.open()
    tier.flip_byte("write")
    assert await tier.write([1], [memoryview(b"")], [encode_key("empty", "")]) == [None]


# The wrapper itself


async def test_every_call_can_be_cancelled_before_and_after_the_work() -> None:
    inner = CountingTier(MemoryTier(8, SIZE))
    tier = FaultyTier(inner)
    await tier.open()
    for operation in ("read", "write", "erase", "flush"):
        inner.reset()

        async def once(operation: Operation = operation) -> None:
            await call(tier, operation)

        assert await cancel_everywhere(once, how="task") == 2
        assert inner.calls[operation] == 2  # not in the first of the three runs


def test_addressable_needs_an_addressable_tier() -> None:
    with pytest.raises(ConfigError, match="not addressable"):
        FaultyTier(RestartableTier(8, SIZE), addressable=True)
    assert not memory().addressable
    assert FaultyTier(MemoryTier(8, SIZE), addressable=True).addressable


def test_impossible_faults() -> None:
    tier = memory()
    with pytest.raises(ValueError, match="operation must be"):
        tier.fail("view")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="concerns no slots"):
        tier.fail("flush", slots=[1])
    with pytest.raises(ValueError, match="at least"):
        tier.fail("read", times=0)
    with pytest.raises(ValueError, match="at least"):
        tier.hang("read", after=-1)


def test_reprs_say_what_they_are() -> None:
    tier = memory()
    assert "MemoryTier" in repr(tier)
    assert repr(tier.fail("read")) == "<Failure of 'read', struck 0 times>"
