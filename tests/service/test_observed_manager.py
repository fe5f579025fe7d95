from __future__ import annotations

import pytest
from tests.service.exported import parse, values

from kvoffload import BlockNotFoundError
from kvoffload.service.observing import Latencies
from kvoffload.service.prometheus import KVOffloadCollector, render
from kvoffload.testing import small_manager


async def test_a_manager_tells_what_it_does() -> None:
    latencies = Latencies()
    async with small_manager() as kv:
        kv.observe(latencies)
        await kv.store(["a", "b"], [b"x", b"y"])
        await kv.namespace("team").store(["a"], [b"z"])
        async with kv.request(["a", "b", "c"]) as request:
            assert latencies.in_progress["request"] == 1
            async with request.load() as lease:
                assert latencies.in_progress["load"] == 0
                assert lease[0].tobytes() == b"x"
            await request.store([b"w"])
        with pytest.raises(BlockNotFoundError):
            async with kv.load(["nowhere"]):
                pass
    assert {
        key: (timing.durations.count, timing.blocks)
        for key, timing in latencies.snapshots().items()
    } == {
        ("load", "error"): (1, 1),
        ("load", "ok"): (1, 2),
        ("request", "ok"): (1, 3),
        ("store", "ok"): (3, 4),
    }
    own = latencies.namespace_snapshots()
    assert set(own) == {"", "team"}
    assert own["team"]["store", "ok"].blocks == 1
    assert not any(latencies.in_progress.values())


async def test_a_real_manager() -> None:
    latencies = Latencies()
    async with small_manager(warm=4) as kv:
        kv.observe(latencies)
        team = kv.namespace('a "team"')
        await team.store(["a", "b"], [b"xx", b"yyy"])
        await kv.store(["a"], [b"z"])
        async with team.request(["a", "b", "c"]) as request, request.load():
            pass
        families = parse(await render(KVOffloadCollector(kv, latencies=latencies)))
    named = ('a "team"', "named")
    assert values(families, "kvoffload_namespace_hits_total") == {("", "own"): 0, named: 2}
    assert values(families, "kvoffload_namespace_misses_total")[named] == 1
    assert values(families, "kvoffload_namespace_tier_bytes")[*named, "hot"] == 5
    assert values(families, "kvoffload_tier_used_bytes") == {("hot",): 6, ("warm",): 0}
    assert values(families, "kvoffload_operation_blocks_total")["request", "ok"] == 3
