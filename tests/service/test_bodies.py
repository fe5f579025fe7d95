"""Bodies that lie, stop, crawl or never end: pins are back, and nothing is stored in part."""

from __future__ import annotations

import os
from collections.abc import Sequence

import anyio
import pytest

from kvoffload import AsyncLRUManager, BlockHash, MemoryTier, streamed
from kvoffload.service.limits import Limits
from kvoffload.service.wire import BATCH, PREFIX, hashes_to_text, pack_header
from kvoffload.testing import eventually

from .serving import BLOCK_BYTES, Served, batch, serving

HASHES: list[BlockHash] = [b"one", "two", 3, "\ud800"]
PAYLOADS = [os.urandom(size) for size in (BLOCK_BYTES, 0, 1, 777)]


def upload(body: bytes, length: int | None = None, path: str = "/v1/store") -> bytes:
    """Return a raw request; `length` is what it announces."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: kvoffload",
        f"Content-Type: {BATCH}",
        f"Content-Length: {len(body) if length is None else length}",
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def status_of(stream: anyio.abc.SocketStream) -> int:
    answer = await stream.receive()
    return int(answer.split()[1])


async def nothing_is_there(served: Served, hashes: Sequence[BlockHash] = HASHES) -> None:
    await served.at_rest()
    stats = served.manager.get_stats()
    assert stats.tiers["hot"].blocks == 0
    assert {each.state.value for each in served.manager.locate(hashes)} == {"absent"}


async def test_every_kind_of_hash_and_size_comes_back() -> None:
    async with serving() as served:
        answer = await served.store(HASHES, PAYLOADS)
        assert answer.json() == {
            "stored": ["b:6f6e65", "s:two", "i:3", "x:eda080"],
            "present": [],
            "rejected": {},
            "evicted": [],
            "waited_s": 0.0,
        }
        answer = await served.post("load", block_hashes=hashes_to_text(HASHES[::-1]))
        assert answer.headers["content-type"] == BATCH
        assert answer.content == batch(HASHES[::-1], PAYLOADS[::-1])


async def test_a_batch_of_many_groups_is_one_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "GROUP_BYTES", 3 * 1000)
    payloads = [os.urandom(size) for size in (1000, 1500, 600, 4000, 0, 1000, 999)]
    hashes = [f"h{number}" for number in range(len(payloads))]
    async with serving() as served:
        answer = await served.store(hashes, payloads)
        assert answer.json()["stored"] == hashes_to_text(hashes)
        again = await served.store([*hashes[:2], *hashes[:2]], [b"other"] * 4)
        assert again.json()["present"] == hashes_to_text(hashes[:2])
        answer = await served.post("load", block_hashes=hashes_to_text(hashes))
        assert answer.content == batch(hashes, payloads)


@pytest.mark.parametrize("sent", [0, 3, 8, 50, 1000, BLOCK_BYTES + 150])
async def test_a_client_that_vanishes_in_an_upload_leaves_nothing(
    sent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "GROUP_BYTES", 1)  # so that some blocks were stored already
    body = batch(HASHES, PAYLOADS)
    async with serving() as served:
        stream = await served.raw(upload(body[:sent], len(body)))
        if sent:
            await eventually(lambda: served.service.calls == 1)
        await stream.aclose()
        await nothing_is_there(served)


@pytest.mark.parametrize("name", ["store", "complete_store", "request"])
async def test_a_body_shorter_than_it_says_is_refused(name: str) -> None:
    """The length that HTTP announces is right, the one in the batch is not."""
    async with serving() as served:
        session = (await served.post("sessions")).json()["session"]
        path = f"/v1/sessions/{session}"
        await served.post(f"sessions/{session}/prepare_store", block_hashes=["s:two"], sizes=[9])
        opened = await served.post(
            f"sessions/{session}/requests", block_hashes=hashes_to_text(HASHES)
        )
        paths = {
            "store": "/v1/store",
            "complete_store": f"{path}/complete_store",
            "request": f"{path}/requests/{opened.json()['request']}/store",
        }
        for body in (
            pack_header(["two"], [9]) + b"short",
            pack_header(["two"], [9]) + b"longer than it says",
            pack_header(["two"], [9])[:-1],
            pack_header(["two"], [9])[:6],
            b"",
            b"KVB2" + pack_header(["two"], [9])[4:] + b"123456789",
            PREFIX.pack(b"KVB1", 2**32 - 1) + b"x",
            PREFIX.pack(b"KVB1", 1) + b"{",
            PREFIX.pack(b"KVB1", 2) + b"[]",
            PREFIX.pack(b"KVB1", 2) + b"{}",
            pack_header(["two"], [BLOCK_BYTES + 1]) + bytes(BLOCK_BYTES + 1),
        ):
            for chunked in (False, True):
                content = _in_chunks(body) if chunked else body
                answer = await served.http.post(
                    paths[name], content=content, headers={"Content-Type": BATCH}
                )
                assert answer.status_code == 422, (body[:40], answer.text)
                assert answer.json()["message"]
        await served.http.delete(path)
        await nothing_is_there(served)


async def _in_chunks(body: bytes):  # type: ignore[no-untyped-def]  # an async generator for httpx
    for start in range(0, len(body), 7):
        yield body[start : start + 7]


async def test_another_type_of_body_is_refused() -> None:
    async with serving() as served:
        answer = await served.http.post("/v1/store", content=b"{}")
        assert answer.status_code == 415
        answer = await served.http.post("/v1/store", json={"block_hashes": ["s:a"]})
        assert answer.status_code == 415
        await nothing_is_there(served)


async def test_limits_say_what_they_are() -> None:
    limits = Limits(max_body_bytes=100_000, max_json_bytes=2000, max_batch_blocks=3, max_sessions=1)
    async with serving(limits=limits) as served:
        answer = await served.store(["a"] * 4, [b""] * 4)
        assert (answer.status_code, answer.json()["error"]) == (422, "WireError")
        assert "at most 3" in answer.json()["message"]
        answer = await served.post("lookup", block_hashes=["s:a"] * 4)
        assert answer.status_code == 422
        answer = await served.post("lookup", block_hashes=["s:" + "a" * 2000])
        assert (answer.status_code, answer.json()["error"]) == (413, "BodyTooLarge")
        answer = await served.store(["a", "b"], [bytes(BLOCK_BYTES)] * 2)
        assert (answer.status_code, answer.json()["error"]) == (413, "BodyTooLarge")
        assert (await served.post("sessions")).status_code == 201
        answer = await served.post("sessions")
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")


async def test_too_much_at_once_is_refused_and_later_served() -> None:
    limits = Limits(max_concurrent=1)
    async with serving(limits=limits) as served:
        body = batch(["a"], [b"payload"])
        stream = await served.raw(upload(body[:-3], len(body)))
        await eventually(lambda: served.service.calls == 1)
        answer = await served.post("lookup", block_hashes=["s:a"])
        assert (answer.status_code, answer.json()["error"]) == (429, "TooManyCalls")
        assert (await served.http.get("/readyz")).status_code == 200
        await stream.send(body[-3:])
        assert await status_of(stream) == 200
        await stream.aclose()
        await served.at_rest()
        assert await served.hit(["a"]) == 1


async def test_a_body_that_crawls_is_given_up() -> None:
    limits = Limits(body_timeout_s=0.2)
    async with serving(limits=limits) as served:
        body = batch(HASHES, PAYLOADS)
        for path in ("/v1/store", "/v1/lookup"):
            stream = await served.raw(upload(body[:-1], len(body), path))
            assert await status_of(stream) == 408
            await stream.aclose()
        await nothing_is_there(served)


async def test_a_client_that_does_not_read_loses_its_pins() -> None:
    """A pin must not last as long as a client pleases."""

    def large() -> AsyncLRUManager:
        return AsyncLRUManager(hot=MemoryTier(8, 8 * 1024 * 1024))

    async with serving(limits=Limits(body_timeout_s=0.5), make_manager=large) as served:
        await served.store(["a"], [bytes(8 * 1024 * 1024)])
        body = b'{"block_hashes": ["s:a"]}'
        stream = await served.raw(
            b"POST /v1/load HTTP/1.1\r\nHost: kv\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        await eventually(lambda: served.manager.get_stats().pinned == 1)
        await served.at_rest()
        await stream.aclose()


async def test_a_client_that_vanishes_in_a_load_loses_its_pins() -> None:
    def large() -> AsyncLRUManager:
        return AsyncLRUManager(hot=MemoryTier(8, 8 * 1024 * 1024))

    async with serving(make_manager=large) as served:
        await served.store(["a"], [bytes(8 * 1024 * 1024)])
        body = b'{"block_hashes": ["s:a"]}'
        stream = await served.raw(
            b"POST /v1/load HTTP/1.1\r\nHost: kv\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        await stream.receive(1000)
        assert served.manager.get_stats().pinned == 1
        await stream.aclose()
        await served.at_rest()
