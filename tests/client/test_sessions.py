"""Sessions of clients: lost, shared, taken back; what is left in the service afterwards."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import anyio
import httpx
import pytest
from tests.client.hosting import Host, Hosted

from kvoffload import (
    AsyncLRUManager,
    BlockState,
    ClosedError,
    DiskTier,
    EventKind,
    Medium,
    MemoryTier,
    NotPinnedError,
    OffloadingEvent,
)
from kvoffload.client import AsyncLRUClient
from kvoffload.events import EventHub
from kvoffload.service.state import STATE, Service
from kvoffload.testing import cancel_everywhere, eventually

BLOCK_BYTES = 64
A, B = b"a" * BLOCK_BYTES, b"b" * BLOCK_BYTES


def small(loop: object) -> AsyncLRUManager:
    return AsyncLRUManager(hot=MemoryTier(8, BLOCK_BYTES))


def service_of(hosted: Hosted) -> Service:
    service = getattr(hosted.app.state, STATE)
    assert isinstance(service, Service)
    return service


def holds(hosted: Hosted) -> tuple[int, int, int]:
    """What is pinned, pending, and held by sessions; read from the test's thread."""
    stats = hosted.manager.get_stats()
    sessions = service_of(hosted).sessions._sessions.values()
    return stats.pinned, stats.pending, sum(session.holds for session in sessions)


async def test_a_lost_session(host: Host) -> None:
    """What was open in it is gone and says why, views of leases stay good, the next call works."""
    hosted = await host.host(small)
    async with AsyncLRUClient(host.unix) as kv:
        await kv.store(["x", "y"], [A, B])
        events = kv.events()
        output = await kv.prepare_store(["reserved"])
        assert output is not None
        spec = await kv.prepare_load(["y"])
        view = spec.entries[0].view
        async with kv.load(["x"]) as lease, kv.request(["x", "z"]) as request:
            await host.on_loop(service_of(hosted).sessions.end_all())
            await eventually(lambda: kv._room._live is None)
            assert lease[0] == A
            with pytest.raises(ClosedError, match="session"):
                await request.store([B])
            with pytest.raises(ClosedError, match="session"):
                request.load()
            with pytest.raises(ClosedError, match="session"):
                request.plan(tokens_per_s=1.0)
        with pytest.raises(NotPinnedError, match="session"):
            await kv.complete_load(["y"])
        with pytest.raises(NotPinnedError, match="session"):
            _ = output.store_spec.entries[0].view
        with pytest.raises(ValueError, match="released"):
            view.tobytes()
        await kv.complete_store(["reserved"])
        async for event in events:
            assert event.kind is not EventKind.STORED  # they end
        assert holds(hosted) == (0, 0, 0)
        assert await kv.lookup(["x", "y", "reserved"]) == 2
        again = kv.events()
        await kv.store(["z"], [A])
        assert (await anext(again)).block_hashes == ("z",)
    await hosted.leave()


async def test_a_session_that_the_service_forgot(host: Host) -> None:
    """It ended while a call was on its way: the call is made again in a new one."""
    hosted = await host.host(small)
    async with AsyncLRUClient(host.unix) as kv:
        live = await kv._room.session()
        service = service_of(hosted)

        async def forget() -> None:
            service.sessions._sessions.pop(live.name)

        await host.on_loop(forget())
        assert (await kv.store(["x"], [A])).stored == ("x",)
        assert (await kv._room.session()).name != live.name
        assert live.lost is not None
    await hosted.leave()


async def test_a_service_that_restarts(host: Host) -> None:
    """Another manager at the same address, empty."""
    hosted = await host.host(small)
    async with AsyncLRUClient(host.tcp) as kv:
        await kv.store(["x"], [A])
        await hosted.leave()
        hosted = await host.host(small)
        await eventually(lambda: kv._room._live is None)
        assert await kv.lookup(["x"]) == 0
        assert kv.locate(["x"])[0].state is BlockState.ABSENT
        assert (await kv.store(["x"], [A])).stored == ("x",)
    await hosted.leave()


async def test_two_clients(host: Host) -> None:
    """Each sees what the other does; the pins of one end with it, and not the other's."""
    hosted = await host.host(small)
    async with AsyncLRUClient(host.unix) as one:
        await one.store(["x", "y"], [A, B])
        await one.prepare_load(["x"])
        async with AsyncLRUClient(host.tcp) as other:
            assert await other.lookup(["x", "y"]) == 2
            await other.prepare_load(["y"])
            assert await other.evict(["x", "y"]) == []
            assert holds(hosted) == (2, 0, 2)
            with pytest.raises(NotPinnedError):
                await other.complete_load(["x"])
            output = await other.prepare_store(["other's"])
            assert output is not None
            await one.complete_store(["other's"])
            assert await one.lookup(["other's"]) == 0
            assert one.locate(["other's"])[0].state is BlockState.PENDING
            await other.complete_store(["other's"], success=False)
            await eventually(lambda: one.locate(["other's"])[0].state is BlockState.ABSENT)
            await one.complete_load(["x"])
            assert await other.evict(["x"]) == ["x"]
            await eventually(lambda: one.locate(["x"])[0].state is BlockState.ABSENT)
            assert (await one.fetch_locations(["y"]))[0].state is BlockState.READY
        assert holds(hosted) == (0, 0, 0)
        assert await one.evict(["y"]) == ["y"]
    await hosted.leave()


async def test_a_client_that_vanishes_leaves_nothing(host: Host) -> None:
    """Its connections break, all at once."""
    hosted = await host.host(small)
    kv = AsyncLRUClient(host.unix)
    async with kv:
        await kv.store(["x"], [A])
        await kv.prepare_load(["x"])
        await kv.prepare_store(["y"])
        async with kv.load(["x"]), kv.request(["x"]):
            assert holds(hosted) == (1, 1, 5)
            await kv._http.close()
            await eventually(lambda: holds(hosted) == (0, 0, 0))
    await hosted.leave()


@pytest.mark.parametrize("turns", [0, 2])
@pytest.mark.parametrize("how", ["scope", "task"])
@pytest.mark.parametrize("call", ["lease", "request", "prepare_store", "prepare_load", "fetch"])
async def test_a_cancelled_call_is_undone_when_it_returns(
    host: Host, call: str, how: Literal["scope", "task"], turns: int
) -> None:
    """Not sometime later: whatever it gave is given back by the time the cancellation goes on."""
    hosted = await host.host(small)
    async with AsyncLRUClient(host.unix) as kv:
        await kv.store(["x", "y"], [A, B])
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "lease": lambda: kv.load(["x", "y"]).__aenter__(),
            "request": lambda: kv.request(["x", "y"]).__aenter__(),
            "prepare_store": lambda: kv.prepare_store(["new"]),
            "prepare_load": lambda: kv.prepare_load(["x", "y"]),
            "fetch": lambda: kv.fetch_stats(),
        }
        is_done = False

        async def make() -> None:
            nonlocal is_done
            is_done = False
            await calls[call]()
            is_done = True

        async def check() -> None:
            if is_done:  # what it gave is to end with the session
                await host.on_loop(service_of(hosted).sessions.end_all())
                await eventually(lambda: kv._room._live is None)
                await kv.lookup(["x"])
            else:
                assert holds(hosted) == (0, 0, 0)
                stats = kv.get_stats()
                assert (stats.pinned, stats.pending) == (0, 0)

        assert await cancel_everywhere(make, check, how=how, turns=turns) > 0
    assert holds(hosted) == (0, 0, 0)
    await hosted.leave()


async def test_a_call_is_taken_back_before_during_and_after(host: Host) -> None:
    """By its name, whether it came already or not."""
    hosted = await host.host(small)
    transport = httpx.AsyncHTTPTransport(uds=str(host.path))
    async with httpx.AsyncClient(transport=transport, base_url="http://service/v1") as http:
        session = (await http.post("/sessions")).json()["session"]
        path = f"/sessions/{session}"

        async def reserve(name: str) -> httpx.Response:
            return await http.post(
                f"{path}/prepare_store",
                json={"block_hashes": [f"s:{name}"]},
                headers={"KVOffload-Call": name},
            )

        async def take_back(name: str) -> None:
            assert (await http.delete(f"{path}/calls/{name}")).status_code == 204

        await take_back("early")
        refused = await reserve("early")
        assert (refused.status_code, refused.json()["error"]) == (409, "CallTakenBack")
        assert (await reserve("late")).status_code == 200
        assert holds(hosted) == (0, 1, 1)
        await take_back("late")
        assert holds(hosted) == (0, 0, 0)
        await reserve("kept")
        body = {"block_hashes": ["s:kept"], "wait_pending_s": 3000.0}
        headers = {"KVOffload-Call": "waiting"}
        async with anyio.create_task_group() as group:

            async def wait() -> None:
                answer = await http.post(f"{path}/requests", json=body, headers=headers)
                assert answer.status_code == 499

            group.start_soon(wait)
            calls = service_of(hosted).sessions._sessions[session].calls
            await eventually(lambda: len(calls) == 1)
            await take_back("waiting")
            group.cancel_scope.cancel()
        assert holds(hosted) == (0, 1, 1)
        assert (await http.delete("/sessions/unknown/calls/x")).status_code == 404
        await http.delete(path)
        assert holds(hosted) == (0, 0, 0)
    await hosted.leave()


async def test_hints(host: Host, tmp_path: Path) -> None:
    """They bring blocks up in the background; what is hinted too much is dropped."""

    def cold(loop: object) -> AsyncLRUManager:
        return AsyncLRUManager(
            hot=MemoryTier(4, BLOCK_BYTES), cold=DiskTier(tmp_path / "cold", 8, BLOCK_BYTES)
        )

    hosted = await host.host(cold)
    async with AsyncLRUClient(host.unix) as kv:
        names = [f"b{number}" for number in range(8)]
        for name in names:
            await kv.store([name], [A])
        assert kv.locate(names[:1])[0].tier == "cold"
        await kv.evict(names[-2:])
        assert kv.hint_prefetch(names[:1]) == 1
        assert kv.hint_prefetch([]) == 0
        await eventually(lambda: kv.locate(names[:1])[0].tier == "hot")
        assert kv.cancel_prefetch(names[:2]) == 2
        assert [kv.hint_prefetch(names[:1]) for _ in range(300)].count(0) > 0
        with pytest.raises(TypeError):
            kv.hint_prefetch("b0")
        async with kv.request(names) as request:
            plan = request.plan(tokens_per_s=1e9)
            assert 0 <= plan.blocks <= request.hit
            assert request.plan(tokens_per_s=1e-3).blocks == request.hit
    await hosted.leave()


def test_events_that_were_missed_elsewhere_show() -> None:
    """A gap in the numbers as long as what was missed, here and there together."""
    hub = EventHub("")
    events = hub.subscribe()
    for missed in (0, 3):
        event: Any = OffloadingEvent(EventKind.STORED, ("x",), "hot", Medium.CPU, missed=missed)
        hub.pass_on(event)
    assert [(each.sequence, each.missed) for each in events.take()] == [(0, 0), (4, 3)]
