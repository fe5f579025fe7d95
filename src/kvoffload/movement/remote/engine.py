"""The calls to a remote tier: each under a deadline, and none while the engine does not answer."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar, cast

import anyio

from ...errors import (
    CapacityError,
    OffloadError,
    TierError,
    TierTimeoutError,
    TierUnavailableError,
)
from ...index import Index
from ...levels import Level
from ...remote.protocol import RemoteTier
from ...signals import Signal
from ...types import Key, Tier, TierState

FIRST_PROBE_S = 0.1
"""Seconds after which an engine that did not answer is asked again."""
MOST_PROBE_S = 5.0
"""The same after many times: it doubles with each."""

T = TypeVar("T")

log = logging.getLogger("kvoffload")


class Engine:
    """One remote tier: what it can do now, and its books.

    The first call that fails as a whole, or that takes longer than `timeout_s`, opens a breaker:
    from then on calls fail at once, until a probe in the background finds the engine well.

    Attributes:
        tier: What is called.
        level: Its counters and meter, in the form that those of the other tiers have.
        timeout_s: Seconds that a call may take.
        changed: Fired whenever it can do more or less than before.
    """

    def __init__(self, tier: RemoteTier, index: Index, timeout_s: float) -> None:
        self.tier = tier
        self.timeout_s = timeout_s
        self.changed = Signal()
        self._index = index
        self._view = _WithoutSlots(tier, index.levels[0].tier.block_bytes)
        # Of a tier it looks at nothing but what is there.
        self.level = Level(len(index.levels), cast("Tier", self._view))

    @property
    def is_down(self) -> bool:
        """Whether calls fail at once."""
        return self._view.state is TierState.UNAVAILABLE

    def set_state(self, state: TierState, why: str = "") -> None:
        """Note what it can do from now on, and tell."""
        if state is self._view.state:
            return
        self._view.state = state
        name = self.tier.name
        if state is TierState.SERVING:
            log.info("remote tier %r serves again", name)
        else:
            log.warning("remote tier %r is %s: %s", name, state.value, why)
        self._index.events.tell_state(state.value, tier=name, medium=self.tier.medium)
        self.changed.fire()

    def took_too_long(self) -> str:
        """Note that somebody waited for it in vain; return what to say."""
        why = f"remote tier {self.tier.name!r} did not answer within {self.timeout_s:g} s"
        self.set_state(TierState.UNAVAILABLE, why)
        return why

    async def call(self, work: Callable[[], Awaitable[T]], *, may_refuse: bool = False) -> T:
        """Do one call.

        Raises:
            TierUnavailableError: The engine does not answer, or did not in time
                (`TierTimeoutError`).
            TierError: It `may_refuse`, and did; of all else it may do as much as before.
        """
        name = self.tier.name
        if self.is_down:
            raise TierUnavailableError(f"remote tier {name!r} does not answer", tier=name)
        try:
            with anyio.fail_after(self.timeout_s):
                return await work()
        except TierUnavailableError as exc:
            self.set_state(TierState.UNAVAILABLE, str(exc))
            raise
        except TimeoutError as exc:
            raise TierTimeoutError(self.took_too_long(), tier=name) from exc
        except Exception as exc:
            if may_refuse and isinstance(exc, TierError):
                raise
            # Whatever a tier raises is its failure, and one of the engine as far as is known.
            why = f"remote tier {name!r} failed: {exc!r}"
            self.set_state(TierState.UNAVAILABLE, why)
            raise TierUnavailableError(why, tier=name) from exc

    def note_failures(self, keys: Sequence[Key], outcomes: Sequence[object]) -> None:
        """Note the errors among the outcomes of a call."""
        for key, outcome in zip(keys, outcomes, strict=True):
            if isinstance(outcome, TierError):
                if outcome.block_hash is None:
                    outcome.block_hash = key[1] if isinstance(key, tuple) else key
                self._index.fail(self.level, [key], str(outcome))
                if isinstance(outcome, TierUnavailableError):
                    self.set_state(TierState.UNAVAILABLE, str(outcome))

    async def open(self) -> None:
        """Open the tier; an engine that does not answer is one that may come back.

        Raises:
            ConfigError: It can't be used as it was set up.
        """
        why = f"it did not answer within {self.timeout_s:g} s"
        with anyio.move_on_after(self.timeout_s):
            try:
                await self.tier.open()
            except TierError as exc:
                why = str(exc)
            else:
                return
        self.set_state(TierState.UNAVAILABLE, why)

    async def probe(self) -> None:
        """Ask an engine that is down every now and then, until cancelled."""
        sleep = self._index.clock.sleep
        while True:
            while not self.is_down:
                await self.changed.wait()
            delay = FIRST_PROBE_S
            while self.is_down:
                await sleep(delay)
                delay = min(2 * delay, MOST_PROBE_S)
                if await self._is_well():
                    self.set_state(TierState.SERVING)

    async def _is_well(self) -> bool:
        with anyio.move_on_after(self.timeout_s):
            try:
                await self.tier.check()
            except Exception as exc:  # noqa: BLE001  # whatever it is, it is not well
                log.debug("remote tier %r: %r", self.tier.name, exc)
            else:
                return True
        return False


class _WithoutSlots:
    """What `Level` asks a tier, of one that has no slots."""

    num_blocks = 0
    addressable = False
    persistent = False

    def __init__(self, tier: RemoteTier, block_bytes: int) -> None:
        self.name = tier.name
        self.medium = tier.medium
        self.block_bytes = block_bytes
        self.state = TierState.SERVING


def again(error: OffloadError) -> OffloadError:
    """Return a new error like one that others get too."""
    fresh: OffloadError
    if isinstance(error, TierError):
        known: tuple[Callable[..., TierError], ...] = (TierTimeoutError, TierUnavailableError)
        kind = next((kind for kind in known if type(error) is kind), TierError)
        fresh = kind(str(error), tier=error.tier, block_hash=error.block_hash)
    else:
        fresh = CapacityError(str(error))
    fresh.__cause__ = error
    return fresh
