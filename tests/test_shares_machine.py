"""Namespaces with and without shares on tiny tiers, one call after the other.

After each call nobody has more than its quota, neither in a tier nor in all, and no block that was
reserved for one namespace has left by another's doing: whose it was is known, for there is but one
caller at a time. Closing and opening again keeps as much as the persistent tier has room for.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvoffload import (
    AsyncLRUManager,
    CapacityError,
    DiskTier,
    EventKind,
    MemoryTier,
    NamespaceShare,
    NamespaceView,
    Tier,
    TierError,
)
from kvoffload.testing import FaultyTier, ManualClock, RestartableTier, payload_for

BLOCK = 32
SIZES = (32, 32, 32, 32, 7, 16, 0, 31)
SHARES = {
    "a": NamespaceShare(max_bytes=3 * BLOCK, reserved_bytes=BLOCK + BLOCK // 2),
    "b": NamespaceShare(reserved_bytes=BLOCK),
    "c": NamespaceShare(max_bytes=2 * BLOCK),
    "": NamespaceShare(max_bytes=4 * BLOCK),
}
NAMES = st.sampled_from(["a", "b", "c", "d", ""])
CHAINS = st.lists(st.integers(0, 7), min_size=1, max_size=4, unique=True)


def memory(blocks: int, name: str = "hot") -> MemoryTier:
    return MemoryTier(blocks, BLOCK, name=name)


Layout = Callable[[Callable[[int], Tier]], list[Tier]]

LAYOUTS: dict[str, Layout] = {
    "hot": lambda _: [memory(4)],
    "hot and warm": lambda _: [memory(2), memory(3, "warm")],
    "hot and cold": lambda cold: [memory(2), cold(4)],
    "three": lambda cold: [memory(1), memory(2, "warm"), cold(3)],
}
"""Tiers, given what makes one that keeps its blocks over a close."""

OPTIONS: list[dict[str, Any]] = [
    {},
    {"policy": "lru", "watermarks": (0.4, 0.6)},
    {"policy": "s3fifo", "write_policy": "through"},
    {"policy": "arc", "cold_admission": "reused"},
    {"cold_admission": "likely", "promote_threshold": 1},
    {"policy": "lru", "when_full": "reject", "promote_threshold": 1},
]


@dataclass(frozen=True)
class Block:
    namespace: str
    number: int

    @property
    def size(self) -> int:
        return SIZES[self.number]

    @property
    def payload(self) -> bytes:
        return payload_for(self.number, self.size, namespace=self.namespace)


class SharesMachine(RuleBasedStateMachine):
    """What each namespace has is read off the manager before and after each call."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.clock = ManualClock()
        self.place = Path(tempfile.mkdtemp(prefix="kvoffload-"))
        self.prepared: list[tuple[str, list[Any]]] = []
        self.kv: AsyncLRUManager | None = None
        self.failing = False
        logging.disable(logging.CRITICAL)

    @initialize(
        layout=st.sampled_from(sorted(LAYOUTS)),
        options=st.sampled_from(OPTIONS),
        on_disk=st.sampled_from([False, False, False, True]),
    )
    def begin(self, layout: str, options: dict[str, Any], on_disk: bool) -> None:
        self.layout = LAYOUTS[layout]
        self.options = options
        self.on_disk = on_disk
        self.lasting: RestartableTier | None = None
        self.open()

    def cold(self, blocks: int) -> Tier:
        if self.on_disk:
            return DiskTier(self.place / "cold", blocks, BLOCK)
        if self.lasting is None:
            self.lasting = RestartableTier(blocks, BLOCK)
        return self.lasting

    def open(self) -> None:
        names = ("hot", "warm", "cold")
        tiers = self.layout(self.cold)
        self.faulty = FaultyTier(tiers[-1], addressable=tiers[-1].addressable)
        tiers[-1] = self.faulty
        kv = AsyncLRUManager(
            **dict(zip(names, tiers, strict=False)),  # type: ignore[arg-type]  # by name
            shares=SHARES,
            clock=self.clock,
            **self.options,
        )
        self.run(kv.__aenter__())
        self.kv = kv
        self.events = kv._core.events.subscribe()

    # Calls

    @rule(name=NAMES, chain=CHAINS)
    def store(self, name: str, chain: list[int]) -> None:
        payloads = [Block(name, number).payload for number in chain]
        result = self.act(name, self.view(name).store(chain, payloads))
        assert {*result.stored, *result.present, *result.rejected} == set(chain)
        assert not set(result.evicted) & set(chain)

    @rule(name=NAMES, chain=CHAINS)
    def load(self, name: str, chain: list[int]) -> None:
        async def call() -> None:
            hit = await self.view(name).lookup(chain)
            with suppress(CapacityError, TierError):
                async with self.view(name).load(chain[:hit]) as lease:
                    for number, view in zip(chain, lease, strict=False):
                        assert bytes(view) == Block(name, number).payload

        self.act(name, call())

    @rule(name=NAMES, chain=CHAINS, split=st.integers(1, 3))
    def request(self, name: str, chain: list[int], split: int) -> None:
        async def call() -> None:
            async with self.view(name).request(chain) as request:
                rest = [Block(name, number).payload for number in chain[request.hit :]]
                for part in (rest[:split], rest[split:]):
                    await request.store(part)

        self.act(name, call())

    @rule(name=NAMES, chain=CHAINS)
    def prepare_store(self, name: str, chain: list[int]) -> None:
        before = self.ready()
        sizes = [SIZES[number] for number in chain]
        output = self.act(name, self.view(name).prepare_store(chain, sizes=sizes))
        if output is None:
            assert self.failing or self.ready() == before
        elif output.block_hashes_to_store:
            for entry, number in zip(
                output.store_spec.entries, output.block_hashes_to_store, strict=True
            ):
                entry.view[:] = Block(name, number).payload
            self.prepared.append((name, list(output.block_hashes_to_store)))

    @rule(which=st.integers(0, 9), success=st.booleans())
    def complete_store(self, which: int, success: bool) -> None:
        if self.prepared:
            name, numbers = self.prepared.pop(which % len(self.prepared))
            with suppress(TierError):
                self.act(name, self.view(name).complete_store(numbers, success))

    @rule(name=NAMES, chain=CHAINS)
    def evict(self, name: str, chain: list[int]) -> None:
        with suppress(TierError):
            self.act(name, self.view(name).evict(chain))

    @rule(name=NAMES, count=st.integers(0, 3))
    def evict_coldest(self, name: str, count: int) -> None:
        mine = [block for block in self.ready() if block.namespace == name]
        with suppress(TierError):
            gone = self.act(name, self.view(name).evict(num_blocks=count))
            assert len(gone) == min(count, len(mine))

    @rule(name=NAMES)
    def clear(self, name: str) -> None:
        with suppress(TierError):
            self.act(name, self.view(name).clear())

    @rule(times=st.integers(1, 3))
    def writes_fail(self, times: int) -> None:
        self.faulty.fail("write", times=times)
        self.failing = True

    @rule()
    def reopen(self) -> None:
        """What is reserved comes through first, if so many blocks find a slot to persist in."""
        assert self.kv is not None
        for name, numbers in self.prepared:
            self.act(name, self.view(name).complete_store(numbers, success=False))
        self.prepared.clear()
        self.faulty.heal()
        self.failing = False
        before = self.used()
        reserved = [each for each in self.entries() if each.namespace in ("a", "b")]
        self.run(self.kv.__aexit__(None, None, None))
        self.kv = None
        self.open()
        after = self.used()
        lasts = self.faulty.persistent and len(reserved) <= self.faulty.num_blocks
        if lasts and self.options.get("cold_admission", "all") == "all":
            for name, share in SHARES.items():
                assert after[name] >= min(before[name], share.reserved_bytes)

    @rule(seconds=st.integers(1, 5))
    def time_passes(self, seconds: int) -> None:
        self.clock.advance(seconds)

    # What always holds

    @invariant()
    def shares_are_kept(self) -> None:
        if self.kv is None:
            return
        kv = self.kv
        kv.check_invariants()
        assert kv._core.index.shares is not None
        used = self.used()
        for name, size in used.items():
            assert kv._core.index.shares.used(name or None) == size
            share = SHARES.get(name, NamespaceShare())
            assert share.max_bytes is None or size <= share.max_bytes
            for level in kv._core.index.levels:
                copies = list(level.copies.values())
                home = [entry for entry in self.entries() if entry.level == level.number]
                here = [each for each in [*copies, *home] if (each.namespace or "") == name]
                if share.max_bytes is not None:
                    assert sum(each.size for each in here) <= share.max_bytes

    def teardown(self) -> None:
        try:
            if self.kv is not None:
                self.reopen()
        finally:
            logging.disable(logging.NOTSET)
            if self.kv is not None:
                self.run(self.kv.__aexit__(None, None, None))
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()
            shutil.rmtree(self.place)

    # Inside

    def view(self, name: str) -> NamespaceView:
        """Return a view of each namespace, for the manager itself may evict everything."""
        assert self.kv is not None
        return self.kv.namespace(name)

    def entries(self) -> list[Any]:
        assert self.kv is not None
        index = self.kv._core.index
        return [*index.ready.values(), *index.pending.values()]

    def used(self) -> dict[str, int]:
        used = dict.fromkeys(("a", "b", "c", "d", ""), 0)
        for entry in self.entries():
            used[entry.namespace or ""] += entry.size
        return used

    def ready(self) -> set[Block]:
        assert self.kv is not None
        ready = self.kv._core.index.ready.values()
        return {Block(entry.namespace or "", int(entry.block_hash)) for entry in ready}

    def act(self, name: str, call: Coroutine[Any, Any, Any]) -> Any:
        """Let a namespace make a call; see that it costs the others nothing reserved."""
        left = self.used()
        self.events._queue.clear()
        try:
            return self.run(call)
        finally:
            for event in self.events._queue:
                if event.kind is EventKind.REMOVED and event.namespace != name:
                    reserved = SHARES.get(event.namespace, NamespaceShare()).reserved_bytes
                    for number in event.block_hashes:
                        assert left[event.namespace] > reserved or not reserved
                        left[event.namespace] -= SIZES[int(number)]
                    assert left[event.namespace] >= reserved or not reserved

    def run(self, call: Coroutine[Any, Any, Any]) -> Any:
        """Run a call to its end, and what it started in the background."""

        async def to_the_end() -> Any:
            try:
                return await call
            finally:
                if self.kv is not None:
                    await self.kv._core.jobs.drain()

        return self.loop.run_until_complete(to_the_end())


TestShares = SharesMachine.TestCase
TestShares.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
