"""Time to first token of a real model: computed, hot, cold, after a restart, shared.

`bash scripts/demo` runs it. Each part runs in a process of its own, so that it is a restart:
nothing but the cold tier's directory goes from the first to the second.

    python -m examples.smollm.demo [--picture FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from kvoffload import AsyncLRUManager, DiskTier, MemoryTier

from .engine import Engine
from .gguf import GGUFFile, find_weights
from .model import Model
from .tokenizer import Message, Tokenizer

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "README.md"
ANSWER_TOKENS = 32
SYSTEM_TOKENS = 960
QUESTIONS = (
    "What is this library for? Answer in two sentences.",
    "What does it guarantee when a task is cancelled? Answer in two sentences.",
)


@dataclass(slots=True)
class Case:
    """One answer, and how its first token came about.

    Attributes:
        name: What was done before.
        question: Which of the prompts.
        first_token_s: Seconds from the request to the first token.
        prompt_tokens: Tokens of the prompt.
        loaded_tokens: Tokens that were restored, by tier.
        loaded_bytes: Their bytes.
        computed_tokens: The others.
        answer: The tokens of the answer.
        logits: Digest of the logits that each token was chosen by.
        text: The answer.
    """

    name: str
    question: int
    first_token_s: float
    prompt_tokens: int
    loaded_tokens: Mapping[str, int] = field(default_factory=dict)
    loaded_bytes: int = 0
    computed_tokens: int = 0
    answer: Sequence[int] = ()
    logits: str = ""
    text: str = ""


def load_model() -> tuple[Tokenizer, Model]:
    """Return tokenizer and model; takes a second or two.

    Raises:
        FileNotFoundError: The weights are not installed.
    """
    if (path := find_weights()) is None:
        raise FileNotFoundError("the model's weights are not installed")
    with GGUFFile(path) as file:
        return Tokenizer(file), Model(file)


def make_manager(model: Model, cold: str | Path, dtype: str = "float32") -> AsyncLRUManager:
    """Return a manager for blocks of this model: 100 hot, 400 cold."""
    block_bytes = model.geometry(dtype).block_bytes
    # Off the page cache: the files are small beside the memory that a server has.
    disk = DiskTier(cold, 400, block_bytes, direct_io="off")
    return AsyncLRUManager(hot=MemoryTier(100, block_bytes), cold=disk)


def make_prompts(tokenizer: Tokenizer, text: str) -> list[list[int]]:
    """Return one prompt for each question, all with the same long system prompt on a text."""
    document = tokenizer.encode(text)
    system = "You answer questions about this document.\n\n"
    system += tokenizer.decode(document[:SYSTEM_TOKENS])
    return [
        tokenizer.encode_chat([Message("system", system), Message("user", question)])
        for question in QUESTIONS
    ]


async def measure(
    engine: Engine,
    tokenizer: Tokenizer,
    name: str,
    question: int,
    prompt: Sequence[int],
    *,
    use_cache: bool = True,
) -> Case:
    """Answer one prompt."""
    digest = sha256()
    stop = [tokenizer.end_of_turn]
    async with engine.generate(prompt, ANSWER_TOKENS, stop=stop, use_cache=use_cache) as answer:
        async for _ in answer:
            assert answer.logits is not None
            digest.update(answer.logits.tobytes())
    origin = answer.origin
    return Case(
        name,
        question,
        origin.first_token_s,
        origin.prompt_tokens,
        origin.loaded_tokens,
        origin.loaded_bytes,
        origin.computed_tokens,
        answer.answer,
        digest.hexdigest(),
        tokenizer.decode(answer.answer),
    )


async def run_part(part: str, cold: Path) -> list[Case]:
    """Run what belongs in one process."""
    tokenizer, model = load_model()
    prompts = make_prompts(tokenizer, document_beside(cold).read_text(encoding="utf-8"))
    cases = []
    if part == "first":
        async with make_manager(model, cold) as kv, Engine(model, kv) as engine:
            # The first products set up the library's buffers; that is not what is measured.
            await measure(engine, tokenizer, "", 0, prompts[0][:64], use_cache=False)
            cases.append(await measure(engine, tokenizer, "recompute", 0, prompts[0]))
            cases.append(await measure(engine, tokenizer, "hot", 0, prompts[0]))
        # Closed, the manager has written to disk what was in memory alone; opened again, its
        # memory tiers are empty.
        async with make_manager(model, cold) as kv, Engine(model, kv) as engine:
            cases.append(await measure(engine, tokenizer, "cold", 0, prompts[0]))
    else:
        async with make_manager(model, cold) as kv, Engine(model, kv) as engine:
            await measure(engine, tokenizer, "", 0, prompts[0][:64], use_cache=False)
            cases.append(await measure(engine, tokenizer, "restarted", 0, prompts[0]))
            cases.append(await measure(engine, tokenizer, "shared system prompt", 1, prompts[1]))
            name = "recompute, other question"
            cases.append(await measure(engine, tokenizer, name, 1, prompts[1], use_cache=False))
    return cases


def document_beside(cold: Path) -> Path:
    """Return where the text lies that is asked about: a copy, for both processes the same."""
    return cold.with_name("document.md")


def run_parts(cold: Path) -> list[Case]:
    """Run all parts, each in a process of its own.

    Raises:
        subprocess.CalledProcessError: One failed; its complaint was shown.
    """
    # One thread of linear algebra: so all figures mean the same on any number of cores.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    shutil.copyfile(DOCUMENT, document_beside(cold))
    cases = []
    for part in ("first", "restarted"):
        command = [sys.executable, "-m", __spec__.name, "--part", part, "--cold", str(cold)]
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, cwd=ROOT, env=environment
        )
        cases += [Case(**case) for case in json.loads(done.stdout)]
    return cases


def wrong_cases(cases: Sequence[Case]) -> list[str]:
    """Return the cases whose answer is not, token by token and bit by bit, that of recomputing."""
    computed = {case.question: case for case in cases if not case.loaded_tokens}
    return [
        case.name
        for case in cases
        if case.answer != computed[case.question].answer
        or case.logits != computed[case.question].logits
    ]


def table_of(cases: Sequence[Case]) -> str:
    """Return the table that is printed."""
    slowest = {case.question: case.first_token_s for case in cases if not case.loaded_tokens}
    head = ("", "first token", "of recompute", "restored", "computed", "bytes", "from")
    rows = [head]
    for case in cases:
        restored = sum(case.loaded_tokens.values())
        rows.append(
            (
                case.name,
                f"{case.first_token_s * 1000:.0f} ms",
                f"{case.first_token_s / slowest[case.question]:.3f}",
                f"{restored} tokens",
                f"{case.computed_tokens} tokens",
                f"{case.loaded_bytes / 1e6:.1f} MB",
                ", ".join(case.loaded_tokens) or "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0])]
            + [text.rjust(width) for text, width in zip(row[1:-1], widths[1:-1], strict=True)]
            + [row[-1]]
        ).rstrip()
        for row in rows
    )


def draw(cases: Sequence[Case], path: Path) -> None:
    """Draw the time to the first token of each case."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.55 * len(cases) + 1.4), layout="constrained")
    times = [case.first_token_s for case in cases]
    colours = ["#2f7d6d" if case.loaded_tokens else "#8a8f98" for case in cases]
    bars = axes.barh([case.name for case in cases], times, color=colours)
    axes.bar_label(bars, [f" {time * 1000:.0f} ms" for time in times])
    axes.invert_yaxis()
    axes.set_xlim(0, max(times) * 1.15)
    axes.set_xlabel("seconds to the first token")
    axes.set_title(f"SmolLM2-135M, a prompt of {cases[0].prompt_tokens} tokens, one thread")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    """Measure, print, check, draw."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.splitlines()[0])
    parser.add_argument("--picture", type=Path, help="where to draw the times, as PNG")
    parser.add_argument("--part", choices=("first", "restarted"), help=argparse.SUPPRESS)
    parser.add_argument("--cold", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        cases = asyncio.run(run_part(arguments.part, arguments.cold))
        json.dump([dataclasses.asdict(case) for case in cases], sys.stdout)
        return 0
    if find_weights() is None:
        sys.exit("demo: the model's weights are not installed; scripts/demo does that")
    print("SmolLM2-135M answers prompts of 1,000 tokens, on one thread; half a minute", flush=True)
    with tempfile.TemporaryDirectory(prefix="kvoffload-demo.") as folder:
        cases = run_parts(Path(folder, "cold"))
    print(f"\n{table_of(cases)}\n")
    print(f"Question: {QUESTIONS[0]}\nAnswer:   {' '.join(cases[0].text.split())} ...\n")
    if wrong := wrong_cases(cases):
        print(f"WRONG: other answers than recomputing gives: {', '.join(wrong)}")
        return 1
    print(
        f"All answers ({ANSWER_TOKENS} tokens, greedy) and their logits are those of recomputing."
    )
    if arguments.picture:
        draw(cases, arguments.picture)
        print(f"Picture: {arguments.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
