"""Bytes that were written to a disk under the wrong name."""

from __future__ import annotations

import anyio

from kvoffload import AsyncLRUManager, BlockHash, LRUOffloadManager, MemoryTier, TieredLRUManager
from kvoffload.testing import FaultyTier, RestartableTier, eventually, payload_for

BLOCK_BYTES = 64


def payload(block_hash: BlockHash) -> bytes:
    return payload_for(block_hash, BLOCK_BYTES)


async def test_a_block_that_a_flush_reads_is_not_promoted() -> None:
    """A flush wrote another block's bytes under this one's name, found only after the restart.

    A promotion had left the slot that the flush was reading to a mere copy, and the copy had given
    way. So the block stays where the flush reads it, and goes up with the next load afterwards.
    """
    inner = RestartableTier(8, BLOCK_BYTES)
    cold = FaultyTier(inner)
    hot, warm = MemoryTier(1, BLOCK_BYTES), MemoryTier(1, BLOCK_BYTES, name="warm")
    async with TieredLRUManager(hot, warm, cold, promote_threshold=1) as kv:
        await kv.store(["h", "x"], [payload("h"), payload("x")])
        assert kv.locate(["x"])[0].tier == "warm"
        await kv.evict(["h"])  # a slot in hot is free
        with cold.hang("write") as hang:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(kv.flush)
                await hang.entered.wait()
                for name in ("y", "z"):
                    async with kv.load(["x"]) as lease:
                        assert bytes(lease[0]) == payload("x")
                    assert kv.locate(["x"])[0].tier == "warm"
                    async with kv.request(["x"]):
                        # Pinned, its home is safe; a copy that it had left there would not be.
                        tasks.start_soon(kv.store, [name], [payload(name)])
                        await anyio.wait_all_tasks_blocked()
                hang.release()
        async with LRUOffloadManager(inner.after_crash()) as crashed, crashed.load(["x"]) as lease:
            assert bytes(lease[0]) == payload("x")

        await kv.evict(["y", "z"])
        async with kv.load(["x"]) as lease:
            assert bytes(lease[0]) == payload("x")
        assert kv.locate(["x"])[0].tier == "hot"


async def test_a_cancelled_store_never_writes_what_its_caller_puts_in_the_buffer_next() -> None:
    """A record that checks showed another prompt's bytes after a crash.

    A cancelled caller reused its buffer, as it may, while the disk was still writing from it.
    """
    inner = RestartableTier(8, BLOCK_BYTES)
    cold = FaultyTier(inner)
    async with AsyncLRUManager(hot=cold) as kv:
        buffer = bytearray(payload("a"))
        with cold.hang("write") as hang:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(kv.store, ["a"], [buffer])
                await hang.entered.wait()
                tasks.cancel_scope.cancel()
            buffer[:] = payload("next")
        await eventually(lambda: kv.get_stats().pending == 0)
        crashed = inner.after_crash()
    async with LRUOffloadManager(crashed) as again:
        assert await again.lookup(["a"]) == 1  # or this test has shown nothing
        async with again.load(["a"]) as lease:
            assert bytes(lease[0]) == payload("a")
