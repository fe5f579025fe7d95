"""Part of `ManagerContract`: cancellation at every await, and many callers at once."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Literal

import anyio
import anyio.abc
import pytest
from anyio.lowlevel import checkpoint

from ...errors import BlockNotFoundError, CapacityError
from ...retention import Retention
from ...types import BlockHash, OffloadingManager
from ..cancellation import cancel_everywhere
from .manager_base import ManagerSuite, chain

CHAIN = chain("c", 6)


class CancelSuite(ManagerSuite):
    """Invariants 1 to 4, the hard way."""

    @pytest.mark.parametrize("how", ["scope", "task"])
    @pytest.mark.parametrize(
        "call",
        [
            "store",
            "load",
            "evict",
            "evict num_blocks",
            "forget",
            "clear",
            "flush",
            "touch",
            "prepare_store",
            "prepare_load",
            "request",
            "last request",
        ],
    )
    async def test_cancelled_at_every_await(
        self,
        manager: OffloadingManager,
        call: str,
        how: Literal["scope", "task"],
    ) -> None:
        """Nothing leaks, no block shows other bytes, and the next call works.

        All tiers are full, so every call that needs room has blocks to move.
        """
        old = chain("old", self.capacity)

        async with self.opened(manager) as kv:

            async def prepare() -> None:
                await kv.clear()
                await self.fill(kv, self.capacity)

            async def check() -> None:
                await self.settled(kv)
                for block_hash in [*old, *CHAIN]:
                    # One by one, for a load may move blocks between tiers.
                    await self.check_bytes(kv, self.ready(kv, [block_hash]))
                result = await self.put(kv, ["afterwards"])
                assert result.stored == ("afterwards",)
                await self.check_bytes(kv, ["afterwards"])

            for turns in (0, 1):
                await cancel_everywhere(
                    self._call(kv, call), check, how=how, turns=turns, prepare=prepare
                )

    def _call(self, kv: OffloadingManager, call: str) -> Callable[[], Awaitable[object]]:
        old = chain("old", self.capacity)

        async def store() -> None:
            await kv.store(CHAIN, self.payloads(CHAIN))

        async def load() -> None:
            async with kv.load(old) as lease:
                assert [view.tobytes() for view in lease] == self.payloads(old)

        async def prepare_store() -> None:
            # Cancelled inside the first call, the reservation can only be taken back by the
            # manager: nobody else knows of it.
            output = await kv.prepare_store(CHAIN)
            assert output is not None
            for block_hash, entry in zip(CHAIN, output.store_spec.entries, strict=True):
                entry.view[:] = self.payload(block_hash)
            await kv.complete_store(CHAIN)

        async def prepare_load() -> None:
            spec = await kv.prepare_load(old)
            assert [entry.view.tobytes() for entry in spec.entries] == self.payloads(old)
            await kv.complete_load(old)

        async def request() -> None:
            hashes = [*old[-2:], *CHAIN]
            async with kv.request(hashes, wait_pending_s=1.0) as request:
                assert request.hit == 2
                async with request.load() as lease:
                    assert [view.tobytes() for view in lease] == self.payloads(old[-2:])
                await request.store(self.payloads(CHAIN[:2]))
                await request.store(self.payloads(CHAIN[2:]))

        async def last_request() -> None:
            over = Retention.SESSION_OVER
            async with kv.request(old, retention=over) as request, request.load() as lease:
                assert [view.tobytes() for view in lease] == self.payloads(old)

        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "store": store,
            "load": load,
            "evict": lambda: kv.evict([*old[:2], *old[-2:]]),
            "evict num_blocks": lambda: kv.evict(num_blocks=self.capacity),
            "forget": lambda: kv.forget(old),
            "clear": kv.clear,
            "flush": kv.flush,
            "touch": lambda: kv.touch(old),
            "prepare_store": prepare_store,
            "prepare_load": prepare_load,
            "request": request,
            "last request": last_request,
        }
        return calls[call]

    @pytest.mark.parametrize("seed", range(3))
    async def test_many_callers(self, manager: OffloadingManager, seed: int) -> None:
        """Random callers side by side, some cancelled: whatever is read is what was stored.

        More blocks than there are slots, so that they come and go all the time.
        """
        rng = random.Random(seed)
        names = chain("block", 2 * self.capacity + 2)

        async def call(kv: OffloadingManager) -> None:
            start = rng.randrange(len(names))
            hashes: list[BlockHash] = names[start : start + rng.randint(1, 5)]
            match rng.choice(["store", "load", "load", "request", "evict", "touch", "prepare"]):
                case "store":
                    result = await kv.store(hashes, self.payloads(hashes))
                    parts = [*result.stored, *result.present, *result.rejected]
                    assert sorted(map(str, parts)) == sorted(map(str, hashes))
                    assert set(result.evicted).isdisjoint(hashes)
                case "load":
                    async with kv.load(hashes) as lease:
                        await checkpoint()
                        assert [view.tobytes() for view in lease] == self.payloads(hashes)
                case "request":
                    async with kv.request(hashes) as request:
                        hit = request.hit
                        async with request.load() as lease:
                            await checkpoint()
                            assert [view.tobytes() for view in lease] == self.payloads(hashes[:hit])
                        await request.store(self.payloads(hashes[hit:]))
                case "evict":
                    await kv.evict(hashes[:2])
                case "touch":
                    await kv.touch(hashes)
                case "prepare":
                    output = await kv.prepare_store(hashes[:2])
                    if output is not None:
                        spec = output.store_spec
                        for block_hash, entry in zip(spec.block_hashes, spec.entries, strict=True):
                            entry.view[:] = self.payload(block_hash)
                        await kv.complete_store(spec.block_hashes, rng.random() < 0.7)

        async def caller(kv: OffloadingManager, tasks: anyio.abc.TaskGroup) -> None:
            for _ in range(40):
                with anyio.CancelScope() as scope:
                    if rng.random() < 0.2:
                        tasks.start_soon(cancel_soon, scope, rng.randrange(8))
                    with suppress(BlockNotFoundError, CapacityError):
                        await call(kv)
                self.check_slots(kv)
                await checkpoint()

        async def cancel_soon(scope: anyio.CancelScope, turns: int) -> None:
            for _ in range(turns):
                await checkpoint()
            scope.cancel()

        async with self.opened(manager) as kv:
            async with anyio.create_task_group() as tasks:
                for _ in range(5):
                    tasks.start_soon(caller, kv, tasks)
            await self.settled(kv)
            for name in names:
                # One by one, for a load may move blocks between tiers.
                await self.check_bytes(kv, self.ready(kv, [name]))
