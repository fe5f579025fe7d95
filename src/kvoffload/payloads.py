"""Checking what callers hand in, before anything changes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .errors import ConfigError
from .types import Buffer, ByteArray


def check_payloads(payloads: Sequence[Buffer], block_bytes: int) -> list[ByteArray]:
    """Return payloads as flat arrays of bytes, without a copy.

    Raises:
        TypeError: One is no buffer.
        ConfigError: One is longer than a block, or its bytes are not contiguous.
    """
    if isinstance(payloads, bytes | bytearray | memoryview | str):
        raise TypeError("payloads must be a sequence of buffers, not one buffer: wrap it in a list")
    data = [_as_bytes(payload) for payload in payloads]
    for each in data:
        if len(each) > block_bytes:
            raise ConfigError(
                f"a payload of {len(each)} bytes is longer than a block of {block_bytes} bytes"
            )
    return data


def check_sizes(sizes: Sequence[int], count: int, block_bytes: int) -> Sequence[int]:
    """Return payload sizes as they are, or say what is wrong with them.

    Raises:
        TypeError: One is no integer.
        ConfigError: Not as many as blocks, negative, or longer than a block.
    """
    if len(sizes) != count:
        raise ConfigError(f"{count} block hashes, but {len(sizes)} sizes")
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"a size is an int, in bytes, not {size!r}")
        if not 0 <= size <= block_bytes:
            raise ConfigError(f"a size of {size} bytes is not within 0 to {block_bytes}")
    return sizes


def _as_bytes(payload: object) -> ByteArray:
    if type(payload) is not bytes:
        try:
            view = memoryview(payload)  # type: ignore[arg-type]  # what is no buffer raises
        except TypeError:
            raise TypeError(
                f"a payload is a buffer (bytes, memoryview, array), not {type(payload).__name__}"
            ) from None
        if "O" in view.format:
            raise TypeError("a payload of Python objects has no bytes: pass a numeric array")
        if not view.c_contiguous:
            raise ConfigError("a payload must be C-contiguous: pass numpy.ascontiguousarray(it)")
        payload = view.cast("B") if view.nbytes else b""
    return np.frombuffer(payload, np.uint8)
