"""Blocks as values in a thread's own memory, from which a store takes them and to which it gives.

A store may look at that memory for as long as it likes, also after who asked has gone; at a
caller's buffer looks nobody but the thread, and only while it is wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ..types import ByteArray
from .envelope import (
    PAYLOAD_MISTAKE,
    TRAILER_BYTES,
    Seal,
    added_bytes,
    header_bytes,
    header_mistake,
    header_of,
)
from .lanes import PIECE_BYTES, Call
from .mooncake_client import Room
from .mooncake_library import LEASE_IS_OVER, NOT_THERE, NOT_WHOLE, WRONG_ARGUMENTS, Store
from .protocol import RemoteOutcome

VALUE_ALIGNMENT = 64

Got: TypeAlias = RemoteOutcome | int | str
"""What became of a block: an outcome, an error of the store's, or what is wrong with the value."""


def place_bytes(key: bytes, size: int) -> int:
    """Return how much memory a block takes up."""
    return -(-(size + added_bytes(key)) // VALUE_ALIGNMENT) * VALUE_ALIGNMENT


@dataclass(frozen=True)
class Values:
    """Blocks of one call, and what they are called in the store.

    Attributes:
        names: Their names.
        keys: Their canonical keys.
        sizes: Their payload bytes.
        layout: What stands for their layout.
    """

    names: Sequence[str]
    keys: Sequence[bytes]
    sizes: Sequence[int]
    layout: int

    def put(self, store: Store, call: Call, room: Room) -> list[int]:
        """Write the payloads, the call's buffers; return the store's answers.

        Raises:
            GivenUpError: Nobody waits for it; nothing was written.
            StoreError: There is no memory for it.
        """
        array, address = self._take(room)
        starts = list(self._starts())
        for number, start in enumerate(starts):
            self._write(call, number, array[start:])
        return store.batch_put_from(
            list(self.names), [address + start for start in starts], self._value_bytes()
        )

    def get(self, store: Store, call: Call, room: Room) -> list[Got]:
        """Read the payloads into the call's buffers; return what became of each.

        Raises:
            GivenUpError: Nobody waits for it.
            StoreError: There is no memory for it.
        """
        array, address = self._take(room)
        starts, sizes = list(self._starts()), self._value_bytes()
        codes = store.batch_get_into(list(self.names), [address + start for start in starts], sizes)
        got: list[Got] = []
        for number, (code, size, start) in enumerate(zip(codes, sizes, starts, strict=True)):
            if code == size:
                wrong = self._read(call, number, array[start : start + size])
                got.append(RemoteOutcome.DONE if wrong is None else wrong)
            else:
                # Of a larger one it says that the arguments are wrong.
                is_larger = code == WRONG_ARGUMENTS and store.get_size(self.names[number]) > size
                is_absent = code >= 0 or code in (NOT_THERE, NOT_WHOLE, LEASE_IS_OVER)
                got.append(RemoteOutcome.ABSENT if is_larger or is_absent else code)
        return got

    # Inside

    def _take(self, room: Room) -> tuple[ByteArray, int]:
        return room.take(sum(map(place_bytes, self.keys, self.sizes)))

    def _starts(self) -> Iterator[int]:
        start = 0
        for key, size in zip(self.keys, self.sizes, strict=True):
            yield start
            start += place_bytes(key, size)

    def _value_bytes(self) -> list[int]:
        return [size + added_bytes(key) for key, size in zip(self.keys, self.sizes, strict=True)]

    def _write(self, call: Call, number: int, value: ByteArray) -> None:
        """Write a value where the store takes it from."""
        size = self.sizes[number]
        header = header_of(self.keys[number], size, self.layout)
        begin = len(header)
        value[:begin] = np.frombuffer(header, np.uint8)
        payload = value[begin : begin + size]
        seal = Seal(header)
        for piece in _pieces(size):
            with call:
                np.copyto(payload[piece], call.bytes_of(number)[piece])
            seal.update(payload[piece].data)
        value[begin + size : begin + size + TRAILER_BYTES] = np.frombuffer(seal.trailer(), np.uint8)

    def _read(self, call: Call, number: int, value: ByteArray) -> str | None:
        """Read a value to where the caller wants it; return what is wrong with it."""
        key, size = self.keys[number], self.sizes[number]
        begin = header_bytes(key)
        header = value[:begin].tobytes()
        wrong = header_mistake(header, key, size, self.layout)
        if wrong is not None:
            return wrong
        payload = value[begin : begin + size]
        seal = Seal(header)
        for piece in _pieces(size):
            with call:
                target = call.bytes_of(number)[piece]
                np.copyto(target, payload[piece])
                # Of what the caller has: a transfer that failed may still write to `payload`.
                seal.update(target.data)
                del target
        good = seal.trailer() == value[begin + size :].tobytes()
        return None if good else PAYLOAD_MISTAKE


def _pieces(size: int) -> Iterator[slice]:
    for start in range(0, size, PIECE_BYTES):
        yield slice(start, min(start + PIECE_BYTES, size))


def sizes_of(store: Store, names: Sequence[str], *, in_one: bool) -> list[int]:
    """Return the bytes of each value, or an error of the store's.

    Args:
        store: Where they are.
        names: Their names.
        in_one: Whether it tells all of them at once.
    """
    sizes = store.batch_is_exist(list(names))
    sizes = [NOT_THERE if code == 0 else code for code in sizes]
    there = [name for name, code in zip(names, sizes, strict=True) if code > 0]
    if not there:
        return sizes
    # It says nothing of those that are gone, nor of any where it did not reach the master.
    told = store.batch_get_replica_desc(there) if in_one else {}
    known = {
        name: replicas[0].get_memory_descriptor().buffer_descriptor.size
        for name, replicas in told.items()
        if replicas and replicas[0].is_memory_replica()
    }
    return [
        code if code < 0 else known[name] if name in known else store.get_size(name)
        for name, code in zip(names, sizes, strict=True)
    ]
