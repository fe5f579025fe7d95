"""The cold tier on disk beside bare calls that move the same bytes in the same run, as ratios.

    python benchmarks/cold_tier.py [--path DIR] [--rounds 15] [--loop asyncio|uvloop|both]
        [--lag-seconds 10] [--io-threads N] [--quick] [--check] [--json]

Bare calls are `preadv` and `pwritev` of neighbouring blocks, by the caller itself or by one, two or
four waiting threads, in calls of several sizes; the fastest counts. The tier's reads check each
payload, and its writes are `write` and then `flush`. All move the same page-aligned buffers, in
files of equal size opened with equal flags. They take turns; a figure is the best of its rounds.

"Overwrite" goes over blocks that are there (bare: `pwritev`, `fdatasync`); "new files" also makes
the files (bare: the same, with `fsync` of the directory, and with the space allocated first or
not). The last table is by how much an event loop is late while the tier reads and writes flat out,
beside the same loop with two bare threads that read a cached file.

The default path is a temporary directory beside the current one. It takes about 1 GiB there, and in
memory, and leaves nothing. Linux only. With `--check` the exit status is 1 if a target was missed;
otherwise figures never fail.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path

import uvloop
from contest import Contest
from disk_contests import (
    Bench,
    DirectIORefusedError,
    NoDirectIOError,
    Work,
    fresh_contest,
    overwrite_contest,
    read_contest,
)
from loop_lag import compare_lag

from kvoffload.benching.machine import describe_machine
from kvoffload.benching.raw_io import KIB, MIB, Team

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}

QUICK_DIVISOR = 8


class Outcome(StrEnum):
    """What came of a target."""

    MET = "met"
    MISSED = "missed"
    UNMEASURED = "not measured"

    @classmethod
    def of(cls, met: bool) -> Outcome:
        """Return what a measured target came to."""
        return cls.MET if met else cls.MISSED


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target and what came of it."""

    target: str
    outcome: Outcome
    figure: str


@dataclass(frozen=True, slots=True)
class Task:
    """A contest to hold, and the ratio that the tier should reach in it, if any."""

    what: str
    hold: Callable[[Bench, Work], Contest]
    work: Work
    least_ratio: float | None

    @property
    def title(self) -> str:
        return f"{self.what} {self.work}"


@dataclass(slots=True)
class Report:
    """All results; printed as they come, unless they are to be one JSON object."""

    machine: dict[str, str]
    settings: dict[str, object]
    quiet: bool
    contests: dict[str, object] = field(default_factory=dict)
    lags: dict[str, object] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)

    def say(self, line: str = "") -> None:
        """Print a line for people."""
        if not self.quiet:
            print(line, flush=True)

    def as_json(self) -> dict[str, object]:
        """Return plain values."""
        return {
            "machine": self.machine,
            "settings": self.settings,
            "contests": self.contests,
            "lag": self.lags,
            "targets": [asdict(verdict) for verdict in self.verdicts],
        }


def all_tasks(*, quick: bool) -> Iterator[Task]:
    """Return every contest: first those by way of the page cache, then those past it."""
    divisor = QUICK_DIVISOR if quick else 1
    for direct in (False, True):
        large = Work(64 // divisor, 2 * MIB, direct)
        few = Work(64 // divisor, 64 * KIB, direct)
        many = Work(2048 // divisor, 64 * KIB, direct)
        yield Task("read", read_contest, large, 0.8)
        yield Task("read", read_contest, few, 0.6)
        yield Task("read", read_contest, many, 0.6)
        yield Task("overwrite", overwrite_contest, large, 0.8)
        yield Task("write into new files,", fresh_contest, large, 0.8)
        yield Task("overwrite", overwrite_contest, few, None)
        yield Task("overwrite", overwrite_contest, many, None)


def hold_contest(bench: Bench, task: Task, report: Report) -> None:
    """Hold a contest, and judge it."""
    report.say(f"\n{task.title}")
    try:
        contest = task.hold(bench, task.work)
    except NoDirectIOError as exc:
        report.contests[task.title] = {"not measured": str(exc)}
        report.say(f"  not measured: {exc}")
        if task.least_ratio is not None:
            report.verdicts.append(_unmeasured(task.title, exc))
        return
    except DirectIORefusedError as exc:
        report.say(f"  tier refuses: {exc}")
        if task.least_ratio is not None:
            report.verdicts.append(_unmeasured(task.title, exc))
        contest = task.hold(replace(bench, runners={}), task.work)
    report.contests[task.title] = contest.as_json()
    for line in contest.lines():
        report.say(line)
    if task.least_ratio is None:
        return
    for name in contest.ours:
        best, median = contest.ratios(name)
        report.verdicts.append(
            Verdict(
                f"{task.title}, {name}: at least {task.least_ratio} of raw",
                Outcome.of(best >= task.least_ratio),
                f"{best:.2f} (median {median:.2f})",
            )
        )


def compare_lags(bench: Bench, work: Work, seconds: float, report: Report) -> None:
    """Measure the lag of each loop, and judge it."""
    report.say(f"\nevent-loop lag, {work} read and as many rewritten, {seconds:g} s each")
    for loop in bench.runners:
        title = f"{loop}, {work.mode}"
        target = f"event-loop lag, {title}: p99 at most "
        try:
            ours, reference = compare_lag(bench, loop, work, seconds)
        except (NoDirectIOError, DirectIORefusedError) as exc:
            report.lags[title] = {"not measured": str(exc)}
            report.verdicts.append(_unmeasured(f"event-loop lag, {title}", exc))
            report.say(f"  {loop:8} not measured: {exc}")
            continue
        report.lags[title] = {"tier": ours.as_json(), "two bare threads": reference.as_json()}
        report.say(f"  {loop:8} tier             {ours}")
        report.say(f"  {loop:8} two bare threads {reference}")
        bound = reference.bound_s
        report.verdicts.append(
            Verdict(
                f"{target}{bound * 1e3:.2f} ms",
                Outcome.of(ours.p99_s <= bound),
                f"{ours.p99_s * 1e3:.2f} ms",
            )
        )


def _unmeasured(target: str, error: Exception) -> Verdict:
    refused = isinstance(error, DirectIORefusedError)
    return Verdict(target, Outcome.MISSED if refused else Outcome.UNMEASURED, str(error))


def measure(options: argparse.Namespace, place: Path, report: Report) -> None:
    """Run everything in a directory."""
    loops = LOOPS if options.loop == "both" else {options.loop: LOOPS[options.loop]}
    with ExitStack() as stack:
        runners = {
            name: stack.enter_context(asyncio.Runner(loop_factory=factory))
            for name, factory in loops.items()
        }
        teams = [Team(size) for size in (0, 1, 2, 4)]
        bench = Bench(place, options.rounds, runners, teams, options.io_threads)
        for task in all_tasks(quick=options.quick):
            hold_contest(bench, task, report)
        for direct in (False, True):
            work = Work(64 // (QUICK_DIVISOR if options.quick else 1), 2 * MIB, direct)
            compare_lags(bench, work, options.lag_seconds, report)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--path", type=Path, default=Path.cwd().parent)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--loop", choices=(*LOOPS, "both"), default="both")
    parser.add_argument("--lag-seconds", type=float)
    parser.add_argument("--io-threads", type=int)
    parser.add_argument("--quick", action="store_true", help="a smoke test: small and short")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target was missed")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 15)
    options.lag_seconds = options.lag_seconds or (0.5 if options.quick else 10.0)
    settings: dict[str, object] = {**vars(options), "path": str(options.path)}
    report = Report(describe_machine(options.path), settings, quiet=options.json)
    report.say(", ".join(f"{name}: {value}" for name, value in report.machine.items()))
    if report.machine["file system"].startswith(("tmpfs", "ramfs")):
        print(f"{options.path} is in memory: these are no figures of a disk", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="kvoffload-cold-", dir=options.path) as place:
        measure(options, Path(place), report)
    if options.json:
        json.dump(report.as_json(), sys.stdout, indent=1)
    report.say("\ntargets")
    for verdict in report.verdicts:
        report.say(f"  {verdict.outcome:12} {verdict.target}: {verdict.figure}")
    missed = any(verdict.outcome is Outcome.MISSED for verdict in report.verdicts)
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
