"""Managers on a real object store that goes wrong: no hang, no wrong bytes, no pin left."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

from kvoffload import (
    AsyncLRUManager,
    BlockHash,
    BlockNotFoundError,
    LoadTimeoutError,
    MemoryTier,
    ObjectStoreTier,
    TierError,
    TierState,
)
from kvoffload.testing import eventually, payload_for

from . import managed
from .cutting import cut_after
from .managed import Managed, state_of
from .object_servers import BUCKET, ObjectServer, Seaweed

SIZE = 200_000
HASHES: list[BlockHash] = [f"block{number}" for number in range(6)]
MISSED = (BlockNotFoundError, LoadTimeoutError, TierError)
"""What a load raises that has to be recomputed."""


def payloads(hashes: Sequence[BlockHash]) -> list[bytes]:
    return [payload_for(each, SIZE) for each in hashes]


def manager_of(tier: ObjectStoreTier, **settings: Any) -> Managed:
    return managed.manager_of(tier, SIZE, **settings)


async def serves(kv: AsyncLRUManager) -> None:
    await eventually(lambda: state_of(kv) is TierState.SERVING, timeout_s=30)


async def shared(kv: AsyncLRUManager, hashes: Sequence[BlockHash] = HASHES) -> None:
    """Store blocks and send them; then only the store has them."""
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


async def test_two_processes_share(seaweed: ObjectServer, prefix: str, tmp_path: Path) -> None:
    """A block that one process stored is a hit in another, in both directions."""
    script = tmp_path / "other.py"
    script.write_text(f"""
import asyncio
from kvoffload import AsyncLRUManager, MemoryTier, ObjectStoreTier
from kvoffload.testing import payload_for

async def main():
    remote = ObjectStoreTier("s3://{BUCKET}/{prefix}", options={seaweed.options!r})
    async with AsyncLRUManager(hot=MemoryTier(16, {SIZE}), remote=remote) as kv:
        assert await kv.lookup({HASHES!r}) == 3
        async with kv.load({HASHES[:3]!r}) as lease:
            assert list(lease) == [payload_for(each, {SIZE}) for each in {HASHES[:3]!r}]
        await kv.store({HASHES[3:]!r}, [payload_for(each, {SIZE}) for each in {HASHES[3:]!r}])

asyncio.run(main())
""")
    async with manager_of(seaweed.tier(prefix)) as kv:
        await shared(kv, HASHES[:3])
        child = await asyncio.create_subprocess_exec(sys.executable, str(script))
        assert await child.wait() == 0
        assert await kv.lookup(HASHES) == 6
        assert await load_or_miss(kv)


async def test_killed_and_restarted(seaweed: ObjectServer, prefix: str) -> None:
    """It is durable: what was shared is there again."""
    async with manager_of(seaweed.tier(prefix)) as kv:
        await shared(kv)
        assert await kv.lookup(HASHES) == 6
        seaweed.kill()
        assert not await load_or_miss(kv)
        assert state_of(kv) is TierState.UNAVAILABLE
        assert await kv.lookup(HASHES) == 0
        own = ["own"]
        await kv.store(own, payloads(own))
        assert await load_or_miss(kv, own)
        await asyncio.to_thread(seaweed.start)
        await serves(kv)
        while not await load_or_miss(kv):  # it may still be looking for its own volumes
            assert state_of(kv) is TierState.UNAVAILABLE
            await serves(kv)
        await kv.flush()
        await kv.evict(num_blocks=16)
        assert await load_or_miss(kv, own)
        assert kv.get_stats().corrupt == 0


@pytest.mark.parametrize("what", ["find", "get", "put"])
async def test_paused(seaweed: ObjectServer, prefix: str, what: str) -> None:
    """It takes the connection and then says nothing."""
    async with manager_of(seaweed.tier(prefix), remote_timeout_s=1.0) as kv:
        await shared(kv)
        if what == "get":
            async with kv.request(HASHES) as request:
                assert request.hit == 6
                seaweed.pause()
                with pytest.raises(LoadTimeoutError):
                    async with request.load():
                        pass
        elif what == "find":
            seaweed.pause()
            async with kv.request(HASHES) as request:
                assert request.hit == 0
        else:
            seaweed.pause()
            new = [f"new{number}" for number in range(10)]
            await kv.store(new, payloads(new))
            await eventually(lambda: state_of(kv) is TierState.UNAVAILABLE, timeout_s=20)
        assert state_of(kv) is TierState.UNAVAILABLE
        assert await kv.lookup(HASHES) == 0
        assert not kv.get_stats().pinned
        # What was on its way when it was given up is not finished from other bytes.
        other = [f"other{number}" for number in range(16)]
        await kv.store(other, payloads(other))
        seaweed.go_on()
        await serves(kv)
        await kv.flush()
        assert await load_or_miss(kv)
        for each in [f"new{number}" for number in range(10)]:
            await load_or_miss(kv, [each])
        assert kv.get_stats().corrupt == 0


async def test_a_process_ends_while_it_hangs(
    seaweed: ObjectServer, prefix: str, tmp_path: Path
) -> None:
    """What the client does on threads of its own holds nobody up."""
    script = tmp_path / "other.py"
    script.write_text(f"""
import asyncio
from kvoffload import AsyncLRUManager, MemoryTier, ObjectStoreTier

async def main():
    remote = ObjectStoreTier("s3://{BUCKET}/{prefix}", options={seaweed.options!r})
    hot = MemoryTier(16, {SIZE})
    async with AsyncLRUManager(hot=hot, remote=remote, remote_timeout_s=0.5) as kv:
        await kv.store({HASHES!r}, [bytes({SIZE})] * 6)

asyncio.run(main())
""")
    seaweed.pause()
    child = await asyncio.create_subprocess_exec(sys.executable, str(script))
    with anyio.fail_after(30):
        assert await child.wait() == 0


@pytest.mark.parametrize("once", [True, False])
async def test_cut_in_the_middle_of_a_value(seaweed: ObjectServer, prefix: str, once: bool) -> None:
    """Once is made good by asking for the rest; again and again, it is as no answer."""
    most = SIZE // 2 if once else SIZE // 8
    async with cut_after(seaweed.port, most, once=once) as (port, cuts):
        async with manager_of(seaweed.tier(prefix)) as other:
            await shared(other)
        options = {**seaweed.options, "endpoint": f"http://127.0.0.1:{port}"}
        async with manager_of(seaweed.tier(prefix, options=options)) as kv:
            assert await kv.lookup(HASHES) == 6
            assert await load_or_miss(kv) is once
            assert cuts
            assert kv.get_stats().tiers["hot"].pending_blocks == 0
            await serves(kv)
            assert kv.get_stats().corrupt == 0


@pytest.mark.parametrize("once", [True, False])
async def test_cut_in_the_middle_of_a_write(seaweed: ObjectServer, prefix: str, once: bool) -> None:
    """A block is there as a whole or not at all."""
    async with cut_after(seaweed.port, SIZE // 2, once=once, sending=True) as (port, cuts):
        options = {**seaweed.options, "endpoint": f"http://127.0.0.1:{port}"}
        async with manager_of(seaweed.tier(prefix, options=options)) as kv:
            await kv.store(HASHES, payloads(HASHES))
            await kv.flush()
            assert cuts
            async with manager_of(seaweed.tier(prefix)) as other:
                there = [each for each in HASHES if await other.lookup([each])]
                assert there == (HASHES if once else [])
                assert await load_or_miss(other, there)
                assert other.get_stats().corrupt == 0


def test_a_store_that_is_full(tmp_path: Path) -> None:
    """It takes no more: it is read from, and what it did not take is a miss."""

    async def fill(seaweed: ObjectServer) -> None:
        async with manager_of(seaweed.tier("")) as kv:
            many: list[BlockHash] = []
            while state_of(kv) is not TierState.READ_ONLY:
                assert len(many) < 200
                new = [f"many{len(many) + number}" for number in range(10)]
                many += new
                await kv.store(new, payloads(new))
                await kv.flush()
                await kv.evict(num_blocks=16)
            stats = kv.get_stats()
            assert stats.tiers["remote"].dropped_blocks > 0
            assert stats.tiers["remote"].blocks_written > 0
            hits = [each for each in many if await kv.lookup([each])]
            assert 0 < len(hits) < len(many)
            for each in hits:
                assert await load_or_miss(kv, [each])
            assert kv.get_stats().corrupt == 0

    # On one loop only: to fill it takes a server of its own.
    with Seaweed(tmp_path / "seaweed", volumes=2, volume_megabytes=1) as seaweed:
        asyncio.run(fill(seaweed))


async def test_emptied_underneath(seaweed: ObjectServer, prefix: str) -> None:
    async with manager_of(seaweed.tier(prefix)) as kv:
        await shared(kv)
        async with kv.request(HASHES) as request:
            assert request.hit == 6
            with seaweed.client() as client:
                for name in seaweed.names(f"{prefix}/"):
                    client.delete_object(Bucket=BUCKET, Key=name)
            with pytest.raises(BlockNotFoundError) as caught:
                async with request.load():
                    pass
            assert caught.value.block_hashes == (*HASHES,)
        assert state_of(kv) is TierState.SERVING
        await shared(kv)
        assert await load_or_miss(kv)


async def test_a_bucket_that_is_deleted_and_made_again(seaweed: ObjectServer) -> None:
    """Reads are misses; writes find out, and the next probe that there is one again."""
    with seaweed.client() as client:
        client.create_bucket(Bucket="passing")
        tier = ObjectStoreTier("s3://passing", options=seaweed.options)
        async with manager_of(tier) as kv:
            await shared(kv)
            for each in client.list_objects_v2(Bucket="passing")["Contents"]:
                client.delete_object(Bucket="passing", Key=each["Key"])
            client.delete_bucket(Bucket="passing")
            assert await kv.lookup(HASHES) == 0
            await kv.store(HASHES, payloads(HASHES))
            await eventually(lambda: state_of(kv) is TierState.UNAVAILABLE, timeout_s=20)
            client.create_bucket(Bucket="passing")
            await serves(kv)
            own = ["own"]
            await shared(kv, own)
            assert await load_or_miss(kv, own)
        for each in client.list_objects_v2(Bucket="passing").get("Contents", ()):
            client.delete_object(Bucket="passing", Key=each["Key"])
        client.delete_bucket(Bucket="passing")


async def test_a_damaged_object_is_a_miss_for_all(seaweed: ObjectServer, prefix: str) -> None:
    async with manager_of(seaweed.tier(prefix)) as kv:
        await shared(kv, HASHES[3:4])
        (name,) = seaweed.names(f"{prefix}/")
        await shared(kv, [*HASHES[:3], *HASHES[4:]])
        with seaweed.client() as client:
            value = bytearray(client.get_object(Bucket=BUCKET, Key=name)["Body"].read())
            value[SIZE // 2] ^= 1
            client.put_object(Bucket=BUCKET, Key=name, Body=bytes(value))
        with pytest.raises(BlockNotFoundError) as caught:
            async with kv.load(HASHES):
                pass
        assert caught.value.block_hashes == (HASHES[3],)
        assert kv.get_stats().corrupt == 1
        assert await kv.lookup(HASHES) == 3
        assert await kv.lookup(HASHES[4:]) == 2
        assert name not in seaweed.names(f"{prefix}/")


async def test_wrong_credentials(seaweed: ObjectServer, prefix: str) -> None:
    """As no answer: the manager works alone."""
    options = {**seaweed.options, "secret_access_key": "wrong"}
    async with manager_of(seaweed.tier(prefix, options=options)) as kv:
        assert state_of(kv) is TierState.UNAVAILABLE
        await kv.store(HASHES, payloads(HASHES))
        assert await load_or_miss(kv)
    assert not seaweed.names(f"{prefix}/")


async def test_other_namespaces_layouts_and_managers(seaweed: ObjectServer, prefix: str) -> None:
    """The same hash elsewhere is another block, and `clear` leaves it."""

    def manager(namespace: str, layout: str) -> AsyncLRUManager:
        remote = seaweed.tier(prefix, layout=layout)
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
