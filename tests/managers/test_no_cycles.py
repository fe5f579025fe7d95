"""Errors must not keep the frames, and so the buffers, of who met them."""

from __future__ import annotations

import contextlib
import gc

import numpy as np
import pytest

from kvoffload import LRUOffloadManager, MemoryTier, TierError
from kvoffload.testing import FaultyTier


@pytest.mark.filterwarnings("ignore::kvoffload.DerivedViewWarning")
async def test_a_failed_completion_frees_its_staging_buffer_without_the_collector() -> None:
    """Failing writes used staging up: each error kept a buffer until a garbage collection."""
    hot = FaultyTier(MemoryTier(4, 64))
    async with LRUOffloadManager(hot) as kv:

        async def engine() -> None:
            out = await kv.prepare_store(["a"])
            assert out is not None
            array = np.frombuffer(out.store_spec.entries[0].view, np.uint8)
            hot.fail("write")
            await kv.complete_store(["a"])
            del array  # not reached: the frame of a caller that fails keeps it

        gc.disable()
        try:
            with contextlib.suppress(TierError):
                await engine()
            slots = kv._core.transfer.staging.slots
            assert (slots.in_use, slots.retired) == (0, 0)
        finally:
            gc.enable()
