"""What an engine brings to `shared_tier.py`: its client driven bare, and a tier beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from kvoffload import RemoteTier

BLOCK_BYTES = 2 * 1024 * 1024
BATCH_BLOCKS = 16


class BareClient(Protocol):
    """An engine's client as its users drive it for speed: no checksums, no headers."""

    async def open(self) -> None:
        """Connect."""

    async def close(self) -> None:
        """Let go."""

    async def put(self, names: Sequence[str], payloads: Sequence[bytes]) -> None:
        """Write values that are not there."""

    async def get(self, names: Sequence[str]) -> None:
        """Read values of `BLOCK_BYTES`, and look at no byte of them."""

    async def delete(self, names: Sequence[str]) -> None:
        """Delete them."""


@dataclass(frozen=True)
class Engine:
    """Two ways to one server."""

    bare: BareClient
    tier: RemoteTier


EngineMaker = Callable[[str | None], AbstractContextManager[Engine]]
"""Runs a server, or takes one that is there by its URL, while it is measured."""
