"""The code of docs/integrating.md runs, and does what the page says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from examples.smollm.model import ModelConfig
from examples.smollm.pool import BlockGeometry

from kvoffload import AsyncLRUManager, DiskTier, MemoryTier, TierUnavailableError, hash_blocks
from kvoffload.testing import FaultyTier, eventually

DOCUMENT = Path(__file__).parents[2] / "docs" / "integrating.md"
CODE = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.M | re.S)
BLOCK_TOKENS, BLOCK_BYTES = 4, 64
TOKENS = list(range(22))  # five blocks and a half


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """Run all the code of the page, top to bottom, and return what it defines."""
    names: dict[str, Any] = {}
    for code in CODE:
        exec(code, names)
    return names


class Device:
    """Memory of its own, whose pages hold the sums of the tokens up to their end."""

    def __init__(self) -> None:
        self.pages = np.zeros((8, BLOCK_BYTES), np.uint8)
        self.computed: list[int] = []

    async def copy_in(self, lease: Sequence[memoryview]) -> None:
        """Copy blocks to the first pages."""
        for page, view in enumerate(lease):
            self.pages[page] = np.frombuffer(view, np.uint8)

    async def copy_out(self, pages: Sequence[int], targets: Sequence[memoryview]) -> None:
        """Copy pages to slots."""
        for page, target in zip(pages, targets, strict=True):
            target[:] = self.pages[page].tobytes()

    async def compute(self, tokens: Sequence[int], start: int) -> None:
        """Compute from a token on."""
        self.computed += tokens[start:]
        for page in range(start // BLOCK_TOKENS, len(tokens) // BLOCK_TOKENS):
            self.pages[page] = sum(tokens[: (page + 1) * BLOCK_TOKENS]) % 256

    def page(self, number: int) -> memoryview:
        """Return the bytes of a page."""
        return memoryview(self.pages[number])


def test_the_code_is_there(names: dict[str, Any]) -> None:
    """Else the tests below would be of nothing; and the geometry is that of the model."""
    assert len(CODE) == 9
    layers, kv_heads, tokens, head_dim, dtype = names["LAYOUT"]
    geometry = BlockGeometry(layers, kv_heads, tokens, head_dim, dtype)
    assert names["block_bytes"](*names["LAYOUT"]) == geometry.block_bytes
    assert ModelConfig.__annotations__.keys() >= {"layers", "kv_heads", "head_dim"}


def test_what_changes_the_kv_changes_the_hash(names: dict[str, Any]) -> None:
    """An adapter changes all of them, an image those behind it."""
    plain = names["hashes_of"](TOKENS, BLOCK_TOKENS)
    assert plain == hash_blocks(TOKENS, BLOCK_TOKENS)
    other = names["hashes_of"](TOKENS, BLOCK_TOKENS, adapter="lora")
    assert not set(plain) & set(other)
    with_image = names["hashes_of"](TOKENS, BLOCK_TOKENS, image=b"a cat")
    assert with_image[0] == plain[0]
    assert not set(plain) & set(with_image[1:])


async def test_a_prompt_is_served_and_its_pages_are_right(
    names: dict[str, Any], tmp_path: Path
) -> None:
    """From nothing, from memory, in another namespace, and from a disk that can't be read."""
    registered: dict[int, int] = {}
    hot = MemoryTier(6, BLOCK_BYTES)
    expected = Device()
    await expected.compute(TOKENS, 0)
    cold = FaultyTier(DiskTier(tmp_path / "cold", 20, BLOCK_BYTES))
    async with (
        AsyncLRUManager(hot=hot, cold=cold, policy="lru") as manager,
        names["registered"](hot, registered.__setitem__, registered.pop),
    ):
        assert registered == {hot.arena.ctypes.data: 6 * BLOCK_BYTES}
        kv = names["view_for"](manager, "model")
        for restored in (0, 20):
            device = Device()
            assert await names["serve"](kv, device, TOKENS, BLOCK_TOKENS, 60.0) == restored
            assert (device.pages == expected.pages).all()
            assert device.computed == TOKENS[restored:]
        other = names["view_for"](manager, "model", "somebody")
        assert await names["serve"](other, Device(), TOKENS, BLOCK_TOKENS, 60.0) == 0
        assert {place.tier for place in kv.locate(hash_blocks(TOKENS, BLOCK_TOKENS))} == {
            "hot",
            "cold",
        }
        device = Device()
        with cold.fail("read", TierUnavailableError("not now", tier="cold"), times=None):
            assert await names["serve"](kv, device, TOKENS, BLOCK_TOKENS, 60.0) == 0
        assert (device.pages == expected.pages).all()
        device = Device()
        with cold.hang("read"):
            assert await names["serve"](kv, device, TOKENS, BLOCK_TOKENS, timeout_s=0.05) == 0
        assert (device.pages == expected.pages).all()
        await eventually(lambda: manager.get_stats().pinned == 0)
        assert await names["serve"](kv, Device(), TOKENS, BLOCK_TOKENS, 60.0) == 20
    assert registered == {}


async def test_the_device_can_write_into_the_slots(names: dict[str, Any]) -> None:
    """Reserved, written, published; refused where there is no room, and given up if it fails."""
    device, hashes = Device(), hash_blocks(TOKENS, BLOCK_TOKENS)
    await device.compute(TOKENS, 0)
    async with AsyncLRUManager(hot=MemoryTier(5, BLOCK_BYTES)) as kv:
        store = names["store_by_device"]
        assert not await store(kv, device, [str(n) for n in range(6)], list(range(6)))
        with pytest.raises(ValueError, match=r"zip\(\)"):
            await store(kv, device, hashes[:2], [0])
        stats = kv.get_stats()
        assert (stats.pending, stats.tiers["hot"].blocks) == (0, 0)
        assert await store(kv, device, hashes, list(range(5)))
        async with kv.load(hashes) as lease:
            assert [bytes(view) for view in lease] == [device.page(n).tobytes() for n in range(5)]


async def test_loading_is_planned(names: dict[str, Any]) -> None:
    """What lies in memory is always sooner there than computed."""
    hashes = hash_blocks(TOKENS, BLOCK_TOKENS)
    async with AsyncLRUManager(hot=MemoryTier(5, BLOCK_BYTES)) as kv:
        restore = names["restore_in_time"]
        async with kv.request(hashes) as request:
            assert await restore(request, Device(), 8000.0, BLOCK_TOKENS) == 0
            await request.store([bytes(BLOCK_BYTES)] * len(hashes))
        async with kv.request(hashes) as request:
            assert await restore(request, Device(), 8000.0, BLOCK_TOKENS) == 5


async def test_what_the_engine_knows_can_be_said(names: dict[str, Any]) -> None:
    """As the request takes it."""
    retention_of = names["retention_of"]
    async with AsyncLRUManager(hot=MemoryTier(5, BLOCK_BYTES)) as kv:
        async with kv.request([b"a"], retention=retention_of(is_over=False, waits_for_tool_s=3)):
            pass
        async with kv.request([b"a"]) as request:
            await request.store([b"x"])
            request.retention = retention_of(is_over=True, waits_for_tool_s=None)
        await eventually(lambda: kv.locate([b"a"])[0].tier is None)
    assert retention_of(is_over=False, waits_for_tool_s=None) is None
