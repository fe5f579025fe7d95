"""What `kvoffload top` shows of a service, from two looks at it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich import box
from rich.columns import Columns
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..types import Medium, TierState
from .report import human_bytes

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

    from ..metrics import TierStats
    from .overview import NamespaceUse, Overview

_BAR = 10
_STATES = {
    TierState.SERVING: "green",
    TierState.FULL: "yellow",
    TierState.READ_ONLY: "red",
    TierState.UNAVAILABLE: "red",
}


class View:
    """A service as rich draws it, anew with each overview.

    Attributes:
        trouble: Why the last look failed; empty if it didn't.
    """

    def __init__(self, overview: Overview) -> None:
        self.trouble = ""
        self._then: Overview | None = None
        self._now = overview

    def advance(self, overview: Overview) -> None:
        """Take the next overview; rates are those since the one before it."""
        # One that is younger than the last is another life of the service.
        self._then = self._now if overview.uptime_s > self._now.uptime_s else None
        self._now = overview
        self.trouble = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the parts, as many namespaces as there is room for."""
        parts = [self._head(), self._rates(), self._tiers()]
        parts.append(Columns([self._latencies(), self._counters()], padding=(0, 4), equal=False))
        rest = 10
        if options.max_height and console.is_terminal:
            used = sum(len(console.render_lines(part, options, pad=False)) for part in parts)
            rest = max(1, console.size.height - used - 4)
        parts.append(self._namespaces(rest, options.max_width))
        yield from parts

    def _head(self) -> RenderableType:
        now = self._now
        text = Text.assemble(
            ("kvoffload ", "bold"),
            (printable(now.version), "bold"),
            "  up ",
            duration(now.uptime_s),
            f"  {now.sessions:,} sessions  {now.requests_total:,} requests  ",
        )
        if self.trouble:
            text.append(printable(self.trouble), "bold red")
        elif now.draining:
            text.append("draining", "bold yellow")
        else:
            text.append("live", "green")
        return text

    def _rates(self) -> RenderableType:
        stats = self._now.stats
        found, missed = self._rate("hits"), self._rate("misses")
        recent = None if found is None or missed is None else ratio(found, missed)
        table = Table(box=None, show_header=False, padding=(0, 3, 0, 0), pad_edge=False)
        table.add_row(
            _pair("hit ratio", _percent(recent), "bold"),
            _pair("overall", _percent(ratio(stats.hits, stats.misses))),
            _pair("read", _byte_rate(self._bytes_rate("bytes_read"))),
            _pair("written", _byte_rate(self._bytes_rate("bytes_written"))),
        )
        table.add_row(
            _pair("found", _per_second(found)),
            _pair("missed", _per_second(missed)),
            _pair("stored", _per_second(self._rate("stored"))),
            _pair("evicted", _per_second(self._rate("evictions"))),
        )
        return Padding(table, (1, 0, 0, 0))

    def _tiers(self) -> RenderableType:
        columns = ("", "full", "blocks", "bytes", "read/s", "written/s", "queue", "a read")
        table = _table("tier", *columns, gap=0)
        for name, tier in self._now.stats.tiers.items():
            label = Text(printable(name))
            if tier.state is not TierState.SERVING:
                label.append(f"\n{tier.state.value.replace('_', ' ')}", _STATES[tier.state])
            slots = (Text(""), "", "", "")
            if not _is_shared(tier):
                slots = (
                    _bar(tier),
                    f"{tier.blocks / max(1, tier.capacity_blocks):.0%}",
                    f"{_count(tier.blocks)}/{_count(tier.capacity_blocks)}",
                    human_bytes(tier.bytes),
                )
            table.add_row(
                label,
                *slots,
                _bytes(self._tier_rate(name, "bytes_read")),
                _bytes(self._tier_rate(name, "bytes_written")),
                f"{tier.queue_depth:,}",
                _seconds(tier.read_latency_s or None),
            )
        return table

    def _latencies(self) -> RenderableType:
        table = _table("latency", "calls", "p50", "p95", "p99", "max")
        for name, one in self._now.latencies.items():
            times = (one.p50_s, one.p95_s, one.p99_s) if one.count else (None, None, None)
            table.add_row(
                Text(printable(name)), _count(one.count), *(_seconds(time) for time in times)
            )
        lag = self._now.loop_lag
        table.add_row(
            "loop lag", "", _seconds(lag.p50_s), "", *map(_seconds, (lag.p99_s, lag.max_s))
        )
        return table

    def _counters(self) -> RenderableType:
        """What should be nothing, or is of use to whom something is wrong for."""
        stats = self._now.stats
        table = _table("blocks", "")
        for name in ("pinned", "pending", "rejected", "corrupt", "io_errors"):
            number = getattr(stats, name)
            bad = number and name in ("corrupt", "io_errors")
            label = {"io_errors": "I/O errors"}.get(name, name)
            table.add_row(label, f"{number:,}", style="red" if bad else None)
        for tier in filter(_is_shared, stats.tiers.values()):
            table.add_row("to be sent", human_bytes(tier.backlog_bytes))
            table.add_row("not sent", f"{tier.dropped_blocks:,}")
        return table

    def _namespaces(self, rows: int, width: int) -> RenderableType:
        table = _table("namespace", "hits", "misses", "ratio", "blocks", "bytes", "max", "reserved")
        table.columns[0].no_wrap = True
        table.columns[0].overflow = "ellipsis"
        table.columns[0].max_width = max(12, width - 66)
        everything = sorted(
            self._now.namespaces.items(), key=lambda item: (-_lookups(item[1]), item[0])
        )
        for name, one in everything[:rows]:
            over = one.max_bytes is not None and one.bytes > one.max_bytes
            table.add_row(
                Text(printable(name)) if name else Text("own", "italic"),
                _count(one.hits),
                _count(one.misses),
                _percent(ratio(one.hits, one.misses)),
                _count(one.blocks),
                Text(human_bytes(one.bytes), "red" if over else ""),
                "-" if one.max_bytes is None else human_bytes(one.max_bytes),
                human_bytes(one.reserved_bytes) if one.reserved_bytes else "-",
            )
        if len(everything) > rows:
            table.caption = f"{len(everything) - rows:,} more"
            table.caption_justify = "left"
        return table

    def _elapsed_s(self) -> float | None:
        return None if self._then is None else self._now.uptime_s - self._then.uptime_s

    def _rate(self, counter: str) -> float | None:
        if self._then is None or (elapsed := self._elapsed_s()) is None:
            return None
        then: int = getattr(self._then.stats, counter)
        now: int = getattr(self._now.stats, counter)
        return (now - then) / elapsed

    def _tier_rate(self, name: str, counter: str) -> float | None:
        if self._then is None or (elapsed := self._elapsed_s()) is None:
            return None
        if (before := self._then.stats.tiers.get(name)) is None:
            return None
        then: int = getattr(before, counter)
        now: int = getattr(self._now.stats.tiers[name], counter)
        return (now - then) / elapsed

    def _bytes_rate(self, counter: str) -> float | None:
        rates = [self._tier_rate(name, counter) for name in self._now.stats.tiers]
        known = [rate for rate in rates if rate is not None]
        return sum(known) if known else None


def _table(*columns: str, gap: int = 1) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False, header_style="dim")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _pair(label: str, value: str, style: str = "") -> Text:
    return Text.assemble((f"{label} ", "dim"), (value, style))


def _is_shared(tier: TierStats) -> bool:
    """Tell whether a tier is an engine that others share, which has no slots of ours."""
    return tier.medium is Medium.REMOTE and not tier.capacity_blocks


def _bar(tier: TierStats) -> Text:
    """Return ready, pending and free slots as a bar; what is there at all is seen."""
    capacity = max(1, tier.capacity_blocks)
    ready = min(_BAR, -(-tier.blocks * _BAR // capacity))
    pending = min(_BAR - ready, -(-tier.pending_blocks * _BAR // capacity))
    return Text.assemble(
        ("█" * ready, _STATES[tier.state]),
        ("▒" * pending, "blue"),
        ("·" * (_BAR - ready - pending), "dim"),
    )


def _lookups(one: NamespaceUse) -> int:
    return one.hits + one.misses


def ratio(hits: float, misses: float) -> float | None:
    """Return the share of hits; `None` of nothing."""
    return hits / (hits + misses) if hits + misses > 0 else None


def printable(text: str) -> str:
    """Return text of others with what would move the cursor, or turn the line, spelt out."""
    return "".join(_spelt(text))


def _spelt(text: str) -> Iterator[str]:
    for char in text:
        yield char if char.isprintable() else f"\\u{{{ord(char):x}}}"


def duration(seconds: float) -> str:
    """Return a long time with its two largest units."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _count(number: int) -> str:
    """Return a count in six characters or so."""
    if number < 100_000:
        return f"{number:,}"
    amount = number / 1e3
    for unit in "kM":
        if amount < 999.5:
            return f"{amount:.3g}{unit}"
        amount /= 1e3
    return f"{amount:.3g}G"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if value * factor < 999.5:
            return f"{value * factor:.3g} {unit}"
    return f"{value:.3g} s"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _bytes(value: float | None) -> str:
    return "-" if value is None else human_bytes(round(value))


def _byte_rate(value: float | None) -> str:
    return "-" if value is None else f"{human_bytes(round(value))}/s"


def _per_second(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}/s"
