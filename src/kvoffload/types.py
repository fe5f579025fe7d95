"""Vocabulary of kvoffload: hashes, states, results, and the seams to tiers and policies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, overload, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import TracebackType
    from typing import Self

    from typing_extensions import Buffer as _Buffer

    from .errors import TierError
    from .events import OffloadingEvent
    from .metrics import ManagerStats
    from .retention import Retention

if TYPE_CHECKING:
    # Arrays are buffers too, but a type checker knows that from Python 3.12 on only.
    Buffer: TypeAlias = _Buffer | NDArray[Any]
else:
    Buffer = Any

BlockHash: TypeAlias = bytes | str | int
"""Content hash of a block and all its prefix; equal hash means equal bytes."""

Key: TypeAlias = BlockHash | tuple[str, BlockHash]
"""A block inside one manager: its hash, with the namespace where it is not the manager's own."""

ByteArray: TypeAlias = NDArray[np.uint8]


class Clock(Protocol):
    """Time as a manager sees it; tests inject `kvoffload.testing.ManualClock`."""

    def __call__(self) -> float:
        """Return monotonic seconds."""

    async def sleep(self, seconds: float) -> None:
        """Return after this many seconds."""


class Medium(Enum):
    """Kind of place that a tier keeps its payloads in."""

    GPU = "gpu"
    CPU = "cpu"
    DISK = "disk"
    REMOTE = "remote"


class TierState(Enum):
    """What a tier can do at the moment."""

    SERVING = "serving"
    """All of it."""
    FULL = "full"
    """Write slots that were written before; there is no space for others."""
    READ_ONLY = "read_only"
    """Read; writes failed over and over, and are tried again after a while."""
    UNAVAILABLE = "unavailable"
    """Nothing: a remote tier that does not answer; it is asked again after a while."""


class BlockState(Enum):
    """What a manager knows of a block."""

    READY = "ready"
    """Complete; can be loaded."""
    PENDING = "pending"
    """Another caller is storing it; not readable yet."""
    ABSENT = "absent"
    """In no tier."""


class RejectReason(Enum):
    """Why `store` did not take a block."""

    FULL = "full"
    """The block, or the call, is larger than the room that there can be."""
    PINNED = "pinned"
    """What would have to give way is pinned or pending."""
    NOT_ADMITTED = "not_admitted"
    """The policy declined."""
    THROTTLED = "throttled"
    """A lower tier is slow and the manager was told not to wait."""
    FAILED = "failed"
    """The tier's write failed."""
    QUOTA = "quota"
    """Its namespace has no bytes left."""


@dataclass(frozen=True, slots=True)
class StoreResult:
    """Outcome of one `store`: each hash asked for is in exactly one of the first three.

    Attributes:
        stored: Blocks copied in, in the order asked.
        present: Blocks that were ready, or pending by another caller.
        rejected: Blocks not taken, each with the reason.
        evicted: Other blocks that left every tier to make room.
        waited_s: Seconds that it waited for a lower tier to take what gave way; 0 where room had
            been made ahead. Results that differ in nothing else are equal.
    """

    stored: tuple[BlockHash, ...] = ()
    present: tuple[BlockHash, ...] = ()
    rejected: Mapping[BlockHash, RejectReason] = field(default_factory=dict)
    evicted: tuple[BlockHash, ...] = ()
    waited_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """How many of a request's hit blocks are worth loading.

    Attributes:
        blocks: Leading blocks to load; the rest is computed sooner than it could be read.
        load_s: Seconds that loading those is expected to take.
        compute_s: Seconds that computing the other hit blocks is expected to take.
    """

    blocks: int
    load_s: float
    compute_s: float

    @property
    def total_s(self) -> float:
        """Seconds until all hit blocks are there."""
        return self.load_s + self.compute_s


@dataclass(frozen=True, slots=True)
class FlushResult:
    """Outcome of `flush`, in blocks.

    Attributes:
        durable: Blocks that survive a power loss from now on.
        not_durable: Ready blocks that lie in memory alone.
    """

    durable: int
    not_durable: int


@dataclass(frozen=True, slots=True)
class BlockLocation:
    """Where a block is: its state, and the name of the highest tier that has it."""

    state: BlockState
    tier: str | None = None


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A block that a persistent tier found when it was opened.

    Attributes:
        key: Canonical key (see `kvoffload.keys`), at most 255 bytes.
        slot: Slot that holds the payload.
        size: Payload bytes.
    """

    key: bytes
    slot: int
    size: int


@runtime_checkable
class Tier(Protocol):
    """Bytes in numbered slots of one medium; no policy, no index.

    A manager owns its tiers: it opens them when it is entered and closes them when it is left,
    and it alone decides which slot holds which block. The manager never reads and writes one slot
    at the same time, and never calls `view` on a tier that is not addressable.

    A third party's tier is checked by subclassing `kvoffload.testing.TierContract`.
    """

    @property
    def name(self) -> str:
        """Unique among the tiers of one manager; appears in stats, events and errors."""

    @property
    def medium(self) -> Medium:
        """Kind of place."""

    @property
    def num_blocks(self) -> int:
        """Slots, numbered from 0."""

    @property
    def block_bytes(self) -> int:
        """Bytes of a slot; a payload may be shorter."""

    @property
    def addressable(self) -> bool:
        """Whether `view` shows the slots themselves; else blocks are read and written."""

    @property
    def persistent(self) -> bool:
        """Whether blocks survive `close` and the end of the process."""

    async def open(self) -> Sequence[StoredBlock]:
        """Get ready; return what a persistent tier still holds, coldest first.

        Raises:
            TierLockedError: Another opener has it.
            ConfigError: What is there has another geometry or format.
        """

    async def close(self, order: Sequence[int] = ()) -> None:
        """Release everything; idempotent. `order` names the slots in use, coldest first."""

    def view(self, slot: int, size: int) -> ByteArray:
        """Return a fresh writable array over the first `size` bytes of a slot, without a copy.

        The manager tells by a weak reference to this very object when the last view derived from
        it is gone, so each call makes a new one.
        """

    async def read(
        self, slots: Sequence[int], into: Sequence[memoryview]
    ) -> list[TierError | None]:
        """Fill each buffer from its slot; the buffers have the payloads' exact sizes.

        Returns one outcome a slot: `None`, or the error that concerns it. A payload that does not
        check is a `CorruptBlockError`.
        """

    async def write(
        self, slots: Sequence[int], payloads: Sequence[memoryview], keys: Sequence[bytes]
    ) -> list[TierError | None]:
        """Write each payload and its canonical key to its slot, replacing what was there.

        Returns one outcome a slot: `None`, or the error that concerns it.
        """

    async def erase(self, slots: Sequence[int]) -> None:
        """Forget these slots for good: they don't come back after a crash of the process.

        Raises:
            TierError: Some could not be erased.
        """

    async def flush(self) -> None:
        """Make every completed `write` and `erase` survive a power loss.

        Raises:
            TierError: It could not be made sure.
        """


@runtime_checkable
class EvictionPolicy(Protocol):
    """Order of eviction and admission; no I/O, no clock, no knowledge of pins but what it is told.

    One object serves one manager. Levels number the manager's tiers from 0, the hottest. A key is
    resident at no or one level: the highest that has the block. Keys of one call are a prefix
    chain, head first; within a call the head is the most recent, so of equal scores the deepest in
    the chain is the first victim.

    A third party's policy is checked by subclassing `kvoffload.testing.PolicyContract`.
    """

    def attach(self, capacities: Sequence[int]) -> None:
        """Called once, before anything else, with the slots of each level.

        Raises:
            ConfigError: The policy serves another manager already.
        """

    def admit(
        self,
        keys: Sequence[Key],
        level: int,
        *,
        chain: Sequence[Key] = (),
        pinned: Collection[Key] = (),
        retention: Retention | None = None,
    ) -> Collection[Key]:
        """Return those of these new keys that may enter the level; the rest goes further down.

        Args:
            keys: New blocks, head first; the answer is a part of them in the same order.
            level: Where they would go.
            chain: The whole chain that they belong to, where it is known.
            pinned: Keys that `victims` could not name to make room for them.
            retention: What the caller of their request says of them.
        """

    def insert(self, keys: Sequence[Key], level: int) -> None:
        """Note that these keys, resident nowhere, became resident at the level. Not a use."""

    def remove(self, keys: Sequence[Key], level: int) -> None:
        """Note that these keys, resident at the level, left it (evicted, or about to move)."""

    def use(self, keys: Sequence[Key], *, retention: Retention | None = None) -> None:
        """Note one use of this chain, each block once, and what its caller says of it.

        Keys that are not resident may be among them.
        """

    def victims(self, level: int, count: int, pinned: Collection[Key]) -> list[Key]:
        """Return up to `count` resident keys not in `pinned`, coldest first; removes nothing."""

    def unpinned(self, keys: Sequence[Key]) -> None:
        """Note that these keys, which `victims` may have stepped over, are pinned no more."""


@runtime_checkable
class ForecastingPolicy(EvictionPolicy, Protocol):
    """A policy that can also tell what it expects; `cold_admission="likely"` needs one."""

    def likely(self, keys: Sequence[Key]) -> Collection[Key]:
        """Return those of these resident keys that are likelier than not to be used again."""


class SlotEntry(Protocol):
    """One block of a `LoadStoreSpec`."""

    @property
    def slot(self) -> int:
        """Slot in the tier."""

    @property
    def tier(self) -> str:
        """Name of the tier."""

    @property
    def medium(self) -> Medium:
        """Kind of the tier."""

    @property
    def view(self) -> memoryview:
        """The bytes: the slot itself in memory, else a staging buffer; made on first access."""


class LoadStoreSpec(Protocol):
    """Where an engine finds, or puts, the bytes of the blocks it prepared.

    Attributes:
        block_hashes: The blocks, in order.
        entries: One entry a block, in the same order.
    """

    @property
    def block_hashes(self) -> tuple[BlockHash, ...]:
        """The blocks, in order."""

    @property
    def entries(self) -> Sequence[SlotEntry]:
        """One entry a block."""


@dataclass(frozen=True, slots=True)
class PrepareStoreOutput:
    """Outcome of `prepare_store`.

    Attributes:
        block_hashes_to_store: What is neither present nor pending, in order, each once.
        store_spec: Where to put those blocks' bytes.
        block_hashes_evicted: Blocks that left every tier to make room.
    """

    block_hashes_to_store: tuple[BlockHash, ...]
    store_spec: LoadStoreSpec
    block_hashes_evicted: tuple[BlockHash, ...]


class Lease(Sequence[memoryview]):
    """Pinned blocks: read-only views in the order asked, valid inside the `async with` alone.

    Zero-copy where a payload lies in memory. Afterwards every view raises `ValueError` on use, and
    the lease is empty.

    Args:
        block_hashes: The blocks.
        views: Their views, or what makes all of them: called once, on the first access to any, for
            a revocable view costs more than a pin, and not every lease is looked at.
    """

    __slots__ = ("_make_views", "_views", "block_hashes")

    def __init__(
        self,
        block_hashes: Sequence[BlockHash],
        views: list[memoryview] | Callable[[], list[memoryview]],
    ) -> None:
        self.block_hashes = tuple(block_hashes)
        self._views: list[memoryview] | None = None
        self._make_views: Callable[[], list[memoryview]] | None = None
        if callable(views):
            self._make_views = views
        else:
            self._views = views

    @overload
    def __getitem__(self, index: int) -> memoryview: ...
    @overload
    def __getitem__(self, index: slice) -> list[memoryview]: ...
    def __getitem__(self, index: int | slice) -> memoryview | list[memoryview]:
        return (self._made() if self._views is None else self._views)[index]

    def __iter__(self) -> Iterator[memoryview]:
        return iter(self._made())

    def __len__(self) -> int:
        return len(self.block_hashes if self._views is None else self._views)

    def end(self) -> None:
        """Let go of the views; the manager does this when the scope is left."""
        self._views = []
        self._make_views = None

    def __repr__(self) -> str:
        return f"<Lease of {len(self)} blocks>"

    def _made(self) -> list[memoryview]:
        make_views = self._make_views
        if self._views is None and make_views is not None:
            self._views = make_views()
            self._make_views = None
        return self._views or []


class Request(Protocol):
    """The chain of one prompt, from `OffloadingManager.request`."""

    @property
    def hit(self) -> int:
        """Prefix hit: leading blocks that were ready on entry; they stay pinned until the end."""

    @property
    def retention(self) -> Retention | None:
        """How likely, or how soon, the chain is used again; to be set until the scope is left."""

    @retention.setter
    def retention(self, retention: Retention | float | None) -> None: ...

    def plan(
        self, *, tokens_per_s: float, block_tokens: int = 16, deadline_s: float | None = None
    ) -> LoadPlan:
        """Say how many of the `hit` blocks are worth loading."""

    def load(
        self, num_blocks: int | None = None, *, timeout_s: float | None = None
    ) -> AbstractAsyncContextManager[Lease]:
        """Lease the `hit` blocks, or the first ones of them, in order."""

    async def store(self, payloads: Sequence[Buffer]) -> StoreResult:
        """Store the next blocks of the chain; goes on where the call before stopped."""


class BlockSource(Protocol):
    """Where `PrefetchingLRUManager` fetches blocks that it was told will be needed."""

    async def read(self, block_hash: BlockHash) -> Buffer:
        """Return the payload.

        Raises:
            KeyError: The source does not have it.
        """


class OffloadingManager(Protocol):
    """The contract of every manager, all of it awaitable from the loop it was opened on.

    A third party's manager is checked by subclassing `kvoffload.testing.ManagerContract`.
    """

    async def lookup(self, block_hashes: Sequence[BlockHash]) -> int:
        """Return the prefix hit: leading ready blocks over all tiers. Changes no recency."""

    async def store(
        self, block_hashes: Sequence[BlockHash], payloads: Sequence[Buffer]
    ) -> StoreResult:
        """Copy payloads in, one use of the chain; nothing is dropped in silence."""

    def load(
        self, block_hashes: Sequence[BlockHash], *, timeout_s: float | None = None
    ) -> AbstractAsyncContextManager[Lease]:
        """Pin the blocks and lease views of them, one use of the chain."""

    async def evict(
        self, block_hashes: Sequence[BlockHash] | None = None, *, num_blocks: int | None = None
    ) -> list[BlockHash]:
        """Remove these blocks, or the coldest `num_blocks`, from every tier for good."""

    async def touch(self, block_hashes: Sequence[BlockHash]) -> None:
        """Count one use of the chain; unknown hashes are ignored."""

    async def prepare_store(
        self, block_hashes: Sequence[BlockHash], *, sizes: Sequence[int] | None = None
    ) -> PrepareStoreOutput | None:
        """Reserve slots for an engine that moves the bytes itself; `None` if there is no room."""

    async def complete_store(self, block_hashes: Sequence[BlockHash], success: bool = True) -> None:
        """Publish, or give up, what `prepare_store` reserved."""

    async def prepare_load(self, block_hashes: Sequence[BlockHash]) -> LoadStoreSpec:
        """Pin the blocks for an engine that moves the bytes itself."""

    async def complete_load(self, block_hashes: Sequence[BlockHash]) -> None:
        """Unpin what `prepare_load` pinned."""

    async def clear(self) -> None:
        """Evict all that is not pinned or pending."""

    async def flush(self) -> FlushResult:
        """Make durable what the cold tier has room for; evicts nothing."""

    async def forget(self, block_hashes: Sequence[BlockHash]) -> list[BlockHash]:
        """Remove what no other chain was seen to share of a chain that is over."""

    def request(
        self,
        block_hashes: Sequence[BlockHash],
        *,
        wait_pending_s: float = 0.0,
        retention: Retention | float | None = None,
    ) -> AbstractAsyncContextManager[Request]:
        """Open the scope of one prompt's chain; leaving it is one use of the whole chain."""

    def locate(self, block_hashes: Sequence[BlockHash]) -> list[BlockLocation]:
        """Say where each block is; no use, no I/O."""

    def get_stats(self) -> ManagerStats:
        """Return a snapshot of the counters."""

    def events(self) -> AsyncIterator[OffloadingEvent]:
        """Subscribe, at the call, to what happens from now on."""

    async def __aenter__(self) -> Self:
        """Open the tiers and start the background tasks."""

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> Any:
        """Drain, flush and close; idempotent."""
