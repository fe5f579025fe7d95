"""Managers on a real server that goes wrong: no hang, no wrong bytes, no pin that is left."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvoffload import (
    AsyncLRUManager,
    BlockHash,
    BlockNotFoundError,
    LoadTimeoutError,
    MemoryTier,
    TierError,
    TierState,
    ValkeyTier,
)
from kvoffload.keys import encode_key
from kvoffload.remote.nodes import slot_of
from kvoffload.testing import eventually, payload_for

from . import managed
from .cutting import cut_after
from .managed import Managed, state_of
from .servers import Cluster, Server

SIZE = 200_000
HASHES: list[BlockHash] = [f"block{number}" for number in range(6)]
MISSED = (BlockNotFoundError, LoadTimeoutError, TierError)
"""What a load raises that has to be recomputed."""


def payloads(hashes: Sequence[BlockHash]) -> list[bytes]:
    return [payload_for(each, SIZE) for each in hashes]


def manager_at(url: str, *, cluster: bool = False, **settings: Any) -> Managed:
    return managed.manager_of(ValkeyTier(url, cluster=cluster), SIZE, **settings)


async def shared(kv: AsyncLRUManager, hashes: Sequence[BlockHash] = HASHES) -> None:
    """Store blocks and send them; then only the engine has them."""
    await kv.store(hashes, payloads(hashes))
    await kv.flush()
    await kv.evict(num_blocks=len(hashes))


async def load_or_miss(kv: AsyncLRUManager, hashes: Sequence[BlockHash] = HASHES) -> bool:
    """Load blocks if that is possible; never are they others."""
    try:
        async with kv.load(hashes) as lease:
            assert list(lease) == payloads(hashes)
            return True
    except MISSED:
        return False


async def test_two_processes_share(own_server: Server, tmp_path: Path) -> None:
    """A block that one process stored is a hit in another, in both directions."""
    script = tmp_path / "other.py"
    script.write_text(f"""
import asyncio, sys
from kvoffload import AsyncLRUManager, MemoryTier, ValkeyTier
from kvoffload.testing import payload_for

async def main():
    remote = ValkeyTier({own_server.url!r})
    async with AsyncLRUManager(hot=MemoryTier(16, {SIZE}), remote=remote) as kv:
        assert await kv.lookup({HASHES!r}) == 3
        async with kv.load({HASHES[:3]!r}) as lease:
            assert list(lease) == [payload_for(each, {SIZE}) for each in {HASHES[:3]!r}]
        await kv.store({HASHES[3:]!r}, [payload_for(each, {SIZE}) for each in {HASHES[3:]!r}])

asyncio.run(main())
""")
    async with manager_at(own_server.url) as kv:
        await shared(kv, HASHES[:3])
        child = await asyncio.create_subprocess_exec(sys.executable, str(script))
        assert await child.wait() == 0
        assert await kv.lookup(HASHES) == 6
        assert await load_or_miss(kv)


async def test_killed_and_restarted(own_server: Server) -> None:
    async with manager_at(own_server.url) as kv:
        await shared(kv)
        assert await kv.lookup(HASHES) == 6
        own_server.kill()
        assert not await load_or_miss(kv)
        assert state_of(kv) is TierState.UNAVAILABLE
        assert await kv.lookup(HASHES) == 0
        own = ["own"]
        await kv.store(own, payloads(own))
        assert await load_or_miss(kv, own)
        own_server.start()
        await eventually(lambda: state_of(kv) is TierState.SERVING, timeout_s=20)
        assert await kv.lookup(HASHES) == 0  # it keeps nothing
        await kv.flush()
        assert await kv.lookup(own) == 1
        await shared(kv)
        assert await load_or_miss(kv)


@pytest.mark.parametrize("what", ["find", "get", "put"])
async def test_paused(own_server: Server, what: str) -> None:
    """It takes the connection and then says nothing."""
    async with manager_at(own_server.url, remote_timeout_s=1.0) as kv:
        await shared(kv)
        if what == "get":
            async with kv.request(HASHES) as request:
                assert request.hit == 6
                own_server.pause()
                with pytest.raises(LoadTimeoutError):
                    async with request.load():
                        pass
        elif what == "find":
            own_server.pause()
            async with kv.request(HASHES) as request:
                assert request.hit == 0
        else:
            own_server.pause()
            new = [f"new{number}" for number in range(10)]
            await kv.store(new, payloads(new))
            await eventually(lambda: state_of(kv) is TierState.UNAVAILABLE, timeout_s=20)
        assert state_of(kv) is TierState.UNAVAILABLE
        assert await kv.lookup(HASHES) == 0
        assert not kv.get_stats().pinned
        # What was on its way when it was given up is not finished from other bytes.
        other = [f"other{number}" for number in range(16)]
        await kv.store(other, payloads(other))
        own_server.go_on()
        await eventually(lambda: state_of(kv) is TierState.SERVING, timeout_s=20)
        await kv.flush()
        assert await load_or_miss(kv)
        for each in [f"new{number}" for number in range(10)]:
            await load_or_miss(kv, [each])
        assert kv.get_stats().corrupt == 0


async def test_cut_in_the_middle_of_a_value(own_server: Server) -> None:
    async with cut_after(own_server.port, SIZE // 2) as (port, cuts):
        async with manager_at(own_server.url) as other:
            await shared(other)
        async with manager_at(f"redis://127.0.0.1:{port}") as kv:
            assert await kv.lookup(HASHES) == 6
            assert not await load_or_miss(kv)
            assert cuts
            assert kv.get_stats().tiers["hot"].pending_blocks == 0
            await eventually(lambda: state_of(kv) is TierState.SERVING, timeout_s=20)
            assert await load_or_miss(kv, HASHES[:1])
            assert kv.get_stats().corrupt == 0


async def test_out_of_memory(tmp_path: Path) -> None:
    """An engine that does not evict takes no more: it is read from, and written to later."""
    arguments = ("--maxmemory", "4mb", "--maxmemory-policy", "noeviction")
    with Server(tmp_path / "server", *arguments) as server:
        async with manager_at(server.url) as kv:
            many = [f"many{number}" for number in range(16)]
            await kv.store(many, payloads(many))
            await eventually(lambda: state_of(kv) is TierState.READ_ONLY, timeout_s=20)
            stats = kv.get_stats()
            assert stats.tiers["remote"].dropped_blocks > 0
            assert stats.tiers["remote"].blocks_written > 0
            await kv.evict(num_blocks=16)
            hit = await kv.lookup(many)
            assert 0 < hit < 16
            assert await load_or_miss(kv, many[:hit])
            with server.client() as client:
                client.config_set("maxmemory", "64mb")
            new = ["new"]
            await kv.store(new, payloads(new))
            await eventually(lambda: state_of(kv) is TierState.SERVING, timeout_s=20)
            await kv.flush()
            await kv.evict(num_blocks=16)
            assert await load_or_miss(kv, new)


async def test_an_engine_that_evicts(tmp_path: Path) -> None:
    """Then it has the newest, and the others are plain misses."""
    arguments = ("--maxmemory", "5mb", "--maxmemory-policy", "allkeys-lru")
    with Server(tmp_path / "server", *arguments) as server:
        async with manager_at(server.url) as kv:
            for start in range(0, 40, 4):
                group = [f"many{number}" for number in range(start, start + 4)]
                await shared(kv, group)
            assert state_of(kv) is TierState.SERVING
            found = [await kv.lookup([f"many{number}"]) for number in range(40)]
            assert 0 < sum(found) < 40
            for number, there in enumerate(found):
                if there:
                    await load_or_miss(kv, [f"many{number}"])
            assert kv.get_stats().corrupt == 0


async def test_a_password_that_is_changed(own_server: Server) -> None:
    async with manager_at(own_server.url) as kv:
        await shared(kv)
        with own_server.client() as client:
            client.config_set("requirepass", "s3cret")
            client.client_kill_filter(_type="normal", skipme=True)
            assert await kv.lookup(HASHES) == 0
            assert state_of(kv) is TierState.UNAVAILABLE
            client.config_set("requirepass", "")
        await eventually(lambda: state_of(kv) is TierState.SERVING, timeout_s=20)
        assert await load_or_miss(kv)


async def test_flushed_underneath(server: Server) -> None:
    async with manager_at(server.url) as kv:
        await shared(kv)
        async with kv.request(HASHES) as request:
            assert request.hit == 6
            with server.client() as client:
                client.flushall()
            with pytest.raises(BlockNotFoundError) as caught:
                async with request.load():
                    pass
            assert caught.value.block_hashes == (*HASHES,)
        assert state_of(kv) is TierState.SERVING
        await shared(kv)
        assert await load_or_miss(kv)


async def test_a_damaged_value_is_a_miss_for_all(server: Server) -> None:
    async with manager_at(server.url) as kv:
        await shared(kv)
        name = b"kvoffload:1:0:" + encode_key(HASHES[3], "")
        with server.client() as client:
            client.setrange(name, SIZE // 2, b"damage")
        with pytest.raises(BlockNotFoundError) as caught:
            async with kv.load(HASHES):
                pass
        assert caught.value.block_hashes == (HASHES[3],)
        assert kv.get_stats().corrupt == 1
        assert await kv.lookup(HASHES) == 3
        assert await kv.lookup(HASHES[4:]) == 2
        with server.client() as client:
            assert not client.exists(name)


async def test_other_namespaces_layouts_and_managers(server: Server) -> None:
    """The same hash elsewhere is another block, and `clear` leaves it."""

    def manager(namespace: str, layout: str) -> AsyncLRUManager:
        remote = ValkeyTier(server.url, layout=layout)
        return AsyncLRUManager(hot=MemoryTier(16, SIZE), remote=remote, namespace=namespace)

    async with manager("a", "x") as one, manager("b", "x") as two, manager("a", "y") as three:
        await shared(one, ["block"])
        assert await two.lookup(["block"]) == await three.lookup(["block"]) == 0
        await two.store(["block"], [b"two"])
        await three.store(["block"], [b"three"])
        for each in (two, three):
            await each.flush()
            await each.evict(num_blocks=1)
        await two.clear()
        async with one.load(["block"]) as lease:
            assert list(lease) == payloads(["block"])
        async with three.load(["block"]) as lease:
            assert list(lease) == [b"three"]


async def test_failover_of_a_cluster_node(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        async with manager_at(cluster.url, cluster=True) as kv:
            many = [f"many{number}" for number in range(12)]
            await shared(kv, many)
            assert {slot_of(name_of(each)) // 5462 for each in many} == {0, 1, 2}
            assert await load_or_miss(kv, many)
            await kv.evict(num_blocks=16)
            # Of what the replica does not have yet, nobody would have it afterwards.
            for server in cluster.servers[:3]:
                with server.client() as client:
                    assert client.wait(1, 5000) == 1
            cluster.servers[0].kill()  # also the node that the URL names
            assert not await load_or_miss(kv, many)
            await eventually(lambda: state_of(kv) is TierState.UNAVAILABLE, timeout_s=20)
            # Once the other two voted, a replica takes over; until then the probe misses a node.
            await eventually(lambda: state_of(kv) is TierState.SERVING, timeout_s=30)
            assert await load_or_miss(kv, many)
            assert state_of(kv) is TierState.SERVING
            new = [f"new{number}" for number in range(12)]
            await shared(kv, new)
            assert await load_or_miss(kv, new)
            assert kv.get_stats().corrupt == 0


def name_of(block_hash: BlockHash) -> bytes:
    return b"kvoffload:1:0:" + encode_key(block_hash, "")
