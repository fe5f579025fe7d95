"""A tier in the machine's memory: one arena, numbered slots, views without a copy."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from ..aligned import aligned_empty
from ..copying import copy
from ..errors import ClosedError, ConfigError, TierError
from ..types import ByteArray, Medium, StoredBlock
from .geometry import check_geometry


class MemoryTier:
    """Slots of one contiguous arena.

    Opening allocates and touches the arena on a thread; from then on nothing here waits but the
    copies of `read` and `write` beyond 256 KiB, which run on a thread too.

    Args:
        num_blocks: Slots.
        block_bytes: Bytes of a slot.
        medium: What kind of memory it stands for.
        name: Name in stats, events and errors.

    Raises:
        ConfigError: `num_blocks` or `block_bytes` is no positive integer.
    """

    addressable = True
    persistent = False

    def __init__(
        self,
        num_blocks: int,
        block_bytes: int,
        *,
        medium: Medium = Medium.CPU,
        name: str = "hot",
    ) -> None:
        check_geometry(num_blocks, block_bytes, name)
        if not isinstance(medium, Medium):
            raise ConfigError(f"medium must be a Medium, not {medium!r}")
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.medium = medium
        self.name = name
        self._arena: ByteArray | None = None

    def __repr__(self) -> str:
        state = "open" if self._arena is not None else "closed"
        return f"<MemoryTier {self.name!r} {self.num_blocks} x {self.block_bytes} bytes, {state}>"

    async def open(self) -> Sequence[StoredBlock]:
        """Allocate the arena; memory keeps nothing, so nothing is found.

        Raises:
            ConfigError: There is not enough memory.
        """
        if self._arena is None:
            size = self.num_blocks * self.block_bytes
            try:
                self._arena = await asyncio.to_thread(_touched, size)
            except MemoryError as exc:
                raise ConfigError(
                    f"tier {self.name!r}: this machine has no {size} bytes of memory for "
                    f"{self.num_blocks} blocks of {self.block_bytes}: ask for fewer"
                ) from exc
        return ()

    async def close(self, order: Sequence[int] = ()) -> None:
        """Let go of the arena; it lives on as long as a view does."""
        self._arena = None

    @property
    def arena(self) -> ByteArray:
        """All slots, one behind the other, to be registered with a device for direct copies.

        Slot `n` begins at byte `n * block_bytes`; leased views and those of `prepare_store` lie in
        it. There while the tier is open; take the registration back before the manager closes.
        What is written to it beside the manager is wrong bytes.

        Raises:
            ClosedError: The tier is not open.
        """
        return self.view(0, self.num_blocks * self.block_bytes)

    def view(self, slot: int, size: int) -> ByteArray:
        """Return a fresh writable array over the first `size` bytes of a slot."""
        arena = self._arena
        if arena is None:
            raise ClosedError(f"tier {self.name!r} is not open")
        start = slot * self.block_bytes
        return arena[start : start + size]

    async def read(
        self, slots: Sequence[int], into: Sequence[memoryview]
    ) -> list[TierError | None]:
        """Copy slots out."""
        sources = [self.view(slot, len(buffer)) for slot, buffer in zip(slots, into, strict=True)]
        await copy([np.frombuffer(buffer, np.uint8) for buffer in into], sources)
        return [None] * len(slots)

    async def write(
        self, slots: Sequence[int], payloads: Sequence[memoryview], keys: Sequence[bytes]
    ) -> list[TierError | None]:
        """Copy payloads in."""
        targets = [self.view(slot, len(data)) for slot, data in zip(slots, payloads, strict=True)]
        await copy(targets, [np.frombuffer(data, np.uint8) for data in payloads])
        return [None] * len(slots)

    async def erase(self, slots: Sequence[int]) -> None:
        """Do nothing: what is free is never shown, and nothing survives the process."""
        self.view(0, 0)

    async def flush(self) -> None:
        """Do nothing: memory is not durable."""
        self.view(0, 0)


def _touched(size: int) -> ByteArray:
    arena = aligned_empty(size)
    arena[::4096] = 0  # one byte a page: later copies find the memory there
    return arena
