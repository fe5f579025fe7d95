"""How a block looks in an engine that knows nothing but values: a header, the payload, a checksum.

Header and checksum say whose bytes these are, and that they are those: of another format, key,
layout or length, nothing is ever returned. The checksum comes last, so that it can be made while
the payload is being sent.

```
offset      bytes
0           4      magic, "KVOR"
4           1      format version
5           1      length of the key
6           2      zero
8           8      payload bytes
16          8      xxh3 of the layout's name, 0 for none
24          8      xxh3 of the 24 bytes above and of the key
32          key    canonical key
32+key      size   payload
32+key+size 8      xxh3 of the payload, seeded with the header's
```

All numbers are little-endian.
"""

from __future__ import annotations

import struct

from xxhash import xxh3_64, xxh3_64_intdigest

MAGIC = b"KVOR"
VERSION = 1
TRAILER_BYTES = 8
PAYLOAD_MISTAKE = "its payload does not check"
_FIELDS = struct.Struct("<4sBBHQQ")
_CHECKSUM = struct.Struct("<Q")
_FIXED_BYTES = _FIELDS.size + _CHECKSUM.size


def header_bytes(key: bytes) -> int:
    """Return how many bytes of a value come before the payload."""
    return _FIXED_BYTES + len(key)


def added_bytes(key: bytes) -> int:
    """Return how many bytes of a value are not the payload."""
    return header_bytes(key) + TRAILER_BYTES


def layout_fingerprint(layout: str) -> int:
    """Return what stands for a layout in headers and names; 0 for none."""
    return xxh3_64_intdigest(layout.encode()) if layout else 0


def header_of(key: bytes, size: int, layout: int) -> bytes:
    """Return the header of a block whose payload has so many bytes."""
    fields = _FIELDS.pack(MAGIC, VERSION, len(key), 0, size, layout)
    return fields + _CHECKSUM.pack(xxh3_64_intdigest(fields + key)) + key


class Seal:
    """Makes what comes after a payload, piece by piece."""

    def __init__(self, header: bytes | bytearray) -> None:
        (seed,) = _CHECKSUM.unpack_from(header, _FIELDS.size)
        self._checksum = xxh3_64(seed=seed)

    def update(self, piece: memoryview) -> None:
        """Take the next bytes of the payload; large ones without the interpreter's lock."""
        self._checksum.update(piece)

    def trailer(self) -> bytes:
        """Return what comes after the bytes so far."""
        return _CHECKSUM.pack(self._checksum.intdigest())


def trailer_of(header: bytes, payload: memoryview) -> bytes:
    """Return what comes after the payload."""
    (seed,) = _CHECKSUM.unpack_from(header, _FIELDS.size)
    return _CHECKSUM.pack(xxh3_64_intdigest(payload, seed))


def mistake(
    header: bytes | bytearray,
    trailer: bytes | bytearray,
    key: bytes,
    payload: memoryview,
    layout: int,
) -> str | None:
    """Return what is wrong with a value that was read for a key; `None` if it is the block."""
    wrong = header_mistake(header, key, payload.nbytes, layout)
    if wrong is None and trailer_of(bytes(header), payload) != trailer:
        return PAYLOAD_MISTAKE
    return wrong


def header_mistake(
    header: bytes | bytearray, key: bytes, payload_bytes: int, layout: int
) -> str | None:
    """Return what is wrong with a header that was read for a key; `None` if it is the block's."""
    fields = bytes(header[: _FIELDS.size])
    magic, version, key_length, _, size, found_layout = _FIELDS.unpack(fields)
    if magic != MAGIC:
        return "it is no block"
    if version != VERSION:
        return f"it has format version {version}, not {VERSION}"
    found = bytes(header[_FIXED_BYTES:])
    if _CHECKSUM.unpack_from(header, _FIELDS.size)[0] != xxh3_64_intdigest(fields + found):
        return "its header does not check"
    if found != key or key_length != len(key):
        return "it is another block"
    if found_layout != layout:
        return "it has another layout"
    if size != payload_bytes:
        return f"it has {size} bytes of payload, not {payload_bytes}"
    return None
