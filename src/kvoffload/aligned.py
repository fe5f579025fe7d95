"""Memory whose address direct I/O takes."""

from __future__ import annotations

import numpy as np

from .types import ByteArray

ALIGNMENT = 4096
"""Bytes that addresses, offsets and lengths of direct I/O are multiples of: a page, and no less
than any disk's sector."""


def aligned_empty(size: int) -> ByteArray:
    """Return an array of bytes, not written yet, at an aligned address."""
    spare = np.empty(size + ALIGNMENT, np.uint8)
    start = -address_of(spare) % ALIGNMENT
    return spare[start : start + size]


def round_up(size: int) -> int:
    """Return the next multiple of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def address_of(array: ByteArray) -> int:
    """Return where the first byte of an array lies."""
    address: int = array.__array_interface__["data"][0]
    return address
