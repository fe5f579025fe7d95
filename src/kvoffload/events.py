"""What happens inside a manager, told to any number of subscribers."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum

import anyio

from .types import BlockHash, Key, Medium

QUEUE_EVENTS = 4096
"""Events that a subscription holds for a slow reader before it misses some."""


class EventKind(Enum):
    """What happened to the blocks of an event."""

    STORED = "stored"
    """Became ready for the first time."""
    REMOVED = "removed"
    """Left every tier: evicted, explicitly or to make room."""
    PROMOTED = "promoted"
    """Moved up, to the event's tier."""
    DEMOTED = "demoted"
    """Moved down, to the event's tier."""
    EXPIRED = "expired"
    """A reservation or a pin whose holder never completed it was taken back."""
    FAILED = "failed"
    """The tier could not read or write them, or what it read did not check."""
    STATE = "state"
    """The tier can do less than before, or more; `detail` is its `TierState`. Of no block."""


@dataclass(frozen=True, slots=True)
class OffloadingEvent:
    """One thing that happened to some blocks of one namespace.

    Attributes:
        kind: What happened.
        block_hashes: The blocks.
        tier: Name of the tier concerned.
        medium: Its kind.
        namespace: The blocks' namespace.
        sequence: Number of the event in its subscription, 0, 1, 2, ...; a gap means that events
            were missed.
        missed: Events that this subscription lost just before this one.
        detail: Text for people, for instance of the error.
    """

    kind: EventKind
    block_hashes: tuple[BlockHash, ...]
    tier: str
    medium: Medium
    namespace: str = ""
    sequence: int = 0
    missed: int = 0
    detail: str = ""


class Subscription:
    """Asynchronous iterator over the events since it was made; ends when the manager closes.

    A reader that falls more than `QUEUE_EVENTS` behind misses the oldest ones: the next event it
    gets says how many, and its `sequence` jumps by as many. Dropping the iterator unsubscribes.
    Cancelling a wait loses nothing.
    """

    def __init__(self, namespace: str | None) -> None:
        self._namespace = namespace
        self._queue: deque[OffloadingEvent] = deque()
        self._next_sequence = 0
        self._missed = 0
        self._closed = False
        self._wake = anyio.Event()
        self.on_put: Callable[[], None] | None = None
        """Is called when there is an event to take, and when there will be none any more."""

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> OffloadingEvent:
        if not await self.wait():
            raise StopAsyncIteration
        return self._take_one()

    @property
    def is_over(self) -> bool:
        """Whether the manager has closed and every event was taken."""
        return self._closed and not self._queue

    async def wait(self) -> bool:
        """Wait for an event to take; `False` if there will be none any more."""
        while not self._queue:
            if self._closed:
                return False
            if self._wake.is_set():
                self._wake = anyio.Event()
            await self._wake.wait()
        return True

    def take(self) -> list[OffloadingEvent]:
        """Return the events that are there, without waiting."""
        return [self._take_one() for _ in range(len(self._queue))]

    def _take_one(self) -> OffloadingEvent:
        event = self._queue.popleft()
        if self._missed:
            event = replace(event, missed=event.missed + self._missed)
            self._missed = 0
        return event

    def wants(self, namespace: str) -> bool:
        """Whether events of this namespace belong to the subscription."""
        return self._namespace is None or self._namespace == namespace

    def put(self, event: OffloadingEvent) -> None:
        """Number and queue an event; drops the oldest when the reader is too far behind.

        One from another subscription that missed some before it is numbered so that it shows.
        """
        if len(self._queue) == QUEUE_EVENTS:
            self._missed += 1 + self._queue.popleft().missed
        self._next_sequence += event.missed
        self._queue.append(replace(event, sequence=self._next_sequence))
        self._next_sequence += 1
        self._tell()

    def close(self) -> None:
        """End the iteration once the queue is read."""
        self._closed = True
        self._tell()

    def _tell(self) -> None:
        self._wake.set()
        if self.on_put is not None:
            self.on_put()


class EventHub:
    """Passes events on to the subscriptions that are alive; free of cost while there are none."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._subscriptions: weakref.WeakSet[Subscription] = weakref.WeakSet()
        self._closed = False

    def subscribe(self, namespace: str | None = None) -> Subscription:
        """Start a subscription to one namespace, or to all."""
        subscription = Subscription(namespace)
        if self._closed:
            subscription.close()
        self._subscriptions.add(subscription)
        return subscription

    def tell_state(self, state: str, *, tier: str, medium: Medium) -> None:
        """Tell subscribers to the manager's own namespace what a tier can do from now on."""
        event = OffloadingEvent(EventKind.STATE, (), tier, medium, self._namespace, detail=state)
        for subscription in list(self._subscriptions):
            if subscription.wants(self._namespace):
                subscription.put(event)

    def emit(
        self, kind: EventKind, keys: Iterable[Key], *, tier: str, medium: Medium, detail: str = ""
    ) -> None:
        """Tell what happened to these blocks, one event for each namespace among them."""
        if not self._subscriptions:
            return
        by_namespace: dict[str, list[BlockHash]] = {}
        for key in keys:
            namespace, block_hash = key if isinstance(key, tuple) else (self._namespace, key)
            by_namespace.setdefault(namespace, []).append(block_hash)
        for namespace, hashes in by_namespace.items():
            event = OffloadingEvent(kind, tuple(hashes), tier, medium, namespace, detail=detail)
            for subscription in tuple(self._subscriptions):
                if subscription.wants(namespace):
                    subscription.put(event)

    def pass_on(self, event: OffloadingEvent) -> None:
        """Give an event that happened elsewhere to every subscription."""
        for subscription in tuple(self._subscriptions):
            subscription.put(event)

    def close(self) -> None:
        """End every subscription."""
        self._closed = True
        for subscription in tuple(self._subscriptions):
            subscription.close()
