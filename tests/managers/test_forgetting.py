"""Which blocks of a chain are its own, on any order of chains; and forgetting by way of a disk."""

from __future__ import annotations

import asyncio
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from kvoffload import AsyncLRUManager, DiskTier, LRUOffloadManager, MemoryTier, Retention
from kvoffload.testing import FaultyTier, RestartableTier, eventually

SIZE = 16
# Paths of a small tree, as chains are: equal number, equal prefix. Numbers so small are followers
# that can't be taken for each other.
PATHS = st.text("01", min_size=1, max_size=6).map(
    lambda path: [int("1" + path[: depth + 1], 2) for depth in range(len(path))]
)


@given(chains=st.lists(PATHS, min_size=1, max_size=6), number=st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_what_no_other_chain_has(chains: list[list[int]], number: int) -> None:
    """Beside the definition: what leaves is the end that no other chain goes on from, or through.

    A chain that is the beginning of the forgotten one is not told from it: it may be its earlier
    turn.
    """
    mine = chains[number % len(chains)]
    shared = 0
    for depth, _ in enumerate(mine, 1):
        followers = {chain[depth] for chain in chains if chain[:depth] == mine[:depth] != chain}
        if followers - set(mine[depth : depth + 1]):
            shared = depth

    async def run() -> None:
        async with LRUOffloadManager(MemoryTier(64, SIZE)) as kv:
            for chain in chains:
                await kv.store(chain, [bytes(SIZE)] * len(chain))
            assert set(await kv.forget(mine)) == set(mine[shared:])

    asyncio.run(run())


async def test_a_session_that_is_over_does_not_come_back(tmp_path: Path) -> None:
    """Its blocks lay on disk too, by spilling and by a flush."""

    def manager() -> AsyncLRUManager:
        return AsyncLRUManager(
            hot=MemoryTier(2, SIZE), cold=DiskTier(tmp_path / "cold", 16, SIZE), policy="lru"
        )

    session = [f"block {number}" for number in range(6)]
    async with manager() as kv:
        await kv.store(session, [bytes([number]) * SIZE for number in range(6)])
        await kv.flush()
        assert kv.get_stats().tiers["cold"].blocks == 6
        async with kv.request(session, retention=Retention.SESSION_OVER) as request:
            assert request.hit == 6
        assert await kv.lookup(session[:1]) == 0  # without waiting for anything
    async with manager() as kv:
        assert [at.tier for at in kv.locate(session)] == [None] * 6


async def test_a_request_may_end_after_the_manager_began_to_close(tmp_path: Path) -> None:
    """Then its session is not freed any more; leaving must not fail for that."""
    kv = AsyncLRUManager(hot=MemoryTier(4, SIZE))
    async with kv:
        await kv.store(["a"], [bytes(SIZE)])
        request = kv.request(["a"], retention=Retention.SESSION_OVER)
        await request.__aenter__()
    await request.__aexit__(None, None, None)


async def test_what_is_used_after_a_session_was_over_stays(tmp_path: Path) -> None:
    """Blocks on their way down were to be dropped once there; meanwhile another chat began."""
    cold = FaultyTier(RestartableTier(100, SIZE, name="cold"))
    chain = [f"c{number}" for number in range(10)]
    manager = AsyncLRUManager(
        hot=MemoryTier(20, SIZE), cold=cold, policy="lru", watermarks=(0.2, 0.4)
    )
    async with manager as kv:
        with cold.hang("write") as hang:
            await kv.store(chain, [bytes(SIZE)] * 10)
            await kv.store([f"other{number}" for number in range(8)], [bytes(SIZE)] * 8)
            await hang.entered.wait()  # some of the chain are on their way
            async with kv.request(chain, retention=Retention.SESSION_OVER):
                pass
            async with kv.request(chain) as request:
                assert request.hit < 10
                await request.store([bytes(SIZE)] * (10 - request.hit))
        await eventually(lambda: not kv.get_stats().pinned)
        for _ in range(20):
            await asyncio.sleep(0)
        assert await kv.lookup(chain) == 10


async def test_a_session_that_is_over_at_close_is_not_made_durable(tmp_path: Path) -> None:
    """Some of its blocks were on their way when the manager was closed."""
    inner = RestartableTier(100, SIZE, name="cold")
    chain = [f"c{number}" for number in range(17)]

    def manager(cold: FaultyTier) -> AsyncLRUManager:
        return AsyncLRUManager(
            hot=MemoryTier(20, SIZE), cold=cold, policy="lru", watermarks=(0.2, 0.4)
        )

    cold = FaultyTier(inner)
    hang = cold.hang("write")
    async with manager(cold) as kv:
        await kv.store(chain, [bytes(SIZE)] * 17)
        await hang.entered.wait()
        async with kv.request(chain, retention=Retention.SESSION_OVER):
            pass
        asyncio.get_running_loop().call_soon(hang.release)
    async with manager(FaultyTier(inner)) as kv:
        assert [at.tier for at in kv.locate(chain)] == [None] * 17
