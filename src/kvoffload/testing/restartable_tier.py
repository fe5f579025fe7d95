"""A persistent tier without a disk, for stories of restarts and crashes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anyio.lowlevel import checkpoint

from ..errors import ClosedError, ConfigError, CorruptBlockError, TierError, TierLockedError
from ..types import ByteArray, Medium, StoredBlock


@dataclass(frozen=True, slots=True)
class _Record:
    key: bytes
    payload: bytes


class RestartableTier:
    """Blocks that survive `close` in one process: hand the same object to the next manager.

    It keeps the promises of `Tier` to the letter, so it also tells what a crash would leave::

        tier = RestartableTier(16, 64)
        async with LRUOffloadManager(tier) as kv:
            await kv.store(hashes, payloads)
            crashed = tier.after_crash()
        async with LRUOffloadManager(crashed) as kv:
            ...

    Args:
        num_blocks: Slots.
        block_bytes: Bytes of a slot.
        name: Name of the tier.
        medium: Kind of place it claims to be.
    """

    addressable = False
    persistent = True

    def __init__(
        self,
        num_blocks: int,
        block_bytes: int,
        *,
        name: str = "cold",
        medium: Medium = Medium.DISK,
    ) -> None:
        if num_blocks < 1 or block_bytes < 1:
            raise ConfigError(
                f"num_blocks={num_blocks} and block_bytes={block_bytes} must be at least 1"
            )
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.name = name
        self.medium = medium
        # Oldest write first, which is the order that a crash leaves.
        self._records: dict[int, _Record] = {}
        self._flushed: dict[int, _Record] = {}
        self._open = False

    def __repr__(self) -> str:
        state = "open" if self._open else "closed"
        return f"<RestartableTier {self.name!r}, {state}, {len(self._records)} blocks>"

    def after_crash(self, *, power_loss: bool = False) -> RestartableTier:
        """Return, closed, what a crash of the process at this moment would leave.

        Args:
            power_loss: The machine crashes, so what was written or erased since the last `flush`
                is undone.
        """
        copy = RestartableTier(
            self.num_blocks, self.block_bytes, name=self.name, medium=self.medium
        )
        copy._records = dict(self._flushed if power_loss else self._records)
        copy._flushed = dict(copy._records)
        return copy

    async def open(self) -> list[StoredBlock]:
        """Return what is there, coldest first."""
        await checkpoint()
        if self._open:
            raise TierLockedError(f"tier {self.name!r} is open already", tier=self.name)
        self._open = True
        return [
            StoredBlock(record.key, slot, len(record.payload))
            for slot, record in self._records.items()
        ]

    async def close(self, order: Sequence[int] = ()) -> None:
        """Keep everything, in this order, for the next `open`."""
        if not self._open:
            return
        self._open = False
        for slot in order:
            if slot in self._records:
                self._records[slot] = self._records.pop(slot)
        self._flushed = dict(self._records)
        await checkpoint()

    def view(self, slot: int, size: int) -> ByteArray:
        """Refuse, for the tier is not addressable."""
        raise TierError(f"tier {self.name!r} is not addressable", tier=self.name)

    async def read(
        self, slots: Sequence[int], into: Sequence[memoryview]
    ) -> list[TierError | None]:
        """Copy payloads out."""
        self._check_open()
        await checkpoint()
        outcomes: list[TierError | None] = []
        for slot, buffer in zip(slots, into, strict=True):
            record = self._records.get(slot)
            if record is None or len(record.payload) != buffer.nbytes:
                found = "nothing" if record is None else f"{len(record.payload)} bytes"
                outcomes.append(
                    CorruptBlockError(
                        f"expected {buffer.nbytes} bytes in slot {slot}, found {found}",
                        tier=self.name,
                    )
                )
            else:
                buffer.cast("B")[:] = record.payload
                outcomes.append(None)
        return outcomes

    async def write(
        self, slots: Sequence[int], payloads: Sequence[memoryview], keys: Sequence[bytes]
    ) -> list[TierError | None]:
        """Copy payloads in."""
        self._check_open()
        await checkpoint()
        for slot, payload, key in zip(slots, payloads, keys, strict=True):
            self._records.pop(slot, None)
            self._records[slot] = _Record(key, bytes(payload))
        return [None] * len(slots)

    async def erase(self, slots: Sequence[int]) -> None:
        """Forget these slots."""
        self._check_open()
        await checkpoint()
        for slot in slots:
            self._records.pop(slot, None)

    async def flush(self) -> None:
        """Make sure that a power loss leaves all that is there now."""
        self._check_open()
        await checkpoint()
        self._flushed = dict(self._records)

    def _check_open(self) -> None:
        if not self._open:
            raise ClosedError(f"tier {self.name!r} is not open")
