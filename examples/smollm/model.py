"""A Llama-type transformer in NumPy: one forward pass over a paged KV pool.

It is the arithmetic and nothing else: no cache, no event loop. The one thing to know about it is
that *the bits of a token's KV and logits depend on the tokens up to it and on nothing else*: not on
how much of the prompt was restored, nor on what comes after. Kernels of linear algebra add in an
order that depends on the matrices' shapes, so 7 rows at once and 32 rows at once differ in the last
bits. Therefore:

- The prompt is always computed in chunks of `CHUNK_TOKENS` rows at multiples of `CHUNK_TOKENS`,
  and a token is always the same row of the same chunk. A chunk of which only some tokens are needed
  (the first are restored, or the prompt ends in it) has all its rows nevertheless; those are zeros,
  and what becomes of them is dropped.
- Attention of a chunk is over all positions up to the chunk's end, later ones masked, so that its
  shapes depend on the chunk alone.
- The logits are those of one row at a time.

Decoding takes one row at a time, which is a shape of its own, and several times as fast as a chunk.
So the KV of an answer differs in the last bits from that of a prompt with the same tokens; the
engine computes it once more as a chunk before others get to see it (`engine.Generation`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .gguf import Floats, GGUFError, GGUFFile
from .pool import BlockGeometry, PagedPool

CHUNK_TOKENS = 32
"""Tokens that are computed at a time in prefill: two blocks. Larger chunks are hardly faster."""

BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The model's shape.

    Attributes:
        layers: Transformer blocks.
        heads: Query heads.
        kv_heads: Heads of keys and values; `heads // kv_heads` query heads share one.
        head_dim: Width of a head.
        feed: Width inside the feed-forward part.
        context_tokens: Longest prompt and answer together.
        rope_base: Base of the rotary frequencies.
        norm_epsilon: Added to a mean square before its root is taken.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    feed: int
    context_tokens: int
    rope_base: float
    norm_epsilon: float

    @classmethod
    def from_file(cls, file: GGUFFile) -> ModelConfig:
        """Read it from the file's values.

        Raises:
            GGUFError: It is no model of this type, or its numbers make no sense.
        """
        if file.values.get("general.architecture") != "llama":
            raise GGUFError("the file's model is not of the llama type")
        width = file.integer("llama.embedding_length")
        heads = file.integer("llama.attention.head_count")
        kv_heads = file.integer("llama.attention.head_count_kv")
        if min(width, heads, kv_heads) < 1 or width % (2 * heads) or heads % kv_heads:
            raise GGUFError(f"{width} wide, {heads} heads, {kv_heads} for KV does not divide")
        config = cls(
            layers=file.integer("llama.block_count"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=width // heads,
            feed=file.integer("llama.feed_forward_length"),
            context_tokens=file.integer("llama.context_length"),
            rope_base=file.number("llama.rope.freq_base"),
            norm_epsilon=file.number("llama.attention.layer_norm_rms_epsilon"),
        )
        if not (
            1 <= config.layers <= 1000
            and 1 <= config.context_tokens <= 1 << 17
            and 1 < config.rope_base < 1e9
            and 0 < config.norm_epsilon < 1
        ):
            raise GGUFError(f"that is no model: {config}")
        return config


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one transformer block, each as (inputs, outputs)."""

    attention_norm: Floats
    query_key_value: Floats
    attention_out: Floats
    feed_norm: Floats
    gate_up: Floats
    down: Floats


class Model:
    """Weights as float32, and the forward pass.

    Args:
        file: Where the weights are; they are turned into floats here, once (0.5 GB), which takes a
            second: so not in an event loop. The file may be closed afterwards.

    Raises:
        GGUFError: The file has no such model.
    """

    def __init__(self, file: GGUFFile) -> None:
        self.fingerprint = file.fingerprint()
        self.config = config = ModelConfig.from_file(file)
        width, words = config.heads * config.head_dim, len(file.strings("tokenizer.ggml.tokens"))
        self.embedding = _read(file, "token_embd", words, width)
        self.output_norm = _read(file, "output_norm", width)
        self.layers = [_read_layer(file, f"blk.{index}.", config) for index in range(config.layers)]
        # Rotary embedding turns pairs of neighbours: the order in which the file has them.
        frequencies = config.rope_base ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
        angles = np.outer(np.arange(config.context_tokens + CHUNK_TOKENS), frequencies)
        self._cos = np.cos(angles).astype(np.float32)[:, None, :]
        self._sin = np.sin(angles).astype(np.float32)[:, None, :]
        later = np.triu(np.ones((CHUNK_TOKENS, CHUNK_TOKENS), bool), 1)
        self._mask = np.where(later, np.float32(-np.inf), np.float32(0))

    def geometry(self, dtype: str = "float32") -> BlockGeometry:
        """Return the shape of a block of this model's KV."""
        config = self.config
        return BlockGeometry(config.layers, config.kv_heads, BLOCK_TOKENS, config.head_dim, dtype)

    def prefill_chunk(
        self, tokens: NDArray[np.int64], start: int, pool: PagedPool, table: NDArray[np.intp]
    ) -> Floats:
        """Compute tokens of one chunk, their KV to the pool; return the last one's hidden state.

        Args:
            tokens: One to `CHUNK_TOKENS` tokens, none beyond the chunk that `start` lies in.
            start: Position of the first.
            pool: Where the KV of all positions before `start` is.
            table: The chat's blocks in the pool, to the end of the chunk at least.
        """
        first = start % CHUNK_TOKENS
        rows = slice(first, first + len(tokens))
        hidden = np.zeros((CHUNK_TOKENS, self.embedding.shape[1]), np.float32)
        hidden[rows] = self.embedding[tokens]
        hidden = self._layers(hidden, start - first, rows, pool, table)
        last: Floats = hidden[rows.stop - 1]
        return last

    def decode(self, token: int, position: int, pool: PagedPool, table: NDArray[np.intp]) -> Floats:
        """Compute one token by itself; as `prefill_chunk`, but for the last bits."""
        hidden = self.embedding[token][None].copy()
        computed: Floats = self._layers(hidden, position, slice(0, 1), pool, table)[0]
        return computed

    def logits(self, hidden: Floats) -> Floats:
        """Return the next token's logits from a token's hidden state."""
        logits: Floats = self.embedding @ self._normed(hidden[None], self.output_norm)[0]
        return logits

    # Inside

    def _layers(
        self,
        hidden: Floats,
        base: int,
        rows: slice,
        pool: PagedPool,
        table: NDArray[np.intp],
    ) -> Floats:
        """Run rows at positions from `base` on through all layers; keep the KV of `rows` alone."""
        config = self.config
        count, heads, kv_heads = len(hidden), config.heads, config.kv_heads
        end = base + count
        seen = table[: -(-end // BLOCK_TOKENS)]
        cos, sin = self._cos[base:end], self._sin[base:end]
        for index, layer in enumerate(self.layers):
            mixed = self._normed(hidden, layer.attention_norm) @ layer.query_key_value
            mixed = mixed.reshape(count, heads + 2 * kv_heads, config.head_dim)
            turned = _rotate(mixed[:, : heads + kv_heads], cos, sin)
            queries, keys = turned[:, :heads], turned[:, heads:]
            values = mixed[:, heads + kv_heads :]
            pool.write(table, index, base + rows.start, keys[rows], values[rows])
            attended = np.empty((count, kv_heads, heads // kv_heads, config.head_dim), np.float32)
            grouped = queries.reshape(count, kv_heads, heads // kv_heads, config.head_dim)
            for group in range(kv_heads):
                attended[:, group] = self._attend(
                    grouped[:, group],
                    pool.read(seen, index, 0, group),
                    pool.read(seen, index, 1, group),
                    end,
                )
            hidden = hidden + attended.reshape(count, -1) @ layer.attention_out
            gate, up = np.split(self._normed(hidden, layer.feed_norm) @ layer.gate_up, 2, axis=1)
            hidden = hidden + (_silu(gate) * up) @ layer.down
        return hidden

    def _attend(self, queries: Floats, keys: Floats, values: Floats, end: int) -> Floats:
        """Attend from the last positions, shape (rows, heads of the group, head_dim)."""
        rows, heads, width = queries.shape
        flat = np.ascontiguousarray(queries.transpose(1, 0, 2)).reshape(heads * rows, width)
        flat *= np.float32(width**-0.5)
        scores: Floats = (flat @ keys.T).reshape(heads, rows, -1)
        scores[:, :, end:] = -np.inf  # the rest of the last block: nothing is there yet
        scores[:, :, end - rows : end] += self._mask[:rows, :rows]
        scores -= scores.max(axis=2, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=2, keepdims=True)
        out = scores.reshape(heads * rows, -1) @ values
        return out.reshape(heads, rows, width).transpose(1, 0, 2)

    def _normed(self, hidden: Floats, weight: Floats) -> Floats:
        mean_square = np.mean(hidden * hidden, axis=1, keepdims=True)
        root = np.sqrt(mean_square + np.float32(self.config.norm_epsilon))
        normed: Floats = hidden / root * weight
        return normed


def _read(file: GGUFFile, name: str, *shape: int) -> Floats:
    tensor = file.read(f"{name}.weight")
    if tensor.shape != shape:
        raise GGUFError(f"tensor {name!r} should be of shape {shape}, not {tensor.shape}")
    return tensor


def _read_layer(file: GGUFFile, prefix: str, config: ModelConfig) -> Layer:
    width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim

    def matrix(inputs: int, **outputs: int) -> Floats:
        """Join matrices side by side: one large product is faster than several."""
        parts = [_read(file, prefix + name, size, inputs).T for name, size in outputs.items()]
        return np.ascontiguousarray(np.concatenate(parts, axis=1))

    return Layer(
        attention_norm=_read(file, f"{prefix}attn_norm", width),
        query_key_value=matrix(width, attn_q=width, attn_k=kv_width, attn_v=kv_width),
        attention_out=matrix(width, attn_output=width),
        feed_norm=_read(file, f"{prefix}ffn_norm", width),
        gate_up=matrix(width, ffn_gate=config.feed, ffn_up=config.feed),
        down=matrix(config.feed, ffn_down=width),
    )


def _rotate(vectors: Floats, cos: Floats, sin: Floats) -> Floats:
    """Turn each pair of neighbours by its angle: vectors (rows, heads, head_dim)."""
    even, odd = vectors[..., 0::2], vectors[..., 1::2]
    turned = np.empty_like(vectors)
    turned[..., 0::2] = even * cos - odd * sin
    turned[..., 1::2] = even * sin + odd * cos
    return turned


def _silu(gate: Floats) -> Floats:
    with np.errstate(over="ignore"):  # exp of a large number is inf, and x / inf is 0, as it should
        activated: Floats = gate / (1 + np.exp(-gate))
        return activated
