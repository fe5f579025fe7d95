"""The bytes on disk: what goes in comes out, and what was damaged is told from what is good."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest
import xxhash
from hypothesis import assume, given
from hypothesis import strategies as st

from kvoffload.storage import format as fmt

COUNTS = st.integers(0, 2**40)
FIELDS = {
    "slot": st.integers(0, 2**32 - 2),
    "sequence": st.integers(0, fmt.MAX_SEQUENCE - 1),
    "block_bytes": st.just(2**40),
    "size": COUNTS,
    "payload_checksum": st.integers(0, 2**64 - 1),
}
SEALS = st.builds(
    fmt.Seal,
    key=st.binary(min_size=272, max_size=272),
    salt=st.binary(min_size=16, max_size=16),
    tag=st.binary(min_size=16, max_size=16),
)
RECORDS = st.builds(fmt.Record, **FIELDS, key=st.binary(max_size=255)) | st.builds(
    fmt.Record, **FIELDS, key=st.just(b""), seal=SEALS
)
HEADERS = st.builds(
    fmt.Header,
    block_bytes=st.integers(1, 2**40),
    num_blocks=st.integers(1, 2**32 - 1),
    generation=COUNTS,
    next_sequence=COUNTS,
    clean=st.booleans(),
    key_check=st.just(b"") | st.binary(min_size=32, max_size=32),
)
RECORD = fmt.Record(7, 99, 4096, 4000, 2**64 - 3, b"b\x05tenthash")


# Records


@given(RECORDS)
def test_a_record_survives(record: fmt.Record) -> None:
    data = fmt.pack_record(record)
    assert len(data) == fmt.SECTOR_BYTES
    assert fmt.parse_record(data, record.slot) == record


def test_a_key_too_long_is_refused_before_it_is_cut() -> None:
    with pytest.raises(ValueError, match="255"):
        fmt.pack_record(replace(RECORD, key=bytes(256)))


def test_a_record_is_laid_out_as_documented() -> None:
    """A reader written from docs/disk-format.md alone must understand it."""
    data = fmt.pack_record(RECORD)
    assert data[0:8] == b"KVOSLOT\n"
    assert struct.unpack_from("<II", data, 8) == (2, len(RECORD.key))
    assert struct.unpack_from("<QQQQQ", data, 16) == (7, 99, 4096, 4000, 2**64 - 3)
    assert data[56:64] == bytes(8)
    assert data[64 : 64 + len(RECORD.key)] == RECORD.key
    assert data[64 + len(RECORD.key) : 504] == bytes(440 - len(RECORD.key))


def test_a_sealed_record_is_laid_out_as_documented() -> None:
    """Nothing of the key is in it but what is sealed, not even its length."""
    seal = fmt.Seal(b"k" * 272, b"s" * 16, b"t" * 16)
    data = fmt.pack_record(replace(RECORD, seal=seal))
    assert struct.unpack_from("<II", data, 8) == (2, 0)
    assert struct.unpack_from("<II", data, 56) == (1, 0)
    assert data[64:368] == b"k" * 272 + b"s" * 16 + b"t" * 16
    assert data[368:504] == bytes(136)
    assert RECORD.key not in data
    assert struct.unpack_from("<Q", data, 504) == (xxhash.xxh3_64_intdigest(data[:504]),)


@given(RECORDS, st.integers(0, 8 * fmt.SECTOR_BYTES - 1))
def test_one_flipped_bit_damages_a_record(record: fmt.Record, bit: int) -> None:
    data = bytearray(fmt.pack_record(record))
    data[bit // 8] ^= 1 << bit % 8
    table = fmt.parse_records(data, record.slot)
    assert len(table.slots) == 0
    assert table.damaged.tolist() == [record.slot]


@given(RECORDS, st.integers(1, fmt.SECTOR_BYTES - 1), st.binary(min_size=512, max_size=512))
def test_a_torn_record_is_damaged(record: fmt.Record, cut: int, before: bytes) -> None:
    """Power went while the record was being written over an older one, or over a blank."""
    data = fmt.pack_record(record)
    for old in (before, fmt.BLANK_RECORD):
        torn = data[:cut] + old[cut:]
        assume(torn != data)
        assert fmt.parse_record(torn, record.slot) is None


@given(st.binary(max_size=3 * fmt.SECTOR_BYTES), st.integers(0, 2**32))
def test_any_bytes_parse_to_good_records_or_a_clean_rejection(data: bytes, first: int) -> None:
    table = fmt.parse_records(data, first)
    whole = [
        data[i * fmt.SECTOR_BYTES : (i + 1) * fmt.SECTOR_BYTES]
        for i in range(len(data) // fmt.SECTOR_BYTES)
    ]
    used = {first + i for i, sector in enumerate(whole) if any(sector)}
    assert {*table.slots.tolist(), *table.damaged.tolist()} == used
    assert not {*table.slots.tolist()} & {*table.damaged.tolist()}


@given(
    st.binary(min_size=496, max_size=496), st.integers(0, 300), st.integers(0, 2**64 - 1), COUNTS
)
def test_sealed_nonsense_is_rejected_or_sane(
    rest: bytes, key_length: int, size: int, slot: int
) -> None:
    """A right checksum over wrong fields, as a bug would write it, must not get past the parser."""
    body = bytearray(b"KVOSLOT\n" + rest)
    struct.pack_into("<IIQ", body, 8, 1, key_length, slot)
    struct.pack_into("<Q", body, 40, size)
    data = bytes(body) + struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(body)))
    record = fmt.parse_record(data, slot)
    if record is not None:
        assert record.slot == slot
        assert len(record.key) <= 255
        assert 0 <= record.size <= record.block_bytes
        assert fmt.pack_record(record)[:56] == data[:56]


@given(st.lists(st.sampled_from(["good", "blank", "bad"]), max_size=20), st.integers(0, 1000))
def test_a_bulk_parse_sorts_each_slot_by_what_it_is(kinds: list[str], first: int) -> None:
    sectors = {
        "good": lambda slot: fmt.pack_record(replace(RECORD, slot=slot, key=b"%d" % slot)),
        "blank": lambda slot: fmt.BLANK_RECORD,
        "bad": lambda slot: b"\1" * fmt.SECTOR_BYTES,
    }
    data = b"".join(sectors[kind](first + i) for i, kind in enumerate(kinds))
    table = fmt.parse_records(data, first)
    assert table.slots.tolist() == [first + i for i, kind in enumerate(kinds) if kind == "good"]
    assert table.damaged.tolist() == [first + i for i, kind in enumerate(kinds) if kind == "bad"]
    assert table.keys == [b"%d" % slot for slot in table.slots.tolist()]


def test_a_part_of_a_record_is_none() -> None:
    assert fmt.parse_record(fmt.pack_record(RECORD)[:-1], RECORD.slot) is None


def test_a_misplaced_record_is_damaged() -> None:
    """The disk wrote the right bytes to the wrong place."""
    assert fmt.parse_record(fmt.pack_record(RECORD), RECORD.slot + 1) is None


def test_a_record_of_another_version_is_reported_as_that() -> None:
    body = bytearray(fmt.pack_record(RECORD)[:504])
    struct.pack_into("<I", body, 8, 3)
    table = fmt.parse_records(
        bytes(body) + struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(body))), RECORD.slot
    )
    assert table.versions == {3}
    assert table.damaged.tolist() == [RECORD.slot]


def test_tables_join() -> None:
    """Records are read in pieces; the pieces make one table."""
    data = b"".join(fmt.pack_record(replace(RECORD, slot=slot)) for slot in range(5))
    whole = fmt.parse_records(data)
    parts = [fmt.parse_records(data[:1024]), fmt.parse_records(data[1024:], 2)]
    joined = fmt.join_tables([fmt.parse_records(b""), *parts])
    assert [joined.record(i) for i in range(5)] == [whole.record(i) for i in range(5)]


def test_of_one_key_the_higher_number_wins_and_then_the_lower_slot() -> None:
    """The same number twice is a block that was being moved down when the power went."""
    records = [(0, 5, b"a"), (1, 9, b"a"), (2, 3, b"b"), (3, 3, b"b")]
    table = fmt.parse_records(
        b"".join(
            fmt.pack_record(replace(RECORD, slot=slot, sequence=sequence, key=key))
            for slot, sequence, key in records
        )
    )
    rows, num_duplicates = fmt.newest_of_each(table, np.arange(4))
    assert sorted(table.slots[rows].tolist()) == [1, 2]
    assert num_duplicates == 2


# Header


@given(HEADERS)
def test_a_header_survives(header: fmt.Header) -> None:
    data = fmt.pack_header(header)
    assert len(data) == fmt.SECTOR_BYTES
    assert fmt.parse_header(data) == header


def test_a_header_is_laid_out_as_documented() -> None:
    data = fmt.pack_header(fmt.Header(4096, 10, generation=3, next_sequence=77, clean=True))
    assert data[0:8] == b"KVOHEAD\n"
    assert struct.unpack_from("<II", data, 8) == (fmt.FORMAT_VERSION, 1)
    assert struct.unpack_from("<QQQQ", data, 16) == (3, 4096, 10, 77)
    assert data[48:504] == bytes(456)
    check = bytes(range(32))
    data = fmt.pack_header(fmt.Header(4096, 10, key_check=check))
    assert struct.unpack_from("<II", data, 8) == (fmt.FORMAT_VERSION, 2)
    assert data[48:504] == check + bytes(424)
    assert struct.unpack_from("<Q", data, 504) == (xxhash.xxh3_64_intdigest(data[:504]),)


@given(HEADERS, st.integers(0, 8 * fmt.SECTOR_BYTES - 1))
def test_one_flipped_bit_damages_a_header(header: fmt.Header, bit: int) -> None:
    data = bytearray(fmt.pack_header(header))
    data[bit // 8] ^= 1 << bit % 8
    assert fmt.parse_header(bytes(data)) is None


@given(st.binary(max_size=600))
def test_any_bytes_are_a_header_or_none(data: bytes) -> None:
    assert fmt.parse_header(data) is None


def test_a_header_of_another_version_says_which() -> None:
    """Whatever its other fields mean there."""
    header = fmt.parse_header(fmt.pack_header(fmt.Header(1, 1, version=2)))
    assert header is not None
    assert header.version == 2


def test_a_sealed_header_of_nonsense_is_none() -> None:
    """The right checksum is not enough: of another kind of sector, or of a geometry of nothing."""
    assert fmt.parse_header(fmt.pack_record(RECORD)) is None
    assert fmt.parse_header(fmt.pack_header(fmt.Header(0, 8))) is None
    assert fmt.parse_header(fmt.pack_header(fmt.Header(8, 0))) is None


# Order


@given(st.lists(st.integers(0, 2**32 - 1), max_size=50), COUNTS, st.binary(max_size=20))
def test_an_order_survives(slots: list[int], generation: int, rest: bytes) -> None:
    """Also with the end of a longer one behind it."""
    parsed = fmt.parse_order(fmt.pack_order(slots, generation) + rest, generation)
    assert parsed is not None
    assert parsed.tolist() == slots


@given(st.lists(st.integers(0, 2**32 - 1), max_size=9), st.data())
def test_a_flipped_bit_or_a_cut_damages_an_order(slots: list[int], data: st.DataObject) -> None:
    good = fmt.pack_order(slots, 4)
    bit = data.draw(st.integers(0, 8 * len(good) - 1))
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    assert fmt.parse_order(bytes(bad), 4) is None
    assert fmt.parse_order(good[: data.draw(st.integers(0, len(good) - 1))], 4) is None


def test_an_order_is_of_one_close_only() -> None:
    """The file of the close before last must not be taken for the last one's."""
    assert fmt.parse_order(fmt.pack_order([1, 2], 4), 5) is None


@given(st.binary(max_size=200), COUNTS)
def test_any_bytes_are_an_order_or_none(data: bytes, generation: int) -> None:
    assert fmt.parse_order(data, generation) is None


# Layout


def test_slabs_are_bounded() -> None:
    assert fmt.slots_per_slab(2**21) * 2**21 == 2**28
    assert fmt.slots_per_slab(2**40) == 1


@given(st.integers(1, 2**30))
def test_slots_of_large_blocks_suit_direct_io_at_little_cost(block_bytes: int) -> None:
    slot_bytes = fmt.slot_bytes(block_bytes)
    assert block_bytes <= slot_bytes < 1.125 * block_bytes + 1
    assert slot_bytes % 4096 == 0 or block_bytes < 32768
