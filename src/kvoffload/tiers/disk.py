"""Blocks in the files of one directory, which outlive the process."""

from __future__ import annotations

import asyncio
import errno
import operator
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from weakref import WeakSet

from ..checks import check_count, check_seconds
from ..errors import (
    ClosedError,
    ConfigError,
    TierError,
    TierLockedError,
    TierTimeoutError,
    TierUnavailableError,
)
from ..keys import MAX_KEY_BYTES
from ..storage.breaker import Breaker
from ..storage.calls import Call, WatchedFiles
from ..storage.cipher import MAX_PAYLOAD_BYTES, Cipher
from ..storage.files import FileLayer
from ..storage.os_errors import tier_error
from ..storage.recovery import RecoveryReport, Store
from ..storage.session import Limits, Role, Session
from ..types import ByteArray, Medium, StoredBlock, TierState
from .geometry import check_geometry


class DiskTier:
    """Keeps blocks in the files of one directory, checks them when read, finds them again later.

    File calls go through aiofiles to threads of the tier's own, a whole batch in one hop, reads
    before writes; neighbouring slots move in one vectored call, and threads that are idle take a
    part of a large batch. A caller that is cancelled returns at once, and its batch goes on to its
    end, with the caller's buffers: don't reuse them before `close`. The same holds for a batch
    that took too long (`TierTimeoutError`); a slot that such a batch still has is refused to
    others until it is back.

    One opener at a time has the directory. A forked child has no part in it.

    When writes fail over and over, the tier refuses them for a while (`state` is `READ_ONLY`) and
    then tries one again; it goes on to read. Where the file system has no space for another slot,
    it still writes those that it wrote before (`state` is `FULL`).

    Args:
        path: Directory of the tier and nothing else; made if need be, for its owner alone.
        num_blocks: Slots, at most 2**32 - 1. More than the directory was made with is growth;
            with fewer, the most recent blocks stay.
        block_bytes: Bytes of a slot; must be what the directory was made with.
        name: Unique among the tiers of one manager.
        fsync: When payloads and records are forced to the disk: `"flush"`, by `flush` and
            `close`; `"always"`, also before each `write` and `erase` returns. There is no
            `"never"`, for then `flush` could not keep its promise.
        direct_io: Whether payloads bypass the page cache, which leaves the memory to the tiers
            above: `"auto"` where the file system takes it and slots are multiples of 4096 bytes
            (blocks of 32 KiB and more have such slots); `"on"`, or an error from `open`; `"off"`.
            Buffers at addresses and of sizes that are multiples of 4096 save a copy.
        io_threads: Most calls at once; by default as many as there are cores, but two to four.
        io_timeout_s: Seconds that one file operation may take; `None` for any time.
        min_free_bytes: Bytes that must stay free on the file system: no new slot is written where
            it would leave less.
        encryption_key: 32 random bytes, to encrypt payloads and keys with AES-256-GCM; needs the
            extra `encryption`. A directory is encrypted from its first opening on, or never.

    Attributes:
        file_layer: The file calls; tests replace it before `open`.
        close_timeout_s: Seconds that `close` waits for calls under way and for the last sync.
        write_breaker: Decides when failing writes are refused and tried again.
        growth_breaker: The same for slots that there was no space for.

    Raises:
        ConfigError: A setting is wrong.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        num_blocks: int,
        block_bytes: int,
        *,
        name: str = "cold",
        fsync: str = "flush",
        direct_io: str = "auto",
        io_threads: int | None = None,
        io_timeout_s: float | None = 30.0,
        min_free_bytes: int = 0,
        encryption_key: bytes | None = None,
    ) -> None:
        given: object = path  # whatever the annotation says
        if not isinstance(given, str | os.PathLike) or not str(path) or "\0" in str(path):
            raise ConfigError(f"path must be a str or Path and not empty, not {path!r}")
        check_geometry(num_blocks, block_bytes, name)
        _check_choice("fsync", fsync, ("flush", "always"))
        _check_choice("direct_io", direct_io, ("auto", "on", "off"))
        self._path = Path(path)
        self._num_blocks = _check_count("num_blocks", num_blocks, 2**32 - 1)
        self._block_bytes = _check_count("block_bytes", block_bytes, 2**40)
        self._name = name
        self._direct_io = direct_io
        self._new_cipher: Callable[[], Cipher] | None = None
        if encryption_key is not None:
            Cipher(encryption_key)  # a wrong one is refused now
            key = bytes(encryption_key)
            self._new_cipher = lambda: Cipher(key)  # where no dump of attributes shows the key
            if block_bytes > MAX_PAYLOAD_BYTES:
                raise ConfigError(
                    f"with encryption_key, block_bytes is at most {MAX_PAYLOAD_BYTES}, "
                    f"not {block_bytes}"
                )
        self._limits = Limits(
            io_threads=None if io_threads is None else _check_count("io_threads", io_threads, 256),
            io_timeout_s=io_timeout_s
            and check_seconds("io_timeout_s", io_timeout_s, positive=True),
            min_free_bytes=check_count("min_free_bytes", min_free_bytes, least=0),
            sync_always=fsync == "always",
        )
        self._session: Session | None = None
        self.file_layer = FileLayer()
        self.close_timeout_s = 60.0
        self.write_breaker = Breaker(failures=3)
        self.growth_breaker = Breaker(failures=1)

    def __repr__(self) -> str:
        state = "open" if self._session is not None and self._session.serving else "closed"
        return (
            f"<DiskTier {self._name!r} in {str(self._path)!r}: "
            f"{self._num_blocks} blocks of {self._block_bytes} bytes, {state}>"
        )

    def __del__(self) -> None:
        session = getattr(self, "_session", None)
        if session is not None and session.serving:
            warnings.warn(f"{self!r} was not closed", ResourceWarning, source=self, stacklevel=1)

    @property
    def name(self) -> str:
        """Unique among the tiers of one manager."""
        return self._name

    @property
    def medium(self) -> Medium:
        """`Medium.DISK`."""
        return Medium.DISK

    @property
    def num_blocks(self) -> int:
        """Slots, numbered from 0."""
        return self._num_blocks

    @property
    def block_bytes(self) -> int:
        """Bytes of a slot."""
        return self._block_bytes

    @property
    def addressable(self) -> bool:
        """False: blocks are read and written."""
        return False

    @property
    def persistent(self) -> bool:
        """True: blocks are there again after the next `open`."""
        return True

    @property
    def path(self) -> Path:
        """Directory of the tier."""
        return self._path

    @property
    def state(self) -> TierState:
        """What the tier can do at the moment."""
        if self.write_breaker.is_open:
            return TierState.READ_ONLY
        return TierState.FULL if self.growth_breaker.is_open else TierState.SERVING

    @property
    def direct(self) -> bool:
        """Whether payloads bypass the page cache; known once it is open."""
        return self._session is not None and self._session.direct

    @property
    def recovery(self) -> RecoveryReport | None:
        """What the last `open` found; `None` before it."""
        return None if self._session is None else self._session.report

    async def open(self) -> list[StoredBlock]:
        """Lock the directory, repair it if need be, and return its blocks, coldest first.

        After a clean close that is the order given to `close`, with the slots that it didn't name
        first; after a crash it is the order of writing. If this fails, nothing stays open or
        locked; if it is cancelled, the same as soon as its thread is done.

        Raises:
            TierLockedError: Another opener has it; names its process.
            ConfigError: What is there has another geometry or format, or is no directory; or
                direct I/O must be used, and can't.
            TierError: The operating system refused.
        """
        if self._session is not None and not self._session.released:
            raise TierLockedError(
                f"tier {self._name!r}: {self._path} is in use by process {os.getpid()} (this "
                "one): this very tier is open, or not closed yet",
                tier=self._name,
            )
        _watch_forks()
        files, path = WatchedFiles(self.file_layer), self._path

        def store() -> Store:  # on a thread, for to make a path absolute asks the system
            return Store(
                files,
                path.absolute(),
                self._block_bytes,
                direct_io=self._direct_io,
                # A new one each time: two sessions must not encrypt with the same salt.
                cipher=self._new_cipher() if self._new_cipher else None,
            )

        session = self._session = Session(
            self._name,
            store,
            self._limits,
            writes=self.write_breaker,
            growth=self.growth_breaker,
        )
        _SESSIONS.add(session)
        try:
            with self._telling("can't open"):
                found = await session.run(partial(session.start, self._num_blocks), role=Role.OPEN)
        except BaseException:
            session.closing = True
            session.threads.retire()
            raise
        session.serving = True
        return found

    async def close(self, order: Sequence[int] = ()) -> None:
        """Wait for calls under way, make everything durable, keep the order, let go.

        Idempotent; a second caller waits for the first. However it ends, cancelled too, files are
        closed and the lock is free as soon as the last call under way is done.

        Args:
            order: Slots in use, coldest first. Blocks in other slots stay too, as the coldest.

        Raises:
            TierUnavailableError: Calls were still under way after `close_timeout_s`.
            TierError: Not all could be made durable; it counts as a crash.
        """
        session = self._session
        if session is None or session.released:
            return
        try:
            async with asyncio.timeout(self.close_timeout_s):
                with self._telling("can't close in good order"):
                    if session.closing:
                        await session.let_go()
                    else:
                        session.closing, session.serving = True, False
                        await session.run(partial(session.finish, tuple(order)), role=Role.CLOSE)
        except TimeoutError as exc:
            kind = TierTimeoutError if isinstance(exc, TierTimeoutError) else TierUnavailableError
            why = exc.__cause__ or f"close_timeout_s={self.close_timeout_s:g} are over"
            raise kind(
                f"tier {self._name!r}: calls are still under way ({why}); "
                f"{self._path} stays locked until they end",
                tier=self._name,
            ) from exc
        finally:
            session.threads.retire()

    def view(self, slot: int, size: int) -> ByteArray:
        """Raise `TypeError`: a disk's slots have no addresses; use `read` and `write`."""
        raise TypeError(f"tier {self._name!r} is on disk and has no views: read its slots")

    async def read(
        self, slots: Sequence[int], into: Sequence[memoryview]
    ) -> list[TierError | None]:
        """Fill each buffer from its slot and check the bytes; any order of slots will do.

        Returns:
            One outcome a slot. `CorruptBlockError` where bytes are wrong or gone: what the buffer
            holds then is no payload, and the record stays until the slot is erased or written.
            `TierError` where the slot holds no block, or one of another size than the buffer.

        Raises:
            ClosedError: The tier isn't open.
            ConfigError: A slot or buffer is not usable; nothing was read.
        """
        session = self._serving()
        checked = self._check_slots(slots, into)
        buffers = [_flat(buffer, "a buffer to read into", writable=True) for buffer in into]
        if not checked:
            return []
        outcomes = await self._outcomes(
            session,
            partial(session.read, checked, buffers),
            checked,
            Role.READ,
        )
        return self._tell(checked, outcomes, "can't read slot", payload=True)

    async def write(
        self, slots: Sequence[int], payloads: Sequence[memoryview], keys: Sequence[bytes]
    ) -> list[TierError | None]:
        """Write each payload and its key to its slot, replacing what was there.

        Counts as writing them one after the other: after a crash, the last is the most recent.
        Payloads must not change until this returns.

        Returns:
            One outcome a slot; one with an error holds no block any more or, where its record
            could not be changed at all, the block from before. After a crash it may show the new
            one too, unless the slot was erased or written since.

        Raises:
            ClosedError: The tier isn't open.
            ConfigError: A slot, payload or key is not usable; nothing was written.
        """
        session = self._serving()
        checked = self._check_slots(slots, payloads, keys)
        if len(set(checked)) < len(checked):
            raise ConfigError(f"a slot can be written once a call: {checked}")
        views = [_flat(payload, "a payload") for payload in payloads]
        self._check_content(views, keys)
        if not checked:
            return []
        sequence = session.next_sequence
        session.next_sequence += len(checked)
        outcomes = await self._outcomes(
            session,
            partial(session.write, checked, views, tuple(keys), sequence),
            checked,
            Role.WRITE,
        )
        if any(isinstance(outcome, TimeoutError) for outcome in outcomes):
            self.write_breaker.failed()
        return self._tell(checked, outcomes, "can't write slot")

    async def erase(self, slots: Sequence[int]) -> None:
        """Forget these slots' blocks: they don't come back after a crash of the process.

        Nor after a power loss once `flush` returned. Slots without a block are no error.

        Raises:
            ClosedError: The tier isn't open.
            ConfigError: There is no such slot; nothing was erased.
            TierError: Some could not be erased; the message names them, the others are.
        """
        session = self._serving()
        checked = self._check_slots(slots)
        if not checked:
            return
        with self._telling("can't make sure that erased blocks stay so"):
            outcomes = await session.run(
                partial(session.erase, checked), slots=checked, role=Role.ERASE
            )
        failed = {slot: error for slot, error in zip(checked, outcomes, strict=True) if error}
        for error in failed.values():
            raise tier_error(error, self._name, f"can't erase slots {sorted(failed)}")

    async def flush(self) -> None:
        """Make every `write` and `erase` that has returned survive a power loss.

        Raises:
            ClosedError: The tier isn't open.
            TierError: It could not be made sure, nor can it be until the tier is reopened: what
                the system failed to write, it forgets.
        """
        session = self._serving()
        with self._telling("can't make blocks survive a power loss"):
            await session.run(session.flush, role=Role.SYNC)

    async def _outcomes(
        self,
        session: Session,
        work: Callable[[list[OSError | None], Call], None],
        slots: list[int],
        role: Role,
    ) -> list[OSError | None]:
        """Run a call that finds one outcome a slot; those that it doesn't get to share its own."""
        outcomes: list[OSError | None] = [_UNKNOWN] * len(slots)
        try:
            await session.run(partial(work, outcomes), slots=slots, role=role)
        except OSError as exc:
            return [exc if outcome is _UNKNOWN else outcome for outcome in list(outcomes)]
        return outcomes

    def _serving(self) -> Session:
        session = self._session
        if session is None or not session.serving:
            raise ClosedError(f"tier {self._name!r} is not open")
        return session

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """Turn the operating system's errors into the tier's."""
        try:
            yield
        except OSError as exc:
            raise tier_error(exc, self._name, what) from exc

    def _tell(
        self, slots: list[int], outcomes: list[OSError | None], what: str, *, payload: bool = False
    ) -> list[TierError | None]:
        if not any(outcomes):
            return [None] * len(outcomes)
        return [
            None
            if error is None
            else tier_error(error, self._name, f"{what} {slot}", payload=payload)
            for slot, error in zip(slots, outcomes, strict=True)
        ]

    def _check_content(self, views: Sequence[memoryview], keys: Sequence[bytes]) -> None:
        longest = max(map(len, views), default=0)
        if longest > self._block_bytes:
            raise ConfigError(
                f"a payload has at most block_bytes={self._block_bytes} bytes, not {longest}"
            )
        for key in keys:
            if type(key) is not bytes or len(key) > MAX_KEY_BYTES:
                raise ConfigError(f"a key is at most {MAX_KEY_BYTES} bytes, not {key!r}")

    def _check_slots(self, slots: Sequence[int], *columns: Sequence[object]) -> list[int]:
        checked = [operator.index(slot) for slot in slots]
        for column in columns:
            if len(column) != len(checked):
                raise ConfigError(f"{len(checked)} slots, but {len(column)} that belong to them")
        if checked and not 0 <= min(checked) <= max(checked) < self._num_blocks:
            wrong = [slot for slot in checked if not 0 <= slot < self._num_blocks]
            raise ConfigError(f"slots are 0 to {self._num_blocks - 1}, not {wrong[0]}")
        return checked


def _flat(buffer: memoryview, what: str, *, writable: bool = False) -> memoryview:
    """Return a flat view of the bytes, as the file calls want it."""
    if (
        type(buffer) is memoryview
        and buffer.format == "B"
        and buffer.ndim == 1
        and buffer.c_contiguous
        and not (writable and buffer.readonly)
    ):
        return buffer  # as nearly all are, of batches of thousands
    try:
        view = memoryview(buffer)
        if not view.nbytes:
            return memoryview(b"")
        flat = view.cast("B") if view.ndim != 1 or view.format != "B" else view
    except TypeError as exc:
        raise ConfigError(f"{what} must be contiguous bytes: {exc}") from exc
    if not flat.c_contiguous or (writable and flat.readonly):
        raise ConfigError(f"{what} must be contiguous{' and writable' if writable else ''}")
    return flat


def _check_count(setting: str, value: int, most: int) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise ConfigError(f"{setting} must be an integer from 1 to {most}, not {value!r}")
    return value


def _check_choice(setting: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        allowed = ", ".join(map(repr, choices))
        raise ConfigError(f"{setting} must be one of {allowed}, not {value!r}")


@cache
def _watch_forks() -> None:
    """See to it, once, that a forked child keeps neither files nor locks of its parent's."""
    os.register_at_fork(after_in_child=_forget_in_child)


def _forget_in_child() -> None:
    for session in list(_SESSIONS):
        session.abandon()


_UNKNOWN = OSError(errno.EINPROGRESS, "not known yet")
_SESSIONS: WeakSet[Session] = WeakSet()
