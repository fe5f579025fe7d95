"""What every manager is made of: tiers, index, movement and lifecycle, put together once."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Protocol

from .blocks import BlockEntry
from .errors import BlockNotFoundError, ConfigError
from .events import EventHub
from .index import Index
from .jobs import Job, Jobs
from .keys import check_namespace, decode_key, show_hash
from .levels import Level
from .lifecycle import Lifecycle, Phase
from .metrics import ManagerStats, new_counters
from .movement.ahead import WorkingAhead
from .movement.durability import Durability
from .movement.loading import Loading
from .movement.moves import Moves
from .movement.remote.part import Remote
from .movement.removal import Removal
from .movement.storing import Stored, Storing
from .movement.transfer import Transfer
from .named import Named
from .observing import Observer
from .open_store import OpenStore, Outcome
from .options import CoreOptions
from .prefetch import Prefetcher
from .remote.protocol import RemoteTier
from .retention import Retention
from .room import Room
from .shares import namespace_of
from .slicing import slices
from .twophase import TwoPhase
from .types import (
    BlockHash,
    BlockLocation,
    BlockState,
    ByteArray,
    EvictionPolicy,
    FlushResult,
    Key,
    StoredBlock,
    Tier,
)
from .views import Staging

log = logging.getLogger("kvoffload")


class OpenLease(Protocol):
    """A lease whose views may still be to make."""

    def show(self) -> None:
        """Make them, for afterwards the tiers are closed."""


class Core:
    """One manager's parts; the managers are the contract on top of it."""

    def __init__(
        self, name: str, tiers: Sequence[Tier], policy: EvictionPolicy, options: CoreOptions
    ) -> None:
        check_tiers(tiers, options.remote.tier if options.remote else None)
        self.namespace = check_namespace(options.namespace)
        self.block_bytes = tiers[0].block_bytes
        self.tiers = tuple(tiers)
        self.clock = options.clock
        self.lifecycle = Lifecycle(name)
        self.check = self.lifecycle.check
        self.events = EventHub(self.namespace)
        self.index = Index(tiers, policy, self.clock, self.events, options.shares)
        self.room = Room(
            self.index, cold_admission=options.cold_admission, watermarks=options.watermarks
        )
        self.options = options
        self._staging = Staging(options.staging_bytes, self.block_bytes)
        self.leases: set[OpenLease] = set()
        """Those that are open; they outlive a close."""
        self.prefetchers: list[Prefetcher] = []
        self.read_ahead: Callable[[Sequence[Key]], Sequence[Key]] | None = None
        """Given the blocks that a request hit, fetches some that it will want; returns them."""
        self.observers: list[Observer] = []
        self.remote: Remote | None = None
        # Made when the manager is opened, for they run its tasks and threads.
        self.transfer: Transfer
        self.jobs: Jobs
        self.moves: Moves
        self.storing: Storing
        self.loading: Loading
        self.durability: Durability
        self.removal: Removal
        self.two_phase: TwoPhase

    # Life

    async def open(self) -> None:
        """Open the tiers, take over what they still hold, and start the background tasks.

        Cancelled, or when a tier can't be opened, those that were opened are closed again.

        Raises:
            ClosedError: It was opened before.
            TierError, ConfigError: A tier can't be opened.
        """
        self.jobs = await self.lifecycle.open()
        self.transfer = Transfer(self.index, self._staging, self.namespace)
        self.moves = Moves(self.index, self.room, self.transfer)
        self.storing = Storing(
            self.index,
            self.room,
            self.transfer,
            self.moves,
            self.jobs,
            may_wait=self.options.may_wait,
        )
        self.durability = Durability(self.index, self.room, self.transfer, self.jobs)
        self.loading = Loading(
            self.index,
            self.room,
            self.transfer,
            self.moves,
            self.jobs,
            promote_threshold=self.options.promote_threshold,
        )
        self.two_phase = TwoPhase(
            self.index, self.loading, self.clock, self.options.reservation_ttl_s
        )
        if self.options.remote is not None:
            self.remote = Remote(
                self.options.remote,
                self.index,
                self.transfer,
                self.storing,
                self.loading,
                self.jobs,
            )
        self.removal = Removal(
            self.index,
            self.durability,
            self.remote,
            self.jobs,
            is_open=lambda: self.lifecycle.phase is Phase.OPEN,
        )
        try:
            # In a job, for a cancelled open would leave its file behind.
            await self.jobs.start(lambda _: self._open_tiers()).result()
            self.lifecycle.opened()
        except BaseException:
            await self._close([self._drain])
            raise
        self.lifecycle.start(self.two_phase.reap)
        if self.remote is not None:
            self.lifecycle.start(*self.remote.tasks)
        if any(level.low for level in self.index.levels):
            ahead = WorkingAhead(self.index, self.room, self.moves, self.jobs)
            self.lifecycle.start(ahead.run)
        for prefetcher in self.prefetchers:
            self.loading.on_demand.append(prefetcher.note_wanted)
            self.lifecycle.start(*[prefetcher.run] * prefetcher.workers)

    async def close(self) -> None:
        """Drain, make durable, close the tiers; idempotent, bounded in time."""
        await self._close([self._drain, self._flush, self._send])

    # What the managers share

    def observed(self, operation: str, keys: Sequence[Key]) -> ExitStack:
        """Return what all observers want around an operation on the blocks of one namespace."""
        namespace = keys[0][0] if keys and isinstance(keys[0], tuple) else self.namespace
        with ExitStack() as stack:
            for observer in self.observers:
                stack.enter_context(observer(operation, namespace, len(keys)))
            return stack.pop_all()

    def find(self, keys: Sequence[Key]) -> list[BlockEntry]:
        """Return the entries of ready blocks.

        Raises:
            BlockNotFoundError: Names those that are not ready.
        """
        ready = self.index.ready
        try:
            return [ready[key] for key in keys]
        except KeyError:
            missing = [key for key in dict.fromkeys(keys) if key not in ready]
        hashes = [key[1] if isinstance(key, tuple) else key for key in missing]
        states = ", ".join(
            f"{show_hash(block_hash)} is {self.index.state(key).value}"
            for block_hash, key in zip(hashes[:4], missing, strict=False)
        )
        more = f", and {len(hashes) - 4} more" if hashes[4:] else ""
        raise BlockNotFoundError(f"not ready: {states}{more}", block_hashes=hashes)

    def unknown(self, keys: Sequence[Key]) -> list[Key]:
        """Return the blocks that are neither ready nor pending, each once, in order."""
        ready, pending = self.index.ready, self.index.pending
        once = dict.fromkeys(keys)
        if ready.keys().isdisjoint(once) and pending.keys().isdisjoint(once):
            return list(once)
        return [key for key in once if key not in ready and key not in pending]

    async def store(
        self,
        keys: Sequence[Key],
        payloads: Sequence[ByteArray],
        chain: Sequence[Key] = (),
        retention: Retention | None = None,
    ) -> Outcome:
        """Store blocks, without counting a use; the blocks that are present are protected.

        `chain` is all that they are part of, where that is known, and `retention` what its caller
        says of it.
        """
        index = self.index
        bytes_of: dict[Key, ByteArray] = {}
        for key, payload in zip(keys, payloads, strict=True):
            bytes_of.setdefault(key, payload)
        new = self.unknown(keys)
        present = index.present(bytes_of)
        # All of them: one that is rejected here, another may store.
        named = Named(index, list(bytes_of), chain, retention)
        try:
            new_bytes = list(map(bytes_of.__getitem__, new))
            stored = await self.storing.store(new, new_bytes, named)
            if self.options.writes_through:
                named.hold()  # those that were stored just now too
                await self.durability.write_through(stored.stored, stored.evicted)
        finally:
            named.release()
        return Outcome.of(present, new, stored)

    def open_store(
        self,
        keys: Sequence[Key],
        sizes: Sequence[int],
        chain: Sequence[Key] = (),
        retention: Retention | None = None,
    ) -> OpenStore | None:
        """Begin to store blocks whose bytes are yet to come, straight into their slots.

        `None` where that takes more than free memory: use `store`, once the bytes have come.
        """
        index = self.index
        size_of = dict(zip(reversed(keys), reversed(sizes), strict=True))
        new = self.unknown(keys)
        present = index.present(dict.fromkeys(keys))
        named = Named(index, list(size_of), chain, retention)
        entries: list[BlockEntry] | None = None
        try:
            entries = self.storing.open_now(new, [size_of[key] for key in new], named)
        finally:
            if entries is None:
                named.release()
        if entries is None:
            return None
        waiting = {entry.key: entry for entry in entries}
        views: list[memoryview] = []
        for key, size in zip(keys, sizes, strict=True):
            entry = waiting.pop(key, None)
            if entry is None:  # present, or there twice: its bytes go nowhere
                views.append(memoryview(bytearray(size)))
            else:
                tier = index.levels[entry.level].tier
                views.append(tier.view(entry.slot, entry.size).data)
        return OpenStore(self, named, entries, views, present)

    async def flush(self) -> FlushResult:
        """Make durable what there is room for, and send what waits for the remote tier.

        Raises:
            TierError: A tier could not make sure of what it has.
        """
        result = await self.durability.flush()
        if self.remote is not None:
            await self.remote.drain()
        return result

    def locate_far(self, key: Key) -> BlockLocation:
        """Return what is known of a block that is not ready here."""
        state = self.index.state(key)
        if self.remote is not None and self.remote.knows(key):
            return BlockLocation(BlockState.READY, self.remote.name)
        return BlockLocation(state)

    def extent(self, keys: Sequence[Key]) -> list[tuple[int, int]]:
        """Return level and payload bytes of the leading blocks that can be loaded."""
        found: list[tuple[int, int]] = []
        for key in keys:
            entry = self.index.ready.get(key)
            if entry is not None:
                found.append((entry.level, entry.size))
            elif self.remote is None or (size := self.remote.size_of(key)) is None:
                break
            else:
                found.append((self.remote.level.number, size))
        return found

    async def bring(self, keys: Sequence[Key], timeout_s: float | None) -> list[BlockEntry]:
        """Fetch what is not here from the remote tier; return what the caller has to unpin then.

        Raises:
            CapacityError: The hottest tier has no room for them.
            LoadTimeoutError: `timeout_s` passed, or the remote tier did not answer in time.
            TierError: The remote tier could not read some.
        """
        return [] if self.remote is None else await self.remote.bring(keys, timeout_s)

    async def quiet(self) -> None:
        """Wait until nothing is being read or fetched that somebody waits for."""
        while self.loading.demand or (self.remote is not None and self.remote.demand):
            await self.index.changed.wait()

    def namespaces(self) -> list[str]:
        """Return the names of the namespaces with blocks, the manager's own first."""
        index = self.index
        names = {name for name in index.counters if name is not None}
        names.update(*(level.usage for level in index.levels))
        names.discard(self.namespace)
        return [self.namespace, *sorted(names)]

    async def reserve(
        self, keys: Sequence[Key], sizes: Sequence[int], named: Named
    ) -> Stored | None:
        """Reserve slots of the hottest tier for new blocks; `None` if there is no room."""
        hottest = self.index.levels[0]
        named.hold()
        if self.room.most(len(keys), namespace_of(keys)) < len(keys) and not (
            self.moves.under_way and len(keys) <= hottest.slots.capacity
        ):
            return None
        buffers: list[int] | None = None
        if not hottest.tier.addressable:
            buffers = self._staging.slots.take(len(keys))
        reserved: Stored | None = None
        try:
            if buffers is None or len(buffers) == len(keys):
                reserved = self.storing.reserve_now(keys, sizes)
                if reserved is None:
                    reserved = await self.storing.reserve(keys, sizes, named)
        finally:
            if reserved is None and buffers:
                self._staging.slots.give_back(buffers)
        if reserved is not None:
            if buffers:
                self.two_phase.stage(reserved.stored, buffers)
            self.two_phase.watch()
        return reserved

    async def complete_store(self, keys: Sequence[Key], *, success: bool) -> list[BlockHash]:
        """Publish or give up what was reserved; return the blocks that a derived view outlives."""
        index = self.index
        if success and index.levels[0].tier.addressable:
            entries = index.take_reserved(self.two_phase.not_late(keys))
            derived = self.two_phase.end_store(entries)
            index.publish(entries)
            if self.options.writes_through:
                await self._write_through(entries)
            return derived
        entries = self.two_phase.reserved(keys)
        derived = self.two_phase.end_store(entries)
        if not success:
            self.two_phase.unstage(entries)
            index.abort(entries)
        elif entries:
            for entry in entries:
                entry.pin_count = 1  # nobody else completes or expires them from here on
            await self.jobs.start(lambda _: self._write_staged(entries)).result()
        return derived

    async def prepare_load(self, keys: Sequence[Key]) -> list[BlockEntry]:
        """Pin blocks until the two-phase load ends, reading what has no address of its own."""
        brought = await self.bring(keys, None) if self.remote is not None else []
        try:
            entries = self.find(keys)
            self.index.pin(entries)
        finally:
            self.index.unpin(brought)
        try:
            self.loading.count_hits(entries)
            flights = {}
            if not self.loading.is_instant(entries):
                flights = await self.loading.bring(entries, None)
        except BaseException:
            self.index.unpin(entries)
            raise
        self.two_phase.hold(entries, flights)
        return entries

    def stats(self, namespace: str | None, *, everywhere: bool) -> ManagerStats:
        """Return a snapshot, of one namespace unless `everywhere`."""
        index = self.index
        if everywhere:
            counters = new_counters()
            for each in (*index.counters.values(), index.strangers):
                for name, value in each.items():
                    counters[name] += value
            tiers = {level.tier.name: level.stats(self.clock()) for level in index.levels}
            if self.remote is not None:
                tiers[self.remote.name] = self.remote.stats(self.clock())
            return ManagerStats(
                **counters, pending=len(index.pending), pinned=len(index.pinned), tiers=tiers
            )
        mine = {
            level.tier.name: level.stats_of(namespace, index.counters) for level in index.levels
        }
        if self.remote is not None:
            mine[self.remote.name] = self.remote.level.stats_of(namespace, index.counters)
        if namespace is None:
            pending = len(index.pending) - index.pending_of.total()
            pinned = len(index.pinned) - index.pinned_of.total()
        else:
            pending, pinned = index.pending_of[namespace], index.pinned_of[namespace]
        counters = index.counters.get(namespace) or new_counters()
        return ManagerStats(**counters, pending=pending, pinned=pinned, tiers=mine)

    async def _write_through(self, entries: Sequence[BlockEntry]) -> None:
        named = Named(self.index, [entry.key for entry in entries])
        named.hold()
        try:
            await self.durability.write_through(entries, [])
        finally:
            named.release()

    async def _write_staged(self, entries: Sequence[BlockEntry]) -> None:
        hottest = self.index.levels[0]
        places = [self.two_phase.place_of_store(entry) for entry in entries]
        outcomes = await self.transfer.write(
            hottest,
            [entry.slot for entry in entries],
            [
                place.show(place.slot, entry.size)
                for place, entry in zip(places, entries, strict=True)
            ],
            [entry.key for entry in entries],
        )
        self.two_phase.unstage(entries)
        bad = [entry for entry, error in zip(entries, outcomes, strict=True) if error is not None]
        self.index.abort(bad)
        self.index.commit([entry for entry in entries if entry not in bad])
        errors = [error for error in outcomes if error is not None]
        if errors:
            try:
                raise errors[0]
            finally:
                del errors, outcomes  # or the error and this frame would keep each other

    # Steps of opening and closing

    async def _open_tiers(self) -> None:
        for level in self.index.levels:
            found: dict[Key, StoredBlock] = {}
            older: list[tuple[Key, StoredBlock]] = []
            async for part in slices(await level.tier.open()):
                for block in part:
                    key = self._key_of(level, block)
                    if key is None:
                        continue  # the slot counts as free
                    if key in found:
                        older.append((key, found.pop(key)))
                    found[key] = block
            level.slots.take_these([block.slot for block in found.values()])
            level.leave([block.slot for _, block in older], [key for key, _ in older])
            hotter = len(found)
            async for restored in slices(list(found.items())):
                hotter -= len(restored)
                self.index.restore(level, restored, hotter)
        if self.room.sharing is not None:
            self.room.sharing.trim()
        if self.remote is not None:
            await self.remote.open()

    def _key_of(self, level: Level, block: StoredBlock) -> Key | None:
        try:
            namespace, block_hash = decode_key(block.key)
        except ValueError:
            log.warning("tier %r: slot %d has no key of ours", level.tier.name, block.slot)
            return None
        return block_hash if namespace == self.namespace else (namespace, block_hash)

    async def _close(self, steps: Sequence[Callable[[], Awaitable[None]]]) -> None:
        final = [self._show_leases, self._close_tiers, self._stop]
        await self.lifecycle.close(steps, final, self.options.close_timeout_s)

    async def _drain(self) -> None:
        await self.jobs.drain()

    async def _flush(self) -> None:
        await self.durability.flush(make_room=True)

    async def _send(self) -> None:
        if self.remote is not None:
            await self.remote.drain()

    async def _show_leases(self) -> None:
        for lease in self.leases:
            lease.show()

    async def _close_tiers(self) -> None:
        index = self.index
        error: Exception | None = None
        # In jobs of their own, for one that hangs must not keep the others open.
        closing: list[Job[None]] = []
        for level in index.levels:
            order: list[int] = []
            try:
                if level.tier.persistent:
                    keys = index.policy.victims(level.number, level.blocks, ())
                    async for part in slices(keys):
                        order += [index.ready[key].slot for key in part]
                    # A copy's block is in use further up, so it is the hotter one.
                    copies = [entry.copies or {} for entry in level.copies.values()]
                    order += [slots[level.number] for slots in copies]
            except Exception as exc:  # noqa: BLE001  # a policy's; the tier must be closed
                error = error or exc
            closing.append(self.jobs.start(partial(_close_tier, level.tier, order)))
        if self.remote is not None:
            remote = self.remote
            closing.append(self.jobs.start(lambda _: remote.close()))
        for job in closing:
            try:
                await job.result()
            except Exception as exc:  # noqa: BLE001  # the other tiers must be closed
                error = error or exc
        if error is not None:
            raise error

    async def _stop(self) -> None:
        self.events.close()
        self.transfer.stop()


ABSENT = BlockState.ABSENT


async def _close_tier(tier: Tier, order: Sequence[int], _: Job[None]) -> None:
    await tier.close(order)


def check_tiers(tiers: Sequence[Tier], remote: RemoteTier | None = None) -> None:
    """Check that these can be the tiers of one manager.

    Raises:
        ConfigError: Names the tier that is none, is there twice, or has another block size.
    """
    for tier in tiers:
        if not isinstance(tier, Tier):
            raise ConfigError(f"not a tier (see kvoffload.Tier): {tier!r}")
    names = [tier.name for tier in tiers] + ([] if remote is None else [remote.name])
    if len(set(names)) < len(names):
        raise ConfigError(
            f"the tiers of one manager need different names, not {names}: pass name=, as in "
            "MemoryTier(..., name='warm')"
        )
    sizes = {tier.name: tier.block_bytes for tier in tiers}
    if len(set(sizes.values())) > 1:
        raise ConfigError(f"the tiers of one manager need the same block_bytes, not {sizes}")
