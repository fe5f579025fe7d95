"""Client-side buffers of one block each, and batches that are read into them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from ..blocks import BlockEntry
from ..errors import CapacityError, ConfigError, TierUnavailableError
from ..meter import Meter
from ..service.wire import PREFIX, BatchHeader, WireError, header_bytes, parse_header
from ..types import BlockHash, ByteArray
from ..views import Lent, Staging, lend
from .decoding import TIER
from .http import Outgoing, chunks_of
from .live import Live
from .room import Room


class Buffers:
    """Buffers of one block each, used again and again.

    The memory is reserved on first use and touched as buffers are used.

    Args:
        budget_bytes: Bytes of all together.

    Attributes:
        meter: How long it took to fill them.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.meter = Meter()
        self._budget_bytes = budget_bytes
        self._staging: Staging | None = None

    @property
    def block_bytes(self) -> int:
        """Bytes of a block at most."""
        return self._there.block_bytes

    def fit(self, block_bytes: int) -> None:
        """Be of the size of the service's blocks.

        Raises:
            ConfigError: They were of another size before.
        """
        if self._staging is None:
            self._staging = Staging(self._budget_bytes, block_bytes)
        elif self._staging.block_bytes != block_bytes:
            raise ConfigError(
                f"the service has blocks of {block_bytes} bytes now, and had blocks of "
                f"{self._staging.block_bytes} before: open a new client"
            )

    def take(self, count: int) -> list[int]:
        """Take so many buffers.

        Raises:
            CapacityError: There are not so many.
        """
        slots = self._there.slots.take(count)
        if len(slots) < count:
            self._there.slots.give_back(slots)
            raise CapacityError(
                f"{count} blocks at once, but only {len(slots)} client-side buffers are free: "
                f"load fewer at a time, or give the client more than "
                f"staging_bytes={self._budget_bytes}"
            )
        return slots

    def give_back(self, slots: Sequence[int]) -> None:
        """Give buffers back, which are used again once nothing shows them any more."""
        self._there.slots.give_back(slots)

    def lend(self, entry: BlockEntry, *, writable: bool = False) -> Lent:
        """Make a view of a block in a buffer that can be taken back."""
        return lend(self._there.slots, self._there.show, entry.slot, entry, writable=writable)

    def array(self, slot: int, size: int) -> ByteArray:
        """Return the first bytes of a buffer."""
        return self._there.show(slot, size)

    def show(self, slot: int, size: int) -> memoryview:
        """Return the first bytes of a buffer, to be written."""
        return self._there.show(slot, size).data

    @property
    def _there(self) -> Staging:
        assert self._staging is not None, "not open"
        return self._staging


def in_buffer(block_hash: BlockHash, slot: int, size: int) -> BlockEntry:
    """Return the record of a block in a buffer."""
    entry = BlockEntry.__new__(BlockEntry)  # what its constructor sets beyond these nobody reads
    entry.block_hash = entry.key = block_hash
    entry.slot = slot
    entry.size = size
    return entry


@dataclass(frozen=True, slots=True)
class Fetched:
    """Blocks that were read into buffers.

    Attributes:
        entries: One a block, in the order asked.
        more: What else the batch's header says.
        live: The session that they were fetched in.
    """

    entries: Sequence[BlockEntry]
    more: Mapping[str, Any]
    live: Live


async def fetch(
    room: Room,
    buffers: Buffers,
    out: Outgoing,
    block_hashes: Sequence[BlockHash],
    live: Live | None = None,
) -> Fetched:
    """Make a call whose answer is a batch, and read that into buffers.

    Raises:
        CapacityError: There are too few buffers.
        OffloadError: As the service says, or as the connection fails.
        SessionLostError: The session that it belongs to is lost.
    """
    slots = buffers.take(len(block_hashes))
    try:

        async def take(response: httpx.Response) -> BatchHeader:
            return await _read_batch(response, block_hashes, buffers, slots)

        header, found = await room.exchange(out, take, live)
    except BaseException:
        buffers.give_back(slots)
        raise
    entries = list(map(in_buffer, block_hashes, slots, header.sizes))
    return Fetched(entries, header.more, found)


async def _read_batch(
    response: httpx.Response,
    block_hashes: Sequence[BlockHash],
    buffers: Buffers,
    slots: Sequence[int],
) -> BatchHeader:
    """Read a batch into buffers, each chunk straight to where it belongs."""
    head = bytearray()
    header: BatchHeader | None = None
    views: list[memoryview] = []
    at = filled = 0
    began = 0.0
    async for chunk in chunks_of(response):
        data = memoryview(chunk)
        if header is None:
            head += chunk
            header = _header_in(head, block_hashes, buffers.block_bytes)
            if header is None:
                continue
            began = time.monotonic()
            views = list(map(buffers.show, slots, header.sizes))
            size = PREFIX.size + header_bytes(head[: PREFIX.size])
            data = memoryview(bytes(head[size:]))
        while data:
            while at < len(views) and filled == len(views[at]):
                at, filled = at + 1, 0
            if at == len(views):
                raise TierUnavailableError("the service sent more than it announced", tier=TIER)
            piece = data[: len(views[at]) - filled]
            views[at][filled : filled + len(piece)] = piece
            filled += len(piece)
            data = data[len(piece) :]
    if header is None or sum(map(len, views[at:])) > filled:
        raise TierUnavailableError("the service sent less than it announced", tier=TIER)
    buffers.meter.note(header.payload_bytes, time.monotonic() - began)
    return header


def _header_in(
    head: bytearray, block_hashes: Sequence[BlockHash], block_bytes: int
) -> BatchHeader | None:
    """Return what a batch says of its payloads; `None` while it has not come whole."""
    try:
        if len(head) < PREFIX.size:
            return None
        end = PREFIX.size + header_bytes(head[: PREFIX.size])
        if len(head) < end:
            return None
        header = parse_header(head[PREFIX.size : end])
    except WireError as exc:
        raise TierUnavailableError(f"the service sent no batch: {exc}", tier=TIER) from None
    if header.block_hashes != list(block_hashes) or max(header.sizes, default=0) > block_bytes:
        raise TierUnavailableError("the service sent other blocks than asked for", tier=TIER)
    return header
