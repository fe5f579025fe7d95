"""What becomes of a store, and one whose bytes come straight into their slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .blocks import BlockEntry
from .named import Named
from .types import Key, RejectReason

if TYPE_CHECKING:
    from .core import Core
    from .movement.storing import Stored


@dataclass(slots=True)
class Outcome:
    """What became of the blocks of one store, by key."""

    stored: list[Key] = field(default_factory=list)
    present: list[Key] = field(default_factory=list)
    rejected: dict[Key, RejectReason] = field(default_factory=dict)
    evicted: list[Key] = field(default_factory=list)
    waited_s: float = 0.0

    @classmethod
    def of(cls, present: list[Key], new: Sequence[Key], stored: Stored) -> Outcome:
        """Return it, of blocks that were there and new ones."""
        taken = {entry.key for entry in stored.stored}
        return cls(
            stored=[key for key in new if key in taken],
            present=present,
            rejected=stored.rejected,
            # One may leave, be stored by another call, and leave again.
            evicted=list(dict.fromkeys(stored.evicted)),
            waited_s=stored.waited_s,
        )


class OpenStore:
    """Blocks whose bytes come straight into their slots.

    Attributes:
        views: Where the bytes of each block of the call go, in order.
    """

    def __init__(
        self,
        core: Core,
        named: Named,
        entries: Sequence[BlockEntry],
        views: list[memoryview],
        present: list[Key],
    ) -> None:
        self.views = views
        self._core = core
        self._named = named
        self._entries = entries
        self._present = present

    def abort(self) -> None:
        """Give the blocks up."""
        self._close()
        self._core.index.abort(self._entries)
        self._named.release()

    async def commit(self) -> Outcome:
        """Publish the blocks, whose bytes have come."""
        self._close()
        core = self._core
        evicted: list[Key] = []
        try:
            core.storing.commit_open(self._entries)
            if core.options.writes_through:
                self._named.hold()
                await core.durability.write_through(self._entries, evicted)
        except BaseException:
            self._named.release()
            core.removal.drop_soon([entry.key for entry in self._entries])
            raise
        finally:
            self._named.release()
        return Outcome(
            stored=[entry.key for entry in self._entries],
            present=self._present,
            evicted=list(dict.fromkeys(evicted)),
        )

    def _close(self) -> None:
        for view in self.views:
            view.release()
        self.views = []
