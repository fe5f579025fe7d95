"""The real model says the same, token by token and bit by bit, wherever its KV comes from."""

from __future__ import annotations

from asyncio import Barrier, TaskGroup
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from examples.smollm.conftest import Loaded
from examples.smollm.engine import Engine, Origin
from examples.smollm.gguf import Floats
from examples.smollm.model import BLOCK_TOKENS, CHUNK_TOKENS, Model
from examples.smollm.test_model import Plain
from examples.smollm.tokenizer import Message

from kvoffload import AsyncLRUManager, DiskTier, MemoryTier, hash_blocks

ANSWER_TOKENS = 32
SYSTEM = "You help the keeper of a lighthouse. Ships pass at night, and the lamp must not go out. "
QUESTION = "The oil will last for two hours, and the night for nine. What should I do first?"


@dataclass(frozen=True, slots=True)
class Said:
    """An answer, and what it was chosen by."""

    answer: list[int]
    logits: list[Floats]

    def is_same(self, other: Said) -> bool:
        """Whether they are the same to the bit."""
        return self.answer == other.answer and all(
            np.array_equal(mine, others)
            for mine, others in zip(self.logits, other.logits, strict=True)
        )


def prompt_of(smollm: Loaded, question: str = QUESTION) -> list[int]:
    """Return a prompt of about a hundred tokens."""
    tokenizer, _ = smollm
    messages = [Message("system", SYSTEM * 3), Message("user", question)]
    return tokenizer.encode_chat(messages)


@cache
def uninterrupted(model: Model, prompt: tuple[int, ...], dtype: str) -> Said:
    """Return what the model says without engine, manager or any cache beyond its own."""
    plain = Plain(model, dtype, pages=(len(prompt) + ANSWER_TOKENS) // BLOCK_TOKENS + 2)
    logits = [plain.prefill(list(prompt))]
    answer = [int(logits[0].argmax())]
    while len(answer) < ANSWER_TOKENS:
        position = len(prompt) + len(answer) - 1
        logits.append(model.logits(model.decode(answer[-1], position, plain.pool, plain.table)))
        answer.append(int(logits[-1].argmax()))
    return Said(answer, logits)


async def ask(
    engine: Engine, prompt: Sequence[int], max_tokens: int = ANSWER_TOKENS
) -> tuple[Said, Origin]:
    """Return the engine's answer."""
    logits = []
    async with engine.generate(prompt, max_tokens) as generation:
        async for _ in generation:
            assert generation.logits is not None
            logits.append(generation.logits)
    return Said(generation.answer, logits), generation.origin


def manager(
    block_bytes: int, *, hot: int, warm: int = 0, cold: DiskTier | None = None
) -> AsyncLRUManager:
    """Return a manager that keeps all it is given, hottest first."""
    return AsyncLRUManager(
        hot=MemoryTier(hot, block_bytes),
        warm=MemoryTier(warm, block_bytes, name="warm") if warm else None,
        cold=cold,
        policy="lru",
        watermarks=(0, 0),
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("where", ["hot", "warm", "cold", "reopened"])
async def test_answers_are_those_of_an_uninterrupted_run(
    smollm: Loaded, tmp_path: Path, where: str, dtype: str
) -> None:
    """Computed at first, then restored: 32 tokens, and the logits behind each of them."""
    _, model = smollm
    prompt, block_bytes = prompt_of(smollm), model.geometry(dtype).block_bytes
    expected = uninterrupted(model, tuple(prompt), dtype)
    blocks = (len(prompt) - 1) // BLOCK_TOKENS
    assert blocks >= 5

    def make() -> AsyncLRUManager:
        disk = DiskTier(tmp_path / "cold", 20, block_bytes)
        match where:
            case "hot":
                return manager(block_bytes, hot=20)
            case "warm":
                return manager(block_bytes, hot=1, warm=20)
            case "cold":
                return manager(block_bytes, hot=1, cold=disk)
            case _:
                return manager(block_bytes, hot=20, cold=disk)

    async with make() as kv, Engine(model, kv, dtype=dtype, pool_pages=16) as engine:
        said, origin = await ask(engine, prompt, 1 if where == "reopened" else ANSWER_TOKENS)
        assert origin.computed_tokens == len(prompt)
        if where != "reopened":
            assert said.is_same(expected)
            said, origin = await ask(engine, prompt)
    if where == "reopened":
        async with make() as kv, Engine(model, kv, dtype=dtype, pool_pages=16) as engine:
            said, origin = await ask(engine, prompt)
    assert said.is_same(expected)
    assert origin.computed_tokens == len(prompt) - blocks * BLOCK_TOKENS
    assert origin.loaded_bytes == blocks * block_bytes
    tier = "cold" if where == "reopened" else where
    assert origin.loaded_tokens[tier] >= (blocks - 1) * BLOCK_TOKENS
    assert sum(origin.loaded_tokens.values()) == blocks * BLOCK_TOKENS


async def test_a_next_turn_computes_its_new_tokens_alone(smollm: Loaded, tmp_path: Path) -> None:
    """The answer's blocks are there too; and the turn says what it would with all computed."""
    tokenizer, model = smollm
    block_bytes = model.geometry().block_bytes

    def make() -> AsyncLRUManager:
        return manager(block_bytes, hot=30, cold=DiskTier(tmp_path / "cold", 30, block_bytes))

    turns = [Message("system", SYSTEM), Message("user", QUESTION)]
    first = tokenizer.encode_chat(turns)
    async with make() as kv, Engine(model, kv, pool_pages=32) as engine:
        said, _ = await ask(engine, first)
    turns += [Message("assistant", tokens=tuple(said.answer)), Message("user", "And then?")]
    second = tokenizer.encode_chat(turns)
    expected = uninterrupted(model, tuple(second), "float32")
    for _ in range(2):  # a restart between the turns, and another one after both
        async with make() as kv, Engine(model, kv, pool_pages=32) as engine:
            said, origin = await ask(engine, second)
        assert said.is_same(expected)
        before = len(first) + ANSWER_TOKENS
        assert origin.computed_tokens <= len(second) - before + BLOCK_TOKENS
        assert set(origin.loaded_tokens) == {"cold"}


async def test_chats_with_a_common_beginning_share_its_blocks(
    smollm: Loaded, tmp_path: Path
) -> None:
    """Two at once after a restart: each block is read once, and is in the pool once."""
    _, model = smollm
    block_bytes = model.geometry().block_bytes
    prompts = [prompt_of(smollm), prompt_of(smollm, "Which is heavier, the oil or the night?")]
    chains = [hash_blocks(prompt, BLOCK_TOKENS) for prompt in prompts]
    common = len(set(chains[0]) & set(chains[1]))
    assert common >= 3

    def make() -> AsyncLRUManager:
        return manager(block_bytes, hot=40, cold=DiskTier(tmp_path / "cold", 40, block_bytes))

    async with make() as kv, Engine(model, kv, pool_pages=40) as engine:
        await ask(engine, prompts[0], 1)
    async with make() as kv, Engine(model, kv, pool_pages=40) as engine:
        answers = [engine.generate(prompt, ANSWER_TOKENS) for prompt in prompts]
        logits: list[list[Floats]] = [[], []]
        both = Barrier(2)

        async def chat(which: int) -> None:
            async with answers[which] as answer:
                await both.wait()  # both have what was to be loaded
                if which == 0:
                    used.append(engine.pool.num_pages - engine.pool.free_pages)
                async for _ in answer:
                    assert answer.logits is not None
                    logits[which].append(answer.logits)

        used: list[int] = []
        async with TaskGroup() as tasks:
            for which in range(2):
                tasks.create_task(chat(which))
        whole = (len(prompts[0]) - 1) // BLOCK_TOKENS
        assert kv.get_stats().tiers["cold"].blocks_read == whole
        assert answers[0].origin.loaded_tokens == {"cold": whole * BLOCK_TOKENS}
        assert answers[1].origin.shared_tokens == common * BLOCK_TOKENS
        assert answers[1].origin.loaded_tokens == {}
        pages = [-(-(len(prompt) + ANSWER_TOKENS) // CHUNK_TOKENS) * 2 for prompt in prompts]
        assert used == [sum(pages) - common]
        assert engine.pool.free_pages == engine.pool.num_pages
    for which, prompt in enumerate(prompts):
        said = Said(answers[which].answer, logits[which])
        assert said.is_same(uninterrupted(model, tuple(prompt), "float32"))


async def test_a_damaged_block_is_computed_and_put_back(smollm: Loaded, tmp_path: Path) -> None:
    """The blocks before it are used, the ones behind it come back; and the answer is the same."""
    _, model = smollm
    prompt, block_bytes = prompt_of(smollm), model.geometry().block_bytes
    expected = uninterrupted(model, tuple(prompt), "float32")
    whole = (len(prompt) - 1) // BLOCK_TOKENS

    def make() -> AsyncLRUManager:
        return manager(block_bytes, hot=20, cold=DiskTier(tmp_path / "cold", 20, block_bytes))

    async with make() as kv, Engine(model, kv, pool_pages=16) as engine:
        await ask(engine, prompt, 1)
        async with engine.kv.load(hash_blocks(prompt, BLOCK_TOKENS)[2:3]) as lease:
            payload = bytes(lease[0])
    found = 0
    for slab in (tmp_path / "cold").iterdir():
        content = bytearray(slab.read_bytes()) if slab.is_file() else bytearray()
        if (at := content.find(payload)) >= 0:
            content[at + block_bytes // 2] ^= 1
            slab.write_bytes(content)
            found += 1
    assert found == 1
    async with make() as kv, Engine(model, kv, pool_pages=16) as engine:
        said, origin = await ask(engine, prompt)
        assert said.is_same(expected)
        assert origin.loaded_tokens == {"cold": 2 * BLOCK_TOKENS}
        assert origin.computed_tokens == len(prompt) - 2 * BLOCK_TOKENS
        assert await engine.kv.lookup(hash_blocks(prompt, BLOCK_TOKENS)) >= whole
        said, origin = await ask(engine, prompt)
        assert said.is_same(expected)
        assert sum(origin.loaded_tokens.values()) == whole * BLOCK_TOKENS
