"""What a client holds ends with its session, and nobody else's ends with it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from kvoffload import AsyncLRUManager, DiskTier, MemoryTier
from kvoffload.service.limits import Limits
from kvoffload.service.wire import BATCH, SEQUENCE_HEADER, hashes_to_text
from kvoffload.testing import FaultyTier, eventually

from .serving import BLOCK_BYTES, Served, batch, serving

A, B = "s:a", "s:b"


async def open_session(served: Served) -> str:
    answer = await served.post("sessions")
    assert answer.status_code == 201
    return str(answer.json()["session"])


class Follower:
    """A client's end of its session's stream."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def last(self, kind: str) -> Any:
        return next(line[kind] for line in reversed(self.lines) if kind in line)


@asynccontextmanager
async def following(served: Served, session: str) -> AsyncIterator[Follower]:
    """Follow a session's stream; on leaving, the connection is cut."""
    follower = Follower()

    async def follow() -> None:
        path = f"/v1/sessions/{session}/stream"
        async with served.http.stream("GET", path, timeout=None) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                follower.lines.append(json.loads(line))

    async with anyio.create_task_group() as group:
        group.start_soon(follow)
        await eventually(lambda: bool(follower.lines))
        yield follower
        group.cancel_scope.cancel()


async def test_pins_end_with_the_connection() -> None:
    async with serving() as served:
        await served.store(["a", "b"], [b"1", b"2"])
        session = await open_session(served)
        async with following(served, session):
            answer = await served.post(f"sessions/{session}/prepare_load", block_hashes=[A, B, A])
            assert answer.content.endswith(b"121")
            answer = await served.post(f"sessions/{session}/requests", block_hashes=[A, B, "s:c"])
            assert answer.json()["hit"] == 2
            await served.post(f"sessions/{session}/prepare_store", block_hashes=["s:d"])
            stats = served.manager.get_stats()
            assert (stats.pinned, stats.pending) == (2, 1)
            answer = await served.post("evict", block_hashes=[A, B])
            assert answer.json() == {"evicted": []}
        await served.at_rest()
        answer = await served.post("evict", block_hashes=[A, B])
        assert answer.json() == {"evicted": [A, B]}
        answer = await served.post(f"sessions/{session}/prepare_load", block_hashes=[A])
        assert (answer.status_code, answer.json()["error"]) == (404, "SessionNotFound")


async def test_a_session_does_not_complete_what_another_holds() -> None:
    async with serving() as served:
        await served.store(["a"], [b"1"])
        mine, other = await open_session(served), await open_session(served)
        await served.post(f"sessions/{mine}/prepare_load", block_hashes=[A])
        await served.post(f"sessions/{mine}/prepare_store", block_hashes=[B], sizes=[3])
        answer = await served.post(f"sessions/{other}/complete_load", block_hashes=[A])
        assert (answer.status_code, answer.json()["error"]) == (409, "NotPinnedError")
        for path in ("complete_store", "abandon_store"):
            content = batch(["b"], [b"bad"])
            if path == "abandon_store":
                answer = await served.post(f"sessions/{other}/{path}", block_hashes=[B])
            else:
                answer = await served.http.post(
                    f"/v1/sessions/{other}/{path}", content=content, headers={"Content-Type": BATCH}
                )
            assert answer.status_code == 204
        assert served.manager.get_stats().pending == 1
        answer = await served.http.post(
            f"/v1/sessions/{mine}/complete_store",
            content=batch(["b"], [b"yes"]),
            headers={"Content-Type": BATCH},
        )
        assert answer.status_code == 204
        answer = await served.post("load", block_hashes=[B])
        assert answer.content.endswith(b"yes")
        answer = await served.post(f"sessions/{mine}/complete_load", block_hashes=[A, A])
        assert answer.status_code == 409
        assert served.manager.get_stats().pinned == 1
        answer = await served.post(f"sessions/{mine}/complete_load", block_hashes=[A])
        assert answer.status_code == 204


async def test_a_payload_of_another_size_gives_its_reservation_up() -> None:
    async with serving() as served:
        session = await open_session(served)
        await served.post(f"sessions/{session}/prepare_store", block_hashes=[A], sizes=[3])
        answer = await served.http.post(
            f"/v1/sessions/{session}/complete_store",
            content=batch(["a"], [b"four"]),
            headers={"Content-Type": BATCH},
        )
        assert (answer.status_code, answer.json()["error"]) == (422, "ConfigError")
        await served.at_rest()
        assert await served.hit(["a"]) == 0


async def test_a_request_is_one_use_and_ends_once() -> None:
    async with serving() as served:
        session = await open_session(served)
        path = f"sessions/{session}/requests"
        answer = await served.post(path, block_hashes=[A, B], retention=0.9)
        request = answer.json()["request"]
        for number in (1, 2):
            answer = await served.http.post(
                f"/v1/{path}/{request}/store",
                content=batch([], [b"%d" % number]),
                headers={"Content-Type": BATCH},
            )
            assert answer.json()["stored"] == hashes_to_text(["ab"[number - 1]])
        answer = await served.post(f"{path}/{request}/plan", tokens_per_s=1000)
        assert answer.json()["blocks"] == 0
        answer = await served.http.patch(
            f"/v1/{path}/{request}", json={"retention": {"likelihood": 0}}
        )
        assert answer.status_code == 204
        assert (await served.http.delete(f"/v1/{path}/{request}")).status_code == 204
        assert (await served.http.delete(f"/v1/{path}/{request}")).status_code == 404
        assert await served.hit(["a"]) == 0, "the session said that it is over"


async def test_a_stream_tells_what_each_call_did_before_its_answer() -> None:
    async with serving() as served:
        session = await open_session(served)
        async with following(served, session) as follower:
            answer = await served.store(["a"], [b"1"], query=f"?session={session}")
            number = int(answer.headers[SEQUENCE_HEADER])
            await eventually(lambda: follower.lines[-1]["n"] >= number)
            assert [line["n"] for line in follower.lines] == list(range(number + 1))
            assert follower.last("event")["kind"] == "stored"
            assert follower.last("locations") == [[A, "ready", "hot"]]
            assert follower.last("stats")["stored"] == 1
            await served.store(["x"], [b"1"], query="?namespace=other")
            await served.manager.evict(["a"])
            await eventually(lambda: follower.last("event")["kind"] == "removed")
            assert {line["event"]["namespace"] for line in follower.lines if "event" in line} == {
                ""
            }


async def test_a_session_has_one_stream() -> None:
    async with serving() as served:
        session = await open_session(served)
        async with following(served, session):
            answer = await served.http.get(f"/v1/sessions/{session}/stream")
            assert (answer.status_code, answer.json()["error"]) == (409, "SessionInUse")
            answer = await served.post("lookup", block_hashes=[A])
            assert answer.status_code == 200


async def test_a_silent_session_ends() -> None:
    async with serving(limits=Limits(session_ttl_s=0.2)) as served:
        await served.store(["a"], [b"1"])
        session = await open_session(served)
        await served.post(f"sessions/{session}/prepare_load", block_hashes=[A])
        await eventually(lambda: len(served.service.sessions) == 0)
        await served.at_rest()


async def test_a_session_holds_no_more_than_allowed() -> None:
    async with serving(limits=Limits(max_held=4)) as served:
        await served.store(["a"], [b"1"])
        session = await open_session(served)
        for _ in range(2):
            answer = await served.post(f"sessions/{session}/requests", block_hashes=[A])
            assert answer.status_code == 201
        answer = await served.post(f"sessions/{session}/requests", block_hashes=[A])
        assert (answer.status_code, answer.json()["error"]) == (429, "TooManyHeld")


async def test_calls_at_once_hold_no_more_than_allowed_together(tmp_path: Path) -> None:
    """What they were about to take was not counted while they waited for a disk."""
    cold = FaultyTier(DiskTier(tmp_path, 8, BLOCK_BYTES, name="cold"))

    def on_disk() -> AsyncLRUManager:
        return AsyncLRUManager(hot=MemoryTier(1, BLOCK_BYTES), cold=cold, policy="lru")

    async with serving(make_manager=on_disk, limits=Limits(max_held=3)) as served:
        await served.store(["a", "b", "c"], [b"1", b"2", b"3"])
        session = await open_session(served)
        statuses: list[int] = []

        async def prepare() -> None:
            answer = await served.post(
                f"sessions/{session}/prepare_load", block_hashes=["s:b", "s:c"]
            )
            statuses.append(answer.status_code)

        async with anyio.create_task_group() as group:
            with cold.hang("read"):
                group.start_soon(prepare)
                await eventually(lambda: served.service.calls == 1)
                await eventually(lambda: served.manager.get_stats().pinned == 2)
                await prepare()
                assert statuses == [429]
        assert statuses == [429, 200]


@pytest.mark.parametrize("path", ["/v1/events", "/v1/sessions/{}/stream"])
async def test_streams_end_when_the_service_drains(path: str) -> None:
    async with serving() as served:
        session = await open_session(served)
        async with served.http.stream("GET", path.format(session), timeout=None) as answer:
            pieces = answer.aiter_bytes()
            assert await anext(pieces)
            served.service.draining.set()
            assert [piece async for piece in pieces if b"beat" not in piece] == []
        refused = await served.post("lookup", block_hashes=[A])
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert (await served.http.get("/v1/overview")).json()["draining"]
        ready = await served.http.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (503, "draining")


async def test_an_overview_counts_namespaces_and_time() -> None:
    async with serving() as served:
        await served.store(["a"], [b"12"], query="?namespace=tenant")
        answer = await served.http.get("/v1/overview")
        body = answer.json()
        assert body["namespaces"]["tenant"]["bytes"] == 2
        assert body["latencies"]["store"]["count"] == 1
        assert body["stats"]["tiers"]["hot"]["blocks"] == 1
        scraped = await served.http.get("/metrics")
        assert scraped.headers["content-type"].startswith("text/plain")
        assert 'kvoffload_operation_duration_seconds_count{operation="store"' in scraped.text
