"""Part of `ManagerContract`: two-phase holders that never come back, or too late."""

from __future__ import annotations

import gc
import warnings
from contextlib import suppress

import pytest

from ...errors import DerivedViewWarning, NotPinnedError
from ...types import OffloadingManager
from ..clock import ManualClock, eventually
from .manager_base import ABSENT, PENDING, ManagerSuite, chain


class ExpirySuite(ManagerSuite):
    """`reservation_ttl_s`."""

    async def test_a_reservation_expires(
        self, manager: OffloadingManager, clock: ManualClock
    ) -> None:
        """The engine died between prepare and complete: its slots come back, counted."""
        async with self.opened(manager) as kv:
            events = kv.events()
            free = sum(tier.free_blocks for tier in kv.get_stats().tiers.values())
            output = await self.prepared(kv, ["a", "b"])
            clock.advance(self.reservation_ttl_s * 0.5)
            await self.prepared(kv, ["young"])
            assert self.states(kv, ["a", "b"]) == [PENDING, PENDING]
            clock.advance(self.reservation_ttl_s * 0.5 + 1)
            await eventually(lambda: self.states(kv, ["a", "b"]) == [ABSENT, ABSENT])
            assert self.states(kv, ["young"]) == [PENDING]
            assert kv.get_stats().expired == 2
            event = await anext(events)
            assert event.kind.value == "expired"
            assert set(event.block_hashes) <= {"a", "b"}
            await kv.complete_store(["young"], success=False)
            del output
            gc.collect()
            await eventually(
                lambda: free == sum(tier.free_blocks for tier in kv.get_stats().tiers.values())
            )
            assert (await self.put(kv, ["a"])).stored == ("a",)

    async def test_a_late_complete_is_a_no_op(
        self, manager: OffloadingManager, clock: ManualClock
    ) -> None:
        """The engine was only slow: too late, and its late bytes hit nobody's block."""
        async with self.opened(manager) as kv:
            output = await self.prepared(kv, ["late"])
            view = output.store_spec.entries[0].view
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DerivedViewWarning)
                clock.advance(self.reservation_ttl_s + 1)
                await eventually(lambda: self.states(kv, ["late"]) == [ABSENT])
            hashes = chain("other", self.capacity)
            result = await kv.store(hashes, self.payloads(hashes))
            with suppress(ValueError):  # the view was revoked: as good
                view[:] = b"\xee" * self.block_bytes
            await kv.complete_store(["late"])
            assert self.states(kv, ["late"]) == [ABSENT]
            await self.check_bytes(kv, result.stored)

    async def test_a_prepared_load_expires(
        self, manager: OffloadingManager, clock: ManualClock
    ) -> None:
        """The pin comes back; the engine that completes late is told."""
        async with self.opened(manager) as kv:
            await self.put(kv, ["a"])
            await kv.prepare_load(["a"])
            clock.advance(self.reservation_ttl_s + 1)
            await eventually(lambda: kv.get_stats().pinned == 0)
            assert kv.get_stats().expired == 1
            with pytest.raises(NotPinnedError):
                await kv.complete_load(["a"])
            assert await kv.evict(["a"]) == ["a"]

    async def test_leases_do_not_expire(
        self, manager: OffloadingManager, clock: ManualClock
    ) -> None:
        """The time limit is for holders that may have died; a lease ends with its scope."""
        async with self.opened(manager) as kv:
            await self.put(kv, ["a", "b"])
            async with kv.load(["a"]) as lease:
                await kv.prepare_load(["b"])
                clock.advance(self.reservation_ttl_s * 10)
                await eventually(lambda: kv.get_stats().expired == 1)
                assert await kv.evict(["a", "b"]) == ["b"]
                assert lease[0] == self.payload("a")
