"""What every remote tier has to do, as tests: subclass and supply `make_tier`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from ...keys import encode_key
from ...remote.protocol import RemoteOutcome, RemoteTier
from ...types import BlockHash, Medium
from ..payloads import payload_for

DONE, PRESENT, ABSENT = RemoteOutcome.DONE, RemoteOutcome.PRESENT, RemoteOutcome.ABSENT


@asynccontextmanager
async def opened(tier: RemoteTier) -> AsyncIterator[RemoteTier]:
    """Open the tier, and close it however the body ends."""
    await tier.open()
    try:
        yield tier
    finally:
        await tier.close()


def names(block_hashes: Sequence[BlockHash], namespace: str = "contract") -> list[bytes]:
    """Return canonical keys."""
    return [encode_key(block_hash, namespace) for block_hash in block_hashes]


class RemoteTierContract:
    """Tests of the `RemoteTier` protocol, collected where a subclass is named `Test...`.

    For instance::

        class TestMyEngine(RemoteTierContract):
            def make_tier(self, tmp_path: Path, *, layout: str = "") -> MyEngine:
                return MyEngine("myengine://127.0.0.1", layout=layout)

    Needs pytest and pytest-asyncio. The engine has to be empty at first, and with room for 64 MiB.

    Attributes:
        has_layouts: Whether tiers of different layouts share an engine without seeing each other.
        many_blocks: Blocks of a namespace that is cleared: more than one step takes, at best.
        deadline_s: Real seconds after which a test counts as hanging.
    """

    pytestmark = pytest.mark.asyncio

    has_layouts: bool = True
    many_blocks: int = 3000
    deadline_s: float = 20.0

    def make_tier(self, tmp_path: Path, *, layout: str = "") -> RemoteTier:
        """Return a tier that is not open; all of one test are on one engine."""
        raise NotImplementedError

    async def put(self, tier: RemoteTier, keys: Sequence[bytes], size: int = 1000) -> None:
        """Write payloads that follow from the keys, and are not there yet."""
        payloads = [memoryview(payload_for(key, size)) for key in keys]
        assert await tier.put(keys, payloads) == [DONE] * len(keys)

    async def get(
        self, tier: RemoteTier, keys: Sequence[bytes], size: int = 1000
    ) -> list[bytes | object]:
        """Read blocks: the bytes of each, or what became of it."""
        buffers = [bytearray(size) for _ in keys]
        outcomes = await tier.get(keys, [memoryview(buffer) for buffer in buffers])
        return [
            bytes(buffer) if outcome is DONE else outcome
            for buffer, outcome in zip(buffers, outcomes, strict=True)
        ]

    async def test_describes_itself(self, tmp_path: Path) -> None:
        """A manager asks before it opens the tier."""
        tier = self.make_tier(tmp_path)
        assert isinstance(tier, RemoteTier)
        assert tier.name
        assert isinstance(tier.name, str)
        assert tier.medium is Medium.REMOTE

    async def test_round_trip(self, tmp_path: Path) -> None:
        """What one wrote, another reads, in the order asked; what nobody wrote is not there."""
        keys = names([b"\x00\xff{}\r\n", "text", 17, b"tail"])
        with anyio.fail_after(self.deadline_s):
            async with opened(self.make_tier(tmp_path)) as here:
                await self.put(here, keys)
            async with opened(self.make_tier(tmp_path)) as there:
                await there.check()
                asked = [keys[2], names(["nobody's"])[0], *keys]
                assert await there.find(asked) == [1000, None, 1000, 1000, 1000, 1000]
                expected = [payload_for(key, 1000) for key in asked]
                assert await self.get(there, asked) == [expected[0], ABSENT, *expected[2:]]

    @pytest.mark.parametrize("size", [0, 1, 2, 63, 64, 65, 4095, 4096, 65_535, 65_537, 2_097_152])
    async def test_any_size(self, tmp_path: Path, size: int) -> None:
        """No number of bytes is special."""
        keys = names([1, 2, 3])
        with anyio.fail_after(self.deadline_s):
            async with opened(self.make_tier(tmp_path)) as tier:
                await self.put(tier, keys, size)
                assert await tier.find(keys) == [size] * 3
                assert await self.get(tier, keys, size) == [payload_for(key, size) for key in keys]

    async def test_sizes_differ_in_one_batch(self, tmp_path: Path) -> None:
        """Each payload has its own."""
        sizes = [100_000, 1, 0, 300_001, 7, 65_536, 2, 1_000_000]
        keys = names([*sizes])
        payloads = [memoryview(payload_for(key, n)) for key, n in zip(keys, sizes, strict=True)]
        with anyio.fail_after(self.deadline_s):
            async with opened(self.make_tier(tmp_path)) as tier:
                assert await tier.put(keys, payloads) == [DONE] * len(keys)
                assert await tier.find(keys) == sizes
                buffers = [memoryview(bytearray(size)) for size in sizes]
                assert await tier.get(keys, buffers) == [DONE] * len(keys)
                assert buffers == payloads

    async def test_another_size_is_absent(self, tmp_path: Path) -> None:
        """A buffer is filled exactly or holds no block; what comes after it is read as ever."""
        keys = names(["short", "long", "right"])
        with anyio.fail_after(self.deadline_s):
            async with opened(self.make_tier(tmp_path)) as tier:
                await self.put(tier, keys, 200_000)
                buffers = [memoryview(bytearray(n)) for n in (300_000, 100, 200_000)]
                assert await tier.get(keys, buffers) == [ABSENT, ABSENT, DONE]
                assert buffers[2] == payload_for(keys[2], 200_000)

    async def test_what_is_there_is_not_written_again(self, tmp_path: Path) -> None:
        """Equal keys are equal bytes: whoever was first was right."""
        keys = names(["old", "new"])
        with anyio.fail_after(self.deadline_s):
            async with opened(self.make_tier(tmp_path)) as tier:
                await self.put(tier, keys[:1])
                payloads = [memoryview(payload_for(key, 1000)) for key in keys]
                assert await tier.put(keys, payloads) == [PRESENT, DONE]
                assert await tier.put(keys, payloads) == [PRESENT, PRESENT]

    async def test_a_buffer_is_the_callers_after_put(self, tmp_path: Path) -> None:
        """What is written into it later does not reach the engine."""
        key = names(["block"])
        payload = bytearray(payload_for(key[0], 1_000_000))
        with anyio.fail_after(self.deadline_s):
            async with opened(self.make_tier(tmp_path)) as tier:
                assert await tier.put(key, [memoryview(payload)]) == [DONE]
                payload[:] = bytes(len(payload))
                assert await self.get(tier, key, 1_000_000) == [payload_for(key[0], 1_000_000)]

    async def test_delete(self, tmp_path: Path) -> None:
        """It says what was there, and then it isn't."""
        keys = names(["a", "b", "c"])
        with anyio.fail_after(self.deadline_s):
            async with opened(self.make_tier(tmp_path)) as tier:
                await self.put(tier, keys[:2])
                assert await tier.delete(keys[1:]) == [True, False]
                assert await tier.find(keys) == [1000, None, None]
                await self.put(tier, keys[1:2])

    @pytest.mark.parametrize("namespace", ["", "tenant", "a*[b]?\\", "ü" * 64])
    async def test_clear_drops_one_namespace(self, tmp_path: Path, namespace: str) -> None:
        """All of it, whatever the hashes are; and nothing of any other."""
        hashes: list[BlockHash] = [b"bytes", "text", 3, *(f"{n}" for n in range(self.many_blocks))]
        mine = names(hashes, namespace)
        others = names(["text", b"bytes"], namespace[:-1] if namespace else "t")
        others += names(["text"], "a1bX\\" if namespace != "a1bX\\" else "y")
        with anyio.fail_after(self.deadline_s):
            async with opened(self.make_tier(tmp_path)) as tier:
                await self.put(tier, mine, 10)
                await self.put(tier, others, 10)
                assert sum([count async for count in tier.clear(namespace)]) == len(mine)
                assert {*await tier.find(mine)} == {None}
                assert await tier.find(others) == [10] * len(others)
                assert sum([count async for count in tier.clear(namespace)]) == 0

    async def test_layouts_are_worlds_apart(self, tmp_path: Path) -> None:
        """The same hash in another layout is another block."""
        if not self.has_layouts:
            pytest.skip("it has no layouts")
        keys = names(["a", "b"])
        with anyio.fail_after(self.deadline_s):
            async with (
                opened(self.make_tier(tmp_path, layout="fp8")) as one,
                opened(self.make_tier(tmp_path, layout="bf16")) as other,
            ):
                await self.put(one, keys)
                assert await other.find(keys) == [None, None]
                assert await self.get(other, keys) == [ABSENT, ABSENT]
                await self.put(other, keys)
                assert await other.delete(keys) == [True, True]
                assert sum([count async for count in other.clear("contract")]) == 0
                assert await one.find(keys) == [1000, 1000]

    async def test_batches_at_once(self, tmp_path: Path) -> None:
        """Callers need not wait for each other."""
        groups = [names([f"{group}-{n}" for n in range(7)]) for group in range(8)]
        with anyio.fail_after(self.deadline_s):
            async with opened(self.make_tier(tmp_path)) as tier:

                async def there_and_back(keys: Sequence[bytes]) -> None:
                    await self.put(tier, keys, 100_000)
                    assert await tier.find(keys) == [100_000] * len(keys)
                    got = await self.get(tier, keys, 100_000)
                    assert got == [payload_for(key, 100_000) for key in keys]

                async with anyio.create_task_group() as tasks:
                    for keys in groups:
                        tasks.start_soon(there_and_back, keys)

    async def test_nothing_to_do(self, tmp_path: Path) -> None:
        """An empty batch is one."""
        async with opened(self.make_tier(tmp_path)) as tier:
            assert await tier.find([]) == []
            assert await tier.get([], []) == []
            assert await tier.put([], []) == []
            assert await tier.delete([]) == []

    async def test_cancelled_anywhere_it_goes_on(self, tmp_path: Path) -> None:
        """A block is there as a whole or not at all, and the next call finds all well."""
        keys = names(["one", "two", "three", "four", "five"])
        payloads = [memoryview(payload_for(key, 500_000)) for key in keys]
        with anyio.fail_after(self.deadline_s):
            async with opened(self.make_tier(tmp_path)) as tier:
                for turns in range(12):
                    for work in ("put", "get", "find"):
                        async with anyio.create_task_group() as tasks:
                            if work == "put":
                                tasks.start_soon(tier.put, keys, payloads)
                            elif work == "get":
                                into = [memoryview(bytearray(500_000)) for _ in keys]
                                tasks.start_soon(tier.get, keys, into)
                            else:
                                tasks.start_soon(tier.find, keys)
                            for _ in range(turns):
                                await anyio.lowlevel.checkpoint()
                            tasks.cancel_scope.cancel()
                    sizes = await tier.find(keys)
                    assert set(sizes) <= {None, 500_000}
                    there = [key for key, size in zip(keys, sizes, strict=True) if size]
                    expected = [payload_for(key, 500_000) for key in there]
                    assert await self.get(tier, there, 500_000) == expected
                    await tier.delete(keys)

    async def test_close_is_idempotent(self, tmp_path: Path) -> None:
        """Also before it was opened."""
        tier = self.make_tier(tmp_path)
        await tier.close()
        tier = self.make_tier(tmp_path)
        await tier.open()
        await tier.close()
        await tier.close()
