"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def describe_machine(path: Path) -> dict[str, str]:
    """Return processor, cores, kernel, Python, and the file system of a path."""
    return {
        "processor": _processor(),
        "cores": str(_cores()),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "file system": file_system(path),
    }


def file_system(path: Path) -> str:
    """Return type and device of what is mounted nearest above a path, as `ext4 on /dev/sda1`."""
    place = path.resolve()
    nearest, found = Path(), "unknown"
    for line in _lines(Path("/proc/self/mountinfo")):
        about, _, source = line.partition(" - ")
        kind, device, *_ = source.split()
        mounted = Path(about.split()[4].replace("\\040", " "))
        # A later mount at the same place hides the earlier one.
        if place.is_relative_to(mounted) and len(mounted.parts) >= len(nearest.parts):
            nearest, found = mounted, f"{kind} on {device}"
    return found


def _cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _lines(path: Path) -> list[str]:
    """Return the lines of a file that Linux alone has."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
