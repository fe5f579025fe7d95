"""First in, first out."""

from __future__ import annotations

from collections.abc import Sequence

from ..retention import Retention
from ..types import Key
from .lru import LRUPolicy


class FIFOPolicy(LRUPolicy):
    """Evict what came longest ago, however often it was used since; admits everything."""

    name = "fifo"

    def use(self, keys: Sequence[Key], *, retention: Retention | None = None) -> None:
        """Change nothing."""
