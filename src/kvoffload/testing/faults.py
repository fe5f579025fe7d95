"""What can go wrong in a `FaultyTier`: one small object for each kind of trouble."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Literal, Self, TypeAlias

import anyio

from ..errors import TierError
from ..types import BlockHash
from .clock import ManualClock

Operation: TypeAlias = Literal["open", "read", "write", "erase", "flush", "close"]
"""A coroutine of a `Tier`."""

OPERATIONS: tuple[Operation, ...] = ("open", "read", "write", "erase", "flush", "close")
SLOT_OPERATIONS: tuple[Operation, ...] = ("read", "write", "erase")


class Fault:
    """Trouble for some calls of one operation, until it has struck often enough or is stopped.

    As a context manager it stops on leaving.

    Attributes:
        operation: The operation.
        triggered: Calls that it struck so far.
    """

    def __init__(
        self,
        operation: Operation,
        *,
        times: int | None,
        after: int = 0,
        slots: Collection[int] | None = None,
    ) -> None:
        if operation not in OPERATIONS:
            raise ValueError(f"operation must be one of {OPERATIONS}, not {operation!r}")
        if slots is not None and operation not in SLOT_OPERATIONS:
            raise ValueError(f"{operation!r} concerns no slots, so none can be chosen")
        if after < 0 or (times is not None and times < 1):
            raise ValueError(f"after={after} must be at least 0, times={times} at least 1 or None")
        self.operation: Operation = operation
        self.triggered = 0
        self._times = times
        self._let_pass = after
        self._slots = None if slots is None else frozenset(slots)
        self._stopped = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.operation!r}, struck {self.triggered} times>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Strike no more."""
        self._stopped = True

    def strikes(self, operation: Operation, slots: Sequence[int]) -> bool:
        """Say, and count, whether a call that begins now is struck."""
        if self._stopped or operation != self.operation:
            return False
        if self._slots is not None and self._slots.isdisjoint(slots):
            return False
        if self._let_pass:
            self._let_pass -= 1
            return False
        if self._times is not None and self.triggered == self._times:
            return False
        self.triggered += 1
        return True

    def concerns(self, slot: int) -> bool:
        """Whether a struck call is struck in this slot."""
        return self._slots is None or slot in self._slots

    async def wait(self) -> None:
        """Hold a struck call up before it does anything."""


class Failure(Fault):
    """Calls, or chosen slots of them, that fail with an error."""

    def __init__(
        self,
        operation: Operation,
        error: Exception | type[TierError],
        *,
        times: int | None,
        after: int,
        slots: Collection[int] | None,
    ) -> None:
        super().__init__(operation, times=times, after=after, slots=slots)
        self.error = error

    def outcome(self, tier: str, block_hash: BlockHash | None = None) -> TierError:
        """Return the error as a tier reports it.

        Raises:
            Exception: The error itself, where a tier would not report it but break with it.
        """
        error = self.error
        if isinstance(error, TierError):
            return error
        if isinstance(error, type):
            return error(
                f"{self.operation} fails, for the test says so", tier=tier, block_hash=block_hash
            )
        if not isinstance(error, OSError):
            raise error
        wrapped = TierError(f"{self.operation} failed: {error}", tier=tier, block_hash=block_hash)
        wrapped.__cause__ = error
        return wrapped


class Hang(Fault):
    """Calls that don't return until `release`.

    Attributes:
        entered: Set as soon as the first call hangs.
        waiting: Calls that hang now.
    """

    def __init__(
        self,
        operation: Operation,
        *,
        times: int | None,
        after: int,
        slots: Collection[int] | None,
        stubborn: bool,
    ) -> None:
        super().__init__(operation, times=times, after=after, slots=slots)
        self.entered = anyio.Event()
        self.waiting = 0
        self._released = anyio.Event()
        self._stubborn = stubborn

    def release(self) -> None:
        """Let the calls that hang go on, and later ones pass."""
        self._released.set()

    def stop(self) -> None:
        """Strike no more, and let go what hangs."""
        super().stop()
        self.release()

    async def wait(self) -> None:
        """Hold the call up until `release`."""
        self.entered.set()
        self.waiting += 1
        try:
            if self._stubborn:
                await self._outlast_cancellation()
            else:
                await self._released.wait()
        finally:
            self.waiting -= 1

    async def _outlast_cancellation(self) -> None:
        # The shield keeps scopes away, but task.cancel() pierces it; both arrive in the end.
        cancelled: BaseException | None = None
        with anyio.CancelScope(shield=True):
            while not self._released.is_set():
                try:
                    await self._released.wait()
                except anyio.get_cancelled_exc_class() as error:
                    cancelled = error
        if cancelled is not None:
            raise cancelled


class Delay(Fault):
    """Calls that take a while, on the test's clock."""

    def __init__(
        self,
        operation: Operation,
        seconds: float,
        clock: ManualClock,
        *,
        times: int | None,
        after: int,
        slots: Collection[int] | None,
    ) -> None:
        super().__init__(operation, times=times, after=after, slots=slots)
        self._seconds = seconds
        self._clock = clock

    async def wait(self) -> None:
        """Hold the call up until the clock was advanced far enough."""
        await self._clock.sleep(self._seconds)


class CutShort(Fault):
    """Reads and writes that move only the first bytes of a payload."""

    def __init__(
        self,
        operation: Literal["read", "write"],
        keep_bytes: int,
        *,
        times: int | None,
        after: int,
        slots: Collection[int] | None,
    ) -> None:
        super().__init__(operation, times=times, after=after, slots=slots)
        self.keep_bytes = keep_bytes


class FlippedByte(Fault):
    """Reads and writes that get one byte of a payload wrong."""

    def __init__(
        self,
        operation: Literal["read", "write"],
        offset: int,
        *,
        silent: bool,
        times: int | None,
        after: int,
        slots: Collection[int] | None,
    ) -> None:
        super().__init__(operation, times=times, after=after, slots=slots)
        self.silent = silent
        self._offset = offset

    def flip(self, payload: memoryview) -> None:
        """Invert one byte; an empty payload has none."""
        if len(payload):
            payload[self._offset % len(payload)] ^= 0xFF
