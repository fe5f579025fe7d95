"""Payloads with their records: written in an order that no crash can hurt, checked when read."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..aligned import round_up
from . import format as fmt
from .os_errors import is_full
from .slabs import SlotFiles
from .vault import Vault

GROUP_BYTES = 2**21
"""Bytes hashed and moved at a time, so that what was moved is in the processor's cache still."""

DIRECT_GROUP_BYTES = 2**23
"""The same with direct I/O, where the disk is what takes long: at most."""
DIRECT_GROUPS = 4
"""Groups that a batch is cut into at least, if it isn't small."""


class Work(Protocol):
    """The call that a batch is part of."""

    @property
    def given_up(self) -> bool:
        """Whether nobody waits for it any more."""

    def share(self, tasks: Iterable[Callable[[], None]]) -> None:
        """Run tasks, several at once where threads are idle; none once it is given up."""

    def publish(self, action: Callable[[], None]) -> bool:
        """Run what must not happen once the call is given up; say whether it was run."""


class AtOnce:
    """Work that nobody gives up, on the thread that asks for it."""

    given_up = False

    def share(self, tasks: Iterable[Callable[[], None]]) -> None:
        """Run tasks one after the other."""
        for task in tasks:
            task()

    def publish(self, action: Callable[[], None]) -> bool:
        """Run an action."""
        action()
        return True


@dataclass(slots=True)
class Catalog:
    """What is known of each slot without looking at the disk.

    Attributes:
        sizes: Payload bytes, -1 where there is none.
        checksums: Of the bytes in the slab.
        blank: Where the record on disk is surely blank, which saves blanking it.
    """

    sizes: NDArray[np.int64]
    checksums: NDArray[np.uint64]
    blank: NDArray[np.bool_]


class Blocks:
    """Payloads with their records, changed in an order that a crash at any point can't hurt.

    Old record blank, payload, new record: so a good record on disk always has its whole payload.
    A power loss may undo the order of what was not synced, and then the checksum tells.
    """

    def __init__(
        self,
        slabs: SlotFiles,
        records: SlotFiles,
        catalog: Catalog,
        *,
        block_bytes: int,
        vault: Vault | None = None,
    ) -> None:
        """Take over files of payloads and of records, and what is known of them.

        With a vault, payloads and keys are encrypted.
        """
        self._slabs = slabs
        self._records = records
        self._catalog = catalog
        self._block_bytes = block_bytes
        self._vault = vault

    def holds(self, slot: int) -> bool:
        """Tell whether there is such a slot, and a block in it."""
        sizes = self._catalog.sizes
        return 0 <= slot < len(sizes) and bool(sizes[slot] >= 0)

    def read(
        self,
        slots: Sequence[int],
        into: Sequence[memoryview],
        outcomes: list[OSError | None],
        work: Work,
    ) -> None:
        """Fill each buffer with a slot's payload, of exactly its size, and check it.

        Args:
            slots: Slots, in any order.
            into: A buffer for each.
            outcomes: Gets one a slot as soon as it is known; `errno.EBADMSG` where the payload
                does not match its checksum.
            work: The call that this is part of.
        """
        held = self._catalog.sizes[slots].tolist()
        wanted = list(map(len, into))
        good = list(range(len(slots)))
        if held != wanted:
            good = [position for position in good if held[position] == wanted[position]]
            for position in set(range(len(slots))).difference(good):
                outcomes[position] = _unfit(held[position], wanted[position])
        good.sort(key=slots.__getitem__)
        checksums = self._catalog.checksums[slots].tolist()
        vault = self._vault

        def read_group(group: list[int]) -> None:
            errors = self._slabs.read([slots[i] for i in group], [into[i] for i in group])
            for i, error in zip(group, errors, strict=True):
                if error is None:
                    if vault is not None:
                        good = vault.open_payload(slots[i], into[i])
                    else:
                        good = fmt.checksum(into[i]) == checksums[i]
                    if not good:
                        error = self._corrupt(slots[i])
                outcomes[i] = error

        work.share([partial(read_group, group) for group in self._groups(good, into)])

    def write(
        self,
        slots: Sequence[int],
        payloads: Sequence[memoryview],
        keys: Sequence[bytes],
        sequences: Sequence[int],
        tell: Callable[[Sequence[OSError | None]], None],
        work: Work,
        *,
        sync: Callable[[], None] | None = None,
    ) -> None:
        """Write payloads and records.

        Args:
            slots: Slots, in any order.
            payloads: A payload for each.
            keys: A key for each.
            sequences: A sequence number for each.
            tell: Gets one outcome a slot at the moment when the blocks are there for `read`. A
                slot with an error holds no block; but where its record could not be blanked, the
                old one or this one may be back after a restart.
            work: The call that this is part of; if it is given up, its slots end up blank, and
                nobody is told.
            sync: Makes what was written durable, where that must be before anybody sees it.
        """
        lost_before = self._slabs.lost
        results = self.erase(slots)
        checksums = [0] * len(slots)
        tags = [b""] * len(slots)

        def write_group(group: list[int]) -> None:
            stored = [payloads[i] for i in group]
            if self._vault is not None:
                stored = self._sealed(self._vault, group, payloads, sequences, tags)
            for i, payload in zip(group, stored, strict=True):
                checksums[i] = fmt.checksum(payload)
            errors = self._slabs.write([slots[i] for i in group], stored)
            for i, error in zip(group, errors, strict=True):
                results[i] = error

        good = [i for i, result in enumerate(results) if result is None]
        good.sort(key=slots.__getitem__)
        groups = list(self._groups(good, payloads))
        work.share([partial(write_group, group) for group in groups])
        if work.given_up:
            return  # some payloads were not begun
        # While several are at work, a file system that is nearly full may refuse one what another
        # gives back a moment later.
        refused = [i for i in good if is_full(results[i])] if len(groups) > 1 else []
        for group in self._groups(refused, payloads):
            if work.given_up:
                return
            write_group(group)
        whole = [i for i, result in enumerate(results) if result is None]
        records = {
            i: fmt.Record(
                slots[i], sequences[i], self._block_bytes, len(payloads[i]), checksums[i], keys[i]
            )
            for i in whole
        }
        if self._vault is not None:
            records = {i: self._vault.seal_record(each, tags[i]) for i, each in records.items()}
        packed = [memoryview(fmt.pack_record(record)) for record in records.values()]
        targets = [slots[i] for i in whole]
        self._catalog.blank[targets] = False
        for i, error in zip(whole, self._records.write(targets, packed), strict=True):
            results[i] = error
        lost = self._slabs.lost
        if lost is not lost_before:
            # The sync that failed meanwhile may have dropped these payloads, and not known of them.
            results = [lost if result is None else result for result in results]
        if sync is not None:
            try:
                sync()
            except OSError as exc:
                results = [exc if result is None else result for result in results]
        written = [i for i in whole if results[i] is None]
        # A record that is reported as failed may have been written all the same. Where it can't be
        # blanked now, it is when the slot is erased or written again.
        self.erase([slots[i] for i in whole if results[i] is not None])

        def publish() -> None:
            there = [slots[i] for i in written]
            self._catalog.checksums[there] = [checksums[i] for i in written]
            self._catalog.sizes[there] = [len(payloads[i]) for i in written]
            if self._vault is not None:
                for i in written:
                    self._vault.note(records[i])
            tell(results)

        if not work.publish(publish):
            self.erase(targets)

    def erase(self, slots: Sequence[int]) -> list[OSError | None]:
        """Blank the records of these slots; return one outcome a slot."""
        outcomes: list[OSError | None] = [None] * len(slots)
        blank = self._catalog.blank[list(slots)].tolist()
        todo = [i for i, is_blank in enumerate(blank) if not is_blank]
        if not todo:
            return outcomes
        record = memoryview(fmt.BLANK_RECORD)
        errors = self._records.write([slots[i] for i in todo], [record] * len(todo))
        for i, error in zip(todo, errors, strict=True):
            outcomes[i] = error
        done = [slots[i] for i in todo if outcomes[i] is None]
        self._catalog.sizes[done] = -1
        self._catalog.blank[done] = True
        return outcomes

    def _groups(
        self, positions: Sequence[int], buffers: Sequence[memoryview]
    ) -> Iterator[list[int]]:
        """Cut positions into pieces of about as many bytes as go at a time."""
        most = GROUP_BYTES
        if self._slabs.direct:
            # Enough of them to keep the disk busy with several at once.
            total = sum(len(buffers[position]) for position in positions)
            most = min(DIRECT_GROUP_BYTES, max(GROUP_BYTES, total // DIRECT_GROUPS))
        group: list[int] = []
        room = most
        for position in positions:
            size = len(buffers[position])
            if group and size > room:
                yield group
                group = []
                room = most
            group.append(position)
            room -= size
        if group:
            yield group

    @staticmethod
    def _sealed(
        vault: Vault,
        group: Sequence[int],
        payloads: Sequence[memoryview],
        sequences: Sequence[int],
        tags: list[bytes],
    ) -> list[memoryview]:
        """Encrypt payloads into memory of this thread's own, and note their tags."""
        places = [round_up(len(payloads[i])) for i in group]
        scratch = vault.scratch(sum(places)).data
        sealed: list[memoryview] = []
        start = 0
        for i, place in zip(group, places, strict=True):
            into = scratch[start : start + len(payloads[i])]
            tags[i] = vault.seal_payload(sequences[i], payloads[i], into)
            sealed.append(into)
            start += place
        return sealed

    def _corrupt(self, slot: int) -> OSError:
        what = "the payload does not match its checksum"
        return OSError(errno.EBADMSG, what, str(self._slabs.path_of(slot)))


def _unfit(held: int, wanted: int) -> OSError:
    what = f"it holds {held} bytes" if held >= 0 else "it holds no block"
    return OSError(errno.EINVAL, f"{what}, and the buffer has {wanted}")
