"""A real tier that fails, hangs, dawdles or damages its bytes when a test says so."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, TypeVar

from anyio.lowlevel import checkpoint

from ..errors import ConfigError, CorruptBlockError, TierError
from ..keys import decode_key
from ..types import BlockHash, ByteArray, StoredBlock, Tier
from .clock import ManualClock
from .faults import CutShort, Delay, Failure, Fault, FlippedByte, Hang, Operation

FaultT = TypeVar("FaultT", bound=Fault)


class FaultyTier:
    """A real tier whose calls fail, hang, take long or damage their bytes when a test says so.

    Each fault concerns one operation, and stays until it struck `times` calls (`None`: every call)
    or is stopped; `after` lets that many calls pass first, and `slots` chooses among the slots of
    a batch. Several faults of one operation add up::

        tier = FaultyTier(MemoryTier(8, 64))
        tier.fail("write", OSError(errno.ENOSPC, "disk full"), times=2)
        with tier.hang("read") as hang:
            ...                        # start a load
            await hang.entered.wait()  # it is inside the tier now
            hang.release()

    Every call gives way to the event loop before and after the inner one, so a cancellation can
    hit it in both places.

    Args:
        inner: The tier that does the work.
        addressable: Keep the inner tier's `view`, so that a manager needs no read and write. Off,
            every byte passes through `read` and `write`, and can meet a fault.
    """

    def __init__(self, inner: Tier, *, addressable: bool = False) -> None:
        if addressable and not inner.addressable:
            raise ConfigError(f"{inner!r} is not addressable, and a wrapper can't make it so")
        self.inner = inner
        self.name = inner.name
        self.medium = inner.medium
        self.num_blocks = inner.num_blocks
        self.block_bytes = inner.block_bytes
        self.addressable = addressable
        self.persistent = inner.persistent
        self._faults: list[Fault] = []
        self._hashes: dict[int, BlockHash] = {}
        self._damaged: set[int] = set()

    def __repr__(self) -> str:
        return f"<FaultyTier around {self.inner!r}>"

    # Faults

    def fail(
        self,
        operation: Operation,
        error: Exception | type[TierError] = TierError,
        *,
        times: int | None = 1,
        after: int = 0,
        slots: Collection[int] | None = None,
    ) -> Failure:
        """Make calls fail.

        Args:
            operation: `read` and `write` report the error for the slots concerned, and do the
                others; the rest raise it. A failing `close` has closed the inner tier before.
            error: An `OSError` is reported as real tiers do, as the cause of a `TierError`. A
                `TierError`, or a class of them, is reported as it is. Any other exception is
                raised from the call, as a bug in a tier would be.
            times: Calls that fail; `None` for all of them.
            after: Calls to let pass first.
            slots: Slots that fail; `None` for all of them.
        """
        return self._add(Failure(operation, error, times=times, after=after, slots=slots))

    def hang(
        self,
        operation: Operation,
        *,
        times: int | None = None,
        after: int = 0,
        slots: Collection[int] | None = None,
        stubborn: bool = False,
    ) -> Hang:
        """Make calls wait until the hang is released, or left as a context manager.

        Args:
            operation: The operation.
            times: Calls that hang; `None` for all that begin before the release.
            after: Calls to let pass first.
            slots: Hang only where one of these slots is concerned.
            stubborn: Don't let a cancellation through before the release either, as a thread that
                is stuck in the kernel doesn't.
        """
        return self._add(Hang(operation, times=times, after=after, slots=slots, stubborn=stubborn))

    def delay(
        self,
        operation: Operation,
        seconds: float,
        *,
        clock: ManualClock,
        times: int | None = None,
        after: int = 0,
        slots: Collection[int] | None = None,
    ) -> Delay:
        """Make calls take `seconds` of the clock longer."""
        return self._add(Delay(operation, seconds, clock, times=times, after=after, slots=slots))

    def cut_short(
        self,
        operation: Literal["read", "write"],
        *,
        keep_bytes: int = 0,
        times: int | None = 1,
        after: int = 0,
        slots: Collection[int] | None = None,
    ) -> CutShort:
        """Make calls move only the first `keep_bytes` bytes of each payload.

        A read reports `CorruptBlockError`, with zeros in the rest of its buffer. A write reports
        `TierError`, and what was in the slot is lost.
        """
        return self._add(CutShort(operation, keep_bytes, times=times, after=after, slots=slots))

    def flip_byte(
        self,
        operation: Literal["read", "write"],
        *,
        offset: int = 0,
        silent: bool = False,
        times: int | None = 1,
        after: int = 0,
        slots: Collection[int] | None = None,
    ) -> FlippedByte:
        """Make calls get the byte at `offset` of each payload wrong.

        A read fills its buffer with the damaged payload and reports `CorruptBlockError`. A write
        reports success, and every read of the slot finds the damage until the next write.

        Args:
            operation: The operation.
            offset: Which byte, modulo the payload's length.
            silent: Report nothing at all, like a tier without checksums.
            times: Calls that are damaged; `None` for all of them.
            after: Calls to let pass first.
            slots: Slots that are damaged; `None` for all of them.
        """
        return self._add(
            FlippedByte(operation, offset, silent=silent, times=times, after=after, slots=slots)
        )

    def heal(self) -> None:
        """Stop every fault and release every hang; damage that was written stays."""
        for fault in self._faults:
            fault.stop()
        self._faults.clear()

    # The tier

    async def open(self) -> Sequence[StoredBlock]:
        """Open the inner tier."""
        struck = await self._begin("open")
        self._raise_failures(struck)
        found = await self.inner.open()
        for block in found:
            self._hashes[block.slot] = decode_key(block.key)[1]
        await checkpoint()
        return found

    async def close(self, order: Sequence[int] = ()) -> None:
        """Close the inner tier; a failure is raised afterwards."""
        struck = await self._begin("close")
        await self.inner.close(order)
        self._raise_failures(struck)

    def view(self, slot: int, size: int) -> ByteArray:
        """Return the inner tier's view."""
        return self.inner.view(slot, size)

    async def read(
        self, slots: Sequence[int], into: Sequence[memoryview]
    ) -> list[TierError | None]:
        """Read what no fault keeps from it."""
        struck = await self._begin("read", slots)
        outcomes = self._failures(struck, slots)
        todo = [at for at, outcome in enumerate(outcomes) if outcome is None]
        if todo:
            got = await self.inner.read([slots[at] for at in todo], [into[at] for at in todo])
            for at, outcome in zip(todo, got, strict=True):
                # Damage first: what an inner tier says of a payload cut short is its own affair.
                outcomes[at] = self._damage_read(struck, slots[at], into[at]) or outcome
        await checkpoint()
        return outcomes

    async def write(
        self, slots: Sequence[int], payloads: Sequence[memoryview], keys: Sequence[bytes]
    ) -> list[TierError | None]:
        """Write what no fault keeps from it."""
        struck = await self._begin("write", slots)
        for slot, key in zip(slots, keys, strict=True):
            self._hashes[slot] = decode_key(key)[1]
        outcomes = self._failures(struck, slots)
        todo = [at for at, outcome in enumerate(outcomes) if outcome is None]
        if todo:
            damaged = [self._damage_write(struck, slots[at], payloads[at]) for at in todo]
            got = await self.inner.write(
                [slots[at] for at in todo],
                [payload for payload, _ in damaged],
                [keys[at] for at in todo],
            )
            for at, outcome, (_, damage) in zip(todo, got, damaged, strict=True):
                outcomes[at] = outcome or damage
        await checkpoint()
        return outcomes

    async def erase(self, slots: Sequence[int]) -> None:
        """Erase what no fault keeps from it, then raise."""
        struck = await self._begin("erase", slots)
        failing = [fault for fault in struck if isinstance(fault, Failure)]
        spared = [slot for slot in slots if not any(fault.concerns(slot) for fault in failing)]
        if spared:
            await self.inner.erase(spared)
            self._damaged.difference_update(spared)
        self._raise_failures(struck)
        await checkpoint()

    async def flush(self) -> None:
        """Flush the inner tier."""
        struck = await self._begin("flush")
        self._raise_failures(struck)
        await self.inner.flush()
        await checkpoint()

    # Inside

    def _add(self, fault: FaultT) -> FaultT:
        self._faults.append(fault)
        return fault

    async def _begin(self, operation: Operation, slots: Sequence[int] = ()) -> list[Fault]:
        """Let what strikes this call hold it up."""
        await checkpoint()
        struck = [fault for fault in self._faults if fault.strikes(operation, slots)]
        for fault in struck:
            await fault.wait()
        return struck

    def _failures(self, struck: list[Fault], slots: Sequence[int]) -> list[TierError | None]:
        outcomes: list[TierError | None] = [None] * len(slots)
        for fault in struck:
            if isinstance(fault, Failure):
                for at, slot in enumerate(slots):
                    if fault.concerns(slot) and outcomes[at] is None:
                        outcomes[at] = fault.outcome(self.name, self._hashes.get(slot))
        return outcomes

    def _raise_failures(self, struck: list[Fault]) -> None:
        for fault in struck:
            if isinstance(fault, Failure):
                raise fault.outcome(self.name)

    def _damage_read(self, struck: list[Fault], slot: int, buffer: memoryview) -> TierError | None:
        damaged = slot in self._damaged
        for fault in struck:
            if not fault.concerns(slot):
                continue
            if isinstance(fault, CutShort):
                buffer[fault.keep_bytes :] = bytes(len(buffer[fault.keep_bytes :]))
                damaged = True
            elif isinstance(fault, FlippedByte):
                fault.flip(buffer)
                damaged = damaged or not fault.silent
        if not damaged:
            return None
        return CorruptBlockError(
            f"slot {slot} does not check", tier=self.name, block_hash=self._hashes.get(slot)
        )

    def _damage_write(
        self, struck: list[Fault], slot: int, payload: memoryview
    ) -> tuple[memoryview, TierError | None]:
        self._damaged.discard(slot)
        outcome: TierError | None = None
        for fault in struck:
            if not fault.concerns(slot):
                continue
            if isinstance(fault, CutShort):
                outcome = TierError(
                    f"only {fault.keep_bytes} of {len(payload)} bytes written to slot {slot}",
                    tier=self.name,
                    block_hash=self._hashes.get(slot),
                )
                payload = payload[: fault.keep_bytes]
                self._damaged.add(slot)
            elif isinstance(fault, FlippedByte):
                payload = memoryview(bytearray(payload))
                fault.flip(payload)
                if not fault.silent:
                    self._damaged.add(slot)
        return payload, outcome
