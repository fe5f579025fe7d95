"""Reads and writes of the cold tier, in turns with bare calls that move the same bytes."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiofiles
import numpy as np
from contest import Contender, Contest, alternate
from xxhash import xxh3_64_intdigest

from kvoffload import ConfigError, DiskTier, TierError
from kvoffload.benching.raw_io import (
    KIB,
    MIB,
    Call,
    RawFile,
    Team,
    Way,
    make_blocks,
    same_bytes,
    sensible_ways,
    sync_names,
)


class NoDirectIOError(Exception):
    """The file system has no direct I/O: there is nothing to compare with."""


class DirectIORefusedError(Exception):
    """The file system has direct I/O, and the tier doesn't use it."""


@dataclass(frozen=True, slots=True)
class Work:
    """Blocks to move, and whether past the page cache."""

    num_blocks: int
    block_bytes: int
    direct: bool

    @property
    def mode(self) -> str:
        return "direct I/O" if self.direct else "page cache"

    def __str__(self) -> str:
        mib, rest = divmod(self.block_bytes, MIB)
        size = f"{self.block_bytes // KIB} KiB" if rest else f"{mib} MiB"
        return f"{self.num_blocks:,} blocks of {size}, {self.mode}"


@dataclass(frozen=True, slots=True)
class Bench:
    """What all measurements share.

    Attributes:
        place: Directory to work in.
        rounds: Times that each contender runs.
        runners: Event loops by name.
        teams: Threads of the bare calls.
        io_threads: Setting of the tier.
    """

    place: Path
    rounds: int
    runners: Mapping[str, asyncio.Runner]
    teams: Sequence[Team]
    io_threads: int | None = None

    @contextmanager
    def directory(self) -> Iterator[Path]:
        """Make a directory and remove it afterwards."""
        path = Path(tempfile.mkdtemp(dir=self.place))
        try:
            yield path
        finally:
            self.remove(path)

    def remove(self, path: Path) -> None:
        """Remove a directory or file, and be done with it before the next measurement starts."""
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        sync_names(path.parent)

    def raw_file(self, path: Path, work: Work) -> RawFile:
        """Open a file for bare calls."""
        try:
            return RawFile(path, direct=work.direct)
        except OSError as exc:
            if not work.direct:
                raise
            raise NoDirectIOError(f"the file system has no direct I/O: {exc}") from exc

    @contextmanager
    def tier(
        self, path: Path, work: Work, runner: asyncio.Runner, *, num_slots: int | None = None
    ) -> Iterator[DiskTier]:
        """Open a tier, by default with a slot for each block."""
        slots = num_slots or work.num_blocks
        mode = "on" if work.direct else "off"
        threads = self.io_threads
        try:
            tier = DiskTier(path, slots, work.block_bytes, direct_io=mode, io_threads=threads)
            runner.run(tier.open())
        except (ConfigError, TierError) as exc:
            if not work.direct:
                raise
            with self.raw_file(path.parent / "direct", work):
                pass  # so it isn't the file system's fault
            raise DirectIORefusedError(str(exc)) from exc
        try:
            if getattr(tier, "direct", work.direct) is not work.direct:
                raise DirectIORefusedError(f"asked for {work.mode}, the tier runs another")
            yield tier
        finally:
            runner.run(tier.close())


def read_contest(bench: Bench, work: Work) -> Contest:
    """Read blocks that are there; with the page cache, they are in it."""
    payloads = make_blocks(work.num_blocks, work.block_bytes, seed=1)
    into = make_blocks(work.num_blocks, work.block_bytes)
    with ExitStack() as stack:
        directory = stack.enter_context(bench.directory())
        file = stack.enter_context(bench.raw_file(directory / "raw", work))
        file.fill(payloads)
        raw = {
            name: _raw_reading(file, way) for name, way in sensible_ways(into, bench.teams).items()
        }
        ours: dict[str, Contender] = {}
        for loop, runner in bench.runners.items():
            tier = stack.enter_context(bench.tier(directory / loop, work, runner))
            runner.run(timed_write(tier, payloads))
            ours[f"tier, {loop}"] = tier_reading(runner, tier, into)
        others = {
            f"{name}, checked": _raw_reading(file, way, check=True)
            for name, way in sensible_ways(into, bench.teams, [work.block_bytes]).items()
        }
        if work.block_bytes < MIB and work.num_blocks <= 64 and not work.direct:
            runner = next(iter(bench.runners.values()))
            others["aiofiles, one open a block"] = _aiofiles_reading(
                runner, directory / "raw", work, payloads
            )
        for name, contender in {**raw, **ours}.items():
            for block in into:
                np.frombuffer(block, np.uint8)[:] = 0
            contender()
            assert same_bytes(into, payloads), f"{name}: other bytes than were written"
        return hold(payloads, bench.rounds, raw, ours, others)


def overwrite_contest(bench: Bench, work: Work) -> Contest:
    """Write over blocks that are there, and make it durable."""
    payloads = make_blocks(work.num_blocks, work.block_bytes, seed=1)
    with ExitStack() as stack:
        directory = stack.enter_context(bench.directory())
        file = stack.enter_context(bench.raw_file(directory / "raw", work))
        file.fill(payloads)
        ways = sensible_ways(payloads, bench.teams)
        raw = {name: _raw_overwriting(file, way) for name, way in ways.items()}
        ours: dict[str, Contender] = {}
        for loop, runner in bench.runners.items():
            tier = stack.enter_context(bench.tier(directory / loop, work, runner))
            runner.run(timed_write(tier, payloads))
            ours[f"tier, {loop}"] = tier_writing(runner, tier, payloads)
        return hold(payloads, bench.rounds, raw, ours)


def fresh_contest(bench: Bench, work: Work) -> Contest:
    """Write blocks into files that are new, and make it durable, with the names of the files."""
    payloads = make_blocks(work.num_blocks, work.block_bytes, seed=1)
    with bench.directory() as directory:
        # One size of calls: allocating the space is what makes a difference here.
        ways = sensible_ways(payloads, bench.teams, [8 * MIB])
        raw: dict[str, Contender] = {}
        for name, way in ways.items():
            for allocate in (False, True):
                what = f"{name}, allocated" if allocate else name
                raw[what] = _raw_making(bench, directory / "raw", work, way, allocate=allocate)
        ours: dict[str, Contender] = {}
        for loop, runner in bench.runners.items():
            making = tier_making(bench, directory / loop, work, runner, payloads)
            ours[f"tier, {loop}"] = making
        return hold(payloads, bench.rounds, raw, ours)


def hold(
    payloads: Sequence[memoryview],
    rounds: int,
    raw: Mapping[str, Contender],
    ours: Mapping[str, Contender],
    others: Mapping[str, Contender] | None = None,
) -> Contest:
    timings = alternate({**raw, **ours, **(others or {})}, rounds)
    return Contest(
        sum(map(len, payloads)),
        {name: timings[name] for name in raw},
        {name: timings[name] for name in ours},
        {name: timings[name] for name in others or {}},
    )


def _raw_reading(file: RawFile, way: Way, *, check: bool = False) -> Contender:
    """Read, and also compute the checksums that the tier does: the most that it can reach."""

    def read_one(call: Call) -> None:
        file.read(call)
        for buffer in call.buffers if check else ():
            xxh3_64_intdigest(buffer)

    def read() -> float:
        started = time.perf_counter()
        way.run(read_one if check else file.read)
        return time.perf_counter() - started

    return read


def _raw_overwriting(file: RawFile, way: Way) -> Contender:
    def write() -> float:
        started = time.perf_counter()
        way.run(file.write)
        file.sync()
        return time.perf_counter() - started

    return write


def _raw_making(bench: Bench, path: Path, work: Work, way: Way, *, allocate: bool) -> Contender:
    total_bytes = work.num_blocks * work.block_bytes

    def make() -> float:
        started = time.perf_counter()
        with bench.raw_file(path, work) as file:
            if allocate:
                os.posix_fallocate(file.fd, 0, total_bytes)
            way.run(file.write)
            file.sync()
            sync_names(path.parent)
            took = time.perf_counter() - started
        bench.remove(path)
        return took

    return make


def tier_reading(runner: asyncio.Runner, tier: DiskTier, into: Sequence[memoryview]) -> Contender:
    slots = range(len(into))

    async def timed() -> float:
        started = time.perf_counter()
        outcomes = await tier.read(slots, into)
        took = time.perf_counter() - started
        assert not any(outcomes), outcomes
        return took

    return lambda: runner.run(timed())


def tier_writing(
    runner: asyncio.Runner, tier: DiskTier, payloads: Sequence[memoryview]
) -> Contender:
    return lambda: runner.run(timed_write(tier, payloads))


def tier_making(
    bench: Bench, path: Path, work: Work, runner: asyncio.Runner, payloads: Sequence[memoryview]
) -> Contender:
    def make() -> float:
        with bench.tier(path, work, runner) as tier:
            took = runner.run(timed_write(tier, payloads))
        bench.remove(path)
        return took

    return make


async def timed_write(tier: DiskTier, payloads: Sequence[memoryview]) -> float:
    slots = range(len(payloads))
    keys = [slot.to_bytes(8, "big") for slot in slots]
    started = time.perf_counter()
    outcomes = await tier.write(slots, payloads, keys)
    await tier.flush()
    took = time.perf_counter() - started
    assert not any(outcomes), outcomes
    return took


def _aiofiles_reading(
    runner: asyncio.Runner, path: Path, work: Work, payloads: Sequence[memoryview]
) -> Contender:
    async def timed() -> float:
        started = time.perf_counter()
        for slot in range(work.num_blocks):
            async with aiofiles.open(path, "rb") as file:
                await file.seek(slot * work.block_bytes)
                data = await file.read(work.block_bytes)
        took = time.perf_counter() - started
        assert data == payloads[-1]
        return took

    return lambda: runner.run(timed())
