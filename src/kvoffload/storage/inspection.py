"""Looking at a cold tier's directory from outside: what it holds, what is damaged, and mending it.

All of it blocks, and raises `OSError` where the operating system refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..aligned import aligned_empty
from ..errors import ConfigError
from ..keys import decode_key
from ..types import BlockHash
from . import format as fmt
from .blocks import AtOnce
from .cipher import Cipher
from .files import FileLayer
from .recovery import Store, Survey, read_records, recover, survey
from .vault import Vault

GROUP_BYTES = 2**22
"""Bytes read and checked at a time; by two threads, which saturate a disk and most memories."""

_OURS = re.compile(r"lock|header-[01]|records|order|slab-\d{6,}")


@dataclass(frozen=True, slots=True)
class FoundBlock:
    """One block of a directory.

    Attributes:
        slot: Where it lies.
        size: Payload bytes.
        sequence: Number of its writing.
        namespace: Its namespace; `None` where it is encrypted and there is no key.
        block_hash: Its hash; `None` as well.
    """

    slot: int
    size: int
    sequence: int
    namespace: str | None
    block_hash: BlockHash | None


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a directory holds; counts are blocks.

    Attributes:
        path: The directory.
        block_bytes: Most bytes of a block.
        num_blocks: Slots.
        slot_bytes: Bytes from one slot to the next.
        clean: Closed in good order.
        generation: How often it was opened and closed, about.
        encrypted: Whether payloads and keys are.
        good_headers: Copies of the header that are good, of two.
        blocks: Good ones.
        payload_bytes: Their payloads.
        disk_bytes: Space that the tier's files take.
        damaged: Records that are no good.
        cut_off: Records whose payload isn't all there.
        duplicates: Older copies of a block that lies in two slots.
        in_use_by: Process that has it open, if any does.
        namespaces: Blocks by namespace; none where they are encrypted and there is no key.
        foreign: Names in the directory that are not the tier's.
    """

    path: Path
    block_bytes: int
    num_blocks: int
    slot_bytes: int
    clean: bool
    generation: int
    encrypted: bool
    good_headers: int
    blocks: int
    payload_bytes: int
    disk_bytes: int
    damaged: int
    cut_off: int
    duplicates: int
    in_use_by: str | None = None
    namespaces: dict[str, int] = field(default_factory=dict)
    foreign: tuple[str, ...] = ()

    @property
    def is_damaged(self) -> bool:
        """Whether something is wrong that opening, or a repair, would drop or rebuild."""
        return bool(self.damaged or self.cut_off or self.duplicates or self.good_headers < 2)


@dataclass(frozen=True, slots=True)
class BadBlock:
    """A block whose payload is not what was stored."""

    slot: int
    reason: str


class Inspector:
    """Reads a directory as it is, without its lock, and changes nothing but in `repair`."""

    def __init__(self, path: Path, *, key: bytes | None = None) -> None:
        """Name the directory and, where it is encrypted, its key.

        Raises:
            ConfigError: It is no directory, there is no cold tier in it, of another format, or the
                key does not fit.
        """
        self.path = path.absolute()
        if not self.path.is_dir():
            why = "is not a directory" if self.path.exists() else "does not exist"
            raise ConfigError(f"{self.path} {why}")
        self._names = [entry.name for entry in self.path.iterdir()]
        if not any(name == "records" or name.startswith("header-") for name in self._names):
            raise ConfigError(f"there is no cold tier in {self.path}")
        self._key = key
        self._block_bytes, self._num_blocks = self._geometry()
        self._store = self._open(read_only=True)
        try:
            self._survey: Survey = survey(self._store, keyless=key is None)
        except BaseException:
            self._store.close()
            raise

    def close(self) -> None:
        """Close the files."""
        self._store.close()

    def look(self) -> Inspection:
        """Return what the directory holds."""
        found = self._survey
        table, rows = found.table, found.blocks
        encrypted = bool(table.sealed.any())
        if found.header is not None:
            encrypted = bool(found.header.key_check)
        namespaces: Counter[str] = Counter()
        if not encrypted or self._key is not None:
            namespaces.update(_namespace_of(table.keys[row]) for row in rows.tolist())
        ours = [name for name in self._names if _OURS.fullmatch(name)]
        return Inspection(
            self.path,
            self._block_bytes,
            self._num_blocks,
            fmt.slot_bytes(self._block_bytes),
            clean=found.clean,
            generation=found.header.generation if found.header is not None else 0,
            encrypted=encrypted,
            good_headers=found.good_headers,
            blocks=len(rows),
            payload_bytes=int(table.sizes[rows].sum()),
            disk_bytes=sum((self.path / name).stat().st_blocks * 512 for name in ours),
            damaged=len(table.damaged),
            cut_off=int((~found.whole).sum()),
            duplicates=found.duplicates,
            in_use_by=self._holder(),
            namespaces=dict(namespaces),
            foreign=tuple(sorted(set(self._names) - set(ours))),
        )

    def blocks(self) -> Iterator[FoundBlock]:
        """Yield the blocks, coldest first."""
        table = self._survey.table
        for row in self._survey.blocks.tolist():
            namespace: str | None = None
            block_hash: BlockHash | None = None
            if not table.sealed[row] or self._key is not None:
                namespace, block_hash = _decoded(table.keys[row])
            yield FoundBlock(
                int(table.slots[row]),
                int(table.sizes[row]),
                int(table.sequences[row]),
                namespace,
                block_hash,
            )

    def verify(self, progress: Callable[[int], None] = lambda _: None) -> list[BadBlock]:
        """Read every payload and check it; `progress` gets the bytes of each piece.

        Without the key of an encrypted directory, the bytes are checked as they lie there.
        """
        table = self._survey.table
        rows = self._survey.blocks[np.argsort(table.slots[self._survey.blocks])]
        vault: Vault | None = None
        if self._store.cipher is not None:
            slots = int(table.slots.max(initial=0)) + 1
            vault = Vault(self._store.cipher, slots, self._block_bytes)
            if len(rows):
                vault.note_all(table, rows, table.slots[rows])
        step = max(1, GROUP_BYTES // self._block_bytes)

        def check(start: int) -> tuple[int, list[BadBlock]]:
            return self._check(rows[start : start + step].tolist(), vault)

        bad: list[BadBlock] = []
        with ThreadPoolExecutor(2) as threads:
            for size, found in threads.map(check, range(0, len(rows), step)):
                progress(size)
                bad += found
        return bad

    def repair(self, *, verify: bool) -> int:
        """Do what opening the tier would, and close it in good order; return the blocks there are.

        Args:
            verify: Also drop the blocks whose payload does not check.

        Raises:
            TierLockedError: A process has it open.
            ConfigError: It is encrypted, and there is no key.
        """
        self._store.close()
        store = self._open(read_only=False)
        try:
            store.lock.acquire("inspect")
            recovered = recover(store, self._num_blocks)
            order = [block.slot for block in recovered.found]
            if verify:
                bad: set[int] = set()
                for block in recovered.found:
                    buffer = aligned_empty(block.size).data
                    outcomes: list[OSError | None] = [None]
                    recovered.blocks.read([block.slot], [buffer], outcomes, AtOnce())
                    if outcomes[0] is not None:
                        bad.add(block.slot)
                recovered.blocks.erase(sorted(bad))
                order = [slot for slot in order if slot not in bad]
            header = recovered.header
            store.write_clean(replace(header, generation=header.generation + 1), order)
        finally:
            store.close()
        self._store = self._open(read_only=True)
        self._survey = survey(self._store, keyless=self._key is None)
        return len(order)

    # Inside

    def _open(self, *, read_only: bool) -> Store:
        cipher = None if self._key is None else Cipher(self._key)
        store = Store(FileLayer(), self.path, self._block_bytes, cipher=cipher)
        if read_only:
            store.only_read()
        return store

    def _geometry(self) -> tuple[int, int]:
        """Return the bytes of a block and the number of slots, by the header or the records."""
        store = Store(FileLayer(), self.path, 1)
        store.only_read()
        try:
            header = store.read_header()[0]
            if header is not None:
                return header.block_bytes, header.num_blocks
            table = read_records(store.records)
            if not len(table.slots):
                raise ConfigError(
                    f"there is neither a good header nor a good record in {self.path}: "
                    "nothing to save"
                )
            num_records = store.records.extents().get(0, 0) // fmt.SECTOR_BYTES
            return int(np.bincount(table.block_bytes).argmax()), num_records
        finally:
            store.close()

    def _holder(self) -> str | None:
        """Return who has the directory open, if anybody has."""
        layer = FileLayer()
        try:
            fd = layer.open(self.path / "lock", 0)
        except OSError:
            return None
        try:
            layer.lock(fd)
        except OSError:
            line = bytearray(32)
            count = layer.preadv(fd, [memoryview(line)], 0)
            return line[:count].split(b"\n")[0].decode("ascii", "replace") or "another process"
        finally:
            layer.close(fd)
        return None

    def _check(self, rows: list[int], vault: Vault | None) -> tuple[int, list[BadBlock]]:
        table = self._survey.table
        slots = [int(table.slots[row]) for row in rows]
        buffers = [aligned_empty(int(table.sizes[row])).data for row in rows]
        bad: list[BadBlock] = []
        outcomes = self._store.slabs.read(slots, buffers)
        for row, slot, buffer, outcome in zip(rows, slots, buffers, outcomes, strict=True):
            if outcome is not None:
                bad.append(BadBlock(slot, f"can't be read: {outcome.strerror or outcome}"))
            elif fmt.checksum(buffer) != table.payload_checksums[row]:
                bad.append(BadBlock(slot, "does not match its checksum"))
            elif vault is not None and not vault.open_payload(slot, buffer):
                bad.append(BadBlock(slot, "was tampered with"))
        return sum(map(len, buffers)), bad


def _decoded(key: bytes) -> tuple[str, BlockHash]:
    try:
        return decode_key(key)
    except ValueError:  # written through the tier itself, by who has keys of another kind
        return "", key


def _namespace_of(key: bytes) -> str:
    return _decoded(key)[0]
