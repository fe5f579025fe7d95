"""`MooncakeTier` while it connects, without a store: the moments that a server seldom brings about.

What it connects to here is no library, and counts the memory that it was lent.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import anyio
import pytest

from kvoffload import ClosedError, MooncakeTier
from kvoffload.keys import encode_key
from kvoffload.remote import mooncake, mooncake_client
from kvoffload.testing import eventually

KEYS = [encode_key("block", "")]


class Library:
    """What a tier asks of a store before it has moved anything."""

    def __init__(self) -> None:
        self.segments = 0

    def allocate_and_mount_segment(self, size: int, protocol: str) -> Mapping[str, Any]:
        self.segments += 1
        return {"ret": 0, "segment_ids": ["segment"]}

    def unmount_and_free_segment(self, segment_ids: list[str]) -> int:
        self.segments -= 1
        return 0

    def batch_is_exist(self, keys: list[str]) -> list[int]:
        return [0] * len(keys)


class Door:
    """A master that lets in who knocks when the test says so, one after the other."""

    def __init__(self) -> None:
        self.knocking: list[asyncio.Event] = []

    async def knock(self, address: mooncake_client.Address) -> str:
        opened = asyncio.Event()
        self.knocking.append(opened)
        await opened.wait()
        return "127.0.0.1"


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    monkeypatch.setattr(mooncake_client, "_set_up", lambda *_: library)
    monkeypatch.setattr(mooncake_client, "_connections", {})
    return library


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Door:
    door = Door()
    monkeypatch.setattr(mooncake, "knock", door.knock)
    return door


def open_tier() -> MooncakeTier:
    """Return a tier that is open and has no client, as after a master that did not answer."""
    tier = MooncakeTier("mooncake://master?segment=1MiB")
    tier._is_open = True
    return tier


async def test_closed_while_it_makes_sure_of_the_master(door: Door, library: Library) -> None:
    """Nothing is connected afterwards: a closed tier had threads, and lent memory for good."""
    tier = open_tier()
    with anyio.fail_after(10):
        finding = asyncio.create_task(tier.find(KEYS))
        await eventually(lambda: len(door.knocking) == 1)
        await tier.close()
        door.knocking[0].set()
        with pytest.raises(ClosedError):
            await finding
    assert not library.segments


async def test_two_calls_make_one_client(door: Door, library: Library) -> None:
    """The first is connected before the second got its answer, which then made another.

    That one took the place of the first, which nobody closed.
    """
    tier = open_tier()
    with anyio.fail_after(10):
        finding = [asyncio.create_task(tier.find(KEYS)) for _ in range(2)]
        await eventually(lambda: len(door.knocking) == 2)
        for answer, found in zip(door.knocking, finding, strict=True):
            answer.set()
            assert await found == [None]
        assert library.segments == 1
        await tier.close()
        await eventually(lambda: not library.segments)


def test_a_fork_while_another_thread_connects() -> None:
    """That thread has the lock, and is not there to let go of it: the child never connected."""
    code = """
import os
from kvoffload.remote import mooncake_client
mooncake_client._lock.acquire()
child = os.fork()
if not child:
    os._exit(mooncake_client._lock.locked())
os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
