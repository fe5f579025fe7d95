from __future__ import annotations

import errno

from kvoffload import MemoryTier
from kvoffload.keys import encode_key
from kvoffload.testing import CountingTier, FaultyTier, TierCall


async def test_counts_calls_blocks_and_bytes() -> None:
    tier = CountingTier(MemoryTier(8, 16))
    await tier.open()
    await tier.write(
        [3, 1], [memoryview(b"abc"), memoryview(b"defgh")], [encode_key(7, ""), encode_key("x", "")]
    )
    await tier.write([0], [memoryview(b"")], [encode_key(b"y", "")])
    await tier.read([3], [memoryview(bytearray(3))])
    tier.view(1, 5)
    await tier.erase([0, 1, 3])
    await tier.flush()
    await tier.close([2])
    assert tier.calls == {
        "open": 1, "write": 2, "read": 1, "view": 1, "erase": 1, "flush": 1, "close": 1
    }  # fmt: skip
    assert (tier.blocks["write"], tier.bytes["write"]) == (3, 8)
    assert (tier.blocks["read"], tier.bytes["read"]) == (1, 3)
    assert (tier.blocks["view"], tier.bytes["view"]) == (1, 5)
    assert (tier.blocks["erase"], tier.bytes["erase"]) == (3, 0)
    assert tier.log[:2] == [TierCall("open"), TierCall("write", (3, 1), (3, 5), (7, "x"))]
    assert tier.log[-1] == TierCall("close", (2,))
    assert "write 2" in repr(tier)


async def test_reset_forgets() -> None:
    tier = CountingTier(MemoryTier(8, 16))
    await tier.open()
    tier.reset()
    assert (tier.log, tier.calls["open"], tier.blocks["open"], tier.bytes["open"]) == ([], 0, 0, 0)
    assert "no calls" in repr(tier)


async def test_a_failing_call_counts_too() -> None:
    """Outside a faulty tier it counts what was tried, inside what was done."""
    inside = CountingTier(MemoryTier(8, 16))
    faulty = FaultyTier(inside)
    outside = CountingTier(faulty)
    await outside.open()
    faulty.fail("write", OSError(errno.EIO, "gone"))
    await outside.write([1], [memoryview(b"x")], [encode_key("x", "")])
    assert outside.calls["write"] == 1
    assert inside.calls["write"] == 0


def test_describes_itself_like_the_inner_tier() -> None:
    inner = MemoryTier(8, 16, name="warm")
    tier = CountingTier(inner)
    assert (tier.name, tier.num_blocks, tier.block_bytes) == ("warm", 8, 16)
    assert (tier.medium, tier.addressable, tier.persistent) == (inner.medium, True, False)
