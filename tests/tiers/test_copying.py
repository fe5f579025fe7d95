"""Copies in memory when the system has no thread to give: made once, by somebody, in time."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kvoffload.copying import INLINE_COPY_BYTES, copy_now, copy_on_thread
from kvoffload.types import ByteArray

SIZE = INLINE_COPY_BYTES


def filled(value: int) -> ByteArray:
    return np.full(SIZE, value, np.uint8)


def no_thread(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


async def test_without_a_thread_the_loop_copies_and_nobody_does_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The executor kept the call that it refused, and made it into memory of another block."""
    executor = ThreadPoolExecutor(1)
    targets, sources = [filled(0), filled(0)], [filled(1), filled(2)]
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        await copy_on_thread(executor, targets, sources)
    assert [int(target[0]) for target in targets] == [1, 2]
    for target in targets:  # they belong to others now
        target[:] = 9
    await asyncio.get_running_loop().run_in_executor(executor, int)
    assert [int(target[0]) for target in targets] == [9, 9]
    executor.shutdown()


async def test_a_thread_that_there_is_makes_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two runs and is busy; the second can't be started: the first takes the call."""
    executor = ThreadPoolExecutor(2)
    go = threading.Event()
    busy = executor.submit(go.wait, 10)
    targets, sources = [filled(0)], [filled(3)]
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        await copy_on_thread(executor, targets, sources)
    assert int(targets[0][-1]) == 3
    targets[0][:] = 9
    go.set()
    await asyncio.wrap_future(busy)
    await asyncio.get_running_loop().run_in_executor(executor, int)
    assert int(targets[0][0]) == 9
    executor.shutdown()


async def test_with_threads_it_is_as_ever() -> None:
    targets, sources = [filled(0)], [filled(5)]
    await copy_on_thread(None, targets, sources)
    assert int(targets[0][0]) == 5


def test_a_copy_on_the_loop_does_not_hand_the_interpreter_to_others() -> None:
    """64 KiB took microseconds to copy, and milliseconds to get the lock back from I/O threads."""
    ran: list[float] = []
    may_run, stop = threading.Semaphore(0), threading.Event()

    def wait_for_the_lock() -> None:
        while not stop.is_set():
            may_run.acquire()
            ran.append(time.perf_counter())

    thread = threading.Thread(target=wait_for_the_lock)
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(100)  # nobody is interrupted
    try:
        targets, sources = [filled(0)], [filled(1)]
        inside = 0
        for _ in range(200):
            may_run.release()
            before = len(ran)
            copy_now(targets, sources)
            inside += len(ran) - before
            time.sleep(0)  # here it may
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        may_run.release()
        thread.join()
    assert not inside
    assert int(targets[0][-1]) == 1
    assert len(ran) > 1
