"""Payloads that are derived from the block hash, so that every wrong byte is found."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_WORD = np.dtype("<u8")
_SEGMENT_WORDS = 8192
"""Words compared at once: 64 KiB of scratch stay in a core's cache."""
_SEED = 0x6B766F66


class PayloadCodec:
    """Derives a block's payload from its hash, and counts the bytes that differ from it.

    The payload is one fixed array of pseudo-random 64-bit words, each XORed with the first eight
    bytes of the hash. So two blocks differ in every word (unless their hashes start the same, one
    pair in 2**64), and no word stands where another could stand unnoticed: a swapped, shifted,
    torn, zeroed or flipped payload shows. Both ways run at the speed of memory and release the
    GIL; they belong on a worker thread all the same.

    Attributes:
        block_bytes: Bytes of a payload; any number from 1.
        words: 64-bit words that a payload fills, the last one maybe in part.
    """

    def __init__(self, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self.words = -(-block_bytes // _WORD.itemsize)
        # The raw stream of a bit generator is the same in every version of NumPy, which the
        # methods of Generator are not; what a cold tier keeps must still check next year.
        self._base = np.random.PCG64(_SEED).random_raw(self.words).astype(_WORD, copy=False)

    def fill(self, block_hashes: Sequence[bytes], rows: NDArray[np.uint64]) -> None:
        """Write each block's payload to its row; `rows` is at least (blocks, `words`)."""
        keys = self._keys(block_hashes)
        np.bitwise_xor(self._base, keys[:, np.newaxis], out=rows[: len(keys)])

    def wrong_bytes(self, block_hashes: Sequence[bytes], payloads: Sequence[memoryview]) -> int:
        """Count the bytes that are not what was derived from the hash at the same place.

        Bytes that are missing, or too many, are wrong; so are all bytes of a missing payload.
        Keeps no reference to the payloads, so that a lease can end.
        """
        keys = self._keys(block_hashes)
        scratch = np.empty(min(self.words, _SEGMENT_WORDS), _WORD)
        unequal = np.empty(len(scratch), np.bool_)
        wrong = self.block_bytes * abs(len(block_hashes) - len(payloads))
        for key, payload in zip(keys, payloads, strict=False):
            data = np.frombuffer(payload, np.uint8)
            if len(data) != self.block_bytes or self._differs(key, data, scratch, unequal):
                wrong += self._count(key, data)
        return wrong

    def _differs(
        self,
        key: np.uint64,
        data: NDArray[np.uint8],
        scratch: NDArray[np.uint64],
        unequal: NDArray[np.bool_],
    ) -> bool:
        whole_words = len(data) // _WORD.itemsize
        whole = data[: whole_words * _WORD.itemsize].view(_WORD)
        for start in range(0, whole_words, _SEGMENT_WORDS):
            there = whole[start : start + _SEGMENT_WORDS]
            expected, result = scratch[: len(there)], unequal[: len(there)]
            np.bitwise_xor(self._base[start : start + len(there)], key, out=expected)
            if np.not_equal(there, expected, out=result).any():
                return True
        if tail := len(data) % _WORD.itemsize:
            last = (self._base[-1:] ^ key).view(np.uint8)
            return data[-tail:].tobytes() != last[:tail].tobytes()
        return False

    def _count(self, key: np.uint64, data: NDArray[np.uint8]) -> int:
        """Count wrong bytes one by one; only for a payload that is known to be wrong."""
        expected = (self._base ^ key).view(np.uint8)[: self.block_bytes]
        common = min(len(data), len(expected))
        return int(
            np.count_nonzero(data[:common] != expected[:common])
            + max(len(data), len(expected))
            - common
        )

    @staticmethod
    def _keys(block_hashes: Sequence[bytes]) -> NDArray[np.uint64]:
        return np.frombuffer(b"".join([block_hash[:8] for block_hash in block_hashes]), _WORD)


class PayloadBuffer:
    """Room for the payloads of one `store`, used over and over.

    Fresh memory costs far more than the bytes put into it, and would be measured as the manager's
    doing; so each worker keeps its own.

    Args:
        codec: What makes the payloads.
        capacity: Most blocks of one call.
    """

    def __init__(self, codec: PayloadCodec, capacity: int) -> None:
        self._codec = codec
        self._rows = np.empty((max(1, capacity), codec.words), _WORD)
        flat = self._rows.data.cast("B")
        row_bytes = codec.words * _WORD.itemsize
        self._views = [
            flat[start : start + codec.block_bytes]
            for start in range(0, capacity * row_bytes, row_bytes)
        ]

    def fill(self, block_hashes: Sequence[bytes]) -> list[memoryview]:
        """Return the payloads of these blocks, valid until the next call."""
        self._codec.fill(block_hashes, self._rows)
        return self._views[: len(block_hashes)]
