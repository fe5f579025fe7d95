"""Sizes as people write them, and what this machine has room for."""

from __future__ import annotations

import os
import re
import shutil
from fractions import Fraction
from pathlib import Path

from .errors import ConfigError

BOOKKEEPING_BYTES = 512
"""Memory that a manager takes for each block that it knows, about; more than its share of an
empty slot."""

_SIZE = re.compile(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]*)\s*", re.ASCII)
_UNITS = {
    "": 1,
    "B": 1,
    **dict.fromkeys(("K", "KIB"), 1 << 10),
    **dict.fromkeys(("M", "MIB"), 1 << 20),
    **dict.fromkeys(("G", "GIB"), 1 << 30),
    **dict.fromkeys(("T", "TIB"), 1 << 40),
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


def parse_size(text: str) -> int:
    """Return the bytes of a size like `65536`, `64KiB`, `1.5 GiB` or `2GB`.

    Raises:
        ConfigError: It is none, or no whole number of bytes.
    """
    match = _SIZE.fullmatch(text)
    factor = _UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise ConfigError(f"must be a size like 65536, 64KiB or 2 GiB, not {text!r}")
    size = Fraction(match[1]) * factor
    if size.denominator != 1:
        raise ConfigError(f"must be a whole number of bytes, not {text!r}")
    return int(size)


def human_bytes(number: int) -> str:
    """Return a number of bytes with a binary unit, three digits or so."""
    amount = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.3g} {unit}" if amount < 1000 else f"{amount:.0f} {unit}"
        amount /= 1024
    return f"{amount:,.1f} TiB"


def memory_needed(
    *, memory_blocks: int, cold_blocks: int, block_bytes: int, staging_bytes: int = 0
) -> int:
    """Return the bytes of memory that a manager takes when it is full, about.

    Args:
        memory_blocks: Slots of the tiers in memory.
        cold_blocks: Slots of the others; the manager knows their blocks too.
        block_bytes: Bytes of a slot.
        staging_bytes: Budget of the manager's buffers.
    """
    known = memory_blocks + cold_blocks
    return memory_blocks * block_bytes + known * BOOKKEEPING_BYTES + staging_bytes


def memory_of_machine() -> int | None:
    """Return the memory that this process may use at most, or `None` if that can't be found out.

    That is the machine's, or less in a container that is limited to less.
    """
    try:
        pages: int = os.sysconf("SC_PHYS_PAGES")
        total = pages * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    return min([total, *_limits_of_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def _limits_of_groups(membership: Path, root: Path) -> list[int]:
    """Return the limits of the control groups that this process is in, of either version."""
    limits: list[int] = []
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return limits
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            base, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        here = base / group.lstrip("/")
        # A container that sees its own group as the root names one that isn't there for it.
        for directory in (here, *here.parents):
            try:
                text = (directory / name).read_text().strip()
            except OSError:
                text = "max"
            if text.isdecimal():
                limits.append(int(text))
            if directory == base:
                break
    return limits


def room_on_disk(directory: Path) -> int | None:
    """Return what is free where a directory is or will be, and what it has already.

    `None` if that can't be found out: then the tier will say what is wrong with the directory.
    """
    try:
        mine = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    except OSError:
        return None
    free = free_on_disk(directory)
    return None if free is None else free + mine


def free_on_disk(directory: Path) -> int | None:
    """Return what is free where a directory is or will be; `None` if that can't be found out."""
    try:
        there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
        return shutil.disk_usage(there).free
    except OSError:
        return None
