"""Leased blocks into an accelerator's memory and back, beside bare copies of pinned memory.

    python benchmarks/device_copy.py [--blocks 64] [--block-bytes 2097152] [--rounds 20]

Needs PyTorch with CUDA. An engine copies straight from the lease, and into what `prepare_store`
reserved. Where the hot tier's arena is registered with the device once (`MemoryTier.arena`), those
copies run by DMA as from any pinned memory; without, the driver copies through buffers of its own.
Each way is measured in turn, round by round, and every byte is compared.
"""

from __future__ import annotations

import argparse
import asyncio
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from kvoffload import AsyncLRUManager, MemoryTier, hash_blocks

GIB = 1 << 30


def as_tensor(torch: Any, view: memoryview) -> Any:
    """Return a view as a tensor over the same memory; drop it before the lease ends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the view is read-only, as it should be
        return torch.frombuffer(view, dtype=torch.uint8)


def copy_all(torch: Any, targets: Sequence[Any], sources: Sequence[Any]) -> None:
    """Copy on the device's stream, and wait for it: to be called off the loop."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)
    torch.cuda.current_stream().synchronize()


async def main(num_blocks: int, block_bytes: int, rounds: int) -> None:
    torch: Any = import_module("torch")

    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs PyTorch with CUDA")
    cuda = torch.cuda.cudart()
    total = num_blocks * block_bytes
    pinned = torch.empty(total, dtype=torch.uint8, pin_memory=True)
    bare = pinned.split(block_bytes)
    device = torch.empty(total, dtype=torch.uint8, device="cuda").split(block_bytes)
    hot = MemoryTier(2 * num_blocks, block_bytes)
    chain = hash_blocks(range(16 * num_blocks), 16)
    payloads = [np.random.default_rng(n).bytes(block_bytes) for n in range(num_blocks)]
    rates: dict[str, list[float]] = {}

    async def timed(name: str, work: Callable[[], None]) -> None:
        began = perf_counter()
        await asyncio.to_thread(work)
        rates.setdefault(name, []).append(total / (perf_counter() - began) / GIB)

    async with AsyncLRUManager(hot=hot, policy="lru") as kv:
        arena = hot.arena
        await kv.store(chain, payloads)

        async def load(name: str) -> None:
            async with kv.request(chain) as request:
                assert request.hit == num_blocks
                began = perf_counter()
                async with request.load() as lease:
                    tensors = [as_tensor(torch, view) for view in lease]
                    await asyncio.to_thread(copy_all, torch, device, tensors)
                    del tensors
                rates.setdefault(name, []).append(total / (perf_counter() - began) / GIB)

        async def store(name: str, number: int) -> None:
            names = [f"{name} {number} {n}" for n in range(num_blocks)]
            began = perf_counter()
            prepared = await kv.prepare_store(names)
            assert prepared is not None
            entries = prepared.store_spec.entries
            tensors = [torch.frombuffer(entry.view, dtype=torch.uint8) for entry in entries]
            await asyncio.to_thread(copy_all, torch, tensors, device)
            del tensors, entries
            await kv.complete_store(names)
            rates.setdefault(name, []).append(total / (perf_counter() - began) / GIB)
            async with kv.load(names) as lease:
                assert all(view == payload for view, payload in zip(lease, payloads, strict=True))
            await kv.evict(names)

        for number in range(rounds):
            await timed("to the device, bare, pinned", lambda: copy_all(torch, device, bare))
            await load("to the device, leased, not registered")
            held = [bytes(each.cpu().numpy()) for each in device] if not number else payloads
            assert held == payloads, "the device has other bytes"
            await store("from the device, reserved, not registered", number)
            await timed("from the device, bare, pinned", lambda: copy_all(torch, bare, device))
            status = cuda.cudaHostRegister(arena.ctypes.data, arena.nbytes, 0)
            assert int(status) == 0, status
            await load("to the device, leased, registered")
            await store("from the device, reserved, registered", number)
            cuda.cudaHostUnregister(arena.ctypes.data)
        del arena
    print(f"{torch.cuda.get_device_name()}, {num_blocks} blocks of {block_bytes} bytes, GiB/s")
    for way in ("to", "from"):
        limit = median(rates[f"{way} the device, bare, pinned"][1:])
        for name, found in rates.items():
            if name.startswith(way):
                rate = median(found[1:])
                print(f"  {name:<44} {rate:6.1f}  {rate / limit:5.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--block-bytes", type=int, default=2 << 20)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    asyncio.run(main(given.blocks, given.block_bytes, given.rounds))
