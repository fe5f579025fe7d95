"""Nothing is left behind, and nothing but time is lost, whatever goes wrong."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest
from examples.smollm.conftest import Loaded
from examples.smollm.engine import Engine, Origin
from examples.smollm.gguf import GGUFFile
from examples.smollm.model import BLOCK_TOKENS, Model
from examples.smollm.pool import PagedPool, PoolFullError
from examples.smollm.tiny import write_tiny
from examples.smollm.worker import Worker

from kvoffload import (
    AsyncLRUManager,
    DiskTier,
    MemoryTier,
    TierUnavailableError,
    hash_blocks,
)
from kvoffload.testing import FaultyTier, cancel_everywhere, eventually

TEXT = "the keeper of the lighthouse sees the ships pass, and the lamp must not go out at all"


def prompt_of(tiny: Loaded, text: str = TEXT) -> list[int]:
    """Return about seventy tokens."""
    return tiny[0].encode(text)


@asynccontextmanager
async def opened(
    model: Model, path: Path, *, hot: int = 20, pool_pages: int = 16, load_timeout_s: float = 60
) -> AsyncIterator[tuple[Engine, AsyncLRUManager, FaultyTier]]:
    """Open an engine over a hot and a cold tier; the latter fails when it is told to."""
    block_bytes = model.geometry().block_bytes
    cold = FaultyTier(DiskTier(path / "cold", 20, block_bytes))
    hot_tier = MemoryTier(hot, block_bytes)
    kv = AsyncLRUManager(hot=hot_tier, cold=cold, policy="lru", watermarks=(0, 0))
    async with (
        kv,
        Engine(model, kv, pool_pages=pool_pages, load_timeout_s=load_timeout_s) as engine,
    ):
        yield engine, kv, cold


async def ask(
    engine: Engine, prompt: Sequence[int], max_tokens: int = 6, *, use_cache: bool = True
) -> tuple[list[int], Origin]:
    """Return an answer."""
    async with engine.generate(prompt, max_tokens, use_cache=use_cache) as generation:
        async for _ in generation:
            pass
    return generation.answer, generation.origin


def check_nothing_left(engine: Engine, kv: AsyncLRUManager) -> None:
    """Check pages, pins, pending slots and retired ones."""
    stats = kv.get_stats()
    assert engine.pool.free_pages == engine.pool.num_pages
    assert (stats.pinned, stats.pending) == (0, 0)
    assert [tier.retired_blocks for tier in stats.tiers.values()] == [0, 0]


@pytest.mark.parametrize("how", ["scope", "task"])
@pytest.mark.parametrize("turns", [0, 3])
@pytest.mark.parametrize("where", ["nowhere", "hot", "cold"])
async def test_a_chat_can_be_cancelled_anywhere(
    tiny: Loaded, tmp_path: Path, where: str, turns: int, how: Literal["scope", "task"]
) -> None:
    """No page, no pin, no warning of a view that lives on; and the next answer is right."""
    prompt = prompt_of(tiny)
    async with opened(tiny[1], tmp_path, hot=1 if where == "cold" else 20) as (engine, kv, _):
        expected, _ = await ask(engine, prompt, use_cache=False)

        async def prepare() -> None:
            await kv.clear()
            if where != "nowhere":
                await ask(engine, prompt, 1)

        async def check() -> None:
            # What the manager was told to read or to write it ends by itself.
            await eventually(lambda: not (kv.get_stats().pending or kv.get_stats().pinned))
            check_nothing_left(engine, kv)

        visited = await cancel_everywhere(
            lambda: ask(engine, prompt), check, how=how, turns=turns, prepare=prepare
        )
        assert visited > 5
        assert (await ask(engine, prompt))[0] == expected


async def test_a_load_that_takes_too_long_is_computed(tiny: Loaded, tmp_path: Path) -> None:
    """The deadline is the engine's; the read goes on without it."""
    prompt = prompt_of(tiny)
    async with opened(tiny[1], tmp_path, hot=1) as (engine, kv, cold):
        expected, _ = await ask(engine, prompt)
        engine.load_timeout_s = 0.05
        with cold.hang("read"):
            answer, origin = await ask(engine, prompt)
        assert (answer, origin.computed_tokens) == (expected, len(prompt))
        await eventually(lambda: kv.get_stats().tiers["cold"].queue_depth == 0)
        check_nothing_left(engine, kv)
        engine.load_timeout_s = 60
        answer, origin = await ask(engine, prompt)
        assert answer == expected
        assert origin.computed_tokens < BLOCK_TOKENS


async def test_a_tier_that_cannot_read_costs_time_alone(tiny: Loaded, tmp_path: Path) -> None:
    """Its blocks stay where they are, to be read another time."""
    prompt = prompt_of(tiny)
    async with opened(tiny[1], tmp_path, hot=1) as (engine, kv, cold):
        expected, _ = await ask(engine, prompt)
        error = TierUnavailableError("not now", tier="cold")
        with cold.fail("read", error, times=None):
            answer, origin = await ask(engine, prompt)
        assert (answer, origin.computed_tokens) == (expected, len(prompt))
        answer, origin = await ask(engine, prompt)
        assert answer == expected
        assert origin.computed_tokens < BLOCK_TOKENS
        check_nothing_left(engine, kv)


async def test_no_room_to_load_is_no_error(tiny: Loaded, tmp_path: Path) -> None:
    """More cold blocks at once than staging has room for are computed."""
    prompt, model = prompt_of(tiny), tiny[1]
    block_bytes = model.geometry().block_bytes
    kv = AsyncLRUManager(
        hot=MemoryTier(1, block_bytes),
        cold=DiskTier(tmp_path / "cold", 20, block_bytes),
        policy="lru",
        staging_bytes=0,
    )
    async with kv, Engine(model, kv, pool_pages=16) as engine:
        expected, _ = await ask(engine, prompt)
        answer, origin = await ask(engine, prompt)
        assert (answer, origin.computed_tokens) == (expected, len(prompt))


async def test_nowhere_to_store_is_no_error(tiny: Loaded) -> None:
    """What was rejected is computed next time; nothing is stored behind the gap."""
    prompt, model = prompt_of(tiny), tiny[1]
    kv = AsyncLRUManager(hot=MemoryTier(2, model.geometry().block_bytes), policy="lru")
    async with kv, Engine(model, kv, pool_pages=16) as engine:
        expected, _ = await ask(engine, prompt, 40)
        answer, origin = await ask(engine, prompt, 40)
        assert answer == expected
        assert origin.loaded_tokens == {"hot": 2 * BLOCK_TOKENS}


async def test_a_full_pool_refuses_and_leaves_nothing(tiny: Loaded, tmp_path: Path) -> None:
    """The chat that is under way goes on."""
    prompt = prompt_of(tiny)
    async with opened(tiny[1], tmp_path, pool_pages=6) as (engine, kv, _):
        async with engine.generate(prompt, 6) as generation:
            with pytest.raises(PoolFullError, match="6 pages are needed, and 0 are free"):
                await ask(engine, prompt)
            assert [token async for token in generation] == generation.answer
        check_nothing_left(engine, kv)
        for tokens, longest in (([], 1), (prompt, 0), (prompt, 2040)):
            with pytest.raises(ValueError, match="together at most"):
                engine.generate(tokens, longest)


async def test_many_chats_at_once_say_what_each_says_alone(tiny: Loaded, tmp_path: Path) -> None:
    """They take turns on one thread, and share what they have in common."""
    prompts = [prompt_of(tiny, f"{TEXT} {number}" * (number % 3 + 1)) for number in range(8)]
    async with opened(tiny[1], tmp_path, hot=4, pool_pages=200) as (engine, kv, _):
        alone = [(await ask(engine, prompt, use_cache=False))[0] for prompt in prompts]
        for _ in range(3):
            said = await asyncio.gather(*(ask(engine, prompt) for prompt in prompts))
            assert [answer for answer, _ in said] == alone
        check_nothing_left(engine, kv)


async def test_other_weights_find_nothing(tiny: Loaded, tmp_path: Path) -> None:
    """In the same directory: what one model computed is wrong for any other."""
    prompt = prompt_of(tiny)
    with GGUFFile(write_tiny(tmp_path / "other.gguf", seed=8)) as file:
        other = Model(file)
    async with opened(tiny[1], tmp_path) as (engine, _, _):
        await ask(engine, prompt)
    async with opened(other, tmp_path) as (engine, _, _):
        assert (await ask(engine, prompt))[1].computed_tokens == len(prompt)
    async with opened(tiny[1], tmp_path) as (engine, _, _):
        assert (await ask(engine, prompt))[1].computed_tokens < BLOCK_TOKENS


async def test_a_stop_token_ends_the_answer(tiny: Loaded, tmp_path: Path) -> None:
    """And is no part of it."""
    prompt = prompt_of(tiny)
    async with opened(tiny[1], tmp_path) as (engine, _, _):
        answer, _ = await ask(engine, prompt, 20)
        stop = answer[10]
        async with engine.generate(prompt, 20, stop=[stop]) as generation:
            said = [token async for token in generation]
            assert said == answer[: answer.index(stop)]
            assert [token async for token in generation] == []


async def test_an_answer_is_stored_as_a_prompt_would_be(tiny: Loaded, tmp_path: Path) -> None:
    """To the bit: whoever computes the same tokens as a prompt stores the same bytes."""
    prompt = prompt_of(tiny)
    async with opened(tiny[1], tmp_path) as (engine, kv, _):
        answer, _ = await ask(engine, prompt, 3 * BLOCK_TOKENS)
        hashes = hash_blocks([*prompt, *answer], BLOCK_TOKENS)
        assert await engine.kv.lookup(hashes) == len(hashes)
        async with engine.kv.load(hashes) as lease:
            stored = [bytes(view) for view in lease]
        await kv.clear()
        await ask(engine, [*prompt, *answer], 1)
        async with engine.kv.load(hashes) as lease:
            assert [bytes(view) for view in lease] == stored


async def test_a_cancelled_job_is_waited_for() -> None:
    """For it writes to what the caller gives back next; cancelled twice, too."""
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def job() -> None:
        begun.set()
        go_on.wait()
        ended.set()

    async with Worker() as worker, asyncio.TaskGroup() as tasks:
        running = tasks.create_task(worker.run(job))
        queued = tasks.create_task(worker.run(pytest.fail, "cancelled before it began"))
        try:
            await asyncio.to_thread(begun.wait)
            queued.cancel()
            await asyncio.wait([queued])
            for _ in range(2):
                running.cancel()
                await asyncio.wait([running], timeout=0)
            assert not running.done()
        finally:
            go_on.set()
        await asyncio.wait([running])
        assert running.cancelled()
        assert ended.is_set()
        with pytest.raises(ZeroDivisionError):
            await worker.run(lambda: 1 / 0)


def test_pages_are_shared_until_the_last_lets_go(tiny: Loaded) -> None:
    """And what was in them is found no more."""
    pool = PagedPool(4, tiny[1].geometry())
    pages = pool.allocate(2)
    pool.publish(pages[0], b"a")
    assert pool.share([b"a", b"b"]) == pages[:1]
    with pytest.raises(PoolFullError):
        pool.allocate(3)
    pool.release(pages)
    assert (pool.free_pages, pool.share([b"a"])) == (3, pages[:1])
    pool.release(pages[:1])
    pool.release(pages[:1])
    assert (pool.free_pages, pool.share([b"a"])) == (4, [])
