"""How blocks travel: hashes as text, and batches of payloads as one binary body.

A batch is `b"KVB1"`, the length of its header (unsigned, 32 bits, little-endian), the header, and
the payloads back to back. The header is a JSON object with `block_hashes` and `sizes`, and may have
more. Client and service share this module, so it needs nothing beyond the standard library.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..types import BlockHash

BATCH = "application/vnd.kvoffload.batch"
"""Media type of a batch."""
MAGIC = b"KVB1"
PREFIX = struct.Struct("<4sI")
"""What every batch starts with: magic, and bytes of the header."""
MAX_HEADER_BYTES = 4 * 1024 * 1024
SEQUENCE_HEADER = "KVOffload-Sequence"
"""Of an answer within a session: the last line of the session's stream that was sent before it."""
CALL_HEADER = "KVOffload-Call"
"""Of a call within a session: the name by which its client can take it back."""


_INTEGER = re.compile(r"-?[0-9]{1,600}")


class WireError(ValueError):
    """What came is no batch, or no block hash; says why."""


@dataclass(frozen=True, slots=True)
class BatchHeader:
    """What a batch says before its payloads.

    Attributes:
        block_hashes: The blocks, in order.
        sizes: Payload bytes of each.
        more: The header's other fields.
    """

    block_hashes: list[BlockHash]
    sizes: list[int]
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def payload_bytes(self) -> int:
        """Bytes of all payloads."""
        return sum(self.sizes)


def hash_to_text(block_hash: BlockHash) -> str:
    """Return a block hash as text, with its type: `b:<hex>`, `s:<text>`, `i:<decimal>`.

    A `str` that is no valid Unicode is `x:<hex>` of its UTF-8, lone surrogates included.
    """
    if isinstance(block_hash, bytes):
        return f"b:{block_hash.hex()}"
    if isinstance(block_hash, int):
        return f"i:{block_hash}"
    try:
        block_hash.encode()
    except UnicodeEncodeError:
        return f"x:{block_hash.encode('utf-8', 'surrogatepass').hex()}"
    return f"s:{block_hash}"


def hash_from_text(text: str) -> BlockHash:
    """Return the block hash that a text stands for.

    Raises:
        WireError: It stands for none.
    """
    kind, rest = text[:2], text[2:]
    try:
        if kind == "b:" and len(value := bytes.fromhex(rest)) * 2 == len(rest):
            return value
        if kind == "s:":
            rest.encode()
            return rest
        if kind == "i:" and _INTEGER.fullmatch(rest):
            return int(rest)
        if kind == "x:":
            return bytes.fromhex(rest).decode("utf-8", "surrogatepass")
    except ValueError as exc:
        raise WireError(f"{text[:80]!r} is no block hash: {exc}") from None
    raise WireError(
        f"{text[:80]!r} is no block hash: write b:<hex>, s:<text> or i:<decimal digits>"
    )


def hashes_to_text(block_hashes: Sequence[BlockHash]) -> list[str]:
    """Return block hashes as text."""
    return [hash_to_text(block_hash) for block_hash in block_hashes]


def hashes_from_text(texts: Sequence[str]) -> list[BlockHash]:
    """Return the block hashes that texts stand for.

    Raises:
        WireError: One stands for none.
    """
    return [hash_from_text(text) for text in texts]


def pack_header(block_hashes: Sequence[BlockHash], sizes: Sequence[int], **more: Any) -> bytes:
    """Return what comes before the payloads of a batch."""
    header = {"block_hashes": hashes_to_text(block_hashes), "sizes": list(sizes), **more}
    body = json.dumps(header, separators=(",", ":")).encode()
    return PREFIX.pack(MAGIC, len(body)) + body


def header_bytes(prefix: bytes | bytearray | memoryview) -> int:
    """Return how long the header is that follows the first 8 bytes of a batch.

    Raises:
        WireError: They are not those of a batch, or the header is longer than `MAX_HEADER_BYTES`.
    """
    magic, length = PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise WireError(f"a batch starts with {MAGIC!r}, not with {magic!r}")
    if length > MAX_HEADER_BYTES:
        raise WireError(f"a batch's header of {length} bytes; at most {MAX_HEADER_BYTES} are taken")
    return int(length)


def parse_header(body: bytes | bytearray | memoryview) -> BatchHeader:
    """Return what a batch's header says.

    Raises:
        WireError: It is no JSON object with as many sizes as hashes.
    """
    try:
        header = json.loads(bytes(body))
    except (ValueError, RecursionError) as exc:
        raise WireError(f"a batch's header is no JSON: {exc}") from None
    if not isinstance(header, dict):
        raise WireError("a batch's header is a JSON object")
    texts, sizes = header.pop("block_hashes", None), header.pop("sizes", None)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise WireError("a batch's header has block_hashes, a list of strings")
    if not isinstance(sizes, list) or not all(type(size) is int and size >= 0 for size in sizes):
        raise WireError("a batch's header has sizes, a list of integers of at least 0")
    if texts and len(texts) != len(sizes):
        raise WireError(f"{len(texts)} block_hashes, but {len(sizes)} sizes")
    return BatchHeader(hashes_from_text(texts), sizes, header)
