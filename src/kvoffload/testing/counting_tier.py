"""A real tier that keeps a record of what was asked of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..errors import TierError
from ..keys import decode_key
from ..types import BlockHash, ByteArray, StoredBlock, Tier
from .faults import Operation

CountedOperation: TypeAlias = Operation | Literal["view"]


@dataclass(frozen=True, slots=True)
class TierCall:
    """One call of a tier, noted as it began.

    Attributes:
        operation: The operation.
        slots: The slots it named.
        sizes: Bytes of each payload, for `read`, `write` and `view`.
        block_hashes: The block of each slot, for `write`.
    """

    operation: CountedOperation
    slots: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    block_hashes: tuple[BlockHash, ...] = ()


class CountingTier:
    """A real tier that counts its calls; for "one read for a thousand callers", for instance.

    Composes with `FaultyTier`, around it or inside it.

    Args:
        inner: The tier that does the work.

    Attributes:
        log: Every call, in the order they began.
        calls: How many, by operation.
        blocks: Slots that they named, by operation.
        bytes: Payload bytes that they moved (or showed, for `view`), by operation.
    """

    def __init__(self, inner: Tier) -> None:
        self.inner = inner
        self.name = inner.name
        self.medium = inner.medium
        self.num_blocks = inner.num_blocks
        self.block_bytes = inner.block_bytes
        self.addressable = inner.addressable
        self.persistent = inner.persistent
        self.log: list[TierCall] = []
        self.calls: Counter[CountedOperation] = Counter()
        self.blocks: Counter[CountedOperation] = Counter()
        self.bytes: Counter[CountedOperation] = Counter()

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {count}" for name, count in self.calls.items())
        return f"<CountingTier around {self.inner!r}: {counts or 'no calls'}>"

    def reset(self) -> None:
        """Forget what was counted, for instance after a test's preparations."""
        self.log.clear()
        for counter in (self.calls, self.blocks, self.bytes):
            counter.clear()

    async def open(self) -> Sequence[StoredBlock]:
        """Open the inner tier."""
        self._note(TierCall("open"))
        return await self.inner.open()

    async def close(self, order: Sequence[int] = ()) -> None:
        """Close the inner tier."""
        self._note(TierCall("close", tuple(order)))
        await self.inner.close(order)

    def view(self, slot: int, size: int) -> ByteArray:
        """Return the inner tier's view."""
        self._note(TierCall("view", (slot,), (size,)))
        return self.inner.view(slot, size)

    async def read(
        self, slots: Sequence[int], into: Sequence[memoryview]
    ) -> list[TierError | None]:
        """Read from the inner tier."""
        self._note(TierCall("read", tuple(slots), tuple(buffer.nbytes for buffer in into)))
        return await self.inner.read(slots, into)

    async def write(
        self, slots: Sequence[int], payloads: Sequence[memoryview], keys: Sequence[bytes]
    ) -> list[TierError | None]:
        """Write to the inner tier."""
        self._note(
            TierCall(
                "write",
                tuple(slots),
                tuple(payload.nbytes for payload in payloads),
                tuple(decode_key(key)[1] for key in keys),
            )
        )
        return await self.inner.write(slots, payloads, keys)

    async def erase(self, slots: Sequence[int]) -> None:
        """Erase in the inner tier."""
        self._note(TierCall("erase", tuple(slots)))
        await self.inner.erase(slots)

    async def flush(self) -> None:
        """Flush the inner tier."""
        self._note(TierCall("flush"))
        await self.inner.flush()

    def _note(self, call: TierCall) -> None:
        self.log.append(call)
        self.calls[call.operation] += 1
        self.blocks[call.operation] += len(call.slots)
        self.bytes[call.operation] += sum(call.sizes)
