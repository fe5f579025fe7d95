"""Mooncake in `shared_tier.py`, through memory shared with a client on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from shared_engine import Engine
from shared_mooncake import Client, store

from kvoffload import MooncakeTier


@contextmanager
def engine(url: str | None) -> Iterator[Engine]:
    """Run a master and a storage node, or take the node at `url`."""
    if url is not None:
        yield Engine(Client(url), MooncakeTier(url))
        return
    with store() as (_, node):
        url = f"mooncake+shm://{node}"
        yield Engine(Client(url), MooncakeTier(url))
