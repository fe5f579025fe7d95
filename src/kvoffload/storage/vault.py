"""Sealed blocks: what is needed to read each, and scratch memory to seal them in."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np

from ..aligned import aligned_empty
from ..types import ByteArray
from . import format as fmt
from .cipher import TAG_BYTES, Cipher


class Vault:
    """Seals payloads and records of one session, and opens those of any.

    Threads may call at once, for different slots.
    """

    def __init__(self, cipher: Cipher, num_slots: int, block_bytes: int) -> None:
        """Start with no sealed block known."""
        self._cipher = cipher
        self._block_bytes = block_bytes
        self._sequences = np.zeros(num_slots, np.uint64)
        self._tags = np.zeros((num_slots, TAG_BYTES), np.uint8)
        self._sessions = np.zeros(num_slots, np.int32)
        self._salts = [cipher.salt]
        self._numbers = {cipher.salt: 0}
        self._own = threading.local()

    def note(self, record: fmt.Record) -> None:
        """Keep what it takes to read a slot whose record was sealed."""
        seal = record.seal
        assert seal is not None
        number = self._numbers.setdefault(seal.salt, len(self._salts))
        if number == len(self._salts):
            self._salts.append(seal.salt)
        self._sessions[record.slot] = number
        self._sequences[record.slot] = record.sequence
        self._tags[record.slot] = np.frombuffer(seal.tag, np.uint8)

    def scratch(self, size: int) -> ByteArray:
        """Return aligned memory, this thread's own."""
        scratch: ByteArray | None = getattr(self._own, "scratch", None)
        if scratch is None or len(scratch) < size:
            self._own.scratch = scratch = aligned_empty(size)
        return scratch[:size]

    def seal_payload(self, sequence: int, payload: memoryview, into: memoryview) -> bytes:
        """Encrypt a payload into as many bytes; return its tag."""
        about = fmt.about_payload(self._block_bytes, len(payload))
        return self._cipher.seal(sequence, about, payload, into)

    def seal_record(self, record: fmt.Record, tag: bytes) -> fmt.Record:
        """Return a record with its key sealed."""
        about = fmt.about_record(record, tag)
        key = self._cipher.seal_key(record.sequence, about, record.key)
        return replace(record, seal=fmt.Seal(key, self._cipher.salt, tag))

    def open_payload(self, slot: int, payload: memoryview) -> bool:
        """Decrypt what was read from a slot, in place; if it was tampered with, leave zeros."""
        return self._cipher.open(
            self._salts[self._sessions[slot]],
            int(self._sequences[slot]),
            fmt.about_payload(self._block_bytes, len(payload)),
            self._tags[slot].tobytes(),
            payload,
            payload,
        )


def unseal(cipher: Cipher, table: fmt.RecordTable) -> fmt.RecordTable:
    """Return the records that the key opens, with their keys; the others are damaged.

    One that is not sealed is none of ours.
    """
    rows: list[int] = []
    keys: list[bytes] = []
    for row, seal in enumerate(table.seals):
        if seal is None:
            continue
        record = table.record(row)
        about = fmt.about_record(record, seal.tag)
        key = cipher.open_key(seal.salt, record.sequence, about, seal.key)
        if key is not None:
            rows.append(row)
            keys.append(key)
    return table.only(np.array(rows, dtype=np.int64), keys)
