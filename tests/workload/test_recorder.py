"""Recording a live manager: the trace that is read back is what was asked for."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from kvoffload import AsyncLRUManager, ConfigError, MemoryTier, hash_blocks
from kvoffload.workload import TraceRecorder, read_trace, recorder, simulate

CHAIN = hash_blocks(range(64), block_tokens=16)


@pytest.mark.parametrize("name", ["requests.jsonl", "requests.jsonl.gz"])
async def test_what_was_served_is_in_the_file(tmp_path: Path, name: str) -> None:
    """Each request once, whether its blocks were there or not, and nothing after the end."""
    path = tmp_path / name
    async with AsyncLRUManager(hot=MemoryTier(8, 64)) as kv:
        async with TraceRecorder(kv, path, block_tokens=16) as taken:
            for length in (2, 4):
                async with kv.request(CHAIN[:length]) as request:
                    await request.store([bytes(64)] * (length - request.hit))
            async with kv.load(CHAIN[:2]):
                pass
        assert (taken.requests, taken.dropped) == (3, 0)
        async with kv.load(CHAIN[:1]):
            pass
    recorded = await asyncio.to_thread(read_trace, path)
    first, second, third = recorded.requests
    assert first.hash_ids == second.hash_ids[:2] == third.hash_ids
    assert [len(request.hash_ids) for request in recorded.requests] == [2, 4, 2]
    assert [request.input_length for request in recorded.requests] == [32, 64, 32]
    assert 0 <= first.timestamp_ms <= second.timestamp_ms <= third.timestamp_ms
    assert simulate(recorded, "lru", 4).prefix_hits == 4


async def test_namespaces_are_told_apart(tmp_path: Path) -> None:
    """The same hash of two tenants is two blocks."""
    path = tmp_path / "requests.jsonl"
    async with AsyncLRUManager(hot=MemoryTier(8, 64)) as kv, TraceRecorder(kv, path):
        for manager in (kv, kv.namespace("tenant")):
            async with manager.request(CHAIN[:1]) as request:
                await request.store([bytes(64)])
    recorded = await asyncio.to_thread(read_trace, path)
    assert recorded.num_distinct_blocks == 2


async def test_no_file_is_overwritten(tmp_path: Path) -> None:
    """It may be last week's trace."""
    path = tmp_path / "requests.jsonl"
    await asyncio.to_thread(path.write_text, "precious")
    async with AsyncLRUManager(hot=MemoryTier(8, 64)) as kv:
        with pytest.raises(ConfigError, match="name a new file"):
            async with TraceRecorder(kv, path):
                pass
    assert await asyncio.to_thread(path.read_text) == "precious"


async def test_cancelled_it_writes_what_waits(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    served = asyncio.Event()
    async with AsyncLRUManager(hot=MemoryTier(8, 64)) as kv:

        async def record() -> None:
            async with TraceRecorder(kv, path):
                async with kv.request(CHAIN[:3]):
                    pass
                served.set()
                await asyncio.sleep(3600)

        task = asyncio.create_task(record())
        await served.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not kv._core.index.users
    lines = (await asyncio.to_thread(path.read_text)).splitlines()
    assert [len(json.loads(line)["hash_ids"]) for line in lines] == [3]


async def test_many_are_written_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order and each once, though several batches are due before the first is written."""
    monkeypatch.setattr(recorder, "WRITE_EVERY", 3)
    path = tmp_path / "requests.jsonl"
    async with AsyncLRUManager(hot=MemoryTier(8, 64)) as kv, TraceRecorder(kv, path):
        for number in range(20):
            async with kv.request(CHAIN[: 1 + number % 4]):
                pass
    recorded = await asyncio.to_thread(read_trace, path)
    assert [len(each.hash_ids) for each in recorded.requests] == [1 + n % 4 for n in range(20)]
