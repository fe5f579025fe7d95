"""When to stop trying what keeps failing, and when to try again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic


class Breaker:
    """Opens after some failures in a row; then lets one attempt through now and again.

    If that fails, the time until the next doubles, from `retry_s` to `most_retry_s` seconds; any
    success closes it. Failures of what was under way when it opened say nothing new.
    """

    def __init__(
        self,
        failures: int,
        *,
        retry_s: float = 1.0,
        most_retry_s: float = 60.0,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """Say how many failures in a row open it."""
        self._failures = failures
        self._retry_s = retry_s
        self._most_retry_s = most_retry_s
        self._clock = clock
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._delay = 0.0
        self._retry_at: float | None = None  # None while closed
        self._trying = False  # an attempt was let through, and its failure is not known yet

    @property
    def is_open(self) -> bool:
        """Whether an attempt would be refused now."""
        retry_at = self._retry_at
        return retry_at is not None and self._clock() < retry_at

    @property
    def is_closed(self) -> bool:
        """Whether all is well, as far as is known."""
        return self._retry_at is None

    def allows(self) -> bool:
        """Say whether to try; while open, true for one caller each time that the delay is over."""
        if self._retry_at is None:
            return True
        with self._lock:
            if self._retry_at is not None:
                if self._clock() < self._retry_at:
                    return False
                self._retry_at = self._clock() + self._delay
                self._trying = True
        return True

    def failed(self) -> bool:
        """Note a failure; say whether that opened it."""
        with self._lock:
            self._in_a_row += 1
            if self._in_a_row < self._failures:
                return False
            opened = self._retry_at is None
            if opened:
                self._delay = self._retry_s
            elif self._trying:
                self._delay = min(2 * self._delay, self._most_retry_s)
            else:
                return False
            self._trying = False
            self._retry_at = self._clock() + self._delay
            return opened

    def succeeded(self) -> bool:
        """Note a success; say whether that closed it."""
        if not self._in_a_row:
            return False
        with self._lock:
            self._in_a_row = 0
            closed = self._retry_at is not None
            self._retry_at = None
            self._trying = False
            return closed
