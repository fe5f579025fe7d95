"""The two-phase form over a service: buffers on this side, slots and pins on that."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..blocks import BlockEntry
from ..errors import CapacityError, NotPinnedError
from ..events import EventKind, OffloadingEvent
from ..keys import show_hash
from ..service.wire import hashes_from_text, hashes_to_text
from ..twophase import SlotView
from ..types import BlockHash, Medium, PrepareStoreOutput
from ..views import Lent, take_back, warn_derived
from .buffers import Buffers, fetch, in_buffer
from .decoding import SessionLostError
from .http import BatchBody, Outgoing, read_json
from .lease import unavailable
from .live import Live
from .room import Room

log = logging.getLogger("kvoffload")


@dataclass(slots=True, eq=False)
class Reserved:
    """A block that is reserved in the service, with the buffer that its bytes are put in."""

    entry: BlockEntry
    live: Live
    lent: list[Lent] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Held:
    """The two-phase loads of one block, each with a buffer of its own."""

    live: Live
    entries: list[BlockEntry] = field(default_factory=list)
    lent: list[Lent] = field(default_factory=list)
    loads: int = 0


class RemoteSpec:
    """Where prepared blocks lie; see `kvoffload.types.LoadStoreSpec`.

    Slots, tiers and media are the service's; the views are buffers on this side.
    """

    def __init__(self, block_hashes: Sequence[BlockHash], entries: Sequence[SlotView]) -> None:
        self.block_hashes = tuple(block_hashes)
        self.entries = tuple(entries)

    def __repr__(self) -> str:
        return f"<RemoteSpec of {len(self.entries)} blocks>"


class RemoteTwoPhase:
    """Keeps what was prepared in a room until it is completed, expires, or its session is lost."""

    def __init__(self, room: Room, buffers: Buffers) -> None:
        self._room = room
        self._buffers = buffers
        self._reserved: dict[BlockHash, Reserved] = {}
        self._held: dict[BlockHash, Held] = {}
        self._why = ""
        room.on_loss.append(self._on_loss)
        room.on_event.append(self._on_event)

    # Stores

    async def prepare_store(
        self, block_hashes: Sequence[BlockHash], sizes: Sequence[int] | None
    ) -> PrepareStoreOutput | None:
        """Reserve slots in the service, and buffers here; `None` if there is no room in either."""
        once = list(dict.fromkeys(block_hashes))
        try:
            slots = self._buffers.take(len(once))
        except CapacityError:
            return None
        try:
            out = Outgoing(
                "POST",
                "/sessions/{session}/prepare_store",
                json={
                    "block_hashes": hashes_to_text(block_hashes),
                    "sizes": None if sizes is None else list(sizes),
                },
            )
            body, live = await self._room.exchange(out, read_json)
            if live.lost is not None:
                raise unavailable(SessionLostError(live.lost))
        except BaseException:
            self._buffers.give_back(slots)
            raise
        prepared = body["prepared"]
        to_store = [] if prepared is None else hashes_from_text(prepared["to_store"])
        self._buffers.give_back(slots[len(to_store) :])
        if prepared is None:
            return None
        size_of: Mapping[BlockHash, int] = {}
        if sizes is not None:
            size_of = dict(zip(reversed(block_hashes), reversed(sizes), strict=True))
        views: list[SlotView] = []
        for block_hash, slot, place in zip(to_store, slots, prepared["entries"], strict=False):
            size = size_of.get(block_hash, self._buffers.block_bytes)
            entry = in_buffer(block_hash, slot, size)
            self._reserved[block_hash] = Reserved(entry, live)
            views.append(self._view(entry, place, writable=True))
        evicted = tuple(hashes_from_text(prepared["evicted"]))
        return PrepareStoreOutput(tuple(to_store), RemoteSpec(to_store, views), evicted)

    async def complete_store(self, block_hashes: Sequence[BlockHash], *, success: bool) -> None:
        """Send the bytes of reserved blocks, or give the blocks up."""
        mine: list[Reserved] = []
        for block_hash in dict.fromkeys(block_hashes):
            reserved = self._reserved.pop(block_hash, None)
            if reserved is not None:
                mine.append(reserved)
        if not mine:
            return
        derived = [one for reserved in mine for one in take_back(reserved.lent)]
        entries = [reserved.entry for reserved in mine]
        hashes = [entry.block_hash for entry in entries]
        live = mine[0].live  # what belonged to another one was taken back with it
        is_published = False
        try:
            if success:
                data = [self._buffers.array(entry.slot, entry.size) for entry in entries]
                batch = BatchBody(hashes, data)
                del data
                out = Outgoing("POST", "/sessions/{session}/complete_store", batch=batch)
                await self._room.call(out, live)
                is_published = True
        except SessionLostError as exc:
            log.warning("%d reserved blocks ended with their session: %s", len(hashes), exc)
        finally:
            if not is_published:
                names = {"block_hashes": hashes_to_text(hashes)}
                out = Outgoing("POST", "/sessions/{session}/abandon_store", json=names)
                await self._room.give_back(live, out)
            self._buffers.give_back([entry.slot for entry in entries])
        warn_derived(derived, writable=success)

    # Loads

    async def prepare_load(self, block_hashes: Sequence[BlockHash]) -> RemoteSpec:
        """Pin blocks in the service, and read them into buffers."""
        if not block_hashes:
            return RemoteSpec((), ())
        out = Outgoing(
            "POST",
            "/sessions/{session}/prepare_load",
            json={"block_hashes": hashes_to_text(block_hashes)},
        )
        fetched = await fetch(self._room, self._buffers, out, block_hashes)
        live = fetched.live
        if live.lost is not None:
            self._buffers.give_back([entry.slot for entry in fetched.entries])
            raise unavailable(SessionLostError(live.lost))
        views: list[SlotView] = []
        for entry, place in zip(fetched.entries, fetched.more["entries"], strict=True):
            held = self._held.setdefault(entry.block_hash, Held(live))
            held.entries.append(entry)
            held.loads += 1
            views.append(self._view(entry, place, writable=False))
        return RemoteSpec(block_hashes, views)

    async def complete_load(self, block_hashes: Sequence[BlockHash]) -> None:
        """Unpin blocks; with the last load of a block its views end.

        Raises:
            NotPinnedError: Some are not held that often; then nothing was changed.
        """
        wanted: dict[BlockHash, int] = {}
        for block_hash in block_hashes:
            wanted[block_hash] = wanted.get(block_hash, 0) + 1
        for block_hash, count in wanted.items():
            held = self._held.get(block_hash)
            if held is None or held.loads < count:
                raise NotPinnedError(
                    f"complete_load of block {show_hash(block_hash)}, which no prepare_load holds"
                    + (" that often" if held is not None else f" (any more){self._why}")
                )
        if not wanted:
            return
        live = self._held[block_hashes[0]].live
        names = {"block_hashes": hashes_to_text(block_hashes)}
        out = Outgoing("POST", "/sessions/{session}/complete_load", json=names)
        for block_hash, count in wanted.items():
            self._held[block_hash].loads -= count  # nobody else may count on these
        try:
            await self._room.see_through(lambda: self._room.call(out, live))
        except SessionLostError as exc:
            raise NotPinnedError(f"the pins ended with their session: {exc}") from exc
        except NotPinnedError:  # the time of one was up, and the service has changed nothing
            if len(wanted) > 1:
                self._count_again(wanted, live)
            raise
        finally:
            derived = self._release()
        warn_derived(derived)

    # Views

    def is_prepared(self, entry: BlockEntry, *, writable: bool) -> bool:
        """Tell whether a block is still prepared for a store, or for a load."""
        return self._lent_to(entry, writable=writable) is not None

    def _lent_to(self, entry: BlockEntry, *, writable: bool) -> list[Lent] | None:
        if writable:
            reserved = self._reserved.get(entry.block_hash)
            return None if reserved is None or reserved.entry is not entry else reserved.lent
        held = self._held.get(entry.block_hash)
        return None if held is None or entry not in held.entries else held.lent

    def lend(self, entry: BlockEntry, *, writable: bool) -> memoryview:
        """Make a view of a prepared block.

        Raises:
            NotPinnedError: It is not prepared any more.
        """
        lent_to = self._lent_to(entry, writable=writable)
        if lent_to is None:
            raise NotPinnedError(
                f"block {show_hash(entry.block_hash)} was completed, or taken back from its "
                f"holder: prepare it again{self._why}"
            )
        lent = self._buffers.lend(entry, writable=writable)
        lent_to.append(lent)
        return lent[0]

    # Inside

    def _view(self, entry: BlockEntry, place: Mapping[str, Any], *, writable: bool) -> SlotView:
        medium = Medium(place["medium"])
        return SlotView(entry, place["tier"], medium, self, writable=writable, slot=place["slot"])

    def _count_again(self, wanted: Mapping[BlockHash, int], live: Live) -> None:
        for block_hash, count in wanted.items():
            held = self._held.get(block_hash)
            if held is not None and held.live is live:
                held.loads += count

    def _release(self) -> list[BlockHash]:
        """Let go of blocks whose last load was completed; return what something outlived."""
        derived: list[BlockHash] = []
        for block_hash in [each for each, held in self._held.items() if held.loads <= 0]:
            held = self._held.pop(block_hash)
            derived += take_back(held.lent)
            self._buffers.give_back([entry.slot for entry in held.entries])
        return derived

    def _on_event(self, event: OffloadingEvent) -> None:
        """Take back the buffers of reservations that the service took back."""
        if event.kind is EventKind.EXPIRED:
            for block_hash in event.block_hashes:
                self._drop(block_hash)

    def _on_loss(self, live: Live) -> None:
        """Take back what ended with a session."""
        self._why = f" (its session was lost: {live.lost})"
        for block_hash in list(self._reserved):
            self._drop(block_hash)
        for held in self._held.values():
            held.loads = 0
        self._release()

    def _drop(self, block_hash: BlockHash) -> None:
        reserved = self._reserved.pop(block_hash, None)
        if reserved is not None:
            take_back(reserved.lent)
            self._buffers.give_back([reserved.entry.slot])
