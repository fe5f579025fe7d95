"""`MooncakeTier` on a real store: what every remote tier does, and what is its own."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from kvoffload import (
    ClosedError,
    ConfigError,
    CorruptBlockError,
    MooncakeTier,
    RemoteOutcome,
    TierError,
    TierUnavailableError,
)
from kvoffload.keys import encode_key
from kvoffload.remote.envelope import added_bytes
from kvoffload.testing import RemoteTierContract, payload_for

from .mooncake_servers import MooncakeStore, needs_mooncake
from .test_valkey import damages

SIZE = 100_000  # as in `damages`
DONE, PRESENT, ABSENT = RemoteOutcome.DONE, RemoteOutcome.PRESENT, RemoteOutcome.ABSENT


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MooncakeStore]:
    with MooncakeStore(tmp_path_factory.mktemp("mooncake")) as store:
        yield store


@pytest.fixture
def store(shared_store: MooncakeStore) -> MooncakeStore:
    """Return a store that is empty, and may not be stopped."""
    shared_store.flush()
    return shared_store


@needs_mooncake
class TestMooncakeTier(RemoteTierContract):
    @pytest.fixture(autouse=True)
    def engine(self, store: MooncakeStore) -> None:
        self.url = store.url

    def make_tier(self, tmp_path: Path, *, layout: str = "") -> MooncakeTier:
        return MooncakeTier(self.url, layout=layout)


@needs_mooncake
class TestMooncakeTierWithLittleMemory(RemoteTierContract):
    """One thread, and memory that takes a block or none."""

    @pytest.fixture(autouse=True)
    def engine(self, store: MooncakeStore) -> None:
        # Of its own is what another tier left, so that it is another connection.
        self.url = f"{store.url}?buffer=4KiB"

    def make_tier(self, tmp_path: Path, *, layout: str = "") -> MooncakeTier:
        return MooncakeTier(self.url, layout=layout, pool=1, staging_bytes=100_000)


@needs_mooncake
class TestMooncakeTierThroughSharedMemory(RemoteTierContract):
    @pytest.fixture(autouse=True)
    def engine(self, store: MooncakeStore) -> None:
        self.url = store.shared_memory_url

    def make_tier(self, tmp_path: Path, *, layout: str = "") -> MooncakeTier:
        return MooncakeTier(self.url, layout=layout)


# Values


def key_of(block_hash: str) -> bytes:
    return encode_key(block_hash, "test")


def name_of(key: bytes) -> str:
    """Return the name that a block has in the store."""
    return "kvoffload:1:0:" + key.hex()


async def put(tier: MooncakeTier, *keys: bytes) -> None:
    payloads = [memoryview(payload_for(key, SIZE)) for key in keys]
    assert await tier.put(keys, payloads) == [DONE] * len(keys)


async def get(tier: MooncakeTier, *keys: bytes) -> list[bytes | RemoteOutcome | TierError]:
    buffers = [memoryview(bytearray(SIZE)) for _ in keys]
    outcomes = await tier.get(keys, buffers)
    return [
        bytes(buffer) if outcome is DONE else outcome
        for buffer, outcome in zip(buffers, outcomes, strict=True)
    ]


@needs_mooncake
async def test_the_format(store: MooncakeStore) -> None:
    """It is that of all engines; the name is hexadecimal, for the store's patterns."""
    key = key_of("block")
    tier = MooncakeTier(store.url)
    await tier.open()
    assert await tier.put([key], [memoryview(b"payload")]) == [DONE]
    await tier.close()
    assert store.client.get("kvoffload:1:0:730474657374626c6f636b").hex() == (
        "4b564f52010b000007000000000000000000000000000000"
        "9962f77779b88cd4" + (key + b"payload").hex() + "da0798bac277a31a"
    )


@needs_mooncake
@pytest.mark.parametrize("damage", damages())
async def test_what_does_not_check_is_deleted(store: MooncakeStore, damage: str) -> None:
    keys = [key_of("before"), key_of("block"), key_of("after")]
    tier = MooncakeTier(store.url)
    await tier.open()
    await put(tier, keys[0], keys[2])
    assert store.client.put(name_of(keys[1]), damages()[damage]) == 0
    before, bad, after = await get(tier, *keys)
    assert (before, after) == (payload_for(keys[0], SIZE), payload_for(keys[2], SIZE))
    assert isinstance(bad, CorruptBlockError)
    assert bad.block_hash == "block"
    assert await tier.find(keys) == [SIZE, None, SIZE]
    await put(tier, keys[1])
    await tier.close()


@needs_mooncake
async def test_a_value_of_another_size_is_replaced(store: MooncakeStore) -> None:
    """Equal keys are equal bytes, so that it was never this block."""
    key = key_of("block")
    tier = MooncakeTier(store.url)
    await tier.open()
    assert store.client.put(name_of(key), b"short") == 0
    assert await tier.find([key]) == [None]
    await put(tier, key)
    assert store.client.upsert(name_of(key), bytes(added_bytes(key) + 7)) == 0
    assert await get(tier, key) == [ABSENT]
    await put(tier, key)
    assert await get(tier, key) == [payload_for(key, SIZE)]
    await tier.close()


@needs_mooncake
async def test_clear_leaves_what_is_not_ours(store: MooncakeStore) -> None:
    tier = MooncakeTier(store.url)
    await tier.open()
    await put(tier, key_of("block"))
    assert store.client.put("somebody:" + name_of(key_of("block")), b"theirs") == 0
    assert sum([count async for count in tier.clear("test")]) == 1
    assert store.client.is_exist("somebody:" + name_of(key_of("block"))) == 1
    await tier.close()


@needs_mooncake
async def test_many_blocks_in_one_call(store: MooncakeStore) -> None:
    """Of some thousands at once to one node, the library failed those after the 2048th."""
    keys = [key_of(f"{number}") for number in range(3000)]
    tier = MooncakeTier(store.url)
    await tier.open()
    payloads = [memoryview(b"%4d" % number) for number in range(3000)]
    assert await tier.put(keys, payloads) == [DONE] * 3000
    buffers = [memoryview(bytearray(4)) for _ in keys]
    assert await tier.get(keys, buffers) == [DONE] * 3000
    assert buffers == payloads
    await tier.close()


@needs_mooncake
async def test_a_block_that_is_asked_for_twice(store: MooncakeStore) -> None:
    """Of the two, the library fills one and says that it did both."""
    tier = MooncakeTier(store.url)
    await tier.open()
    one, other = key_of("one"), key_of("other")
    await put(tier, one, other)
    expected = [payload_for(key, SIZE) for key in (one, other, one, one)]
    assert await get(tier, one, other, one, one) == expected
    await tier.close()


# Whom it talks to


async def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(20))
        writer.close()
        await writer.wait_closed()

    monkeypatch.setitem(sys.modules, "mooncake.store", None)
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        tier = MooncakeTier(f"mooncake://127.0.0.1:{port}")
        with anyio.fail_after(10):
            with pytest.raises(ConfigError, match=r"kvoffload\[mooncake\].*libibverbs1"):
                await tier.open()
            await tier.close()
        with pytest.raises(ClosedError):
            await tier.find([key_of("block")])


async def test_what_is_no_master() -> None:
    """The library would stop the whole process until it has given up, for half a minute."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(20)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        tier = MooncakeTier(f"mooncake://127.0.0.1:{port}")
        with anyio.fail_after(10):
            with pytest.raises(TierUnavailableError, match="does not speak"):
                await tier.open()
            await tier.close()


@pytest.mark.parametrize(
    "url",
    [
        "mooncake://master:50051",
        "mooncake://master:50051?protocol=rdma&devices=mlx5_0,mlx5_1&hostname=10.0.0.5",
        "mooncake://master:50051?segment=4GiB&buffer=16MiB&metadata=http://meta:8080/metadata",
        "mooncake+shm://master:50051",
        "MOONCAKE://master",
    ],
)
def test_urls(url: str) -> None:
    assert repr(MooncakeTier(url)) == "<MooncakeTier 'remote': master:50051>"


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": "redis://host:1"},
        {"url": "mooncake://"},
        {"url": "mooncake://user:secret@host"},
        {"url": "mooncake://host:port"},
        {"url": "mooncake://host:1/path"},
        {"url": "mooncake://host:1?protocol=udp"},
        {"url": "mooncake://host:1?segment=much"},
        {"url": "mooncake://host:1?colour=red"},
        {"url": "mooncake+shm://host:1?protocol=tcp"},
        {"url": "mooncake://host:1", "pool": 0},
        {"url": "mooncake://host:1", "staging_bytes": 100},
    ],
)
def test_wrong_settings(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        MooncakeTier(**wrong)  # type: ignore[arg-type]  # it is wrong
