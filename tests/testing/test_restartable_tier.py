from __future__ import annotations

import pytest

from kvoffload import (
    ClosedError,
    ConfigError,
    CorruptBlockError,
    LRUOffloadManager,
    TierError,
    TierLockedError,
)
from kvoffload.keys import encode_key
from kvoffload.testing import RestartableTier, payload_for


async def put(tier: RestartableTier, slot: int, name: str) -> None:
    await tier.write([slot], [memoryview(payload_for(name, 16))], [encode_key(name, "")])


async def names(tier: RestartableTier) -> list[str]:
    found = await tier.open()
    await tier.close()
    return [block.key[2:].decode() for block in found]


async def test_a_process_crash_keeps_what_was_written() -> None:
    tier = RestartableTier(8, 16)
    await tier.open()
    await put(tier, 0, "written")
    await put(tier, 1, "erased")
    await tier.erase([1])
    assert await names(tier.after_crash()) == ["written"]


async def test_a_power_loss_undoes_what_was_not_flushed() -> None:
    tier = RestartableTier(8, 16)
    await tier.open()
    await put(tier, 0, "flushed")
    await put(tier, 1, "erased too late")
    await tier.flush()
    await put(tier, 2, "written too late")
    await tier.erase([1])
    assert await names(tier.after_crash(power_loss=True)) == ["flushed", "erased too late"]
    await tier.flush()
    assert await names(tier.after_crash(power_loss=True)) == ["flushed", "written too late"]


async def test_a_crash_leaves_the_tier_itself_alone() -> None:
    tier = RestartableTier(8, 16)
    await tier.open()
    await put(tier, 0, "before")
    crashed = tier.after_crash()
    await put(tier, 1, "after")
    await crashed.open()
    await put(crashed, 2, "elsewhere")
    await crashed.close()
    await tier.close()
    assert await names(tier) == ["before", "after"]
    assert await names(crashed) == ["before", "elsewhere"]


async def test_a_crash_leaves_the_blocks_in_the_order_they_were_written() -> None:
    tier = RestartableTier(8, 16)
    await tier.open()
    for slot, name in enumerate("abc"):
        await put(tier, slot, name)
    await put(tier, 0, "a again")
    assert await names(tier.after_crash()) == ["b", "c", "a again"]
    await tier.close([0, 2, 1])
    assert await names(tier) == ["a again", "c", "b"]


async def test_reading_what_is_not_there() -> None:
    """A manager that mixes up its slots or sizes is told, not given zeros."""
    tier = RestartableTier(8, 16)
    await tier.open()
    await put(tier, 1, "sixteen")
    outcomes = await tier.read([0, 1], [memoryview(bytearray(16)), memoryview(bytearray(15))])
    assert [type(outcome) for outcome in outcomes] == [CorruptBlockError, CorruptBlockError]


async def test_is_locked_while_it_is_open() -> None:
    tier = RestartableTier(8, 16)
    await tier.open()
    with pytest.raises(TierLockedError):
        await tier.open()
    await tier.close()
    with pytest.raises(ClosedError):
        await tier.flush()
    with pytest.raises(TierError, match="not addressable"):
        tier.view(0, 16)


def test_impossible_sizes() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        RestartableTier(0, 16)


async def test_a_manager_finds_its_blocks_again() -> None:
    """The story of the docstring: one run stores, the next one loads."""
    tier = RestartableTier(8, 16)
    assert "closed" in repr(tier)
    async with LRUOffloadManager(tier) as kv:
        assert "open" in repr(tier)
        await kv.store(["a", "b"], [payload_for("a", 16), payload_for("b", 16)])
        crashed = tier.after_crash()
    for restarted in (tier, crashed):
        async with LRUOffloadManager(restarted) as kv, kv.load(["a", "b"]) as lease:
            assert [view.tobytes() for view in lease] == [
                payload_for("a", 16), payload_for("b", 16)
            ]  # fmt: skip
