"""Arrays that outlive a lease: none may show, or write, another block's bytes."""

from __future__ import annotations

import numpy as np
import pytest

from kvoffload import (
    AsyncLRUManager,
    DerivedViewWarning,
    LRUOffloadManager,
    MemoryTier,
    TieredLRUManager,
)
from kvoffload.testing import RestartableTier


async def test_implicit_eviction_one_tier() -> None:
    """Implicit eviction one tier."""
    async with LRUOffloadManager(MemoryTier(1, 64)) as kv:
        await kv.store(["a"], [b"a" * 64])
        with pytest.warns(DerivedViewWarning):
            async with kv.load(["a"]) as lease:
                array = np.frombuffer(lease[0], np.uint8)
        await kv.store(["b"], [b"b" * 64])  # evicts a implicitly
        assert bytes(array) == b"a" * 64


async def test_demotion() -> None:
    """Demotion."""
    async with TieredLRUManager(MemoryTier(1, 64), MemoryTier(4, 64, name="warm")) as kv:
        await kv.store(["a"], [b"a" * 64])
        with pytest.warns(DerivedViewWarning):
            async with kv.load(["a"]) as lease:
                array = np.frombuffer(lease[0], np.uint8)
        await kv.store(["b"], [b"b" * 64])
        assert bytes(array) == b"a" * 64


async def test_fall_back_on_clean_copy() -> None:
    """Fall back on clean copy."""
    cold = RestartableTier(4, 64)
    async with AsyncLRUManager(hot=MemoryTier(1, 64), cold=cold) as kv:
        await kv.store(["a"], [b"a" * 64])
        await kv.flush()
        with pytest.warns(DerivedViewWarning):
            async with kv.load(["a"]) as lease:
                array = np.frombuffer(lease[0], np.uint8)
        await kv.store(["b"], [b"b" * 64])
        assert bytes(array) == b"a" * 64


async def test_late_writer_of_a_two_phase_store() -> None:
    """The engine's derived array keeps writing after complete_store: hits another block."""
    async with LRUOffloadManager(MemoryTier(1, 64)) as kv:
        out = await kv.prepare_store(["a"])
        assert out is not None
        array = np.frombuffer(out.store_spec.entries[0].view, np.uint8)
        with pytest.warns(DerivedViewWarning):
            await kv.complete_store(["a"])
        await kv.store(["b"], [b"b" * 64])
        array[:] = 0
        if await kv.lookup(["b"]):
            async with kv.load(["b"]) as lease:
                assert bytes(lease[0]) == b"b" * 64
