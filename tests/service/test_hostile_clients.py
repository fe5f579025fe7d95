"""Clients that mean harm: what a token does not allow, it does not get in a roundabout way."""

from __future__ import annotations

import resource

import pytest
from anyio.lowlevel import checkpoint

from kvoffload import AsyncLRUManager, MemoryTier
from kvoffload.service.access import AccessControl, Right, Token
from kvoffload.service.limits import Limits
from kvoffload.service.wire import BATCH, pack_header
from kvoffload.testing import ManualClock, eventually

from .serving import BLOCK_BYTES, Served, batch, bearer, serving

READER, WRITER, OTHER = "reader", "writer", "other"
ACCESS = AccessControl(
    [
        Token.of(READER, ["a"], [Right.READ]),
        Token.of(WRITER, ["a"], [Right.READ, Right.WRITE]),
        Token.of(OTHER, ["b"]),
    ]
)
A = "?namespace=a"


def raw_post(path: str, length: int, headers: str = "", body: bytes = b"") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: kv\r\n{headers}Content-Length: {length}\r\n\r\n".encode()
        + body
    )


async def session_of(served: Served, token: str | None = None, query: str = "") -> str:
    headers = {} if token is None else bearer(token)
    answer = await served.http.post(f"/v1/sessions{query}", headers=headers)
    return str(answer.json()["session"])


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


async def test_who_may_only_read_ends_no_ones_session() -> None:
    """That a chain is over, said with a request, frees its blocks for good."""
    async with serving(access=ACCESS) as served:
        await served.store(["x", "y"], [b"1", b"2"], query=A, headers=bearer(WRITER))
        session = await session_of(served, READER, A)
        path = f"/v1/sessions/{session}/requests"
        body = {"block_hashes": ["s:x", "s:y"], "retention": 0}
        answer = await served.http.post(path + A, json=body, headers=bearer(READER))
        assert answer.status_code == 403
        body["retention"] = 0.5
        answer = await served.http.post(path + A, json=body, headers=bearer(READER))
        request = answer.json()["request"]
        for over in (0, {"likelihood": 0}):
            answer = await served.http.patch(
                f"{path}/{request}{A}", json={"retention": over}, headers=bearer(READER)
            )
            assert answer.status_code == 403
        await served.http.delete(f"{path}/{request}{A}", headers=bearer(READER))
        assert await served.manager.namespace("a").lookup(["x", "y"]) == 2


async def test_without_a_token_nothing_is_counted_or_read() -> None:
    """Else those who have none could keep those out who do, or fill the memory."""
    async with serving(access=ACCESS, limits=Limits(max_concurrent=2)) as served:
        streams = [await served.raw(raw_post("/v1/lookup", 10)) for _ in range(4)]
        before = peak_bytes()
        large = await served.raw(raw_post("/v1/lookup", 1 << 28, f"Content-Type: {BATCH}\r\n"))
        for stream in [*streams, large]:
            assert (await stream.receive()).split()[1] == b"401"
            await stream.aclose()
        assert peak_bytes() - before < 1 << 26
        answer = await served.http.post(
            "/v1/lookup" + A, json={"block_hashes": []}, headers=bearer(READER)
        )
        assert answer.status_code == 200


async def test_a_json_body_is_none_by_being_called_a_batch() -> None:
    async with serving(limits=Limits(max_json_bytes=100)) as served:
        answer = await served.http.post(
            "/v1/lookup", content=bytes(1000), headers={"Content-Type": BATCH}
        )
        assert (answer.status_code, answer.json()["error"]) == (413, "BodyTooLarge")


async def test_one_token_does_not_take_all_calls_or_sessions() -> None:
    limits = Limits(max_concurrent=4, max_sessions=4)
    async with serving(access=ACCESS, limits=limits) as served:
        headers = f"Authorization: Bearer {WRITER}\r\nContent-Type: application/json\r\n"
        streams = [await served.raw(raw_post("/v1/lookup" + A, 10, headers)) for _ in range(3)]
        await eventually(lambda: served.service.calls == 3)
        answer = await served.http.post("/v1/clear" + A, headers=bearer(WRITER))
        assert answer.status_code == 429
        assert (await served.http.get("/v1/stats" + A, headers=bearer(WRITER))).is_success
        for _ in range(4):
            answer = await served.http.post("/v1/clear?namespace=b", headers=bearer(OTHER))
            assert answer.status_code == 204
        for stream in streams:
            await stream.aclose()
        await served.at_rest()
        for number in range(4):
            answer = await served.http.post("/v1/sessions" + A, headers=bearer(READER))
            assert answer.status_code == (201 if number < 3 else 429)
        assert await session_of(served, OTHER, "?namespace=b")


async def test_a_call_whose_client_hung_up_ends() -> None:
    """It waits for a block that is never completed: for an hour, if it were up to the client."""
    async with serving() as served:
        session = await session_of(served)
        await served.post(f"sessions/{session}/prepare_store", block_hashes=["s:x"])
        body = b'{"block_hashes": ["s:x"], "wait_pending_s": 3600}'
        headers = "Content-Type: application/json\r\n"
        path = f"/v1/sessions/{session}/requests"
        stream = await served.raw(raw_post(path, len(body), headers, body))
        await eventually(lambda: served.service.calls == 1)
        await stream.aclose()
        await eventually(lambda: served.service.calls == 0)


async def test_payloads_of_what_is_not_reserved_take_no_memory() -> None:
    def large() -> AsyncLRUManager:
        return AsyncLRUManager(hot=MemoryTier(2, 1 << 22))

    async with serving(make_manager=large) as served:
        session = await session_of(served)
        head = pack_header([f"{number}" for number in range(100)], [1 << 22] * 100)
        before = peak_bytes()
        length = len(head) + (100 << 22)
        headers = f"Content-Type: {BATCH}\r\n"
        path = f"/v1/sessions/{session}/complete_store"
        stream = await served.raw(raw_post(path, length, headers, head))
        await eventually(lambda: served.service.calls == 1)
        await stream.send(bytes(1 << 20))
        await stream.aclose()
        await served.at_rest()
        assert peak_bytes() - before < 1 << 26


async def test_a_completion_that_lies_or_is_late_is_a_mistake_and_no_defect() -> None:
    clock = ManualClock()

    def expiring() -> AsyncLRUManager:
        return AsyncLRUManager(hot=MemoryTier(4, BLOCK_BYTES), reservation_ttl_s=10, clock=clock)

    async with serving(make_manager=expiring) as served:
        session = await session_of(served)
        path = f"/v1/sessions/{session}/complete_store"
        answer = await served.http.post(
            path, content=pack_header([], [3]) + b"abc", headers={"Content-Type": BATCH}
        )
        assert (answer.status_code, answer.json()["error"]) == (422, "WireError")
        await served.post(f"sessions/{session}/prepare_store", block_hashes=["s:x"], sizes=[9])
        body = batch(["x"], [b"123456789"])
        stream = await served.raw(
            raw_post(path, len(body), f"Content-Type: {BATCH}\r\n", body[:-4])
        )
        await eventually(lambda: served.service.calls == 1)
        clock.advance(11)
        await eventually(lambda: served.manager.get_stats().expired == 1)
        await stream.send(body[-4:])
        assert (await stream.receive()).split()[1] == b"409"
        await stream.aclose()
        assert await served.hit(["x"]) == 0


async def test_a_session_whose_time_was_up_takes_nothing_from_another() -> None:
    clock = ManualClock()

    def expiring() -> AsyncLRUManager:
        return AsyncLRUManager(hot=MemoryTier(4, BLOCK_BYTES), reservation_ttl_s=10, clock=clock)

    async with serving(make_manager=expiring) as served:
        await served.store(["x"], [b"1"])
        late, other = await session_of(served), await session_of(served)
        for _ in range(2):
            await served.post(f"sessions/{late}/prepare_load", block_hashes=["s:x"])
        await served.post(f"sessions/{late}/prepare_store", block_hashes=["s:y"], sizes=[1])
        for _ in range(2):  # the second time, also what is known of the late one is over
            clock.advance(11)
            await eventually(lambda: served.manager.get_stats().pinned == 0)
        await eventually(lambda: served.manager.get_stats().pending == 0)
        await served.post(f"sessions/{other}/prepare_load", block_hashes=["s:x"])
        await served.post(f"sessions/{other}/prepare_store", block_hashes=["s:y"], sizes=[1])
        await served.http.delete(f"/v1/sessions/{late}")
        stats = served.manager.get_stats()
        assert (stats.pinned, stats.pending) == (1, 1)


async def test_a_stream_that_nobody_reads_is_told_no_more() -> None:
    async with serving() as served:
        session = await session_of(served)
        stream = await served.raw(
            f"GET /v1/sessions/{session}/stream HTTP/1.1\r\nHost: kv\r\n\r\n".encode()
        )
        await stream.receive()
        name = "s:" + "x" * 900_000
        before = peak_bytes()
        for _ in range(100):
            answer = await served.http.post(
                f"/v1/lookup?session={session}", json={"block_hashes": [name]}
            )
            assert answer.is_success
        assert peak_bytes() - before < 1 << 26
        await stream.aclose()


async def test_an_unprotected_service_answers_no_pages_from_elsewhere() -> None:
    """A browser sends them to loopback too, and a name of the page's own may lead there."""
    async with serving() as served:
        await served.store(["x"], [b"1"])
        for headers in (
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Sec-Fetch-Site": "cross-site"},
        ):
            answer = await served.http.post("/v1/clear", headers=headers)
            assert answer.status_code == 403, headers
        same = {"Origin": "http://kvoffload", "Sec-Fetch-Site": "same-origin"}
        answer = await served.http.post("/v1/evict", json={"num_blocks": 0}, headers=same)
        assert answer.status_code == 200
        assert await served.hit(["x"]) == 1


async def test_many_hashes_that_are_none_are_refused_at_the_first() -> None:
    async with serving() as served:
        answer = await served.post("lookup", block_hashes=["-"] * 100_000)
        assert answer.status_code == 422
        assert answer.json()["message"].startswith("body.block_hashes.0: ")


@pytest.mark.parametrize("sent", [0, 200])
async def test_an_upload_that_only_begins_pushes_nobody_out(sent: int) -> None:
    """Nobody gives way to bytes that may never come."""
    async with serving() as served:
        mine = [f"{number}" for number in range(8)]
        await served.store(mine, [bytes(BLOCK_BYTES)] * 8)
        names = [f"new {number}" for number in range(8)]
        body = batch(names, [bytes(1000)] * 8)
        head = len(pack_header(names, [1000] * 8))
        stream = await served.raw(
            raw_post(
                "/v1/store?namespace=b",
                len(body),
                f"Content-Type: {BATCH}\r\n",
                body[: head + sent],
            )
        )
        await eventually(lambda: served.service.calls == 1)
        for _ in range(100):
            await checkpoint()
        assert await served.hit(mine) == 8
        await stream.aclose()
        await served.at_rest()
        assert await served.hit(mine) == 8
