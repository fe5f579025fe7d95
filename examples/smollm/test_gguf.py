"""The reader gives the floats that the format says, and an error for all that is no such file."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from examples.smollm.gguf import GGUFError, GGUFFile, find_weights
from examples.smollm.model import Model
from examples.smollm.tiny import write_gguf, write_tiny
from examples.smollm.tokenizer import Tokenizer


def test_each_format_decodes_as_it_is_defined(tmp_path: Path) -> None:
    """Numbers by hand: Q8_0 is scale * byte, Q4_1 is scale * nibble + minimum, low halves first."""
    q8 = struct.pack("<e32b", 0.5, *range(-16, 16))
    q4 = struct.pack("<ee16B", 0.25, -1.0, *(low | (15 - low) << 4 for low in range(16)))
    write_gguf(
        tmp_path / "file",
        {"answer": 42, "ratio": 1.5, "names": ["a", "é"], "sizes": [1, 2]},
        {
            "plain": (0, (2, 3), np.arange(6, dtype=np.float32)),
            "bytes": (8, (32,), q8),
            "nibbles": (3, (2, 32), q4 + q4),
        },
    )
    with GGUFFile(tmp_path / "file") as file:
        assert (file.integer("answer"), file.number("ratio")) == (42, 1.5)
        assert (file.strings("names"), file.integers("sizes")) == (["a", "é"], [1, 2])
        plain, of_bytes, nibbles = map(file.read, ("plain", "bytes", "nibbles"))
    assert plain.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert of_bytes.tolist() == [n / 2 for n in range(-16, 16)]
    row = [n / 4 - 1 for n in range(16)]
    assert nibbles.tolist() == [row + row[::-1]] * 2
    assert {each.dtype for each in (plain, of_bytes, nibbles)} == {np.dtype(np.float32)}


def test_a_file_that_was_cut_off_is_refused_wherever_it_was(tmp_path: Path) -> None:
    """Never an error of another kind, and never a tensor that is shorter than it says."""
    whole = write_tiny(tmp_path / "whole").read_bytes()
    for length in [*range(0, 2000, 7), *range(2000, len(whole), 997), len(whole) - 1]:
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(GGUFError):
            GGUFFile(tmp_path / "cut")


def test_damage_of_the_head_is_refused_or_harmless(tmp_path: Path) -> None:
    """Each byte in turn: what comes of it is a file that can be read, or the error."""
    whole = bytearray(write_tiny(tmp_path / "whole").read_bytes())
    refused = 0
    for at in range(0, 9000, 11):
        whole[at] ^= 0xFF
        (tmp_path / "damaged").write_bytes(whole)
        whole[at] ^= 0xFF
        try:
            with GGUFFile(tmp_path / "damaged") as file:
                Tokenizer(file)
                Model(file)
        except GGUFError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "damaged"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"x" + struct.pack("<I", 77), "type 77"),
    ],
)
def test_rubbish_is_refused_with_what_it_is(tmp_path: Path, content: bytes, says: str) -> None:
    """So that whoever gave the wrong file sees which way it is wrong."""
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(GGUFError, match=says):
        GGUFFile(tmp_path / "file")


def test_what_is_not_there_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    """Values, tensors, formats, and a model of another type."""
    write_gguf(tmp_path / "file", {"text": "a", "mixed": ["a"]}, {})
    with GGUFFile(tmp_path / "file") as file:
        for read in (file.integer, file.number, file.strings, file.integers, file.read):
            with pytest.raises(GGUFError):
                read("absent")
            with pytest.raises(GGUFError):
                read("text")
        with pytest.raises(GGUFError, match="whole numbers alone"):
            file.integers("mixed")
        with pytest.raises(GGUFError, match="llama"):
            Model(file)
        with pytest.raises(GGUFError, match="BPE"):
            Tokenizer(file)
    write_gguf(tmp_path / "other", {}, {"x": (2, (32,), bytes(32))})
    with pytest.raises(GGUFError, match="of format 2; this reads F32, Q4_1, Q8_0"):
        GGUFFile(tmp_path / "other")
    write_gguf(tmp_path / "other", {}, {"x": (8, (33,), bytes(64))})
    with pytest.raises(GGUFError, match="no whole Q8_0 blocks"):
        GGUFFile(tmp_path / "other")


def test_the_weights_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the environment, whatever is installed."""
    monkeypatch.setenv("SMOLLM_GGUF", "some.gguf")
    assert find_weights() == Path("some.gguf")
