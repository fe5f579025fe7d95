"""Opening the cold tier's directory: read headers and records, and repair what is there.

The records are the truth; the headers and the order file save work, tell what the directory was
made for, and keep the order of eviction.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..aligned import ALIGNMENT
from ..errors import ConfigError
from ..types import StoredBlock
from . import format as fmt
from .blocks import Blocks, Catalog
from .cipher import Cipher
from .directory import DirectoryLock
from .files import FileLayer
from .os_errors import is_full, is_lost, raise_first
from .slabs import SlotFiles, takes_direct_io
from .vault import Vault, unseal

_SCAN_SLOTS = 8192
_PAGE_SLOTS = 8
"""Records given up together where the disk can't read: 4096 bytes, as the system reads them.

Nor could fewer be blanked, since it reads what a write leaves of a page.
"""
_SEQUENCE_JUMP = 2**32

_log = logging.getLogger("kvoffload")


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """What a disk tier found when it was opened; counts are blocks.

    Attributes:
        clean: Closed in good order, or new; the order of eviction is the one it was closed with.
        blocks: Good ones, which are there now.
        damaged: Dropped, for the record did not check or the payload isn't all there. Where
            records can't be read, each slot counts, for it may have held a block.
        duplicates: Older copies of a block that lay in two slots; dropped.
        dropped: The coldest ones, for which there are fewer slots than before.
        header_rebuilt: Neither copy of the header was good.
    """

    clean: bool
    blocks: int
    damaged: int = 0
    duplicates: int = 0
    dropped: int = 0
    header_rebuilt: bool = False


@dataclass(frozen=True, slots=True)
class Survey:
    """What a directory says, before anything in it is changed.

    Attributes:
        header: The newer good copy of the header; `None` if neither is good.
        good_headers: Copies that are good.
        found_any: Something is there, good or damaged.
        clean: Closed in good order, or new.
        table: Good records, with their keys; without, where they are sealed and there is no key.
        whole: Which of them have slots of the store's size and their whole payload.
        blocks: Rows of the blocks, coldest first.
        in_order_of_use: Not of writing.
        duplicates: Older copies among what is whole.
    """

    header: fmt.Header | None
    good_headers: int
    found_any: bool
    clean: bool
    table: fmt.RecordTable
    whole: NDArray[np.bool_]
    blocks: fmt.Slots
    in_order_of_use: bool
    duplicates: int


@dataclass(frozen=True, slots=True)
class Recovered:
    """A directory ready for use.

    Attributes:
        found: What it holds, coldest first.
        blocks: The same, to read and write.
        header: The header as it is on disk now.
        report: The counts.
    """

    found: list[StoredBlock]
    blocks: Blocks
    header: fmt.Header
    report: RecoveryReport


class Store:
    """The files of one disk tier: lock, headers, order, records and slabs.

    What touches them raises `OSError` where the operating system refused.
    """

    def __init__(
        self,
        layer: FileLayer,
        path: Path,
        block_bytes: int,
        *,
        direct_io: str = "off",
        cipher: Cipher | None = None,
    ) -> None:
        """Name the files; nothing is touched."""

        def files(pattern: str, slot_bytes: int, slots_per_file: int) -> SlotFiles:
            return SlotFiles(
                layer, path, pattern.format, slot_bytes=slot_bytes, slots_per_file=slots_per_file
            )

        self.layer = layer
        self.path = path
        self.block_bytes = block_bytes
        self.lock = DirectoryLock(layer, path)
        slot_bytes = fmt.slot_bytes(block_bytes)
        self.slabs = files("slab-{:06}", slot_bytes, fmt.slots_per_slab(block_bytes))
        self.cipher = cipher
        self._direct_io = direct_io
        self.records = files("records", fmt.SECTOR_BYTES, 2**40)
        self._order = files("order", 2**40, 1)
        self._headers = files("header-{}", fmt.SECTOR_BYTES, 1)
        self._older_copy = 0  # of the header: the one to overwrite first

    def only_read(self) -> None:
        """Open files to be read alone."""
        for files in (self.slabs, self.records, self._order, self._headers):
            files.read_only = True

    def choose_io(self) -> None:
        """Use direct I/O for payloads if it is wanted and works here.

        Raises:
            ConfigError: It must be used, and can't.
        """
        if self._direct_io == "off":
            return
        aligned = self.slabs.slot_bytes % ALIGNMENT == 0
        self.slabs.direct = aligned and takes_direct_io(self.layer, self.path)
        if self._direct_io == "on" and not self.slabs.direct:
            why = (
                f"the file system of {self.path} does not take it"
                if aligned
                else f"it needs block_bytes of {fmt.PADDED_BYTES} or more, or a multiple of "
                f"{ALIGNMENT}, not {self.block_bytes}"
            )
            raise ConfigError(f"direct_io='on' can't be had: {why}; choose 'auto' or 'off'")

    def read_header(self) -> tuple[fmt.Header | None, int, bool]:
        """Return the newer good copy of the header, how many are good, and if any was there.

        Raises:
            ConfigError: It has another format version.
        """
        copies = [bytearray(fmt.SECTOR_BYTES) for _ in range(2)]
        outcomes = self._headers.read([0, 1], [memoryview(copy) for copy in copies])
        raise_first([None if is_lost(error) else error for error in outcomes])
        headers = [
            fmt.parse_header(copy) if outcome is None else None
            for copy, outcome in zip(copies, outcomes, strict=True)
        ]
        for header in headers:
            if header is not None and header.version != fmt.FORMAT_VERSION:
                raise _other_version(self.path, header.version)
        generations = [-1 if header is None else header.generation for header in headers]
        self._older_copy = 0 if generations[0] <= generations[1] else 1
        good = sum(header is not None for header in headers)
        return headers[1 - self._older_copy], good, any(map(any, copies))

    def write_header(self, header: fmt.Header) -> None:
        """Write both copies, the older first, each to the disk before the next is touched."""
        data = memoryview(fmt.pack_header(header))
        for copy in (self._older_copy, 1 - self._older_copy):
            raise_first(self._headers.write([copy], [data]))
            self._headers.sync()

    def read_order(self, generation: int) -> fmt.Slots | None:
        """Return the slots coldest first as they were at a clean close, if that is known."""
        size = self._order.extents().get(0, 0)
        data = memoryview(bytearray(size))
        try:
            done = self._order.read_span(0, data) if size else 0
        except OSError as exc:
            if not is_lost(exc):
                raise
            return None
        return fmt.parse_order(data[:done], generation)

    def write_clean(self, header: fmt.Header, order: Sequence[int]) -> None:
        """Sync everything, then say in the header that it is, and in which order the slots are."""
        self.sync()
        data = memoryview(fmt.pack_order(order, header.generation))
        try:
            raise_first(self._order.write([0], [data]))
            self._order.sync()
        except OSError as exc:
            if not is_full(exc):
                raise
            _log.warning("%s: no space to keep the order of use", self.path)
        self.write_header(replace(header, clean=True))

    def sync(self) -> None:
        """Make every payload and record written so far survive a power loss."""
        self.lock.check()
        self.sync_slabs()
        self.records.sync()

    def sync_slabs(self) -> None:
        """Make every payload written so far survive a power loss.

        Of those that the disk lost, the records are blanked: else the next session would find
        them good, and have nothing left to sync. Until then the system may still show the blocks.
        """
        try:
            self.slabs.sync()
        except OSError:
            slots = self.slabs.take_doubtful()
            errors = self.records.write(slots, [memoryview(fmt.BLANK_RECORD)] * len(slots))
            self.slabs.doubt(slot for slot, error in zip(slots, errors, strict=True) if error)
            raise

    def close(self) -> None:
        """Close all files and let go of the lock; nobody may be using them."""
        for files in (self.slabs, self.records, self._order, self._headers):
            files.close()
        self.lock.release()


def survey(store: Store, *, keyless: bool = False) -> Survey:
    """Find the blocks in a directory; nothing is changed.

    Args:
        store: The directory.
        keyless: Take sealed records as they are, each for a block of its own.

    Raises:
        ConfigError: It was made with another size of slots, format or key.
        OSError: The operating system refused.
    """
    slabs, records, cipher = store.slabs, store.records, store.cipher
    header, good_headers, any_copy = store.read_header()
    if header is not None and header.block_bytes != store.block_bytes:
        raise _mismatch(store.path, "block_bytes", header.block_bytes, store.block_bytes)
    encrypted = header is not None and bool(header.key_check)
    if header is not None and not keyless:
        _check_key(store, encrypted=encrypted, check=header.key_check)
    table = read_records(records)
    ours = table.block_bytes == store.block_bytes
    if header is None:
        # Then the records alone say what this is.
        if len(ours) and not ours.any():
            raise _mismatch(store.path, "block_bytes", int(table.block_bytes[0]), store.block_bytes)
        if table.versions and not len(ours):
            raise _other_version(store.path, min(table.versions))
        encrypted = bool(table.sealed.any())
        if len(table.slots) and not keyless:
            _check_key(store, encrypted=encrypted)
    if cipher is not None:
        num_records = len(table.slots)
        table = unseal(cipher, table)
        if header is None and num_records and not len(table.slots):
            raise ConfigError(
                f"{store.path} holds no block that encryption_key opens: give the one that it was "
                "made with, or another path"
            )
    else:
        table = _alike(table, sealed=encrypted)
    found_any = any_copy or bool(len(table.slots) or len(table.damaged))
    clean = not found_any
    if header is not None:
        # A records file cut short may have lost anything.
        num_records = records.extents().get(0, 0) // fmt.SECTOR_BYTES
        clean = header.clean and num_records >= header.num_blocks
    order = store.read_order(header.generation) if header is not None and clean else None

    ours = table.block_bytes == store.block_bytes
    whole = ours & _payload_is_there(table, slabs)
    newest, num_duplicates = np.flatnonzero(whole), 0
    if cipher is not None or not encrypted:
        newest, num_duplicates = fmt.newest_of_each(table, newest)
    return Survey(
        header=header,
        good_headers=good_headers,
        found_any=found_any,
        clean=clean,
        table=table,
        whole=whole,
        blocks=fmt.coldest_first(table, newest, order),
        in_order_of_use=order is not None,
        duplicates=num_duplicates,
    )


def recover(store: Store, num_blocks: int) -> Recovered:
    """Find the blocks in a locked directory and make it ready for use, as one not closed yet.

    Raises:
        ConfigError: It was made with another size of slots or format; nothing was changed.
        OSError: The operating system refused.
    """
    slabs, records, cipher = store.slabs, store.records, store.cipher
    found = survey(store)
    header, clean, table, whole = found.header, found.clean, found.table, found.whole
    ordered = found.blocks
    kept = ordered[max(0, len(ordered) - num_blocks) :]

    next_sequence = max(
        header.next_sequence if header is not None else 0,
        int(table.sequences.max(initial=-1)) + 1,
    )
    if not clean:
        # Above what was written and erased, and so not seen: numbers never come twice.
        next_sequence += _SEQUENCE_JUMP
        slabs.distrust()
    new_header = fmt.Header(
        store.block_bytes,
        num_blocks,
        generation=(header.generation if header is not None else 0) + 1,
        next_sequence=next_sequence,
        key_check=_key_check(header, cipher),
    )
    store.write_header(new_header)
    # From here on a crash leaves a directory that says it wasn't closed.
    used = np.union1d(table.slots, table.damaged)
    gone = np.setdiff1d(used, table.slots[kept])
    raise_first(records.write(gone.tolist(), [memoryview(fmt.BLANK_RECORD)] * len(gone)))
    slots, lost = _move_down(table, kept, num_blocks, store)
    records.truncate(num_blocks, extend=True)
    records.reserve(num_blocks)  # or payloads would take the space of their own records
    slabs.truncate(num_blocks)
    records.sync()
    if not clean:
        _write_again(records, num_blocks, gone)

    report = RecoveryReport(
        clean=clean,
        blocks=int((~lost).sum()),
        damaged=len(table.damaged) + int((~whole).sum()) + int(lost.sum()),
        duplicates=found.duplicates,
        dropped=len(ordered) - len(kept),
        header_rebuilt=found.found_any and header is None,
    )
    _tell(store.path, report, ordered=found.in_order_of_use)
    kept, slots = kept[~lost], slots[~lost]
    sizes = np.full(num_blocks, -1, dtype=np.int64)
    checksums = np.zeros(num_blocks, dtype=np.uint64)
    sizes[slots] = table.sizes[kept]
    checksums[slots] = table.payload_checksums[kept]
    stored = [
        StoredBlock(table.keys[row], slot, size)
        for row, slot, size in zip(
            kept.tolist(), slots.tolist(), table.sizes[kept].tolist(), strict=True
        )
    ]
    catalog = Catalog(sizes, checksums, blank=sizes < 0)
    vault: Vault | None = None
    if cipher is not None:
        vault = Vault(cipher, num_blocks, store.block_bytes)
        if len(kept):
            vault.note_all(table, kept, slots)
    blocks = Blocks(slabs, records, catalog, block_bytes=store.block_bytes, vault=vault)
    return Recovered(stored, blocks, new_header, report)


def _check_key(store: Store, *, encrypted: bool, check: bytes = b"") -> None:
    """Raise `ConfigError` unless a directory can be read with the key that there is, or with none.

    Args:
        store: The directory.
        encrypted: Whether its blocks are.
        check: What tells the key, if it is known.
    """
    if encrypted and store.cipher is None:
        why = "is encrypted: give the encryption_key that it was made with"
    elif not encrypted and store.cipher is not None:
        why = "was made without encryption_key: give none, or another path"
    elif store.cipher is not None and check and not store.cipher.checks(check):
        why = "was made with another encryption_key: give that one, or another path"
    else:
        return
    raise ConfigError(f"{store.path} {why}")


def _key_check(header: fmt.Header | None, cipher: Cipher | None) -> bytes:
    if cipher is None:
        return b""
    return header.key_check if header is not None else cipher.new_check()


def _alike(table: fmt.RecordTable, *, sealed: bool) -> fmt.RecordTable:
    """Return the records that are sealed, or those that are not; the others are damaged."""
    alike = table.sealed == sealed
    if alike.all():
        return table
    rows = np.flatnonzero(alike)
    return table.only(rows, [table.keys[row] for row in rows.tolist()])


def read_records(records: SlotFiles) -> fmt.RecordTable:
    """Read the whole file; what the disk can't read is damaged.

    Raises:
        OSError: The operating system refused for another reason.
    """
    num_slots = -(-records.extents().get(0, 0) // fmt.SECTOR_BYTES)
    tables = [fmt.parse_records(b"")]
    errors: list[OSError] = []
    buffer = memoryview(bytearray(min(num_slots, _SCAN_SLOTS) * fmt.SECTOR_BYTES))
    for slot in range(0, num_slots, _SCAN_SLOTS):
        count = min(_SCAN_SLOTS, num_slots - slot)
        tables += _read_piece(records, slot, buffer[: count * fmt.SECTOR_BYTES], errors)
    if errors:
        _log.warning("records can't be read (errors: %d, the first: %s)", len(errors), errors[0])
    return fmt.join_tables(tables)


def _read_piece(
    records: SlotFiles, slot: int, buffer: memoryview, errors: list[OSError]
) -> list[fmt.RecordTable]:
    """Read as many records as the buffer takes; what the disk can't read is damaged.

    Other errors are raised: they may pass, and must not cost blocks.
    """
    try:
        done = records.read_span(slot, buffer)
    except OSError as exc:
        if exc.errno != errno.EIO:
            raise
        count = len(buffer) // fmt.SECTOR_BYTES
        if count <= _PAGE_SLOTS:
            errors.append(exc)
            return [replace(fmt.parse_records(b""), damaged=np.arange(slot, slot + count))]
        tables = []
        for first in range(0, count, _PAGE_SLOTS):
            page = buffer[first * fmt.SECTOR_BYTES : (first + _PAGE_SLOTS) * fmt.SECTOR_BYTES]
            tables += _read_piece(records, slot + first, page, errors)
        return tables
    buffer[done:] = bytes(len(buffer) - done)  # a record cut off must not borrow an older one's end
    return [fmt.parse_records(buffer, slot)]


def _payload_is_there(table: fmt.RecordTable, slabs: SlotFiles) -> NDArray[np.bool_]:
    """Tell by the lengths of the slab files alone; the bytes are checked when they are read."""
    extents = slabs.extents()
    indexes, first = np.divmod(table.slots, slabs.slots_per_file)
    have = np.array([extents.get(index, 0) for index in indexes.tolist()], dtype=np.int64)
    there: NDArray[np.bool_] = (table.sizes == 0) | (first * slabs.slot_bytes + table.sizes <= have)
    return there


def _move_down(
    table: fmt.RecordTable, rows: fmt.Slots, num_blocks: int, store: Store
) -> tuple[fmt.Slots, NDArray[np.bool_]]:
    """Move blocks from slots that are no more to free ones; return all slots, and who was lost."""
    slots = table.slots[rows]
    lost = np.zeros(len(rows), dtype=np.bool_)
    outside = np.flatnonzero(slots >= num_blocks)
    free = np.setdiff1d(np.arange(num_blocks), slots)[: len(outside)]
    moved: dict[int, memoryview] = {}
    for at, slot in zip(outside.tolist(), free.tolist(), strict=True):
        record = table.record(int(rows[at]))
        payload = memoryview(bytearray(record.size))
        (error,) = store.slabs.read([record.slot], [payload])
        if error is not None or fmt.checksum(payload) != record.payload_checksum:
            lost[at] = True
            continue
        raise_first(store.slabs.write([slot], [payload]))
        moved[slot] = memoryview(fmt.pack_record(replace(record, slot=slot)))
        slots[at] = slot
    if len(outside):
        store.sync_slabs()  # else, after a power loss, a record without its payload may win
        raise_first(store.records.write(list(moved), list(moved.values())))
        store.sync()  # before the old places go away
    return slots, lost


def _write_again(records: SlotFiles, num_blocks: int, done: fmt.Slots) -> None:
    """Have the next sync include what another session wrote to the records, but for these slots.

    Erasures too. It does not do to sync the file: where a sync has failed, the system takes what
    it could not write for written, and would call the next one a success.
    """
    # Where the file has no space of its own, nobody wrote, and there may be none.
    slots = np.setdiff1d(np.flatnonzero(records.filled_bytes(num_blocks)), done)
    for start in range(0, len(slots), _SCAN_SLOTS):
        piece = slots[start : start + _SCAN_SLOTS].tolist()
        data = memoryview(bytearray(len(piece) * fmt.SECTOR_BYTES))
        sectors = [data[at : at + fmt.SECTOR_BYTES] for at in range(0, len(data), fmt.SECTOR_BYTES)]
        raise_first(records.read(piece, sectors))
        raise_first(records.write(piece, sectors))


def _tell(path: Path, report: RecoveryReport, *, ordered: bool) -> None:
    trouble = report.damaged or report.header_rebuilt or not report.clean
    _log.log(
        logging.WARNING if trouble else logging.INFO,
        "%s opened after %s: %d blocks in order of %s; dropped %d damaged, %d duplicates, "
        "%d beyond the slots%s",
        path,
        "a clean close" if report.clean else "a crash",
        report.blocks,
        "use" if ordered else "writing",
        report.damaged,
        report.duplicates,
        report.dropped,
        "; header rebuilt from the records" if report.header_rebuilt else "",
    )


def _other_version(path: Path, found: int) -> ConfigError:
    return ConfigError(
        f"{path} has format version {found}, and this program reads format version "
        f"{fmt.FORMAT_VERSION}: use the release that made it, or another path, or remove the "
        "directory"
    )


def _mismatch(path: Path, what: str, found: int, ours: int) -> ConfigError:
    return ConfigError(
        f"{path} was made with {what} {found}, and this tier has {what} {ours}: "
        "give the same, or another path, or remove the directory"
    )
