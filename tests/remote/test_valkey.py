"""`ValkeyTier` on real servers: what every remote tier does, and what is its own."""

from __future__ import annotations

import asyncio
import ssl
import struct
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from kvoffload import (
    ClosedError,
    ConfigError,
    CorruptBlockError,
    RemoteOutcome,
    TierError,
    TierUnavailableError,
    ValkeyTier,
)
from kvoffload.keys import encode_key
from kvoffload.remote.envelope import added_bytes, header_of, layout_fingerprint, trailer_of
from kvoffload.testing import RemoteTierContract, payload_for

from .servers import Server, free_port, make_certificates, system_binary

SIZE = 100_000
DONE, PRESENT, ABSENT = RemoteOutcome.DONE, RemoteOutcome.PRESENT, RemoteOutcome.ABSENT
needs_redis = pytest.mark.skipif(
    system_binary("redis-server") is None, reason="needs the system's redis-server"
)


class TestValkeyTier(RemoteTierContract):
    @pytest.fixture(autouse=True)
    def engine(self, server: Server) -> None:
        self.url = server.url

    def make_tier(self, tmp_path: Path, *, layout: str = "") -> ValkeyTier:
        return ValkeyTier(self.url, layout=layout)


class TestValkeyTierOnUnixSocket(RemoteTierContract):
    @pytest.fixture(autouse=True)
    def engine(self, server: Server) -> None:
        self.path = server.socket

    def make_tier(self, tmp_path: Path, *, layout: str = "") -> ValkeyTier:
        return ValkeyTier(f"unix://{self.path}?database=3", layout=layout, pool=1)


@needs_redis
class TestValkeyTierWithTLS(RemoteTierContract):
    """Debian's Redis, for the wheel's server has no TLS; with a user and a password."""

    @pytest.fixture(scope="class")
    @classmethod
    def tls_server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        directory = tmp_path_factory.mktemp("tls")
        make_certificates(directory)
        tls_port = free_port()
        with Server(
            directory,
            *("--tls-port", str(tls_port), "--tls-auth-clients", "no"),
            *("--tls-cert-file", str(directory / "cert.pem")),
            *("--tls-key-file", str(directory / "key.pem")),
            *("--user", "kv", "on", ">s3cret", "~kvoffload:*", "+@all"),
            binary=system_binary("redis-server"),
        ) as server:
            server.tls_port = tls_port
            yield server

    @pytest.fixture(autouse=True)
    def engine(self, tls_server: Server) -> None:
        with tls_server.client() as client:
            client.flushall()
        self.port = tls_server.tls_port
        self.trust = tls_server.directory / "cert.pem"

    def make_tier(self, tmp_path: Path, *, layout: str = "") -> ValkeyTier:
        context = ssl.create_default_context(cafile=str(self.trust))
        url = f"rediss://kv:s3cret@127.0.0.1:{self.port}"
        return ValkeyTier(url, layout=layout, ssl_context=context)

    async def test_a_certificate_that_nobody_vouches_for(self) -> None:
        tier = ValkeyTier(f"valkeys://127.0.0.1:{self.port}")
        with pytest.raises(TierUnavailableError, match="certificate verify failed"):
            await tier.open()
        await tier.close()


# Values


def key_of(block_hash: str) -> bytes:
    return encode_key(block_hash, "test")


def name_of(key: bytes, layout: str = "") -> bytes:
    """Return the name that a block has in the engine."""
    return b"kvoffload:1:%x:" % layout_fingerprint(layout) + key


async def put(tier: ValkeyTier, *keys: bytes) -> None:
    payloads = [memoryview(payload_for(key, SIZE)) for key in keys]
    assert await tier.put(keys, payloads) == [DONE] * len(keys)


async def get(tier: ValkeyTier, *keys: bytes) -> list[bytes | RemoteOutcome | TierError]:
    buffers = [memoryview(bytearray(SIZE)) for _ in keys]
    outcomes = await tier.get(keys, buffers)
    return [
        bytes(buffer) if outcome is DONE else outcome
        for buffer, outcome in zip(buffers, outcomes, strict=True)
    ]


async def test_the_format(server: Server) -> None:
    """Written down, for other versions have to read it."""
    key = key_of("block")
    tier = ValkeyTier(server.url)
    await tier.open()
    assert await tier.put([key], [memoryview(b"payload")]) == [DONE]
    await tier.close()
    with server.client() as client:
        assert client.keys() == [b"kvoffload:1:0:s\x04testblock"]
        value = client.get(client.keys()[0])
    assert isinstance(value, bytes)
    assert value.hex() == (
        "4b564f52010b000007000000000000000000000000000000"
        "9962f77779b88cd4" + (key + b"payload").hex() + "da0798bac277a31a"
    )


def damages() -> dict[str, bytes]:
    """Return values that are no block, each for another reason."""
    key, other = key_of("block"), key_of("other")
    payload = memoryview(payload_for(key, SIZE))

    def value(key: bytes, layout: int) -> bytes:
        header = header_of(key, SIZE, layout)
        return header + payload.tobytes() + trailer_of(header, payload)

    good = value(key, 0)
    swapped = value(other, 0)
    flipped = bytearray(good)
    flipped[-1] ^= 1
    in_payload = bytearray(good)
    in_payload[-9] ^= 1
    in_header = bytearray(good)
    in_header[20] ^= 1
    version = bytearray(good)
    version[4] = 2
    length = bytearray(good)
    struct.pack_into("<Q", length, 8, SIZE + 1)
    return {
        "payload": bytes(in_payload),
        "header": bytes(in_header),
        "version": bytes(version),
        "length": bytes(length),
        "magic": b"????" + good[4:],
        "trailer": bytes(flipped),
        "another block": swapped,
        "another's payload": good[: -SIZE - 8] + swapped[-SIZE - 8 :],
        "another layout": value(key, 5),
        "zeros": bytes(len(good)),
    }


@pytest.mark.parametrize("damage", damages())
async def test_what_does_not_check_is_deleted(server: Server, damage: str) -> None:
    keys = [key_of("before"), key_of("block"), key_of("after")]
    tier = ValkeyTier(server.url)
    await tier.open()
    await put(tier, keys[0], keys[2])
    with server.client() as client:
        client.set(name_of(keys[1]), damages()[damage])
    before, bad, after = await get(tier, *keys)
    assert (before, after) == (payload_for(keys[0], SIZE), payload_for(keys[2], SIZE))
    assert isinstance(bad, CorruptBlockError)
    assert bad.block_hash == "block"
    assert await tier.find(keys) == [SIZE, None, SIZE]
    await put(tier, keys[1])
    await tier.close()


async def test_what_is_no_value_at_all(server: Server) -> None:
    key = key_of("block")
    tier = ValkeyTier(server.url)
    await tier.open()
    with server.client() as client:
        client.lpush(name_of(key), b"item")
    assert await tier.find([key]) == [None]
    (bad,) = await get(tier, key)
    assert isinstance(bad, CorruptBlockError)
    await put(tier, key)
    await tier.close()


async def test_a_value_of_another_size_is_replaced(server: Server) -> None:
    """Equal keys are equal bytes, so that it was never this block."""
    key = key_of("block")
    tier = ValkeyTier(server.url)
    await tier.open()
    with server.client() as client:
        client.set(name_of(key), b"short")
    assert await tier.find([key]) == [None]
    await put(tier, key)
    with server.client() as client:
        client.set(name_of(key), bytes(added_bytes(key) + 7))
    assert await get(tier, key) == [ABSENT]
    await put(tier, key)
    assert await get(tier, key) == [payload_for(key, SIZE)]
    await tier.close()


async def test_blocks_can_expire(server: Server) -> None:
    tier = ValkeyTier(server.url, ttl_s=1000)
    await tier.open()
    await put(tier, key_of("block"))
    await tier.close()
    with server.client() as client:
        left = client.pttl(name_of(key_of("block")))
    assert isinstance(left, int)
    assert 900_000 < left <= 1_000_000


async def test_clear_leaves_what_is_not_ours(server: Server) -> None:
    tier = ValkeyTier(server.url)
    await tier.open()
    await put(tier, key_of("block"))
    with server.client() as client:
        client.set("s\x04testblock", "somebody else's")
        assert sum([count async for count in tier.clear("test")]) == 1
        assert client.keys() == [b"s\x04testblock"]
    await tier.close()


# Whom it talks to


async def test_nobody_is_there(own_server: Server) -> None:
    own_server.kill()
    tier = ValkeyTier(own_server.url)
    with anyio.fail_after(10):
        with pytest.raises(TierUnavailableError):
            await tier.open()
        with pytest.raises(TierUnavailableError):
            await tier.find([key_of("block")])
        with pytest.raises(TierUnavailableError):
            await put(tier, key_of("block"))
        own_server.start()
        await tier.check()
        await put(tier, key_of("block"))
    await tier.close()
    with pytest.raises(ClosedError):
        await tier.find([key_of("block")])


@pytest.mark.parametrize("password", ["wrong", None])
async def test_a_wrong_password(tmp_path: Path, password: str | None) -> None:
    with Server(tmp_path / "server", "--requirepass", "s3cret") as server:
        tier = ValkeyTier(server.url, password=password)
        with pytest.raises(TierUnavailableError, match=r"WRONGPASS|NOAUTH"):
            await tier.open()
        with pytest.raises(TierUnavailableError):
            await tier.find([key_of("block")])
        (outcome,) = await tier.get([key_of("block")], [memoryview(bytearray(10))])
        assert isinstance(outcome, TierUnavailableError)
        await tier.close()
        url = server.url.replace("//", "//:s3cret@")
        tier = ValkeyTier(url)
        await tier.open()
        await put(tier, key_of("block"))
        await tier.close()


async def test_no_message_shows_the_password() -> None:
    url = "redis://user:s3cret@127.0.0.1:1"
    tier = ValkeyTier(url)
    with pytest.raises(TierUnavailableError) as caught:
        await tier.open()
    assert "s3cret" not in f"{tier!r} {caught.value!r} {caught.value.__cause__!r}"
    await tier.close()
    for bad in ("http://:s3cret@host", "redis://:s3cret@host:port", "redis://:s3cret@"):
        with pytest.raises(ConfigError) as wrong:
            ValkeyTier(bad)
        assert "s3cret" not in str(wrong.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://localhost", "localhost:6379"),
        ("valkey://10.0.0.1:7000/2", "10.0.0.1:7000"),
        ("valkeys://example", "example:6379"),
        ("/run/valkey.sock", "/run/valkey.sock"),
        ("unix:///run/valkey.sock?database=2", "/run/valkey.sock"),
        ("redis://[::1]:7", "::1:7"),
    ],
)
def test_urls(url: str, shown: str) -> None:
    assert repr(ValkeyTier(url)) == f"<ValkeyTier 'remote': {shown}>"


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": "http://host"},
        {"url": ""},
        {"url": "redis://"},
        {"url": "redis://host/name"},
        {"url": "redis://host", "pool": 0},
        {"url": "redis://host", "ttl_s": 0},
        {"url": "/run/valkey.sock", "cluster": True},
        {"url": "redis://host", "ssl_context": ssl.create_default_context()},
    ],
)
def test_wrong_settings(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        ValkeyTier(**wrong)  # type: ignore[arg-type]  # it is wrong


async def test_what_speaks_another_protocol() -> None:
    """Not a block, not a hang."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        tier = ValkeyTier(f"redis://127.0.0.1:{port}")
        with anyio.fail_after(10), pytest.raises(TierUnavailableError):
            await tier.open()
        await tier.close()


async def test_closed_while_it_authenticates() -> None:
    """A connection that is let in after the close is given up; it stayed open for good."""
    asked, let_in, over = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert b"AUTH" in await reader.read(1000)
        asked.set()
        await let_in.wait()
        writer.write(b"+OK\r\n")
        while await reader.read(1000):
            writer.write(b"+PONG\r\n")
        writer.close()
        await writer.wait_closed()
        over.set()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        tier = ValkeyTier(f"redis://:secret@127.0.0.1:{port}")
        with anyio.fail_after(10):
            opening = asyncio.create_task(tier.open())
            await asked.wait()
            await tier.close()
            let_in.set()
            with pytest.raises(TierUnavailableError, match="closed"):
                await opening
            await over.wait()
