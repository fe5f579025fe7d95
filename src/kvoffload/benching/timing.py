"""The same work done in several ways, in turns, so that a noisy moment hits them all."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import count
from time import perf_counter
from typing import TypeVar

_T = TypeVar("_T")

Contender = Callable[[], Awaitable[float]]
"""Does the work once and returns the seconds that it took."""

LEAST_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds that one contender took, round by round."""

    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        """Return the fewest seconds."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """Return the seconds of a round like most."""
        return statistics.median(self.seconds)


def in_turns(names: Sequence[str], rounds: Iterable[int]) -> Iterator[tuple[int, str]]:
    """Yield each name once a round, with the round's number.

    Each round is begun by another one, so that none always runs in the wake of the same.
    """
    for number in rounds:
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            yield number, name


async def alternate(contenders: Mapping[str, Contender], seconds: float) -> dict[str, Timings]:
    """Time each contender once a round, after one round that doesn't count.

    Args:
        contenders: What to time.
        seconds: When to begin no more rounds; there are a few in any case.
    """
    found: dict[str, list[float]] = {name: [] for name in contenders}
    until = perf_counter() + seconds

    def rounds() -> Iterator[int]:
        for number in count(-1):
            if number >= LEAST_ROUNDS and perf_counter() >= until:
                return
            yield number

    for number, name in in_turns(list(contenders), rounds()):
        took = await contenders[name]()
        if number >= 0:
            found[name].append(took)
    return {name: Timings(tuple(values)) for name, values in found.items()}


async def apart(work: Callable[[], _T]) -> _T:
    """Run blocking work on a thread, and return what it returns.

    Cancelled, it waits for its end nevertheless: what it works with can be taken away then.
    """
    future = asyncio.get_running_loop().run_in_executor(None, work)
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is not None:
        future.exception()  # or it would be reported as one that nobody looked at
        raise cancelled
    return future.result()


def timed_apart(work: Callable[[], object]) -> Contender:
    """Return a contender that does blocking work on a thread; the way there doesn't count."""

    def timed() -> float:
        started = perf_counter()
        work()
        return perf_counter() - started

    return lambda: apart(timed)


@asynccontextmanager
async def stack_apart() -> AsyncIterator[ExitStack]:
    """Lend a stack for what `apart` opens; it is left on a thread too."""
    stack = ExitStack()
    try:
        yield stack
    finally:
        await apart(stack.close)
