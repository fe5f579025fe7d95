"""Time to the first token of a real model, with its KV restored, as parts of recomputing it.

    bash scripts/demo && python benchmarks/first_token.py [--rounds 5]

The weights are those that scripts/demo installs. One thread of linear algebra, cold reads through
the page cache. The first table is one prompt of about 1,000 tokens; the second a chat, where each
turn's prompt is all that was said before it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before NumPy is imported
sys.path.insert(0, str(ROOT))

from examples.smollm.demo import DOCUMENT, load_model, make_manager, make_prompts  # noqa: E402
from examples.smollm.engine import Engine, Origin  # noqa: E402
from examples.smollm.model import Model  # noqa: E402
from examples.smollm.tokenizer import Message, Tokenizer  # noqa: E402

from kvoffload.benching.machine import describe_machine  # noqa: E402

TURNS = (
    "Name the planets of the solar system, each with one sentence on what is special about it.",
    "Which of them could one stand on?",
    "How long would the journey to the nearest of those take?",
    "Write a short letter home from there.",
)


async def first_token(
    engine: Engine, prompt: list[int], *, max_tokens: int = 1, use_cache: bool = True
) -> tuple[Origin, list[int]]:
    async with engine.generate(prompt, max_tokens, use_cache=use_cache) as answer:
        async for _ in answer:
            pass
    return answer.origin, answer.answer


async def one_prompt(model: Model, prompt: list[int], rounds: int, cold: Path) -> None:
    """Print the ratios for one prompt; in each round all cases, so that they share its weather."""
    recomputed: list[float] = []
    ratios: dict[str, list[float]] = {"hot": [], "cold": []}
    for _ in range(rounds):
        async with make_manager(model, cold) as kv, Engine(model, kv) as engine:
            await first_token(engine, prompt[:64], use_cache=False)
            origin, _ = await first_token(engine, prompt, use_cache=False)
            recomputed.append(origin.first_token_s)
            await first_token(engine, prompt)  # the first time it stores, then it is hot
            origin, _ = await first_token(engine, prompt)
            ratios["hot"].append(origin.first_token_s / recomputed[-1])
        async with make_manager(model, cold) as kv, Engine(model, kv) as engine:
            origin, _ = await first_token(engine, prompt)
            assert set(origin.loaded_tokens) == {"cold"}
            ratios["cold"].append(origin.first_token_s / recomputed[-1])
    print(
        f"prompt of {len(prompt)} tokens, {origin.computed_tokens} of them computed when restored"
    )
    print(f"recompute: {statistics.median(recomputed):.2f} s")
    for name, each in ratios.items():
        low, middle, high = min(each), statistics.median(each), max(each)
        print(f"{name:4} / recompute: {middle:.3f} (from {low:.3f} to {high:.3f})")


async def chat(tokenizer: Tokenizer, model: Model, cold: Path) -> None:
    """Print each turn of a chat, the memory tiers emptied before each."""
    print("\nturn   prompt   computed   first token / recompute")
    messages: list[Message] = []
    for number, question in enumerate(TURNS, 1):
        messages.append(Message("user", question))
        prompt = tokenizer.encode_chat(messages)
        async with make_manager(model, cold) as kv, Engine(model, kv) as engine:
            await first_token(engine, prompt[:64], use_cache=False)
            whole, _ = await first_token(engine, prompt, use_cache=False)
            origin, answer = await first_token(engine, prompt, max_tokens=120)
        ratio = origin.first_token_s / whole.first_token_s
        print(f"{number:4}   {len(prompt):6}   {origin.computed_tokens:8}   {ratio:23.3f}")
        messages.append(Message("assistant", tokens=tuple(answer)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    tokenizer, model = load_model()
    with tempfile.TemporaryDirectory(prefix="kvoffload-bench.") as folder:
        for name, value in describe_machine(Path(folder)).items():
            print(f"{name}: {value}")
        prompt = make_prompts(tokenizer, DOCUMENT.read_text(encoding="utf-8"))[0]
        asyncio.run(one_prompt(model, prompt, rounds, Path(folder, "prompt")))
        asyncio.run(chat(tokenizer, model, Path(folder, "chat")))


if __name__ == "__main__":
    main()
