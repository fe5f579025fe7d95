"""A model that knows nothing, in a file of 60 KB: for tests that are not about what is said."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .gguf import Floats
from .tokenizer import BYTE_LETTERS, CONTROL

LAYERS, HEADS, KV_HEADS, WIDTH, FEED, CONTEXT = 2, 4, 2, 32, 48, 2048
MERGES = ("Ġ t", "h e", "Ġt he", "l o")
TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *BYTE_LETTERS.values())

Metadata = Mapping[str, "int | float | str | Sequence[int] | Sequence[str]"]


def write_tiny(path: Path, seed: int = 7) -> Path:
    """Write the model's file; the same one for the same seed."""
    tokens = [*TOKENS, *(merge.replace(" ", "") for merge in MERGES)]
    values: Metadata = {
        "general.architecture": "llama",
        "llama.block_count": LAYERS,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": FEED,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if i < 3 else 1 for i in range(len(tokens))],
        "tokenizer.ggml.merges": MERGES,
    }
    kv_width = WIDTH // HEADS * KV_HEADS
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm": (WIDTH,),
            f"blk.{layer}.attn_q": (WIDTH, WIDTH),
            f"blk.{layer}.attn_k": (kv_width, WIDTH),
            f"blk.{layer}.attn_v": (kv_width, WIDTH),
            f"blk.{layer}.attn_output": (WIDTH, WIDTH),
            f"blk.{layer}.ffn_norm": (WIDTH,),
            f"blk.{layer}.ffn_gate": (FEED, WIDTH),
            f"blk.{layer}.ffn_up": (FEED, WIDTH),
            f"blk.{layer}.ffn_down": (WIDTH, FEED),
        }
    random = np.random.default_rng(seed)
    tensors = {
        f"{name}.weight": random.standard_normal(shape, np.float32) * np.float32(0.3)
        for name, shape in shapes.items()
    }
    tensors["output_norm.weight"] += 1
    write_gguf(path, values, {name: (0, each.shape, each) for name, each in tensors.items()})
    return path


def write_gguf(
    path: Path,
    values: Metadata,
    tensors: Mapping[str, tuple[int, Sequence[int], Floats | bytes]],
) -> None:
    """Write a GGUF file; a tensor is the number of its format, its shape and its bytes."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    for name, value in values.items():
        head += _string(name) + _value(value)
    data = b""
    for name, (kind, shape, content) in tensors.items():
        raw = content if isinstance(content, bytes) else content.tobytes()
        dimensions = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += _string(name) + struct.pack("<I", len(shape)) + dimensions
        head += struct.pack("<IQ", kind, len(data))
        data += raw + bytes(-len(raw) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + data)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: int | float | str | Sequence[int] | Sequence[str]) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    body = b"".join(_value(each)[4:] for each in value)
    kind = 8 if isinstance(value[0], str) else 4
    return struct.pack("<IIQ", 9, kind, len(value)) + body
