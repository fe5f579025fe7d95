"""Cold blocks, beside bare calls on files in the same directory."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from shutil import rmtree
from time import perf_counter

from ..errors import ConfigError
from ..managers.async_lru_manager import AsyncLRUManager
from ..storage.format import checksum
from ..storage.session import default_threads
from ..tiers.disk import DiskTier
from ..tiers.memory import MemoryTier
from .cold import cold_manager
from .latency import measure_lag, measure_one_block
from .raw_io import MIB, Call, RawFile, Team, Way, plan_calls, same_bytes, sensible_ways
from .rows import BenchError, NotMeasured, Row, Work, chain_of, expect, row_of
from .timing import Contender, alternate, apart, stack_apart, timed_apart

READ_CALLS = (2 * MIB, 8 * MIB)
WRITE_CALLS = (8 * MIB,)
NO_DIRECT_IO = (errno.EINVAL, errno.EOPNOTSUPP)
"""How a file system refuses direct I/O, or blocks that are too odd for it."""
CACHED, DIRECT = "page cache", "direct I/O"


async def measure_durable_store(
    place: Path, payloads: Sequence[memoryview], seconds: float
) -> list[Row]:
    """Store and flush, beside bare writes and a sync."""
    place /= "durable"
    await apart(place.mkdir)
    work = Work(len(payloads), len(payloads[0]))
    chain = chain_of("durable", work.num_blocks)
    cold = DiskTier(place / "cold", work.num_blocks, work.block_bytes)
    hot = MemoryTier(work.num_blocks, work.block_bytes)
    async with AsyncLRUManager(hot=hot, cold=cold, policy="lru") as kv, stack_apart() as stack:

        def raw_ways() -> dict[str, Contender]:
            ways = _ways(stack, payloads, WRITE_CALLS)
            found: dict[str, Contender] = {}
            for mode, direct in ((CACHED, False), (DIRECT, True)):
                try:
                    file = stack.enter_context(RawFile(place / f"raw-{direct:d}", direct=direct))
                    file.fill(payloads)
                except OSError as exc:
                    if not (direct and exc.errno in NO_DIRECT_IO):
                        raise
                    continue  # the tier doesn't use it either
                found |= {f"{mode}, {name}": _writing(file, way) for name, way in ways.items()}
            return found

        async def store() -> float:
            await kv.evict(chain)
            started = perf_counter()
            stored = len((await kv.store(chain, payloads)).stored)
            durable = (await kv.flush()).durable
            took = perf_counter() - started
            expect("stored", stored, work.num_blocks)
            expect("made durable", durable, work.num_blocks)
            return took

        raw = await apart(raw_ways)
        timings = await alternate({**raw, "store": store}, seconds)
        mode = DIRECT if cold.direct else CACHED
    await apart(lambda: rmtree(place))
    return [
        row_of(
            "durable store",
            timings,
            ours="store",
            limits=list(raw),
            limit_is="pwritev over a file that is there, in order, and fdatasync",
            reached_is=f"store and flush: into memory, to the cold tier ({mode}), durably",
            moved=work,
        )
    ]


async def measure_cached_loads(
    place: Path, payloads: Sequence[memoryview], into: Sequence[memoryview], seconds: float
) -> list[Row]:
    """Load cold blocks that the page cache has, beside bare reads, with checksums and without."""
    work = Work(len(payloads), len(payloads[0]))
    chain = chain_of("cold", work.num_blocks)
    async with cold_manager(place / "cold", payloads, "off") as kv, stack_apart() as stack:
        file = await apart(lambda: stack.enter_context(RawFile(place / "raw", direct=False)))
        ways = await apart(lambda: _ways(stack, into, READ_CALLS))
        await apart(lambda: file.fill(payloads))
        raw, checked = _reading(file, ways), _reading(file, ways, check=True)
        await _verify(kv, chain, payloads)
        contenders = {**raw, **checked, "load": _loading(kv, chain)}
        timings = await alternate(contenders, 0.5 * seconds)
        calls = plan_calls(into, 1)
        one = await measure_one_block(kv, chain, file, calls, 0.1 * seconds)
        lag = await measure_lag(kv, chain, file, calls, 0.4 * seconds)
    return [
        row_of(
            "cold load, cached",
            timings,
            ours="load",
            limits=list(raw),
            limit_is="preadv of a file that the page cache has",
            reached_is="load of cold blocks, each checked, from the page cache",
            moved=work,
        ),
        row_of(
            "cold load, checked",
            timings,
            ours="load",
            limits=list(checked),
            limit_is="preadv of a file that the page cache has, and xxh3 of each block",
            reached_is="the same loads as above, which check each block",
            moved=work,
        ),
        one,
        lag,
    ]


async def measure_direct_loads(
    place: Path, payloads: Sequence[memoryview], into: Sequence[memoryview], seconds: float
) -> list[Row | NotMeasured]:
    """Load cold blocks past the page cache, beside bare reads; from what the cached loads left."""
    name = "cold load, direct"
    work = Work(len(payloads), len(payloads[0]))
    chain = chain_of("cold", work.num_blocks)
    async with stack_apart() as stack:

        def raw_ways() -> dict[str, Contender]:
            file = stack.enter_context(RawFile(place / "raw", direct=True))
            file.read(Call(0, [into[0]], len(into[0])))
            return _reading(file, _ways(stack, into, READ_CALLS))

        try:
            raw = await apart(raw_ways)
            async with cold_manager(place / "cold", payloads, "on") as kv:
                await _verify(kv, chain, payloads)
                timings = await alternate({**raw, "load": _loading(kv, chain)}, seconds)
        except OSError as exc:
            if exc.errno not in NO_DIRECT_IO:
                raise
            return [NotMeasured(name, f"no direct I/O for such blocks here: {exc.strerror}")]
        except ConfigError as exc:
            return [NotMeasured(name, " ".join(str(exc).split()))]
    return [
        row_of(
            name,
            timings,
            ours="load",
            limits=list(raw),
            limit_is="preadv with O_DIRECT",
            reached_is="load of cold blocks, each checked, past the page cache",
            moved=work,
        )
    ]


def _ways(stack: ExitStack, blocks: Sequence[memoryview], sizes: Sequence[int]) -> dict[str, Way]:
    """Return ways to move blocks: by one thread, or by as many as the cold tier has."""
    teams = [stack.enter_context(Team(size)) for size in (1, default_threads())]
    ways = sensible_ways(blocks, teams, sizes)
    return {name.removeprefix("raw, "): way for name, way in ways.items()}


def _writing(file: RawFile, way: Way) -> Contender:
    def write() -> None:
        way.run(file.write)
        file.sync()

    return timed_apart(write)


def _reading(
    file: RawFile, ways: Mapping[str, Way], *, check: bool = False
) -> dict[str, Contender]:
    def read_and_check(call: Call) -> None:
        file.read(call)
        for buffer in call.buffers:
            checksum(buffer)

    def reading(way: Way) -> Contender:
        return timed_apart(lambda: way.run(read_and_check if check else file.read))

    suffix = ", xxh3" if check else ""
    return {f"{name}{suffix}": reading(way) for name, way in ways.items()}


def _loading(kv: AsyncLRUManager, chain: Sequence[str]) -> Contender:
    async def load() -> float:
        started = perf_counter()
        async with kv.load(chain) as lease:
            took = perf_counter() - started
            expect("loaded", len(lease), len(chain))
        return took

    return load


async def _verify(
    kv: AsyncLRUManager, chain: Sequence[str], payloads: Sequence[memoryview]
) -> None:
    """Check that the very bytes come back whose moving is timed."""
    async with kv.load(chain) as lease:
        views = list(lease)
        if not await apart(lambda: same_bytes(views, payloads)):
            raise BenchError("other bytes were loaded than had been stored")
