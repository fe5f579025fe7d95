"""A cold tier from `open` to `close`: its threads, and the files that they work on."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import TypeVar

from aiofiles.os import wrap

from ..types import StoredBlock
from . import format as fmt
from .blocks import Blocks
from .breaker import Breaker
from .os_errors import is_full
from .recovery import RecoveryReport, Store, recover
from .space import Space
from .threads import Call, Threads

_T = TypeVar("_T")

_log = logging.getLogger("kvoffload")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a session may take, and for how long.

    Attributes:
        io_threads: Most calls at once; `None` for what suits the way of doing I/O.
        io_timeout_s: Seconds that a file operation may take; `None` for any time.
        min_free_bytes: What must stay free on the file system.
        sync_always: Make everything durable before a call returns.
    """

    io_threads: int | None
    io_timeout_s: float | None
    min_free_bytes: int
    sync_always: bool


class Role(Enum):
    """What a call does to its slots."""

    READ = "read"
    WRITE = "write"
    ERASE = "erase"
    OTHER = "other"


class Session:
    """What a tier holds from `open` to `close`: threads, and the files that they work on.

    Coroutines are for the event loop; most other methods block, and are run on the threads. The
    last call under way closes the files, so none ever meets one that was closed under it.
    """

    def __init__(
        self,
        tier: str,
        store: Callable[[], Store],
        limits: Limits,
        *,
        writes: Breaker,
        growth: Breaker,
    ) -> None:
        """Take the tier's name, how to make its files known, its limits and its breakers."""
        self.serving = False
        self.closing = False
        self.released = False
        self.report: RecoveryReport | None = None
        self.next_sequence = 0
        self.threads = Threads(limits.io_threads or default_threads(), tier, self.abandon)
        self.direct = False
        self._tier = tier
        self._make_store = store
        self._limits = limits
        self._writes = writes
        self._growth = growth
        self._header = fmt.Header(1, 1)
        self._store: Store | None = None
        self._blocks: Blocks | None = None
        self._space: Space | None = None
        # Calls that nobody waits for any more, with their slots and what they do to them.
        self._drifting: dict[Call, tuple[frozenset[int], Role]] = {}
        self._waiters: list[Future[None]] = []

    # On the event loop

    async def run(
        self,
        work: Callable[[Call], _T],
        *,
        slots: Sequence[int] = (),
        role: Role = Role.OTHER,
    ) -> _T:
        """Make a call on the threads; it goes on when this is cancelled.

        Args:
            work: What to do.
            slots: Slots that it reads or changes.
            role: What it does to them; reads go ahead of others that wait for a thread.

        Raises:
            TimeoutError: A file operation took too long.
        """
        if self._drifting:
            await self._wait_for_drifting(slots, role)
        call = Call(self.threads, urgent=role is Role.READ)
        timer = Timer(call, self._limits.io_timeout_s)
        try:
            return await wrap(partial(work, call))(executor=call)
        except asyncio.CancelledError:
            self._let_drift(call, slots, role)
            raise
        except TimeoutError:
            if call.given_up:
                self._let_drift(call, slots, role)
            raise
        finally:
            timer.stop()

    @property
    def stuck_calls(self) -> int:
        """Calls that took too long, and whose threads are not back."""
        return sum(call.given_up for call in list(self._drifting))

    async def let_go(self) -> None:
        """Wait until the files are closed.

        Raises:
            TimeoutError: A call that is under way is stuck.
        """
        released = asyncio.wrap_future(self.when_released())
        while not (await asyncio.wait([released], timeout=self._limits.io_timeout_s))[0]:
            if self.stuck_calls:
                raise TimeoutError(errno.ETIMEDOUT, "the disk does not answer")

    # On a thread

    def start(self, num_blocks: int, _: Call) -> list[StoredBlock]:
        """Lock, recover, and return the blocks, coldest first; on an error close all again."""
        try:
            store = self._store = self._make_store()
            store.lock.acquire(self._tier)
            store.choose_io()
            self.direct = store.slabs.direct
            if self._limits.io_threads is None:
                self.threads.most = default_threads(direct=self.direct)
            recovered = recover(store, num_blocks)
            self._space = Space(
                store.layer,
                store.path,
                store.slabs.filled_slots(num_blocks),
                slot_bytes=store.slabs.slot_bytes,
                min_free_bytes=self._limits.min_free_bytes,
                growth=self._growth,
            )
        except BaseException:
            self.abandon()
            raise
        self._blocks, self._header = recovered.blocks, recovered.header
        self.next_sequence = recovered.header.next_sequence
        self.report = recovered.report
        return recovered.found

    def read(
        self,
        slots: list[int],
        into: list[memoryview],
        outcomes: list[OSError | None],
        call: Call,
    ) -> None:
        """Read and check payloads; one outcome a slot, as soon as it is known."""
        self._open()[1].read(slots, into, outcomes, call)

    def write(
        self,
        slots: list[int],
        payloads: list[memoryview],
        keys: Sequence[bytes],
        sequence: int,
        outcomes: list[OSError | None],
        call: Call,
    ) -> None:
        """Write payloads and records; one outcome a slot."""
        store, blocks = self._open()
        assert self._space is not None
        if not self._writes.allows():
            outcomes[:] = [
                OSError(errno.EAGAIN, "writes failed over and over; they are tried again later")
            ] * len(slots)
            return
        try:
            store.lock.check()
        except OSError as exc:
            outcomes[:] = [exc] * len(slots)
            self._writes.failed()
            return
        admitted = self._space.admit(slots)
        todo = [n for n, refusal in enumerate(admitted) if refusal is None]
        written = [outcomes[n] for n in todo]
        try:
            if todo:
                blocks.write(
                    [slots[n] for n in todo],
                    [payloads[n] for n in todo],
                    [keys[n] for n in todo],
                    [sequence + n for n in todo],
                    written,
                    call,
                    sync=store.sync if self._limits.sync_always else None,
                )
        finally:
            results = list(admitted)
            for n, outcome in zip(todo, written, strict=True):
                results[n] = outcome
            if not call.given_up:
                self._judge(slots, results)
            self._space.settle(slots, admitted, results)
        call.publish(lambda: outcomes.__setitem__(slice(None), results))

    def erase(self, slots: list[int], outcomes: list[OSError | None], _: Call) -> None:
        """Blank records; one outcome a slot."""
        store, blocks = self._open()
        results = blocks.erase(slots)
        if self._limits.sync_always:
            store.sync()
        outcomes[:] = results

    def flush(self, _: Call) -> None:
        """Sync everything."""
        self._open()[0].sync()

    def finish(self, order: Sequence[int], call: Call) -> None:
        """Wait for the other calls, sync, note that all is well, and close."""
        interval = (self._limits.io_timeout_s or 60.0) / 8
        self.threads.wait_for_others(lambda: self.stuck_calls > 0, interval)
        try:
            store, blocks = self._open()
            number = self._header.generation + 1
            header = replace(self._header, generation=number, next_sequence=self.next_sequence)
            store.write_clean(header, [slot for slot in dict.fromkeys(order) if blocks.holds(slot)])
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the files as they are; idempotent. No other call may be under way."""
        store, self._store, self._blocks = self._store, None, None
        if store is not None:
            store.close()
        self.serving = False
        self.released = True
        self._notify()

    def when_released(self) -> Future[None]:
        """Return a future that is done when the files are closed."""
        waiter: Future[None] = Future()
        self._waiters.append(waiter)
        if self.released:
            self._notify()
        return waiter

    # Inside

    def _let_drift(self, call: Call, slots: Sequence[int], role: Role) -> None:
        """Keep slots to a call that goes on without its caller, until its thread is back."""
        self._drifting[call] = (frozenset(slots), role)
        loop = asyncio.get_running_loop()

        def tell(_: Future[None]) -> None:
            with suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(self._drifting.pop, call, None)

        call.back.add_done_callback(tell)

    async def _wait_for_drifting(self, slots: Sequence[int], role: Role) -> None:
        if self.stuck_calls >= self.threads.most:
            raise TimeoutError(errno.ETIMEDOUT, "every thread is stuck in an earlier call")
        for call in [
            call
            for call, (theirs, their_role) in self._drifting.items()
            if not (call.back.done() or theirs.isdisjoint(slots))
            and _collide(role, their_role, stuck=call.given_up)
        ]:
            if not call.given_up:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._limits.io_timeout_s):
                        await wait_for(call.back)
            if not call.back.done():
                raise TimeoutError(errno.ETIMEDOUT, "an earlier call for it is stuck")

    def _judge(self, slots: list[int], results: list[OSError | None]) -> None:
        """Tell the breaker how a write went, but for what a full disk explains."""
        assert self._space is not None
        bad = [
            error
            for slot, error in zip(slots, results, strict=True)
            if error is not None and not (is_full(error) and not self._space.is_filled(slot))
        ]
        if bad:
            if self._writes.failed():
                _log.warning("tier %r stops storing for a while: %s", self._tier, bad[0])
        elif any(error is None for error in results) and self._writes.succeeded():
            _log.info("tier %r stores again", self._tier)

    def _notify(self) -> None:
        # Two threads may be here at once; each waiter is popped by one of them.
        with suppress(IndexError):
            while True:
                waiter = self._waiters.pop()
                if waiter.set_running_or_notify_cancel():
                    waiter.set_result(None)

    def _open(self) -> tuple[Store, Blocks]:
        # No call is made but after `start`, and the last one under way closes.
        assert self._store is not None
        assert self._blocks is not None
        return self._store, self._blocks


def default_threads(*, direct: bool = False) -> int:
    """Return how many threads suit buffered or direct I/O.

    With direct I/O they wait for the disk and leave the processor to others; else they copy, and
    more than there are cores hold the event loop up.
    """
    return 4 if direct else min(4, os.cpu_count() or 1)


def _collide(role: Role, drifting: Role, *, stuck: bool) -> bool:
    """Tell whether a call for a slot must not be made while one from before has it still."""
    if drifting is Role.READ:
        # A second read would get stuck too; an erasure leaves the payload alone.
        return role is Role.WRITE or (role is Role.READ and stuck)
    return True


class Timer:
    """Gives a call up when one of its file operations takes too long; for the event loop."""

    def __init__(self, call: Call, limit_s: float | None) -> None:
        """Start; `None` is no limit."""
        self._call = call
        self._limit_s = limit_s
        self._handle: asyncio.TimerHandle | None = None
        if limit_s is not None:
            self._handle = asyncio.get_running_loop().call_later(limit_s, self._check, limit_s)

    def stop(self) -> None:
        """Look no more."""
        if self._handle is not None:
            self._handle.cancel()

    def _check(self, limit_s: float) -> None:
        left = limit_s - self._call.age()
        if left > 0:
            loop = asyncio.get_running_loop()
            self._handle = loop.call_later(left, self._check, limit_s)
        else:
            what = f"the disk did not answer within io_timeout_s={limit_s:g} s"
            self._call.give_up(TimeoutError(errno.ETIMEDOUT, what))


async def wait_for(done: Future[None]) -> None:
    """Wait for a future of another thread without ever cancelling it."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()

    def tell(_: Future[None]) -> None:
        with suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(event.set)

    done.add_done_callback(tell)
    await event.wait()
