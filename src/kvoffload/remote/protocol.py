"""The seam to engines that all machines share: blocks by key, and no slot."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ..types import Medium

if TYPE_CHECKING:
    from ..errors import TierError


class RemoteOutcome(Enum):
    """What became of one block of a call to a `RemoteTier`."""

    DONE = "done"
    """Read, or written."""
    PRESENT = "present"
    """Not written, for it was there."""
    ABSENT = "absent"
    """Not read, for it is not there."""


@runtime_checkable
class RemoteTier(Protocol):
    """Blocks by canonical key (see `kvoffload.keys`) on an engine that several managers share.

    The engine evicts as it likes, and others delete: a block that `find` saw may be gone for `get`,
    and that is no error. What `get` returns is what some `put` was given for this very key, format
    and layout, or it is not returned: a value that does not check is deleted, and is a
    `CorruptBlockError` for the one that found it.

    Errors that concern one block are outcomes. What concerns the engine is raised, or is the
    outcome of each block that it kept from its end: `TierUnavailableError` where it does not
    answer.

    There are no deadlines here: a caller sets them, by cancelling. A call that ended, in whatever
    way, looks at no buffer of its caller's any more, neither to read nor to write.

    A third party's remote tier is checked by subclassing
    `kvoffload.testing.RemoteTierContract`.
    """

    @property
    def name(self) -> str:
        """Unique among the tiers of one manager; appears in stats, events and errors."""

    @property
    def medium(self) -> Medium:
        """Kind of place."""

    async def open(self) -> None:
        """Get ready to be called; it need not connect yet.

        Raises:
            ConfigError: It can't be used as it was set up.
            TierUnavailableError: The engine does not answer; later calls may find it well.
        """

    async def close(self) -> None:
        """Release everything, whatever is under way; idempotent. Blocks stay."""

    async def check(self) -> None:
        """Make sure that the engine serves, all of it.

        Raises:
            TierError: It does not.
        """

    async def find(self, keys: Sequence[bytes]) -> list[int | None]:
        """Return the payload bytes of each block, `None` where it is not there; one round trip.

        Where asking for all would be dear and those at the beginning are not there, the answer may
        be for the first ones alone, one at least: of the rest it says nothing.
        """

    async def get(
        self, keys: Sequence[bytes], into: Sequence[memoryview]
    ) -> list[RemoteOutcome | TierError]:
        """Fill each buffer, which has the payload's exact size, with the block's bytes.

        Returns one outcome a block: `DONE`, `ABSENT` (a payload of another size is none either),
        or the error that concerns it. Where it is not `DONE`, the buffer may have been written to.
        """

    async def put(
        self, keys: Sequence[bytes], payloads: Sequence[memoryview]
    ) -> list[RemoteOutcome | TierError]:
        """Write blocks that are not there yet; those that are, are not sent.

        Returns one outcome a block: `DONE`, `PRESENT`, or the error that concerns it. A block is
        there as a whole or not at all.
        """

    async def delete(self, keys: Sequence[bytes]) -> list[bool]:
        """Delete blocks; say of each whether it was there."""

    def clear(self, namespace: str) -> AsyncIterator[int]:
        """Delete all blocks of a namespace that have this tier's format and layout.

        What others have in the engine stays. Yields after each round trip or two how many they
        were, for there may be any number: so a caller sets a deadline for each of its steps.
        """
