from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvoffload.workload import PayloadBuffer, PayloadCodec

SIZES = (1, 7, 8, 9, 100, 4096, 65_536, 65_537, 3 * 65_536 + 5)
CODECS = {size: PayloadCodec(size) for size in SIZES}


def hashes(number: int) -> list[bytes]:
    return [hashlib.sha256(b"%d" % i).digest() for i in range(number)]


def payloads(codec: PayloadCodec, block_hashes: Sequence[bytes]) -> list[memoryview]:
    views = PayloadBuffer(codec, len(block_hashes)).fill(block_hashes)
    return [memoryview(bytearray(view)) for view in views]


@pytest.mark.parametrize("size", SIZES)
def test_what_was_filled_checks(size: int) -> None:
    codec, blocks = CODECS[size], hashes(5)
    made = payloads(codec, blocks)
    assert [payload.nbytes for payload in made] == [size] * 5
    assert codec.wrong_bytes(blocks, made) == 0
    assert codec.wrong_bytes(blocks, [payload.toreadonly() for payload in made]) == 0
    assert codec.wrong_bytes([], []) == 0


@given(data=st.data(), size=st.sampled_from(SIZES), flip=st.integers(1, 255))
@settings(deadline=None)
def test_any_single_wrong_byte_is_found(data: st.DataObject, size: int, flip: int) -> None:
    codec, blocks = CODECS[size], hashes(3)
    made = payloads(codec, blocks)
    made[data.draw(st.integers(0, 2), "block")][data.draw(st.integers(0, size - 1), "at")] ^= flip
    assert codec.wrong_bytes(blocks, made) == 1


@pytest.mark.parametrize("size", [9, 4096, 65_537])
def test_every_position_is_looked_at(size: int) -> None:
    codec, blocks = CODECS[size], hashes(1)
    made = payloads(codec, blocks)
    # Around each boundary: of the payload, of its last whole word, of a segment.
    for at in {0, 7, 8, size - 9, size - 8, size - 2, size - 1, 65_535 % size, 65_536 % size}:
        if at >= 0:
            made[0][at] ^= 0x80
            assert codec.wrong_bytes(blocks, made) == 1, at
            made[0][at] ^= 0x80


@pytest.mark.parametrize("size", [8, 100, 65_536])
def test_swapped_blocks_are_found(size: int) -> None:
    codec, blocks = CODECS[size], hashes(2)
    first, second = payloads(codec, blocks)
    differing = sum(a != b for a, b in zip(first, second, strict=True))
    # Keys may agree in a byte or two of their eight.
    assert differing > 0.6 * size
    assert codec.wrong_bytes(blocks, [second, first]) == 2 * differing


def test_a_payload_moved_inside_its_block_is_found() -> None:
    codec, blocks = CODECS[4096], hashes(1)
    (made,) = payloads(codec, blocks)
    for shift in (1, 8, 64, 512, 2048):
        moved = memoryview(bytes(made[shift:]) + bytes(made[:shift]))
        assert codec.wrong_bytes(blocks, [moved]) > 3800


def test_a_block_torn_between_two_writes_is_found() -> None:
    codec, blocks = CODECS[65_536], hashes(2)
    first, second = payloads(codec, blocks)
    torn = memoryview(bytes(first[:512]) + bytes(second[512:]))
    assert codec.wrong_bytes(blocks[1:], [torn]) > 300
    assert codec.wrong_bytes(blocks[:1], [torn]) > 40_000


def test_zeros_missing_and_surplus_bytes_are_wrong() -> None:
    codec, blocks = CODECS[100], hashes(2)
    made = payloads(codec, blocks)
    zeros = memoryview(bytes(100))
    assert codec.wrong_bytes(blocks, [zeros, made[1]]) == 100 - bytes(made[0]).count(0)
    assert codec.wrong_bytes(blocks, [made[0][:93], made[1]]) == 7
    assert codec.wrong_bytes(blocks, [memoryview(bytes(made[0]) + b"abc"), made[1]]) == 3
    assert codec.wrong_bytes(blocks, [memoryview(b""), made[1]]) == 100
    assert codec.wrong_bytes(blocks, [made[0]]) == 100
    assert codec.wrong_bytes(blocks[:1], made) == 100


def test_a_buffer_is_used_again() -> None:
    codec, blocks = CODECS[4096], hashes(6)
    buffer = PayloadBuffer(codec, 3)
    first = buffer.fill(blocks[:3])
    assert codec.wrong_bytes(blocks[:3], first) == 0
    second = buffer.fill(blocks[3:5])
    assert codec.wrong_bytes(blocks[3:5], second) == 0
    assert all(a is b for a, b in zip(first, second, strict=False))
    assert buffer.fill([]) == []


def test_payloads_stay_what_they_are_so_that_a_cold_tier_stays_valid() -> None:
    (made,) = payloads(CODECS[65_537], hashes(1))
    assert hashlib.sha256(made).hexdigest() == (
        "399e3e642da68c9b6d85ca418dc098de98c633263315c5e6fb4fe56284040228"
    )


def test_unaligned_memory_checks_too() -> None:
    codec, blocks = CODECS[4096], hashes(1)
    (made,) = payloads(codec, blocks)
    arena = np.zeros(4096 + 3, np.uint8)
    arena[3:] = made
    assert codec.wrong_bytes(blocks, [arena[3:].data]) == 0
    arena[-1] ^= 1
    assert codec.wrong_bytes(blocks, [arena[3:].data]) == 1
