"""The threads of a tier let the event loop go first, and keep their share of the processor."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from kvoffload.scheduling import SLICE_S, step_aside
from kvoffload.storage.calls import Call
from kvoffload.storage.threads import Threads

_T = TypeVar("_T")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such classes")


def in_a_thread(call: Callable[[], _T]) -> _T:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_the_thread_alone_becomes_a_batch_thread() -> None:
    def policy_after() -> int:
        step_aside()
        return os.sched_getscheduler(0)

    assert in_a_thread(policy_after) == os.SCHED_BATCH
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_its_weight_stays_what_it_was() -> None:
    def niceness_after() -> int:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 7)
        step_aside()
        return niceness()

    assert in_a_thread(niceness_after) == 7


def test_its_slice_is_longer_where_the_system_tells() -> None:
    def slice_after() -> str:
        step_aside()
        return Path("/proc/thread-self/sched").read_text()

    try:
        told = in_a_thread(slice_after)
    except FileNotFoundError:
        pytest.skip("this kernel doesn't tell")
    slices = [line.split()[-1] for line in told.splitlines() if line.startswith("se.slice")]
    if not slices:
        pytest.skip("this kernel's slices are not settable")
    assert float(slices[0]) == SLICE_S * 1e9


def test_a_system_that_forbids_it_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sandbox answers EPERM: the tier works on as before."""

    def forbid(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    def policy_after() -> int:
        step_aside()
        return os.sched_getscheduler(0)

    monkeypatch.setattr(os, "sched_setscheduler", forbid)
    assert in_a_thread(policy_after) == os.SCHED_OTHER


async def test_a_tiers_threads_step_aside() -> None:
    threads = Threads(1, "test", lambda: None)
    try:
        policy = await Call(threads).submit(lambda: os.sched_getscheduler(0))
    finally:
        threads.retire()
    assert policy == os.SCHED_BATCH
