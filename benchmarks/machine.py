"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def describe_machine(path: Path) -> dict[str, str]:
    """Return processor, cores, kernel, Python, and the file system of a path."""
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "file system": file_system(path),
    }


def file_system(path: Path) -> str:
    """Return type and device of what is mounted nearest above a path, as `ext4 on /dev/sda1`."""
    place = path.resolve()
    nearest, found = Path(), "unknown"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        about, _, source = line.partition(" - ")
        kind, device, *_ = source.split()
        mounted = Path(about.split()[4].replace("\\040", " "))
        # A later mount at the same place hides the earlier one.
        if place.is_relative_to(mounted) and len(mounted.parts) >= len(nearest.parts):
            nearest, found = mounted, f"{kind} on {device}"
    return found


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
