"""What a client knows of its namespace without asking: told by its session's stream."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from ..events import EventHub, EventKind, OffloadingEvent
from ..metrics import ManagerStats
from ..service.wire import hash_from_text
from ..types import BlockHash, BlockLocation, BlockState
from .decoding import event_from_json, location_from_json, stats_from_json

MOST_PLACES = 65536
"""Blocks whose place is kept; the ones that were named longest ago go first."""

ABSENT = BlockLocation(BlockState.ABSENT)


class Mirror:
    """Places, counters and events, as the lines of a session's stream tell them.

    Attributes:
        namespace: The namespace whose blocks it knows.
        events: Passes events on to who subscribed.
    """

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.events = EventHub(namespace)
        self._places: OrderedDict[BlockHash, BlockLocation] = OrderedDict()
        self._body: Mapping[str, Any] | None = None
        self._stats = ManagerStats()

    @property
    def stats(self) -> ManagerStats:
        """The counters that were told last."""
        if self._body is not None:  # made here, for most are never looked at
            self._stats = stats_from_json(self._body)
            self._body = None
        return self._stats

    def locate(self, block_hashes: Sequence[BlockHash]) -> list[BlockLocation]:
        """Return where blocks are; those that are not known are absent."""
        places = self._places
        return [places.get(block_hash, ABSENT) for block_hash in block_hashes]

    def begin(self) -> None:
        """Start over: a session tells only what happens from its beginning."""
        self._places.clear()

    def renew_events(self) -> None:
        """End the subscriptions there are; later ones are told what happens from then on."""
        ended, self.events = self.events, EventHub(self.namespace)
        ended.close()

    def take(self, line: Mapping[str, Any]) -> OffloadingEvent | None:
        """Take a line in; return its event, if it is one of this namespace."""
        if "event" in line:
            event = event_from_json(line["event"])
            mine = event.namespace == self.namespace
            if mine:
                self._note(event)
            self.events.pass_on(event)
            return event if mine else None
        if "stats" in line:
            self._body = line["stats"]
        elif "locations" in line:
            for text, state, tier in line["locations"]:
                block_hash = hash_from_text(text)
                self._places[block_hash] = location_from_json(state, tier)
                self._places.move_to_end(block_hash)
            while len(self._places) > MOST_PLACES:
                self._places.popitem(last=False)
        return None

    def _note(self, event: OffloadingEvent) -> None:
        """Move those of an event's blocks that are known."""
        for block_hash in event.block_hashes:
            place = self._places.get(block_hash)
            if place is None:
                continue
            match event.kind:
                case EventKind.STORED | EventKind.PROMOTED | EventKind.DEMOTED:
                    place = BlockLocation(BlockState.READY, event.tier)
                case EventKind.REMOVED:
                    place = ABSENT
                case EventKind.EXPIRED if place.state is BlockState.PENDING:
                    place = ABSENT  # a reservation; where it was a pin, the block stays
                case _:
                    continue
            self._places[block_hash] = place
