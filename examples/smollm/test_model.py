"""The forward pass agrees with another implementation, and its bits with itself."""

from __future__ import annotations

import numpy as np
import pytest
from examples.smollm.conftest import Loaded
from examples.smollm.gguf import Floats
from examples.smollm.model import BLOCK_TOKENS, CHUNK_TOKENS, Model
from examples.smollm.pool import PagedPool
from examples.smollm.tokenizer import Message

# From the transformers library 5.24.0 (torch 2.13.0, float32), AutoModelForCausalLM of the same
# file: the largest logits after the prompt, and what generate(do_sample=False) goes on with.
MESSAGES = [
    Message("system", "You answer briefly."),
    Message(
        "user",
        "Name three colours of the rainbow, and say which of them a ripe lemon has. Then explain "
        "in one sentence why the sky looks blue by day and red in the evening.",
    ),
]
LARGEST = {
    504: 30.599289,
    49: 28.345934,
    1348: 27.255434,
    33: 27.191027,
    2705: 27.087845,
    4590: 27.070976,
    12869: 27.031841,
    788: 27.021418,
}
GREEDY = [
    504,
    24594,
    314,
    1135,
    282,
    253,
    3086,
    282,
    4683,
    28,
    564,
    260,
    768,
    7703,
    582,
    314,
    2390,
    260,
    2380,
    282,
    260,
    6376,
    28,
    527,
    314,
    2390,
    253,
    8196,
    282,
    260,
    4683,
    282,
]


class Plain:
    """Prefill and decode, and nothing around them."""

    def __init__(self, model: Model, dtype: str = "float32", pages: int = 16) -> None:
        self.model = model
        self.pool = PagedPool(pages, model.geometry(dtype))
        self.table = np.arange(pages)

    def prefill(self, tokens: list[int], start: int = 0) -> Floats:
        """Compute from a position on, and return the logits after the last token."""
        hidden = np.empty(0, np.float32)
        while start < len(tokens):
            end = min(len(tokens), (start // CHUNK_TOKENS + 1) * CHUNK_TOKENS)
            chunk = np.array(tokens[start:end])
            hidden = self.model.prefill_chunk(chunk, start, self.pool, self.table)
            start = end
        return self.model.logits(hidden)

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        """Return the greedy continuation."""
        logits, answer = self.prefill(tokens), list[int]()
        while len(answer) < count:
            answer.append(int(logits.argmax()))
            position = len(tokens) + len(answer) - 1
            logits = self.model.logits(
                self.model.decode(answer[-1], position, self.pool, self.table)
            )
        return answer


def test_logits_and_answer_are_those_of_another_implementation(smollm: Loaded) -> None:
    """To a thousandth of a logit; their sums are added up in other orders."""
    tokenizer, model = smollm
    prompt = tokenizer.encode_chat(MESSAGES)
    logits = Plain(model).prefill(prompt)
    assert np.argsort(logits)[::-1][: len(LARGEST)].tolist() == list(LARGEST)
    assert logits[list(LARGEST)] == pytest.approx(list(LARGEST.values()), abs=1e-3)
    assert Plain(model).greedy(prompt, len(GREEDY)) == GREEDY


def test_a_cache_of_half_precision_says_nearly_the_same(smollm: Loaded) -> None:
    """And is what attention sees in the first pass already, so that restoring changes nothing."""
    tokenizer, model = smollm
    prompt = tokenizer.encode_chat(MESSAGES)
    whole, half = (Plain(model, dtype).prefill(prompt) for dtype in ("float32", "float16"))
    assert 0 < np.abs(whole - half).max() < 0.1


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("start", [BLOCK_TOKENS, CHUNK_TOKENS, 3 * BLOCK_TOKENS, 50, 52])
def test_bits_are_the_same_wherever_the_prompt_is_taken_up(
    smollm: Loaded, start: int, dtype: str
) -> None:
    """At the beginning of a chunk, within one, and for the last token alone."""
    tokenizer, model = smollm
    prompt = tokenizer.encode_chat(MESSAGES)
    assert start < len(prompt)
    plain, again = Plain(model, dtype), Plain(model, dtype)
    whole = plain.prefill(prompt)
    blocks = -(-start // BLOCK_TOKENS)
    again.pool.fill(range(blocks), [plain.pool.view(page) for page in range(blocks)])
    assert (again.prefill(prompt, start) == whole).all()
    for page in range(len(prompt) // BLOCK_TOKENS):
        assert again.pool.view(page) == plain.pool.view(page)


def test_bits_do_not_depend_on_what_comes_after(tiny: Loaded) -> None:
    """A block of a prompt is the same bytes in a longer prompt: its hash says no more than that."""
    tokenizer, model = tiny
    tokens = tokenizer.encode("the same beginning, " * 9)
    longer, shorter = Plain(model), Plain(model)
    longer.prefill(tokens)
    shorter.prefill(tokens[: 4 * BLOCK_TOKENS + 3])
    for page in range(4):
        assert longer.pool.view(page) == shorter.pool.view(page)


@pytest.mark.parametrize("pages", [[3, 0, 2, 1], [0, 1, 2, 3]], ids=str)
def test_it_does_not_matter_where_pages_are(tiny: Loaded, pages: list[int]) -> None:
    """They are looked up in the table alone."""
    tokenizer, model = tiny
    tokens = tokenizer.encode("somewhere in the pool " * 5)[:60]
    straight, moved = Plain(model), Plain(model)
    moved.table = np.array(pages)
    assert (straight.prefill(tokens) == moved.prefill(tokens)).all()
