"""Payloads that can be told from each other, and a source of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from anyio.lowlevel import checkpoint

from ..keys import encode_key
from ..types import BlockHash, Buffer


def payload_for(block_hash: BlockHash, size: int, *, namespace: str = "") -> bytes:
    """Return `size` bytes that belong to this block and to no other.

    The same in every process. Two blocks share their bytes only by chance, and a size of eight or
    more makes that no chance to count on.
    """
    return hashlib.shake_128(encode_key(block_hash, namespace)).digest(size)


class DictSource:
    """A `BlockSource` over a dictionary, which tests may change at any time.

    Args:
        payloads: What it has to begin with.

    Attributes:
        payloads: What it has.
        reads: Hashes that were asked for, in order, found or not.
    """

    def __init__(self, payloads: Mapping[BlockHash, Buffer] | None = None) -> None:
        self.payloads: dict[BlockHash, Buffer] = dict(payloads or {})
        self.reads: list[BlockHash] = []

    @classmethod
    def of(cls, block_hashes: Sequence[BlockHash], size: int) -> DictSource:
        """Make a source that has `payload_for` each of these blocks."""
        return cls({block_hash: payload_for(block_hash, size) for block_hash in block_hashes})

    async def read(self, block_hash: BlockHash) -> Buffer:
        """Return the payload.

        Raises:
            KeyError: It is not there.
        """
        self.reads.append(block_hash)
        await checkpoint()
        return self.payloads[block_hash]
