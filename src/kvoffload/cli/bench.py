"""The command `kvoffload bench`."""

from __future__ import annotations

import asyncio
import contextlib
import json as jsonlib
import math
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..benching.machine import describe_machine
from ..benching.rows import RATE, BenchError, NotMeasured, Row, Setup
from ..benching.suite import LEAST_BLOCK_BYTES, LEAST_BLOCKS, disk_for, measure, memory_for
from ..errors import ConfigError
from ..sizes import free_on_disk, human_bytes, memory_of_machine
from .replay import loop_factory, parse_size

MOST_SECONDS = 3600.0
_TERMINATING = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")]


def bench(
    cold: Annotated[
        Path | None,
        typer.Option(
            help="Directory on the disk to measure; what is written there is removed in the end. "
            "By default, the directory of temporary files.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    block_bytes: Annotated[
        str,
        typer.Option(
            help="Bytes of a block: a number, or one with a unit (64KiB, 2MiB).", metavar="SIZE"
        ),
    ] = "2MiB",
    size: Annotated[
        str,
        typer.Option(
            help="Bytes of the blocks that are moved at a time; fewer on a slow disk. It takes "
            "five times as much memory, and three times as much space on the disk.",
            metavar="SIZE",
        ),
    ] = "256MiB",
    seconds: Annotated[
        float,
        typer.Option(help="How long to measure, about; getting ready comes on top of it."),
    ] = 24.0,
    uvloop: Annotated[
        bool, typer.Option(help="Event loop: uvloop, or asyncio's own.")
    ] = sys.platform != "win32",
    json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
) -> None:
    """Measure the limits of this machine, and what kvoffload reaches of each.

    Each limit is measured in turns with kvoffload's own figure, so that a noisy moment hits both;
    figures are the best of their rounds, and the ratio of the medians is beside. **A ratio of 1**
    is the X

    **Exit status**: 0 fine; 1 blocks did not come back as they were stored, or not all of them did;
    2 a mistake in the arguments, no room, or a disk that fails; 130, 143 or 129 interrupted or
    terminated. Whatever happens, nothing is left on the disk.
    """
    errors = Console(stderr=True)
    place = _directory(cold)
    setup = _setup(place, parse_size(block_bytes), parse_size(size, "--size"), seconds)
    factory = loop_factory(uvloop)
    machine = describe_machine(place)
    if machine["file system"].startswith(("tmpfs", "ramfs")):
        _say(
            errors,
            f"warning: {place} is in memory (tmpfs), so these are no figures of a disk; "
            "give another directory with --cold",
        )
    _say(
        errors,
        f"measuring with {setup.num_blocks:,} blocks of {human_bytes(setup.block_bytes)} in "
        f"{place}, for about {seconds:g} s and the time to get ready",
    )
    found = _run(setup, factory, errors)
    machine["event loop"] = "uvloop" if uvloop else "asyncio"
    if json:
        sys.stdout.write(_as_json(setup, machine, found) + "\n")
    else:
        _show(Console(), machine, found)


# Arguments


def _directory(cold: Path | None) -> Path:
    place = Path(tempfile.gettempdir()) if cold is None else cold
    if not place.is_dir():
        raise ConfigError(f"--cold must be a directory that is there, not {str(place)!r}")
    return place


def _setup(place: Path, block_bytes: int, size: int, seconds: float) -> Setup:
    if not (math.isfinite(seconds) and 0 < seconds <= MOST_SECONDS):
        raise ConfigError(f"--seconds must be more than 0 and at most {MOST_SECONDS:g}")
    if block_bytes < LEAST_BLOCK_BYTES:
        raise ConfigError(f"--block-bytes must be at least {human_bytes(LEAST_BLOCK_BYTES)} here")
    num_blocks = size // block_bytes
    if num_blocks < LEAST_BLOCKS:
        raise ConfigError(
            f"--size must be that of {LEAST_BLOCKS} blocks at least, "
            f"{human_bytes(LEAST_BLOCKS * block_bytes)}, not {human_bytes(size)}"
        )
    needed, memory = memory_for(block_bytes, num_blocks), memory_of_machine()
    if memory is not None and needed > memory:
        raise ConfigError(
            f"--size {human_bytes(size)} needs {human_bytes(needed)} of memory, "
            f"and this machine has {human_bytes(memory)}"
        )
    needed, free = disk_for(block_bytes, num_blocks), free_on_disk(place)
    if free is not None and needed > free:
        raise ConfigError(
            f"--size {human_bytes(size)} needs {human_bytes(needed)} in {place}, "
            f"and there is room for {human_bytes(free)}"
        )
    return Setup(place, block_bytes, num_blocks, seconds)


# Running


def _run(
    setup: Setup, factory: Callable[[], asyncio.AbstractEventLoop] | None, errors: Console
) -> list[Row | NotMeasured]:
    # Seldom drawn, for drawing holds the GIL, which the lag of the event loop would show.
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=errors,
        refresh_per_second=2,
        transient=True,
        disable=not errors.is_terminal,
    )
    task = progress.add_task("getting ready", total=None)

    def on_step(what: str, number: int, steps: int) -> None:
        progress.update(task, description=what, completed=number, total=steps)

    killed: list[int] = []
    try:
        with (
            tempfile.TemporaryDirectory(prefix="kvoffload-bench-", dir=setup.place) as inside,
            progress,
            asyncio.Runner(loop_factory=factory) as runner,
        ):
            mine = Setup(Path(inside), setup.block_bytes, setup.num_blocks, setup.seconds)
            return runner.run(_measure(mine, on_step, killed))
    except asyncio.CancelledError:
        if not killed:
            raise
        _say(errors, "terminated; nothing is left")
        raise typer.Exit(128 + killed[0]) from None
    except KeyboardInterrupt:
        _say(errors, "interrupted; nothing is left")
        raise
    except BenchError as exc:
        _say(errors, f"kvoffload: error: {exc}")
        raise typer.Exit(1) from None
    except MemoryError:
        raise ConfigError("there is not enough memory; give a smaller --size") from None


async def _measure(
    setup: Setup, on_step: Callable[[str, int, int], None], killed: list[int]
) -> list[Row | NotMeasured]:
    with _terminable(killed):
        return await measure(setup, on_step)


@contextlib.contextmanager
def _terminable(killed: list[int]) -> Iterator[None]:
    """Have signals that end the process cancel this task instead, so that it cleans up."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()

    def end(number: int) -> None:
        killed.append(number)
        if task is not None:
            task.cancel()

    with contextlib.ExitStack() as stack:
        for number in _TERMINATING:
            # One that is ignored (nohup) stays so.
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                # Only the main thread of a POSIX system can.
                with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
                    loop.add_signal_handler(number, end, number)
                    stack.callback(loop.remove_signal_handler, number)
        yield


# Showing


def _as_json(setup: Setup, machine: dict[str, str], found: Sequence[Row | NotMeasured]) -> str:
    return jsonlib.dumps(
        {
            "machine": machine,
            "block_bytes": setup.block_bytes,
            "size_bytes": setup.num_blocks * setup.block_bytes,
            "seconds": setup.seconds,
            "rows": [
                asdict(row)
                | {
                    "ratio": row.ratio,
                    "ratio_median": row.ratio_median,
                    "ratio_is": row.ratio_is,
                }
                for row in found
                if isinstance(row, Row)
            ],
            "not_measured": [asdict(row) for row in found if isinstance(row, NotMeasured)],
        }
    )


def _show(console: Console, machine: dict[str, str], found: Sequence[Row | NotMeasured]) -> None:
    about = ", ".join(f"{name}: {value}" for name, value in machine.items())
    console.print(about, highlight=False, markup=False)
    figures = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    figures.add_column("")
    for heading in ("limit", "kvoffload", "", "ratio", "of medians"):
        figures.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    meaning = Table(box=box.SIMPLE, show_header=False, padding=(0, 1, 0, 0))
    meaning.add_column(style="bold", no_wrap=True)
    meaning.add_column(style="dim", no_wrap=True)
    meaning.add_column(overflow="fold")
    for row in found:
        if isinstance(row, NotMeasured):
            figures.add_row(escape(row.name), "-", "-", "", "-", "-", style="dim")
            meaning.add_row(escape(row.name), "", f"not measured: {escape(row.why)}")
            continue
        figures.add_row(
            escape(row.name),
            f"{row.limit:.3g}",
            f"{row.reached:.3g}",
            row.unit,
            f"{row.ratio:.2f}",
            f"{row.ratio_median:.2f}",
        )
        meaning.add_row(escape(row.name), "limit", escape(row.limit_is))
        meaning.add_row("", "kvoffload", escape(row.reached_is))
    console.print(figures)
    console.print(meaning)
    console.print(
        f"ratio: of rates ({RATE}) kvoffload / limit, of times limit / kvoffload; 1 is the limit",
        highlight=False,
    )


def _say(errors: Console, line: str) -> None:
    errors.print(line, highlight=False, markup=False, soft_wrap=True)
