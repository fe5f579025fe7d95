"""The command `kvoffload simulate`."""

from __future__ import annotations

import json as json_format
import multiprocessing
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..errors import ConfigError
from ..sizes import human_bytes
from ..workload import Simulated, Workload, least_capacity, policy_for, read_trace
from ..workload import simulate as run_simulation
from .replay import parse_size

DEFAULT_POLICIES = "lru,weighted,optimal"
DEFAULT_SIZES = "1%,2%,5%,10%,20%,50%"


@dataclass(frozen=True, slots=True)
class _Job:
    trace: int
    policy: str
    capacity: int
    accuracy: float


@dataclass(frozen=True, slots=True)
class _Advice:
    """The fewest blocks that reach a ratio; `None` where no number does."""

    trace: str
    policy: str
    prefix_hit_ratio: float
    capacity: int | None


def simulate(
    traces: Annotated[
        list[Path],
        typer.Argument(
            help="Traces: JSON lines, plain or gzipped, each with `timestamp` and `hash_ids`.",
            show_default=False,
        ),
    ],
    policies: Annotated[
        str,
        typer.Option(
            help="Policies, with commas between: `arc`, `fifo`, `lru`, `s3fifo`, `weighted`; "
            "`optimal`, which knows the future and is a bound; and `told`: `weighted` with callers "
            "who say of each request whether its chain goes on."
        ),
    ] = DEFAULT_POLICIES,
    accuracy: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="How often they are right, for `told`."),
    ] = 1.0,
    sizes: Annotated[
        str,
        typer.Option(
            help="Sizes of the cache, with commas between: blocks, or per cent of the trace's "
            "distinct blocks."
        ),
    ] = DEFAULT_SIZES,
    advise: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Say how many blocks reach this prefix hit ratio, instead of simulating sizes.",
            show_default=False,
        ),
    ] = None,
    block_bytes: Annotated[
        str,
        typer.Option(help="Bytes of a block, to tell sizes in bytes too.", metavar="SIZE"),
    ] = "2MiB",
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw hit ratio against size into this file, PNG or SVG; needs the extra `plot`.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
) -> None:
    """Tell what eviction policies would hit on traces, without moving a byte.

    The policies are the very ones that managers run. Requests come one after the other; what
    counts is the prefix hit ratio: the share of all blocks that were there when their request
    came, with all blocks before them. Behind a missing block nothing counts.

    **Exit status**: 0 fine; 2 a mistake in the arguments or an unusable trace; 130 interrupted.
    """
    names = _split(policies, "--policies")
    for name in names:
        policy_for(name, ())
    size_of_block = parse_size(block_bytes)
    if plot is not None:
        _check_plot(plot)
    workloads = [read_trace(trace) for trace in traces]
    console = Console(stderr=True)
    if advise is not None:
        found = [
            _Advice(workloads[job.trace].name, job.policy, advise, capacity)
            for job, capacity in _run(
                workloads, _advice_jobs(workloads, names, accuracy), advise, console
            )
            if not isinstance(capacity, Simulated)
        ]
        if json:
            print(json_format.dumps({"advice": [_advice_as_json(each) for each in found]}))
        else:
            Console().print(_advice_table(found, size_of_block))
        return
    jobs = [
        _Job(number, name, capacity, accuracy)
        for number, workload in enumerate(workloads)
        for name in names
        for capacity in _capacities(workload, sizes)
    ]
    results = [result for _, result in _run(workloads, jobs, None, console)]
    simulated = [result for result in results if isinstance(result, Simulated)]
    if plot is not None:
        _draw(plot, simulated)
    if json:
        print(json_format.dumps({"results": [_as_json(each) for each in simulated]}))
        return
    for workload in workloads:
        Console().print(_table(workload, names, simulated, size_of_block))
    if plot is not None:
        console.print(f"drawn into {plot}")


# Running


_WORKLOADS: Sequence[Workload] = ()
"""In a worker process: what it simulates."""


def _start_worker(workloads: Sequence[Workload]) -> None:
    global _WORKLOADS  # a process's own, set once
    _WORKLOADS = workloads


def _work(job: _Job, advise: float | None) -> Simulated | int | None:
    workload = _WORKLOADS[job.trace]
    if advise is not None:
        return least_capacity(workload, job.policy, advise, accuracy=job.accuracy)
    return run_simulation(workload, job.policy, job.capacity, accuracy=job.accuracy)


def _run(
    workloads: Sequence[Workload], jobs: Sequence[_Job], advise: float | None, console: Console
) -> list[tuple[_Job, Simulated | int | None]]:
    """Do all jobs, on all cores; return them in order with what came of them."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    workers = min(len(jobs), os.cpu_count() or 1)
    with bar:
        task = bar.add_task("simulating", total=len(jobs))
        done: dict[_Job, Simulated | int | None] = {}
        if workers <= 1:
            _start_worker(workloads)
            for job in jobs:
                done[job] = _work(job, advise)
                bar.advance(task)
        else:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(
                workers, context, initializer=_start_worker, initargs=(workloads,)
            ) as pool:
                futures = {pool.submit(_work, job, advise): job for job in _longest_first(jobs)}
                for future in as_completed(futures):
                    done[futures[future]] = future.result()
                    bar.advance(task)
    return [(job, done[job]) for job in jobs]


def _longest_first(jobs: Sequence[_Job]) -> list[_Job]:
    """Return jobs so that no long one is begun at the end."""
    return sorted(jobs, key=lambda job: job.policy in ("lru", "fifo"))


def _advice_jobs(
    workloads: Sequence[Workload], names: Sequence[str], accuracy: float
) -> list[_Job]:
    return [_Job(number, name, 0, accuracy) for number in range(len(workloads)) for name in names]


# Arguments


def _split(text: str, option: str) -> list[str]:
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise ConfigError(f"{option} is empty")
    return names


def _capacities(workload: Workload, sizes: str) -> list[int]:
    """Return sizes in blocks, in rising order."""
    distinct = workload.num_distinct_blocks
    return sorted({_capacity(size, distinct) for size in _split(sizes, "--sizes")})


def _capacity(size: str, distinct: int) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", size)
    if match is None:
        raise ConfigError(f"--sizes takes blocks (1000) or per cent (5%), not {size!r}")
    number, percent = match.groups()
    if not percent and "." in number:
        raise ConfigError(f"--sizes takes whole blocks, not {size!r}")
    capacity = int(float(number) * distinct / 100) if percent else int(number)
    if not percent and capacity < 1:
        raise ConfigError(f"--sizes takes at least 1 block, not {size!r}")
    return max(1, capacity)


# Showing


def _as_json(result: Simulated) -> dict[str, object]:
    return {
        "trace": result.trace,
        "policy": result.policy,
        "capacity": result.capacity,
        "prefix_hit_ratio": result.prefix_hit_ratio,
        "block_hit_ratio": result.block_hit_ratio,
        "writes": result.writes,
        "evictions": result.evictions,
    }


def _advice_as_json(advice: _Advice) -> dict[str, object]:
    return {
        "trace": advice.trace,
        "policy": advice.policy,
        "prefix_hit_ratio": advice.prefix_hit_ratio,
        "capacity": advice.capacity,
    }


def _table(
    workload: Workload, names: Sequence[str], results: Sequence[Simulated], block_bytes: int
) -> Table:
    mine = [result for result in results if result.trace == workload.name]
    table = Table(
        title=f"{workload.name}: prefix hits in % of {workload.num_blocks:,} blocks, "
        f"{workload.num_distinct_blocks:,} of them distinct",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("blocks", "% of all", f"of {human_bytes(block_bytes)} each", *names):
        table.add_column(heading, justify="right")
    for capacity in sorted({result.capacity for result in mine}):
        ratios = {r.policy: r.prefix_hit_ratio for r in mine if r.capacity == capacity}
        table.add_row(
            f"{capacity:,}",
            f"{100 * capacity / workload.num_distinct_blocks:.3g}",
            human_bytes(capacity * block_bytes),
            *(f"{100 * ratios[name]:.2f}" for name in names),
        )
    return table


def _advice_table(found: Sequence[_Advice], block_bytes: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("trace", "policy", "prefix hits", "blocks", "bytes"):
        table.add_column(heading, justify="left" if heading in ("trace", "policy") else "right")
    for each in found:
        reached = each.capacity is not None
        table.add_row(
            each.trace,
            each.policy,
            f"{100 * each.prefix_hit_ratio:.4g} %",
            f"{each.capacity:,}" if each.capacity is not None else "never",
            human_bytes(each.capacity * block_bytes) if each.capacity is not None else "",
            style=None if reached else "dim",
        )
    return table


# Drawing


def _check_plot(path: Path) -> None:
    """Tell before the work begins that nothing could be drawn.

    Raises:
        ConfigError: matplotlib isn't there, or can't write this kind of file.
    """
    if path.suffix.lower() not in (".png", ".svg"):
        raise ConfigError(f"--plot takes a name that ends in .png or .svg, not {str(path)!r}")
    try:
        import matplotlib  # noqa: F401  # only to see whether it is there
    except ModuleNotFoundError as exc:
        raise ConfigError(
            "--plot needs matplotlib; install it with: pip install 'kvoffload[plot]'"
        ) from exc


def _draw(path: Path, results: Sequence[Simulated]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    traces = list(dict.fromkeys(result.trace for result in results))
    figure = Figure(figsize=(6.4 * len(traces), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for number, trace in enumerate(traces, 1):
        axes = figure.add_subplot(1, len(traces), number)
        for name, capacities, ratios in _lines(results, trace):
            style = "--" if name == "optimal" else "-"
            axes.plot(capacities, ratios, style, marker="o", markersize=4, label=name)
        axes.set_xscale("log")
        axes.set_title(trace)
        axes.set_xlabel("capacity, blocks")
        axes.set_ylabel("prefix hits")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(bottom=0)
        axes.grid(visible=True, which="both", alpha=0.25)
        axes.legend()
    figure.savefig(path, dpi=150)


def _lines(
    results: Sequence[Simulated], trace: str
) -> Iterator[tuple[str, list[int], list[float]]]:
    mine = [result for result in results if result.trace == trace]
    for name in dict.fromkeys(result.policy for result in mine):
        points = sorted((r.capacity, r.prefix_hit_ratio) for r in mine if r.policy == name)
        yield name, [point[0] for point in points], [point[1] for point in points]
