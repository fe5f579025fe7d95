"""Sealed blocks: what is needed to read each, and scratch memory to seal them in."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np

from ..aligned import aligned_empty
from ..types import ByteArray
from . import format as fmt
from .cipher import SALT_BYTES, SEALED_KEY_BYTES, TAG_BYTES, Cipher


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

    def note_all(self, table: fmt.RecordTable, rows: fmt.Slots, slots: fmt.Slots) -> None:
        """Do the same for rows of a table whose payloads lie in these slots."""
        seals = table.seals[rows]
        salts, numbers = np.unique(seals["salt"], return_inverse=True)
        known = []
        for salt in map(bytes, salts.tolist()):
            known.append(self._numbers.setdefault(salt, len(self._salts)))
            if known[-1] == len(self._salts):
                self._salts.append(salt)
        self._sessions[slots] = np.array(known, np.int32)[numbers]
        self._sequences[slots] = table.sequences[rows]
        self._tags[slots] = np.frombuffer(seals["tag"].tobytes(), np.uint8).reshape(-1, TAG_BYTES)

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
    sealed = np.flatnonzero(table.sealed)
    ours = table.only(sealed, [table.keys[row] for row in sealed.tolist()])
    if not len(sealed):
        return ours
    salts, sealed_keys = ours.seals["salt"].tobytes(), ours.seals["key"].tobytes()
    opened = [
        cipher.open_key(
            salts[SALT_BYTES * row : SALT_BYTES * (row + 1)],
            sequence,
            about,
            sealed_keys[SEALED_KEY_BYTES * row : SEALED_KEY_BYTES * (row + 1)],
        )
        for row, (sequence, about) in enumerate(
            zip(ours.sequences.tolist(), ours.abouts(), strict=True)
        )
    ]
    good = np.array([row for row, key in enumerate(opened) if key is not None], dtype=np.int64)
    return ours.only(good, [key for key in opened if key is not None])
