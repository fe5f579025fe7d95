"""Blocks of a prompt, stored once and found again: hot in memory, cold on disk."""

import asyncio
import tempfile

from kvoffload import AsyncLRUManager, DiskTier, MemoryTier, hash_blocks

BLOCK_TOKENS, BLOCK_BYTES = 16, 65536


def compute(block: int) -> bytes:
    """Stand in for the model that computes the KV of one block."""
    return bytes([block]) * BLOCK_BYTES


async def main(cold_path: str) -> None:
    """Serve the same prompt twice."""
    async with AsyncLRUManager(
        hot=MemoryTier(4, BLOCK_BYTES), cold=DiskTier(cold_path, 100, BLOCK_BYTES)
    ) as kv:
        hashes = hash_blocks(range(6 * BLOCK_TOKENS), BLOCK_TOKENS)
        for turn in ("first", "second"):
            async with kv.request(hashes) as request:
                async with request.load() as lease:  # views without a copy, valid in here alone
                    loaded = sum(view.nbytes for view in lease)
                result = await request.store([compute(n) for n in range(request.hit, len(hashes))])
            print(f"{turn} request: loaded {loaded} bytes, computed {len(result.stored)} blocks")
        print("blocks are in:", [location.tier for location in kv.locate(hashes)])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(main(directory))
