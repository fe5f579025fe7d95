"""The text formats that Prometheus reads, written a few lines at a time.

`prometheus_client.generate_latest` does the same in one go, and holds the event loop meanwhile: 20
to 40 ms for 5,600 series. A thread is no way out, for it competes with the loop for the
interpreter's lock, which the loop gets back after the switch interval (5 ms), each time that it
wants it: half of the scrapes held it for 9 ms and more, the worst for 25. So this writes in the
loop, and gives way whenever its time is used up: 2 ms, and 5 to 9 ms in all. See
benchmarks/metrics_scrape.py.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from time import perf_counter
from typing import TypeAlias, TypeVar

from anyio.lowlevel import checkpoint

T = TypeVar("T")

HOLD_S = 0.002
"""Seconds of work between two turns of the loop."""

LINES_A_LOOK = 16
"""Lines between two looks at the clock, which costs about as much as half a line."""


class Exposition(Enum):
    """A text format."""

    TEXT = "text/plain; version=0.0.4; charset=utf-8"
    OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

    @property
    def content_type(self) -> str:
        """Return the value of the header of that name."""
        return self.value

    @classmethod
    def accepted(cls, accept: str | None) -> Exposition:
        """Return the format that a client's `Accept` header asks for.

        OpenMetrics where it is named, in a version that this is, and nothing that the other format
        is too is preferred; else the older format, which everything reads.
        """
        quality = dict.fromkeys(cls, 0.0)
        for one in (accept or "").split(","):
            kind, *parameters = (part.strip().lower() for part in one.split(";"))
            given = dict(parameter.split("=", 1) for parameter in parameters if "=" in parameter)
            version = given.get("version", "").strip('"')
            try:
                weight = float(given.get("q", "1"))
            except ValueError:
                continue
            if kind == "application/openmetrics-text" and version in ("", "1.0.0", "0.0.1"):
                quality[cls.OPENMETRICS] = max(quality[cls.OPENMETRICS], weight)
            elif kind == "text/plain" and version in ("", "0.0.4"):
                quality[cls.TEXT] = max(quality[cls.TEXT], weight)
        best = quality[cls.OPENMETRICS]
        return cls.OPENMETRICS if best > 0 and best >= quality[cls.TEXT] else cls.TEXT


class Labels:
    """Names and values that tell a series from others, escaped once for all its uses.

    Attributes:
        pairs: As they were given.
        text: As they are written.
    """

    __slots__ = ("pairs", "text")

    def __init__(self, **pairs: str) -> None:
        self.pairs = pairs
        inside = ",".join(f'{name}="{_escape_value(value)}"' for name, value in pairs.items())
        self.text = f"{{{inside}}}" if inside else ""

    def __or__(self, more: Labels) -> Labels:
        """Return these labels and some more."""
        if not (self.pairs and more.pairs):
            return self if self.pairs else more
        both = Labels.__new__(Labels)
        both.pairs = {**self.pairs, **more.pairs}
        both.text = f"{self.text[:-1]},{more.text[1:]}"
        return both


NO_LABELS = Labels()

Sample: TypeAlias = tuple[str, Labels, float]
"""What follows the family's name in the name of the series; its labels; its value."""


@dataclass(frozen=True, slots=True)
class Family:
    """What is said once of many series.

    Attributes:
        name: With prefix and unit, without `_total`.
        kind: `"counter"`, `"gauge"` or `"histogram"`.
        help: One sentence.
        unit: `"seconds"` or `"bytes"`, the last word of the name; or nothing.
        labels: Names of the labels, `le` of a histogram apart.
    """

    name: str
    kind: str
    help: str
    unit: str = ""
    labels: tuple[str, ...] = ()

    @property
    def exported(self) -> str:
        """Return the name as in a query."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


def header(family: Family, exposition: Exposition) -> str:
    """Return the lines before the first sample of a family."""
    if exposition is Exposition.TEXT:
        name = family.exported
        text = family.help.replace("\\", r"\\").replace("\n", r"\n")
        return f"# HELP {name} {text}\n# TYPE {name} {family.kind}\n"
    unit = f"# UNIT {family.name} {family.unit}\n" if family.unit else ""
    return (
        f"# HELP {family.name} {_escape_value(family.help)}\n"
        f"# TYPE {family.name} {family.kind}\n{unit}"
    )


def lines(
    families: Iterable[tuple[Family, Iterable[Sample]]], exposition: Exposition
) -> Iterator[str]:
    """Write families of series; those that have none are left out."""
    for family, samples in families:
        name = family.name
        first = True
        for suffix, labels, value in samples:
            if first:
                first = False
                yield header(family, exposition)
            # An int as it is: as a float, a counter beyond 2**53 would be off.
            shown = value if value.__class__ is int else _show(value)
            yield f"{name}{suffix}{labels.text} {shown}\n"
    if exposition is Exposition.OPENMETRICS:
        yield "# EOF\n"


class Turns:
    """Shares an event loop: says when it is time to give way, and does.

    Args:
        hold_s: Seconds of work between two turns of the loop.
        clock: Seconds, from wherever.
    """

    def __init__(
        self, hold_s: float = HOLD_S, *, clock: Callable[[], float] = perf_counter
    ) -> None:
        self._hold_s = hold_s
        self._clock = clock
        self._began = clock()

    async def give_way(self) -> None:
        """Let the loop have a turn if the time is used up."""
        if self._clock() - self._began >= self._hold_s:
            await checkpoint()
            self._began = self._clock()

    async def follow(self, steps: Generator[None, None, T]) -> T:
        """Take steps, with turns of the loop in between; return what comes of them."""
        try:
            while True:
                next(steps)
                await self.give_way()
        except StopIteration as done:
            result: T = done.value
            return result

    async def join(self, text: Iterable[str]) -> bytes:
        """Put lines together, with turns of the loop in between."""
        chunks = []
        waiting: list[str] = []
        for line in text:
            waiting.append(line)
            if len(waiting) == LINES_A_LOOK:
                chunks.append("".join(waiting).encode())
                waiting.clear()
                await self.give_way()
        chunks.append("".join(waiting).encode())
        return b"".join(chunks)


def _escape_value(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _show(value: float) -> str:
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "+Inf" if value > 0 else "-Inf"
    return repr(float(value))
