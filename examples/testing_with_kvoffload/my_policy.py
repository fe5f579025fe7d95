"""An eviction policy of yours: what was used once leaves before what was used again."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kvoffload import ConfigError, Key, Retention


class UsedAgain:
    """Two queues a level, each least recently used: blocks used once, and blocks used more often.

    A block that moves to another level starts anew.
    """

    def __init__(self) -> None:
        self._levels: list[tuple[dict[Key, None], dict[Key, None]]] = []
        self._uses: dict[Key, int] = {}

    def attach(self, capacities: Sequence[int]) -> None:
        """Serve one manager."""
        if self._levels:
            raise ConfigError("this policy serves another manager already")
        self._levels = [({}, {}) for _ in capacities]

    def admit(
        self,
        keys: Sequence[Key],
        level: int,
        *,
        chain: Sequence[Key] = (),
        pinned: Collection[Key] = (),
        retention: Retention | None = None,
    ) -> Collection[Key]:
        """Let everything in."""
        return keys

    def insert(self, keys: Sequence[Key], level: int) -> None:
        """Queue a chain, tail first: of one call the head leaves last."""
        once, _ = self._levels[level]
        for key in reversed(keys):
            once[key] = None
            self._uses[key] = 0

    def remove(self, keys: Sequence[Key], level: int) -> None:
        """Forget what left."""
        for key in keys:
            del self._uses[key]
            for queue in self._levels[level]:
                queue.pop(key, None)

    def use(self, keys: Sequence[Key], *, retention: Retention | None = None) -> None:
        """Move a chain to the end of its queues, tail first."""
        for key in reversed(keys):
            if key in self._uses:
                self._uses[key] += 1
                for once, again in self._levels:
                    if key in once or key in again:
                        once.pop(key, None)
                        again.pop(key, None)
                        (once if self._uses[key] == 1 else again)[key] = None

    def victims(self, level: int, count: int, pinned: Collection[Key]) -> list[Key]:
        """Return what was used least, and longest ago."""
        once, again = self._levels[level]
        return [key for key in (*once, *again) if key not in pinned][:count]

    def unpinned(self, keys: Sequence[Key]) -> None:
        """Do nothing, for nothing was set aside."""
