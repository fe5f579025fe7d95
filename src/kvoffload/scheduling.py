"""Have the system run this thread like one that computes, after those that mostly sleep."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading

SLICE_S = 0.01
"""Seconds that such a thread asks to run at a stretch; Linux's own default is some 1 to 3 ms."""


def step_aside() -> None:
    """Let others that wake up, as an event loop does, run before this thread goes on.

    It keeps its share of the processor and has it in longer pieces: `SCHED_BATCH`, and from Linux
    6.12 a longer slice too, which is what lets a shorter one break in. Otherwise a loop's timer
    waits until a thread that copies megabytes has had its whole slice. Where a system has nothing
    of the kind, nothing happens.
    """
    if sys.platform != "linux":
        return
    try:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    except OSError:  # a sandbox may forbid it
        return
    number = _SCHED_SETATTR.get(platform.machine())
    if number is not None:
        attributes = _Attributes(
            size=ctypes.sizeof(_Attributes),
            policy=os.SCHED_BATCH,
            nice=nice,
            runtime_ns=int(SLICE_S * 1e9),
        )
        ctypes.CDLL(None).syscall(number, 0, ctypes.byref(attributes), 0)


class _Attributes(ctypes.Structure):
    """`struct sched_attr` of sched_setattr(2), which Python doesn't offer."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime_ns", ctypes.c_uint64),
        ("deadline_ns", ctypes.c_uint64),
        ("period_ns", ctypes.c_uint64),
    )


_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
"""The system call's number by kind of processor; glibc has a function for it only since 2.41."""
