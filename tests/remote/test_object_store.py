"""`ObjectStoreTier` on real stores: what every remote tier does, and what is its own."""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import re
import resource
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import util
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from kvoffload import (
    ClosedError,
    ConfigError,
    CorruptBlockError,
    ObjectStoreTier,
    RemoteOutcome,
    TierError,
    TierUnavailableError,
)
from kvoffload.keys import encode_key
from kvoffload.remote.envelope import added_bytes, header_of, layout_fingerprint, trailer_of
from kvoffload.remote.object_client import EXIT_S, MAX_RETRIES, ObjectClient
from kvoffload.remote.send_buffers import SendBuffers
from kvoffload.testing import RemoteTierContract, eventually, payload_for

from .cutting import serving
from .object_servers import BUCKET, SECRET, ObjectServer, Seaweed
from .servers import free_port

SIZE = 100_000
DONE, PRESENT, ABSENT = RemoteOutcome.DONE, RemoteOutcome.PRESENT, RemoteOutcome.ABSENT


class TestObjectStoreTier(RemoteTierContract):
    many_blocks = 1200  # more than one page of a listing

    @pytest.fixture(autouse=True)
    def engine(self, seaweed: ObjectServer, prefix: str) -> None:
        self.server, self.prefix = seaweed, prefix

    def make_tier(self, tmp_path: Path, *, layout: str = "") -> ObjectStoreTier:
        return self.server.tier(self.prefix, layout=layout)


class TestObjectStoreTierOnMoto(RemoteTierContract):
    many_blocks = 20  # it is slow

    @pytest.fixture(autouse=True)
    def engine(self, moto: ObjectServer, prefix: str) -> None:
        self.server, self.prefix = moto, prefix

    def make_tier(self, tmp_path: Path, *, layout: str = "") -> ObjectStoreTier:
        return self.server.tier(self.prefix, layout=layout)


class TestObjectStoreTierInFolder(RemoteTierContract):
    many_blocks = 1200

    def make_tier(self, tmp_path: Path, *, layout: str = "") -> ObjectStoreTier:
        return ObjectStoreTier(f"file://{tmp_path}/blocks", layout=layout, pool=3)


# Values


def key_of(block_hash: str, namespace: str = "test") -> bytes:
    return encode_key(block_hash, namespace)


def name_of(key: bytes, layout: str = "") -> str:
    """Return the name that a block of the namespace `test` has in the store."""
    digest = hashlib.blake2b(key, digest_size=16).hexdigest()
    return f"kvoffload/1/{layout_fingerprint(layout):x}/n-test/{digest[:2]}/{digest[2:]}"


def options_at(port: int) -> dict[str, str]:
    """Return what finds a server that lets everybody in."""
    endpoint = {"endpoint": f"http://127.0.0.1:{port}", "region": "us-east-1"}
    return {**endpoint, "access_key_id": "key", "secret_access_key": SECRET}


@asynccontextmanager
async def opened(tier: ObjectStoreTier) -> AsyncIterator[ObjectStoreTier]:
    await tier.open()
    try:
        yield tier
    finally:
        await tier.close()


async def put(tier: ObjectStoreTier, *keys: bytes) -> None:
    payloads = [memoryview(payload_for(key, SIZE)) for key in keys]
    assert await tier.put(keys, payloads) == [DONE] * len(keys)


async def get(tier: ObjectStoreTier, *keys: bytes) -> list[bytes | RemoteOutcome | TierError]:
    buffers = [memoryview(bytearray(SIZE)) for _ in keys]
    outcomes = await tier.get(keys, buffers)
    return [
        bytes(buffer) if outcome is DONE else outcome
        for buffer, outcome in zip(buffers, outcomes, strict=True)
    ]


async def test_the_format(tmp_path: Path) -> None:
    """Written down, for other versions have to read it."""
    key = key_of("block")
    async with opened(ObjectStoreTier(f"file://{tmp_path}")) as tier:
        assert await tier.put([key], [memoryview(b"payload")]) == [DONE]
    path = tmp_path / "kvoffload/1/0/n-test/b2/e2b9cc553a34e8030faff4f36d3765"
    assert path.read_bytes().hex() == (
        "4b564f52010b000007000000000000000000000000000000"
        "9962f77779b88cd4" + (key + b"payload").hex() + "da0798bac277a31a"
    )


@pytest.mark.parametrize(
    ("namespace", "folder"),
    [
        ("", "n-"),
        ("tenant-1.prod_x", "n-tenant-1.prod_x"),
        ("Tenant", "h-"),
        ("a/b", "h-"),
        ("..", "h-"),
        ("x" * 65, "h-"),
        ("ü", "h-"),
    ],
)
async def test_namespaces_are_folders(tmp_path: Path, namespace: str, folder: str) -> None:
    """Readable where no file system or store can take it for another."""
    async with opened(ObjectStoreTier(f"file://{tmp_path}")) as tier:
        await put(tier, key_of("block", namespace))
    (found,) = (tmp_path / "kvoffload" / "1" / "0").iterdir()
    assert found.name == folder or (folder == "h-" and len(found.name) == 34)


def damages() -> dict[str, bytes]:
    """Return values that are no block, each for another reason."""
    key, other = key_of("block"), key_of("other")
    payload = memoryview(payload_for(key, SIZE))

    def value(key: bytes, layout: int) -> bytes:
        header = header_of(key, SIZE, layout)
        return header + payload.tobytes() + trailer_of(header, payload)

    def changed(offset: int, value: bytes) -> bytes:
        return good[:offset] + value + good[offset + len(value) :]

    good = value(key, 0)
    swapped = value(other, 0)
    return {
        "payload": changed(SIZE, bytes([good[SIZE] ^ 1])),
        "header": changed(20, b"\xff"),
        "version": changed(4, b"\x02"),
        "length": changed(8, struct.pack("<Q", SIZE + 1)),
        "magic": changed(0, b"????"),
        "trailer": changed(len(good) - 1, bytes([good[-1] ^ 1])),
        "another block": swapped,
        "another's payload": good[: -SIZE - 8] + swapped[-SIZE - 8 :],
        "another layout": value(key, 5),
        "zeros": bytes(len(good)),
    }


@pytest.mark.parametrize("damage", damages())
async def test_what_does_not_check_is_deleted(tmp_path: Path, damage: str) -> None:
    keys = [key_of("before"), key_of("block"), key_of("after")]
    async with opened(ObjectStoreTier(f"file://{tmp_path}")) as tier:
        await put(tier, *keys)
        path = tmp_path / name_of(keys[1])
        path.write_bytes(damages()[damage])
        before, bad, after = await get(tier, *keys)
        assert (before, after) == (payload_for(keys[0], SIZE), payload_for(keys[2], SIZE))
        assert isinstance(bad, CorruptBlockError)
        assert bad.block_hash == "block"
        assert await tier.find(keys) == [SIZE, None, SIZE]
        assert not path.exists()
        await put(tier, keys[1])


@pytest.mark.parametrize("length", [0, 1, 60, SIZE + 50, SIZE + 52, 2 * SIZE])
async def test_an_object_of_another_size_is_replaced(
    seaweed: ObjectServer, prefix: str, length: int
) -> None:
    """Equal keys are equal bytes, so that it was never this block; it may have none at all."""
    key = key_of("block")
    assert added_bytes(key) == 51
    async with opened(seaweed.tier(prefix)) as tier:
        with seaweed.client() as client:
            name = f"{prefix}/{name_of(key)}"
            client.put_object(Bucket=BUCKET, Key=name, Body=bytes(length))
        found = length - added_bytes(key)
        assert await tier.find([key]) == [found if found >= 0 else None]
        assert await get(tier, key) == [ABSENT]
        await put(tier, key)
        assert await get(tier, key) == [payload_for(key, SIZE)]


async def test_clear_leaves_what_is_not_ours(seaweed: ObjectServer, prefix: str) -> None:
    others = [
        f"{prefix}/kvoffload/1/0/n-test/notes.txt",
        f"{prefix}/kvoffload/1/0/n-test2/{name_of(key_of('x'))[-33:]}",
        f"{prefix}/kvoffload/2/0/n-test/{name_of(key_of('x'))[-33:]}",
        f"{prefix}/n-test/{name_of(key_of('x'))[-33:]}",
    ]
    async with opened(seaweed.tier(prefix)) as tier:
        await put(tier, key_of("block"))
        with seaweed.client() as client:
            for name in others:
                client.put_object(Bucket=BUCKET, Key=name, Body=b"somebody else's")
        assert sum([count async for count in tier.clear("test")]) == 1
        assert sorted(seaweed.names(f"{prefix}/")) == sorted(others)


async def test_a_chain_that_nobody_stored_is_not_asked_for_to_its_end(
    moto: ObjectServer, prefix: str
) -> None:
    """Requests cost money: behind many that are not there, no more are asked for."""
    keys = [key_of(f"block{number}") for number in range(300)]
    async with opened(moto.tier(prefix)) as tier:
        await put(tier, keys[0], keys[100], keys[299])
        log = moto.directory / "log"
        before = log.read_text().count("HEAD")
        assert await tier.find(keys) == [SIZE, *[None] * 99, SIZE, *[None] * 91]
        assert log.read_text().count("HEAD") - before == 192
        assert await tier.find(keys[1:]) == [None] * 64
        assert (await tier.find(keys[::-1]))[0] == SIZE


async def test_two_write_one_block(seaweed: ObjectServer, prefix: str) -> None:
    """Both ask before either wrote; the store keeps the first, and neither fails."""
    keys = [key_of(f"block{number}") for number in range(20)]
    payloads = [memoryview(payload_for(key, SIZE)) for key in keys]
    outcomes: list[RemoteOutcome | TierError] = []
    async with opened(seaweed.tier(prefix)) as one, opened(seaweed.tier(prefix)) as two:

        async def write(tier: ObjectStoreTier) -> None:
            outcomes.extend(await tier.put(keys, payloads))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write, one)
            tasks.start_soon(write, two)
        assert sorted(str(each) for each in outcomes) == sorted([str(DONE), str(PRESENT)] * 20)
        assert await get(one, *keys) == [payload_for(key, SIZE) for key in keys]


async def test_a_store_without_conditional_writes(moto: ObjectServer, prefix: str) -> None:
    """The last one stays: the same bytes."""
    options = {**moto.options, "conditional_put": "disabled"}
    keys = [key_of("one"), key_of("two")]
    async with opened(moto.tier(prefix, options=options)) as tier:
        await put(tier, *keys)
        assert await tier.put(keys, [memoryview(payload_for(key, SIZE)) for key in keys]) == [
            PRESENT,
            PRESENT,
        ]
        assert await get(tier, *keys) == [payload_for(key, SIZE) for key in keys]


async def test_a_store_that_refuses_conditional_writes(prefix: str) -> None:
    """It says 501: from then on, writes are plain."""
    written: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := (await reader.readuntil(b"\r\n\r\n")).lower():
            length = re.search(rb"content-length: (\d+)", head)
            body = await reader.readexactly(int(length[1]) if length else 0)
            if head.startswith(b"head"):
                writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
            elif head.startswith(b"get"):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(_EMPTY))
                writer.write(_EMPTY)
            elif b"if-none-match" in head:
                writer.write(b"HTTP/1.1 501 Not Implemented\r\ncontent-length: 0\r\n\r\n")
            else:
                written.append(body)
                writer.write(b'HTTP/1.1 200 OK\r\netag: "1"\r\ncontent-length: 0\r\n\r\n')

    with anyio.fail_after(20):
        async with (
            serving(talk) as port,
            opened(ObjectStoreTier("s3://bucket", options=options_at(port))) as tier,
        ):
            await put(tier, key_of("one"))
            await put(tier, key_of("two"))
    assert len(written) == 2


async def test_what_is_deleted_twice(tmp_path: Path) -> None:
    """Some stores call the first name that is not there an error, and stop."""
    client = ObjectClient(f"file://{tmp_path}", {}, {})
    for name in ("a", "b"):
        assert await client.create(name, b"value")
    await client.delete(["nobody's", "a", "neither", "b"])
    assert await client.size("a") is None
    assert await client.size("b") is None


async def test_a_folder_that_goes_away(tmp_path: Path) -> None:
    """Then nothing is there, until somebody writes."""
    folder = tmp_path / "with spaces and ü"
    async with opened(ObjectStoreTier(f"file://{folder}")) as tier:
        await put(tier, key_of("block"))
        folder.rename(tmp_path / "elsewhere")
        assert await get(tier, key_of("block")) == [ABSENT]
        assert await tier.delete([key_of("block")]) == [False]
        await put(tier, key_of("block"))
        assert await get(tier, key_of("block")) == [payload_for(key_of("block"), SIZE)]


async def test_a_folder_that_is_full(tmp_path: Path) -> None:
    """Each block is refused, nothing is left of it, and what is there is read."""
    small, large = key_of("small"), key_of("large")
    async with opened(ObjectStoreTier(f"file://{tmp_path}")) as tier:
        assert await tier.put([small], [memoryview(b"payload")]) == [DONE]
        before = sum(path.is_file() for path in tmp_path.rglob("*"))  # noqa: ASYNC240  # a test
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, limits[1]))
        try:
            (outcome,) = await tier.put([large], [memoryview(payload_for(large, SIZE))])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert type(outcome) is TierError
        assert outcome.block_hash == "large"
        assert await tier.find([small, large]) == [7, None]
        assert sum(path.is_file() for path in tmp_path.rglob("*")) == before  # noqa: ASYNC240
        await put(tier, large)


# Buffers


class StalledServer:
    """A bucket that has one object, of which it gives half, and that takes half of what it is
    given; then it waits until it is told to go on."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.go_on = asyncio.Event()
        self.gone = asyncio.Event()
        self.received = bytearray()
        self.value = b""

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            verb, path, _ = head.split(b" ", 2)
            if verb == b"HEAD":
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            elif b"list-type" in path:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(_EMPTY))
                writer.write(_EMPTY)
            else:
                try:
                    await (self._give(writer) if verb == b"GET" else self._take(reader))
                finally:
                    self.gone.set()

    async def _give(self, writer: asyncio.StreamWriter) -> None:
        length = len(self.value)
        writer.write(
            b"HTTP/1.1 206 Partial Content\r\nContent-Length: %d\r\n"
            b'Last-Modified: Sat, 01 Jan 2000 00:00:00 GMT\r\nETag: "1"\r\n'
            b"Content-Range: bytes 0-%d/%d\r\n\r\n" % (length, length - 1, length)
        )
        writer.write(self.value[: length // 2])
        await writer.drain()
        await self._stall()
        writer.write(self.value[length // 2 :])
        await writer.drain()

    async def _take(self, reader: asyncio.StreamReader) -> None:
        self.received += await reader.read(65536)
        await self._stall()
        while data := await reader.read(65536):
            self.received += data

    async def _stall(self) -> None:
        self.reached.set()
        await self.go_on.wait()


_EMPTY = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"


@asynccontextmanager
async def stalled() -> AsyncIterator[tuple[StalledServer, ObjectStoreTier]]:
    """Run a server that stalls; yield it and a tier on it."""
    server = StalledServer()
    with anyio.fail_after(20):
        async with (
            serving(server.talk, limit=4096) as port,
            opened(ObjectStoreTier("s3://bucket", options=options_at(port))) as tier,
        ):
            yield server, tier
            server.go_on.set()
            await server.gone.wait()


async def test_what_is_sent_is_a_copy() -> None:
    """A request that was cancelled reads on for a moment, on a thread that nobody can wait for:
    so it may not look at the caller's buffer, which is another block's by then."""
    size = 16 * 1024 * 1024  # more than sockets hold
    payload = bytearray(b"A" * size)
    async with stalled() as (server, tier):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(tier.put, [key_of("block")], [memoryview(payload)])
            await server.reached.wait()
            payload[:] = b"B" * size
            server.go_on.set()
            await eventually(lambda: len(server.received) > size // 2)
            tasks.cancel_scope.cancel()
        await server.gone.wait()
        assert server.received.count(b"A") > size // 2
        assert b"BBBB" not in server.received


async def test_what_is_read_after_it_was_cancelled_goes_nowhere() -> None:
    """The buffer is another block's by then."""
    key = key_of("block")
    header = header_of(key, SIZE, 0)
    payload = memoryview(payload_for(key, SIZE))
    buffer = bytearray(SIZE)
    async with stalled() as (server, tier):
        server.value = header + payload + trailer_of(header, payload)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(tier.get, [key], [memoryview(buffer)])
            await server.reached.wait()
            tasks.cancel_scope.cancel()
        server.go_on.set()
        await server.gone.wait()
        assert buffer == bytes(SIZE)


async def test_buffers_are_used_again(tmp_path: Path) -> None:
    """The first touch of memory costs more than all else."""
    keys = [key_of(f"block{number}") for number in range(4)]
    async with opened(ObjectStoreTier(f"file://{tmp_path}", pool=2)) as tier:
        assert tier._open is not None
        free = tier._open.buffers._free

        async def was_used_again() -> bool:
            await tier.delete(keys)
            before = {id(each) for each in free}
            await put(tier, *keys)
            return bool(before & {id(each) for each in free})

        # A thread of the client's may have one a moment longer than the request took.
        assert any([await was_used_again() for _ in range(20)])
        assert len(free) <= 2


def test_a_buffer_that_somebody_has_is_not_used_again() -> None:
    """A request that was cancelled reads on: not another block's bytes."""
    staging = SendBuffers(2)
    with staging.take(10) as buffer:
        held = buffer.data
    del buffer
    with staging.take(10) as buffer:
        assert not np.shares_memory(buffer, np.asarray(held))
        address = buffer.ctypes.data
        del buffer
    with staging.take(9) as buffer:
        assert buffer.ctypes.data == address
        assert len(buffer) == 9


async def test_nothing_is_left_when_it_is_closed(tmp_path: Path) -> None:
    def threads() -> set[threading.Thread]:
        return {each for each in threading.enumerate() if "kvoffload" in each.name}

    before = threads()
    async with opened(ObjectStoreTier(f"file://{tmp_path}")) as tier:
        await put(tier, key_of("block"))
        assert threads() > before
    await eventually(lambda: threads() <= before)
    assert len(asyncio.all_tasks()) == 1
    with pytest.raises(ClosedError):
        await tier.find([key_of("block")])


# Whom it talks to


async def test_an_ill_store_is_not_asked_for_each_of_many(prefix: str) -> None:
    """It answers, but to all that matters with an error."""
    asked: Counter[bytes] = Counter()
    there = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := (await reader.readuntil(b"\r\n\r\n")).lower():
            verb, path, _ = head.split(b" ", 2)
            length = re.search(rb"content-length: (\d+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            asked[verb] += 1
            if verb == b"head":
                writer.write(there)
            elif b"nobody" in path:
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(_EMPTY))
                writer.write(_EMPTY)
            else:
                writer.write(b"HTTP/1.1 500 Internal Error\r\ncontent-length: 3\r\n\r\nill")

    keys = [key_of(f"block{number}") for number in range(50)]
    payloads = [memoryview(payload_for(key, SIZE)) for key in keys]
    with anyio.fail_after(20):
        async with (
            serving(talk) as port,
            opened(ObjectStoreTier("s3://bucket", options=options_at(port), pool=2)) as tier,
        ):
            refused = await tier.put(keys, payloads)
            assert {type(each) for each in refused} == {TierError}
            assert "500 Internal Server Error" in str(refused[-1])
            assert {each.block_hash for each in refused if isinstance(each, TierError)} == {
                f"block{number}" for number in range(50)
            }
            assert asked[b"put"] <= 2 * (1 + MAX_RETRIES)
            del asked[b"get"]
            lost = await get(tier, *keys)
            assert {type(each) for each in lost} == {TierUnavailableError}
            assert asked[b"get"] <= 2 * (1 + MAX_RETRIES)
            there = (
                b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n"
                b"last-modified: Sat, 01 Jan 2000 00:00:00 GMT\r\n\r\n"
            ) % (SIZE + added_bytes(keys[0]))
            assert await tier.find(keys[:1]) == [SIZE]
            with pytest.raises(TierError, match="refused: 500"):
                await tier.delete(keys[:1])
            with pytest.raises(TierError, match="refused: 500"):
                await anext(aiter(tier.clear("test")))


async def test_nobody_is_there(prefix: str) -> None:
    tier = ObjectStoreTier(f"s3://{BUCKET}/{prefix}", options=options_at(free_port()))
    with anyio.fail_after(10):
        with pytest.raises(TierUnavailableError, match="Connection refused"):
            await tier.open()
        with pytest.raises(TierUnavailableError):
            await tier.find([key_of("block")])
        with pytest.raises(TierUnavailableError):
            await put(tier, key_of("block"))
        assert isinstance((await get(tier, key_of("block")))[0], TierUnavailableError)
        await tier.close()


async def test_somebody_comes(prefix: str, moto: ObjectServer) -> None:
    """A tier that found nobody when it was opened is well from then on."""
    tier = moto.tier(prefix)
    moto.kill()
    with anyio.fail_after(60):
        with pytest.raises(TierUnavailableError):
            await tier.open()
        moto.start()
        await tier.check()
        await put(tier, key_of("block"))
        assert await get(tier, key_of("block")) == [payload_for(key_of("block"), SIZE)]
        await tier.close()


async def test_what_the_environment_says(
    moto: ObjectServer, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is all that a URL needs beside it; an endpoint without TLS is one that is wanted."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto.options["endpoint"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    async with opened(ObjectStoreTier(f"s3://{BUCKET}/{prefix}")) as tier:
        await put(tier, key_of("block"))
        assert await get(tier, key_of("block")) == [payload_for(key_of("block"), SIZE)]


async def test_tls(seaweed: Seaweed, prefix: str) -> None:
    """Payloads are not signed then, for nobody can change them; and a stranger is no server."""
    options = {**seaweed.options, "endpoint": f"https://127.0.0.1:{seaweed.tls_port}"}
    trust = {"root_certificate": (seaweed.directory / "cert.pem").read_bytes()}
    async with opened(seaweed.tier(prefix, options=options, client_options=trust)) as tier:
        await put(tier, key_of("block"))
        assert await get(tier, key_of("block")) == [payload_for(key_of("block"), SIZE)]
    tier = seaweed.tier(prefix, options=options)
    with pytest.raises(TierUnavailableError, match="InvalidCertificate UnknownIssuer"):
        await tier.open()
    await tier.close()


async def test_a_bucket_that_is_not_there(seaweed: ObjectServer) -> None:
    """Of an object in it the store says what it says of any: so the bucket is looked for."""
    tier = ObjectStoreTier("s3://nobodys", options=seaweed.options)
    with pytest.raises(TierUnavailableError, match="NoSuchBucket"):
        await tier.open()
    assert await get(tier, key_of("block")) == [ABSENT]
    (outcome,) = await tier.put([key_of("block")], [memoryview(b"payload")])
    assert isinstance(outcome, TierUnavailableError)
    await tier.close()


async def test_wrong_credentials_are_in_no_message(seaweed: ObjectServer, prefix: str) -> None:
    wrong = {**seaweed.options, "secret_access_key": "wr0ng", "access_key_id": "test-key"}
    tier = seaweed.tier(prefix, options=wrong)
    key = key_of("block")
    with pytest.raises(TierUnavailableError, match="SignatureDoesNotMatch") as caught:
        await tier.open()
    with pytest.raises(TierUnavailableError) as found:
        await tier.find([key])
    (outcome,) = await get(tier, key)
    assert isinstance(outcome, TierUnavailableError)
    await tier.close()
    said = [tier, outcome, outcome.__cause__]
    for each in (caught.value, found.value):
        said += [each, each.__cause__, each.__cause__ and each.__cause__.__context__]
    assert "wr0ng" not in repr(said)
    assert "test-key" not in repr(said)


async def test_options_that_are_wrong(tmp_path: Path) -> None:
    """Found when it is opened; and the message has no value of any."""
    for options in (
        {"secret": "wr0ng"},
        {"secret_access_key": "wr0ng", "unsigned_payload": "?"},
        {"unsigned_payload": "wr0ng"},
    ):
        tier = ObjectStoreTier("s3://bucket", options=options)
        with pytest.raises(ConfigError, match="s3://bucket can't be used") as caught:
            await tier.open()
        assert "wr0ng" not in str(caught.value)
        await tier.close()
    (tmp_path / "file").write_bytes(b"")
    tier = ObjectStoreTier(f"file://{tmp_path}/file/folder")
    with pytest.raises(ConfigError):
        await tier.open()
    await tier.close()


@pytest.mark.parametrize("name", ["endpoint", "AWS_ENDPOINT_URL"])
async def test_an_endpoint_that_is_no_url(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`host:port` is what other clients take; obstore took it, and panicked in the first call."""
    options = {"region": "us-east-1", "skip_signature": "true"}
    if name.isupper():
        monkeypatch.setenv(name, "wr0ng:9000")
    else:
        options[name] = "wr0ng:9000"
    tier = ObjectStoreTier("s3://bucket", options=options)
    with pytest.raises(ConfigError, match=f"{name} must be a URL, as http://host:9000") as caught:
        await tier.open()
    assert "wr0ng" not in str(caught.value)
    await tier.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": "http://host/bucket"},
        {"url": "bucket"},
        {"url": ""},
        {"url": "s3://"},
        {"url": "s3:///prefix"},
        {"url": "s3://[bucket/prefix"},
        {"url": "file://"},
        {"url": "file:///"},
        {"url": "file://folder"},
        {"url": "memory:///"},
        {"url": "s3://bucket?region=x"},
        {"url": 5},
        {"url": "s3://bucket", "pool": 0},
    ],
)
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ObjectStoreTier(**wrong)


def test_no_message_shows_what_is_no_part_of_a_url() -> None:
    with pytest.raises(ConfigError, match="credentials go into options") as caught:
        ObjectStoreTier("s3://key:s3cret@bucket")
    assert "s3cret" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        ObjectStoreTier("s3://key:s3cret\N{ACCOUNT OF}@bucket")
    assert "s3cret" not in repr([caught.value, caught.value.__context__])
    tier = ObjectStoreTier("s3://bucket/a", options={"secret_access_key": "s3cret"})
    assert repr(tier) == "<ObjectStoreTier 'remote': s3://bucket/a>"


def test_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without obstore, kvoffload can be imported all the same."""
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"kvoffload\[s3\]"):
        ObjectStoreTier("s3://bucket")


async def test_obstore_is_imported_late() -> None:
    code = "import kvoffload, sys; sys.exit('obstore' in sys.modules)"
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    assert await child.wait() == 0


def test_a_process_that_ends_waits_for_the_clients_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of ten processes that ended right after a request was aborted on a busy machine: a
    thread had told of the request's end, and wanted the interpreter once more."""
    registered: list[object] = []
    monkeypatch.setattr(ObjectClient, "first_pid", None)
    monkeypatch.setattr(atexit, "register", lambda *call: registered.append(call))
    for _ in range(2):
        ObjectClient(f"file://{tmp_path}", {}, {})
    assert registered == [(time.sleep, EXIT_S)]


async def test_a_fork_says_what_is_wrong(tmp_path: Path) -> None:
    """The client's threads are not there, so that no call would ever end."""
    script = tmp_path / "fork.py"
    script.write_text(f"""
import asyncio, os
from kvoffload import ConfigError, ObjectStoreTier

async def use():
    tier = ObjectStoreTier("file://{tmp_path}")
    await tier.open()
    await tier.close()

asyncio.run(use())
if pid := os.fork():
    assert os.waitpid(pid, 0)[1] == 0
else:
    try:
        asyncio.run(use())
    except ConfigError as exc:
        os._exit("spawn" not in str(exc))
""")
    child = await asyncio.create_subprocess_exec(sys.executable, str(script))
    with anyio.fail_after(30):
        assert await child.wait() == 0


@pytest.mark.parametrize("url", ["gs://bucket/prefix", "az://container/prefix"])
async def test_other_clouds(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are set up, and the store is asked; there is none here."""
    base = f"http://127.0.0.1:{free_port()}"
    options: dict[str, str] = {"skip_signature": "true", "base_url": base}
    if url.startswith("az"):
        options = {"account_name": "account", "skip_signature": "true", "endpoint": base}
    tier = ObjectStoreTier(url, options=options)
    with anyio.fail_after(10), pytest.raises(TierUnavailableError, match=f"{url}: .*refused"):
        await tier.open()
    await tier.close()
