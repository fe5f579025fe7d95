"""How long reads of a tier take, learned from those that were made."""

from __future__ import annotations

DECAY = 0.95
"""What a read still weighs after the next one: some twenty of them count."""


class Meter:
    """A line through the times of recent reads: a time for each call, and one for each byte.

    The bytes of a call are those that were under way before it too, for it queues behind them.
    Weighted least squares, the weights falling off with each call.
    """

    __slots__ = ("_bytes", "_calls", "_products", "_seconds", "_squares")

    def __init__(self) -> None:
        self._calls = 0.0
        self._bytes = 0.0
        self._seconds = 0.0
        self._squares = 0.0
        self._products = 0.0

    def note(self, size: int, seconds: float) -> None:
        """Note a call: the bytes that it had to wait for, its own included, and its time."""
        self._calls = DECAY * self._calls + 1
        self._bytes = DECAY * self._bytes + size
        self._seconds = DECAY * self._seconds + seconds
        self._squares = DECAY * self._squares + size * size
        self._products = DECAY * self._products + size * seconds

    def expect(self, size: int) -> float:
        """Return the seconds that a call for so many bytes would take; 0 while nothing is known."""
        if not self._calls or not size:
            return 0.0
        latency, byte_s = self._line()
        return latency + size * byte_s

    @property
    def latency_s(self) -> float:
        """Seconds of a call, whatever its size."""
        return self._line()[0] if self._calls else 0.0

    @property
    def bytes_per_s(self) -> float:
        """Bytes a second beyond that; 0 while nothing is known."""
        byte_s = self._line()[1] if self._calls else 0.0
        return 1 / byte_s if byte_s else 0.0

    def _line(self) -> tuple[float, float]:
        mean_size, mean_s = self._bytes / self._calls, self._seconds / self._calls
        spread = self._squares / self._calls - mean_size * mean_size
        byte_s = 0.0
        if spread > 1e-6 * mean_size * mean_size:
            shared = self._products / self._calls - mean_size * mean_s
            byte_s = max(0.0, shared / spread)
        elif mean_size:
            byte_s = mean_s / mean_size  # calls of one size: as if each byte took its share
        latency = mean_s - byte_s * mean_size
        if latency < 0:
            return 0.0, mean_s / mean_size
        return latency, byte_s
