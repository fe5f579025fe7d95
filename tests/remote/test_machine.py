"""The whole manager in any order of calls, with an engine that fails, hangs, forgets and damages.

What is evicted may come back from it, where others have stored it or it was not reached, so that is
not looked at here; bytes, pins, slots and books are.
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import pytest
import uvloop
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from tests.test_whole_manager_machine import CHAINS, MISSES, NAMESPACES, OTHER, TURNS, WholeManager

from kvoffload import AsyncLRUManager, BlockHash, NamespaceView
from kvoffload.keys import decode_key, encode_key
from kvoffload.testing import DictRemoteTier

# The machine derives arrays from leases on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::kvoffload.DerivedViewWarning")


class WithEngine(WholeManager):
    """The same where there is an engine below, that other managers use too."""

    def __init__(self) -> None:
        super().__init__()
        self.engine: dict[bytes, bytes] = {}
        self.remote = DictRemoteTier(store=self.engine, name="engine")

    def more_settings(self) -> dict[str, Any]:
        if len(self.tiers) == 4:  # the fourth stands in its place
            return {}
        self.remote = DictRemoteTier(store=self.engine, name="engine")
        for number in range(10):
            for namespace in ("", OTHER):
                self.another_stores(number, namespace)
        # What hangs does so until it is healed, so that every run of the machine is alike.
        return {"remote": self.remote, "remote_timeout_s": 3600.0, "remote_queue_bytes": 100}

    @precondition(lambda self: not self.closed)
    @rule(chain=CHAINS, namespace=NAMESPACES, turns=TURNS)
    def hint_of_a_namespace(self, chain: list[int], namespace: str, turns: int) -> None:
        async def call() -> None:
            view = self.view(namespace)
            assert isinstance(view, AsyncLRUManager | NamespaceView)
            view.hint_prefetch(chain)
            await self.turn(turns)

        self.loop.run_until_complete(call())

    @precondition(lambda self: not self.closed)
    @rule(chain=CHAINS, namespace=NAMESPACES)
    def look_around(self, chain: list[int], namespace: str) -> None:
        """What a lookup found on the engine may be deleted by the time it returns."""

        async def call() -> None:
            view = self.view(namespace)
            hit = await view.lookup(chain)
            assert hit >= self.kv._core.index.prefix_hit(view._keys(chain))
            view.locate(chain)
            await view.touch(chain)
            view.get_stats()

        self.loop.run_until_complete(call())

    @precondition(lambda self: not self.closed)
    @rule(number=st.integers(0, 9), namespace=NAMESPACES)
    def stored_by_another(self, number: int, namespace: str) -> None:
        self.another_stores(number, namespace)

    def another_stores(self, number: int, namespace: str) -> None:
        self.engine[encode_key(number, namespace)] = self.payload(namespace, number)

    @precondition(lambda self: not self.closed)
    @rule(number=st.integers(0, 9), namespace=NAMESPACES, how=st.sampled_from(["gone", "damaged"]))
    def lost(self, number: int, namespace: str, how: str) -> None:
        key = encode_key(number, namespace)
        if how == "gone":
            self.engine.pop(key, None)
        elif key in self.engine:
            self.remote.corrupt.add(key)

    @precondition(lambda self: not self.closed)
    @rule(how=st.sampled_from(["dead", "get", "put", "hung get", "hung put", "well"]))
    def engine_trouble(
        self, how: Literal["dead", "get", "put", "hung get", "hung put", "well"]
    ) -> None:
        if how == "dead":
            self.remote.is_dead = True
        elif how == "get" or how == "put":
            self.remote.fail(how)
        elif how == "well":
            self.remote.heal()
        else:
            self.remote.hang("get" if how == "hung get" else "put")

    @precondition(lambda self: not self.closed)
    @rule(turns=TURNS)
    def time_passes(self, turns: int) -> None:
        """A probe finds it well again, what was seen is not believed any more."""

        async def call() -> None:
            # Else they might expire, which is `time_is_up`.
            if self.loads or any(call.what.startswith("prepare_load") for call in self.calls):
                return
            self.clock.advance(1.5)
            await self.turn(turns)

        self.loop.run_until_complete(call())

    def heal_tiers(self) -> None:
        super().heal_tiers()
        self.remote.heal()

    def note_gone(self, *_: object) -> None:
        pass

    async def settled(self) -> None:
        await super().settled()
        for key, payload in self.engine.items():
            namespace, block_hash = decode_key(key)
            assert payload == self.payload(namespace, block_hash)
        if self.kv._core.remote is not None:
            assert not self.kv._core.remote._fetching.under_way
            assert not self.kv._core.remote.demand

    async def check_bytes(self, kv: AsyncLRUManager) -> None:
        for namespace in ("", OTHER):
            view = self.view(namespace, kv)
            numbers: list[BlockHash] = [n for n in range(10) if await view.lookup([n])]
            for number in numbers:
                # Seen there a moment ago, and gone since.
                with contextlib.suppress(*MISSES):
                    async with view.load([number]) as lease:
                        assert bytes(lease[0]) == self.payload(namespace, number)


class WithEngineOnUvloop(WithEngine):
    def make_loop(self) -> Any:
        return uvloop.new_event_loop()


SETTINGS = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestOnAsyncio = WithEngine.TestCase
TestOnAsyncio.settings = SETTINGS
TestOnUvloop = WithEngineOnUvloop.TestCase
TestOnUvloop.settings = SETTINGS
