"""Managers on a real Mooncake store that goes wrong: no hang, no wrong bytes, no pin left."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

from kvoffload import (
    AsyncLRUManager,
    BlockHash,
    BlockNotFoundError,
    ClosedError,
    LoadTimeoutError,
    MooncakeTier,
    RemoteOutcome,
    TierError,
    TierState,
    TierUnavailableError,
)
from kvoffload.keys import encode_key
from kvoffload.remote import lanes
from kvoffload.testing import eventually, payload_for

from . import managed
from .managed import Managed, state_of
from .mooncake_servers import MooncakeStore, needs_mooncake

pytestmark = needs_mooncake

SIZE = 200_000
HASHES: list[BlockHash] = [f"block{number}" for number in range(6)]
MISSED = (BlockNotFoundError, LoadTimeoutError, TierError)
"""What a load raises that has to be recomputed."""
DONE, ABSENT = RemoteOutcome.DONE, RemoteOutcome.ABSENT


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MooncakeStore]:
    with MooncakeStore(tmp_path_factory.mktemp("mooncake")) as store:
        yield store


@pytest.fixture
def store(shared_store: MooncakeStore) -> MooncakeStore:
    """Return a store that is well and empty; one for all, for at the end each takes a second."""
    shared_store.recover()
    return shared_store


def payloads(hashes: Sequence[BlockHash]) -> list[bytes]:
    return [payload_for(each, SIZE) for each in hashes]


def manager_at(url: str, **settings: Any) -> Managed:
    return managed.manager_of(MooncakeTier(url), SIZE, **settings)


async def shared(kv: AsyncLRUManager, hashes: Sequence[BlockHash] = HASHES) -> None:
    """Store blocks and send them; then only the store has them."""
    await kv.store(hashes, payloads(hashes))
    # Where it refused some before, it is tried again after a second.
    await eventually(lambda: state_of(kv) is TierState.SERVING, timeout_s=20)
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


@pytest.mark.parametrize("shared_memory", [False, True])
async def test_two_processes_share(
    store: MooncakeStore, tmp_path: Path, shared_memory: bool
) -> None:
    """A block that one process stored is a hit in another, in both directions."""
    url = store.shared_memory_url if shared_memory else store.url
    script = tmp_path / "other.py"
    script.write_text(f"""
import asyncio, sys
from kvoffload import AsyncLRUManager, MemoryTier, MooncakeTier
from kvoffload.testing import payload_for

async def main():
    remote = MooncakeTier({url!r})
    hot = MemoryTier(16, {SIZE})
    async with AsyncLRUManager(hot=hot, remote=remote, remote_timeout_s=10) as kv:
        assert await kv.lookup({HASHES!r}) == 3
        async with kv.load({HASHES[:3]!r}) as lease:
            assert list(lease) == [payload_for(each, {SIZE}) for each in {HASHES[:3]!r}]
        await kv.store({HASHES[3:]!r}, [payload_for(each, {SIZE}) for each in {HASHES[3:]!r}])

asyncio.run(main())
""")
    async with manager_at(store.url) as kv:
        await shared(kv, HASHES[:3])
        child = await asyncio.create_subprocess_exec(
            sys.executable, str(script), stderr=asyncio.subprocess.PIPE
        )
        _, said = await child.communicate()
        # Nor does the library say anything, of all that it says by default.
        assert (child.returncode, said) == (0, b"")
        assert await kv.lookup(HASHES) == 6
        assert await load_or_miss(kv)


async def test_the_master_is_killed_and_restarted(store: MooncakeStore) -> None:
    async with manager_at(store.url, remote_timeout_s=1.0) as kv:
        await shared(kv)
        assert await kv.lookup(HASHES) == 6
        store.master.kill()
        assert not await load_or_miss(kv)
        assert state_of(kv) is TierState.UNAVAILABLE
        assert await kv.lookup(HASHES) == 0
        own = ["own"]
        await kv.store(own, payloads(own))
        assert await load_or_miss(kv, own)
        store.master.start()
        await eventually(lambda: state_of(kv) is not TierState.UNAVAILABLE, timeout_s=20)
        assert await kv.lookup(HASHES) == 0  # it keeps nothing
        await eventually(store.takes_values, timeout_s=20)
        await shared(kv)
        assert await load_or_miss(kv)


@pytest.mark.parametrize("what", ["find", "get", "put"])
async def test_the_master_is_stopped(store: MooncakeStore, what: str) -> None:
    """It takes the connection and says nothing: the library's calls hang for half a minute."""
    async with manager_at(store.url, remote_timeout_s=1.0) as kv:
        await shared(kv)
        if what == "get":
            async with kv.request(HASHES) as request:
                assert request.hit == 6
                store.master.pause()
                with pytest.raises(LoadTimeoutError):
                    async with request.load():
                        pass
        elif what == "find":
            store.master.pause()
            async with kv.request(HASHES) as request:
                assert request.hit == 0
        else:
            store.master.pause()
            new = [f"new{number}" for number in range(10)]
            await kv.store(new, payloads(new))
            await eventually(lambda: state_of(kv) is TierState.UNAVAILABLE, timeout_s=20)
        assert state_of(kv) is TierState.UNAVAILABLE
        assert await kv.lookup(HASHES) == 0
        assert not kv.get_stats().pinned
        # What was on its way when it was given up is not finished from other bytes.
        other = [f"other{number}" for number in range(16)]
        await kv.store(other, payloads(other))
        store.master.go_on()
        await eventually(lambda: state_of(kv) is TierState.SERVING, timeout_s=20)
        await kv.flush()
        for each in [*HASHES, *(f"new{number}" for number in range(10))]:
            await load_or_miss(kv, [each])
        assert kv.get_stats().corrupt == 0


@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_a_node_is_gone(store: MooncakeStore, how: str) -> None:
    """Its blocks are misses, and until the master notices, the tier is not there."""
    node = store.nodes[0]
    async with manager_at(store.url, remote_timeout_s=1.0) as kv:
        await shared(kv)
        assert await kv.lookup(HASHES) == 6
        if how == "killed":
            node.kill()
        else:
            node.pause()
        assert not await load_or_miss(kv)
        new = ["new"]
        await kv.store(new, payloads(new))
        assert await load_or_miss(kv, new)
        if how == "killed":
            node.start()
        else:
            node.go_on()
        await eventually(store.takes_values, timeout_s=20)
        await eventually(lambda: state_of(kv) is not TierState.UNAVAILABLE, timeout_s=20)
        again = [f"again{number}" for number in range(6)]
        await shared(kv, again)
        assert await load_or_miss(kv, again)
        assert kv.get_stats().corrupt == 0


async def test_a_full_store(tmp_path: Path) -> None:
    """It evicts, or refuses for a while; what it has is what was stored."""
    many = [f"many{number}" for number in range(120)]
    with MooncakeStore(tmp_path / "small", nodes=["16MB"]) as store:
        async with manager_at(store.url) as kv:
            for first in range(0, len(many), 10):
                await kv.store(many[first : first + 10], payloads(many[first : first + 10]))
                await kv.flush()
                await kv.evict(num_blocks=10)
            found = [each for each in many if await kv.lookup([each])]
            assert 0 < len(found) <= 16 * 1024**2 // SIZE
            loaded = [await load_or_miss(kv, [each]) for each in found]
            assert any(loaded)
            assert state_of(kv) is not TierState.UNAVAILABLE
            assert kv.get_stats().corrupt == 0


async def test_flushed(store: MooncakeStore) -> None:
    """Blocks that it just said it has are gone: a miss, and no error of the tier's."""
    async with manager_at(store.url, remote_ttl_s=60.0) as kv:
        await shared(kv)
        assert await kv.lookup(HASHES) == 6
        store.flush()
        with pytest.raises(BlockNotFoundError):
            async with kv.load(HASHES):
                pass
        assert state_of(kv) is TierState.SERVING
        assert await kv.lookup(HASHES) == 0
        await shared(kv)
        assert await load_or_miss(kv)


async def test_a_damaged_value(store: MooncakeStore) -> None:
    """It is a miss, counted, and gone; the others are not concerned."""
    name = "kvoffload:1:0:" + encode_key(HASHES[3], "").hex()
    async with manager_at(store.url) as kv:
        await shared(kv)
        value = bytearray(store.client.get(name))
        value[len(value) // 2] ^= 1
        assert store.client.upsert(name, bytes(value)) == 0
        with pytest.raises(BlockNotFoundError) as caught:
            async with kv.load(HASHES):
                pass
        assert caught.value.block_hashes == (HASHES[3],)
        assert kv.get_stats().corrupt == 1
        assert await kv.lookup(HASHES) == 3
        assert await kv.lookup(HASHES[4:]) == 2
        assert not store.client.is_exist(name)


# The tier alone


def key_of(block_hash: str) -> bytes:
    return encode_key(block_hash, "test")


async def put(tier: MooncakeTier, *keys: bytes) -> None:
    data = [memoryview(payload_for(key, SIZE)) for key in keys]
    assert await tier.put(keys, data) == [DONE] * len(keys)


async def test_nobody_is_there_at_first(tmp_path: Path) -> None:
    store = MooncakeStore(tmp_path)
    tier = MooncakeTier(store.url)
    with anyio.fail_after(30):
        with pytest.raises(TierUnavailableError):
            await tier.open()
        with pytest.raises(TierUnavailableError):
            await put(tier, key_of("block"))
        with store:
            await tier.check()
            await put(tier, key_of("block"))
            await tier.close()


async def test_the_master_is_stopped_before_the_tier_is_opened(store: MooncakeStore) -> None:
    """The library would stop the whole process until it has given up, for minutes."""
    store.master.pause()
    tier = MooncakeTier(store.url)
    with anyio.move_on_after(0.3) as scope:
        await tier.open()
    assert scope.cancelled_caught
    store.master.go_on()
    with anyio.fail_after(20):
        await tier.check()
        await put(tier, key_of("block"))
        await tier.close()


async def test_who_gives_up_has_the_buffer_back(store: MooncakeStore) -> None:
    """A read that was cancelled in the middle ends much later, and not in its caller's buffer."""
    tier = MooncakeTier(store.url, pool=1)
    key = key_of("block")
    await tier.open()
    await put(tier, key)
    buffer = bytearray(SIZE)
    store.nodes[0].pause()
    with anyio.move_on_after(0.3) as scope:
        await tier.get([key], [memoryview(buffer)])
    assert scope.cancelled_caught
    buffer[:] = b"mine" * (SIZE // 4)
    store.nodes[0].go_on()
    with anyio.fail_after(20):
        await tier.check()  # the one thread is back
        assert buffer == b"mine" * (SIZE // 4)
        other = memoryview(bytearray(SIZE))
        assert await tier.get([key], [other]) in ([DONE], [ABSENT])
        await tier.close()


async def test_calls_fail_at_once_while_all_threads_are_stuck(
    store: MooncakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are bounded, and who waits for one of them would wait as long as they do."""
    monkeypatch.setattr(lanes, "STUCK_S", 0.1)
    tier = MooncakeTier(store.url)
    await tier.open()
    store.master.pause()
    for _ in range(2):
        with anyio.move_on_after(0.2):
            await tier.find([key_of("block")])
    with anyio.fail_after(20):
        with pytest.raises(TierUnavailableError, match="all 2 threads wait"):
            await tier.find([key_of("block")])
        store.master.go_on()
        await tier.check()
        while True:
            try:
                assert await tier.find([key_of("block")]) == [None]
            except TierUnavailableError:
                await anyio.sleep(0.01)
            else:
                break
        await tier.close()


async def test_close_while_a_call_hangs(store: MooncakeStore) -> None:
    tier = MooncakeTier(store.url)
    await tier.open()
    store.master.pause()
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            ended = anyio.Event()

            async def find() -> None:
                with pytest.raises(ClosedError):
                    await tier.find([key_of("block")])
                ended.set()

            tasks.start_soon(find)
            await anyio.wait_all_tasks_blocked()
            await tier.close()
            await ended.wait()
    store.master.go_on()


@pytest.mark.parametrize("how", ["idle", "busy", "hanging", "with a segment"])
def test_the_interpreter_ends(store: MooncakeStore, tmp_path: Path, how: str) -> None:
    """Whatever the library's threads do: it neither waits for them nor crashes."""
    url = store.url + ("?segment=32MiB" if how == "with a segment" else "")
    script = tmp_path / "ends.py"
    script.write_text(f"""
import asyncio, os, signal, sys
import anyio
from kvoffload import MooncakeTier

async def main():
    tier = MooncakeTier({url!r})
    await tier.open()
    keys = [b"b\\0%d" % number for number in range(200)]
    if {how!r} in ("hanging", "with a segment"):
        os.kill({store.master.pid}, signal.SIGSTOP)
        with anyio.move_on_after(0.2):
            await tier.find(keys)
    if {how!r} == "busy":
        asyncio.get_running_loop().create_task(tier.put(keys, [memoryview(bytes(10**5))] * 200))
        await asyncio.sleep(0.01)

asyncio.run(main())
sys.exit(7)
""")
    child = subprocess.Popen([sys.executable, script], stderr=subprocess.PIPE)
    try:
        _, said = child.communicate(timeout=20)
    finally:
        child.kill()
        store.master.go_on()
    assert (child.returncode, said) == (7, b"")


async def test_memory_of_this_process(tmp_path: Path) -> None:
    """What a tier lends to the store is taken back when it is closed."""
    with MooncakeStore(tmp_path, nodes=[]) as store:
        with anyio.fail_after(20):
            tier = MooncakeTier(f"{store.url}?segment=32MiB")
            await tier.open()
            await put(tier, key_of("block"))
            await tier.close()
            name = "kvoffload:1:0:" + key_of("block").hex()
            await eventually(lambda: not store.client.is_exist(name), timeout_s=20)
            bare = MooncakeTier(store.url)
            await bare.open()
            (refused,) = await bare.put([key_of("block")], [memoryview(b"payload")])
            assert isinstance(refused, TierError)
            assert "no node has room" in str(refused)
            await bare.close()


async def test_the_client_that_memory_is_shared_with_is_restarted(store: MooncakeStore) -> None:
    """It does not know the memory any more; the next check makes another connection."""
    tier = MooncakeTier(store.shared_memory_url)
    with anyio.fail_after(20):
        await tier.open()
        await put(tier, key_of("block"))
        store.nodes[0].kill()
        with pytest.raises(TierUnavailableError):
            await tier.find([key_of("block")])
        store.nodes[0].start()
        await eventually(store.takes_values, timeout_s=20)
        await tier.check()
        await put(tier, key_of("other"))
        await tier.close()
