"""The blocks that a call names and need not store: they are not to give way to its own."""

from __future__ import annotations

from collections.abc import Sequence

from .blocks import BlockEntry
from .index import Index
from .retention import Retention
from .types import Key


class Named:
    """Pins those blocks of a call that are ready, now and as they become it, until it ends.

    Attributes:
        chain: The whole chain that the call is about, where that is known.
        retention: What the caller says of it.
    """

    __slots__ = ("_held", "_index", "_keys", "_released", "chain", "retention")

    def __init__(
        self,
        index: Index,
        keys: Sequence[Key],
        chain: Sequence[Key] = (),
        retention: Retention | None = None,
    ) -> None:
        self.chain = chain
        self.retention = retention
        self._index = index
        self._keys = keys
        self._held: dict[Key, BlockEntry] = {}
        self._released = False

    def __len__(self) -> int:
        return len(self._held)

    def hold(self) -> None:
        """Pin what became ready since; nothing any more once the call ended."""
        if self._keys and not self._released:
            ready = self._index.ready
            fresh = {
                key: ready[key] for key in self._keys if key in ready and key not in self._held
            }
            self._index.begin_transfer(fresh.values())
            self._held |= fresh

    def release(self) -> None:
        """Take the pins back; the call ended."""
        self._released = True
        if self._held:
            self._index.end_transfer(self._held.values())
            self._held = {}
