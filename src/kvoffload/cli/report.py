"""The result of a replay, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from ..sizes import human_bytes as human_bytes
from ..workload import Latency, ReplayReport, Workload

_PERCENTILES = ("calls", "p50", "p99", "max")


@dataclass(frozen=True, slots=True)
class Setup:
    """What was asked for on the command line.

    Attributes:
        policy: Name of the eviction policy.
        block_bytes: Bytes of a block.
        hot: Blocks of the hot tier.
        warm: Blocks of the warm tier; 0 for none.
        cold: Directory of the cold tier; `None` for none.
        cold_blocks: Blocks of the cold tier.
        concurrency: Requests under way at once, at most.
        speed: Factor on the arrival times; 0 for as fast as it goes.
        uvloop: Whether the event loop is uvloop's.
    """

    policy: str
    block_bytes: int
    hot: int
    warm: int
    cold: Path | None
    cold_blocks: int
    concurrency: int
    speed: float
    uvloop: bool


@dataclass(frozen=True, slots=True)
class Result:
    """A finished replay.

    Attributes:
        setup: What was asked for.
        workload: What was replayed.
        report: What came of it.
        close_s: Seconds that closing the manager took.
    """

    setup: Setup
    workload: Workload
    report: ReplayReport
    close_s: float


def as_json(result: Result) -> str:
    """Return everything as one JSON object on one line."""
    setup, report = result.setup, asdict(result.report)
    for call in ("lookup", "load", "store"):
        report[f"{call}_us"] = report.pop(call)
    return json.dumps(
        {
            "workload": result.workload.name,
            "policy": setup.policy,
            "block_bytes": setup.block_bytes,
            "concurrency": setup.concurrency,
            "speed": setup.speed,
            "uvloop": setup.uvloop,
            **report,
            "close_seconds": result.close_s,
        }
    )


def as_tables(result: Result) -> Iterator[Table]:
    """Yield the tables to print; they fit 80 columns."""
    yield _summary(result)
    yield _tiers(result)
    yield _latencies(result.report)


def _table(title: str, *columns: str, header: bool = True) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_header=header,
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _summary(result: Result) -> Table:
    setup, report = result.setup, result.report
    title = f"Replay of {result.workload.name}, policy {setup.policy}"
    table = _table(title, "", "", header=False)
    table.add_column("", style="dim")
    rate = report.requests / report.seconds
    table.add_row("requests", f"{report.requests:,}", f"{rate:,.0f} a second")
    table.add_row("blocks", f"{report.blocks:,}", f"{human_bytes(setup.block_bytes)} each")
    table.add_row(
        "prefix hits",
        f"{report.prefix_hit_ratio:.1%}",
        f"{report.hit_blocks:,} blocks found and not computed again",
    )
    verdict = "not all is as stored" if report.wrong_bytes else "all is as stored"
    table.add_row(
        "wrong bytes",
        f"{report.wrong_bytes:,}",
        f"{human_bytes(report.verified_bytes)} loaded and checked, {verdict}",
        style="red" if report.wrong_bytes else None,
    )
    saving = " and save on disk" if setup.cold else ""
    table.add_row(
        "time", f"{report.seconds:.2f} s", f"then {result.close_s:.2f} s to close{saving}"
    )
    if setup.speed:
        table.add_row("late", f"{report.late_max_s:.2f} s", "longest wait for a free worker")
    table.add_row("evictions", f"{report.evictions:,}", "blocks that left every tier for room")
    table.add_row("demotions", f"{report.demotions:,}", "moves to a lower tier")
    table.add_row("promotions", f"{report.promotions:,}", "moves to a higher tier")
    for name, number, meaning in (
        ("rejected", report.rejected, "blocks that no tier took"),
        ("failed loads", report.failed_loads, "requests whose blocks could not be loaded"),
        ("I/O errors", report.io_errors, "blocks that could not be read, written, erased"),
    ):
        if number:
            table.add_row(name, f"{number:,}", meaning, style="yellow")
    return table


def _tiers(result: Result) -> Table:
    table = _table(
        "Tiers, hottest first; moves between them count as read and written",
        *("tier", "size", "filled", "hits", "read", "GB/s", "written", "GB/s"),
    )
    for name, tier in result.report.tiers.items():
        table.add_row(
            f"{name} ({tier.medium})",
            human_bytes(tier.capacity_blocks * result.setup.block_bytes),
            f"{tier.blocks / tier.capacity_blocks:.0%}",
            f"{tier.hits:,}",
            human_bytes(tier.bytes_read),
            f"{tier.read_gb_per_s:.2f}",
            human_bytes(tier.bytes_written),
            f"{tier.write_gb_per_s:.2f}",
        )
    return table


def _latencies(report: ReplayReport) -> Table:
    table = _table("Calls, and lag of the event loop", "", *_PERCENTILES)
    for name, calls in (("lookup", report.lookup), ("load", report.load), ("store", report.store)):
        table.add_row(name, f"{calls.calls:,}", *_times(calls), "")
    table.add_row(
        "loop lag",
        "",
        "",
        f"{report.loop_lag_p99_ms:.2f} ms",
        f"{report.loop_lag_max_ms:.2f} ms",
    )
    return table


def _times(latency: Latency) -> tuple[str, str]:
    if not latency.calls:
        return "-", "-"
    return f"{latency.p50:,.0f} us", f"{latency.p99:,.0f} us"
