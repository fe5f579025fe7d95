"""The command `kvoffload replay`."""

from __future__ import annotations

import asyncio
import gc
import math
import sys
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import anyio.to_thread
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import AsyncLRUManager, DiskTier, MemoryTier, sizes
from ..errors import ConfigError
from ..sizes import human_bytes
from ..workload import Workload, chat_workload, read_trace
from ..workload import replay as drive
from .report import Result, Setup, as_json, as_tables

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import Task

DEFAULT_COLD_BLOCKS = 16384
DEFAULT_REQUESTS = 1000


def replay(
    trace: Annotated[
        Path | None,
        typer.Argument(
            help="Trace to replay: JSON lines, plain or gzipped, each with `timestamp` "
            "(ms), `hash_ids` and maybe `input_length` and "
            "`output_length`. Without it, chat traffic is generated.",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[
        str, typer.Option(help="Order of eviction: `weighted` or `lru`.")
    ] = "weighted",
    hot: Annotated[int, typer.Option(min=1, help="Blocks of the hot tier, in memory.")] = 512,
    warm: Annotated[
        int, typer.Option(min=0, help="Blocks of the warm tier, in memory; 0: no warm tier.")
    ] = 1024,
    cold: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the cold tier, on disk; made if it is not there. Its blocks "
            "**stay for the next run**. Without it there is no cold tier.",
            show_default=False,
        ),
    ] = None,
    cold_blocks: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Blocks of the cold tier; {DEFAULT_COLD_BLOCKS} by default.",
            show_default=False,
        ),
    ] = None,
    block_bytes: Annotated[
        str,
        typer.Option(
            help="Bytes of a block: a number, or one with a unit (64KiB, 2MiB).", metavar="SIZE"
        ),
    ] = "64KiB",
    concurrency: Annotated[
        int, typer.Option(min=1, help="Requests under way at once, at most.")
    ] = 8,
    speed: Annotated[
        float,
        typer.Option(
            min=0,
            help="0: as fast as it goes; 1: at the arrival times of the trace; 2: twice as fast.",
        ),
    ] = 0.0,
    requests: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Stop after so many requests; by default all of a trace, "
            f"{DEFAULT_REQUESTS} of generated traffic.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of generated traffic; equal seeds give equal requests.")
    ] = 0,
    uvloop: Annotated[
        bool, typer.Option(help="Event loop: uvloop, or asyncio's own.")
    ] = sys.platform != "win32",
    json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
) -> None:
    """Replay requests against hot, warm and cold tiers, and check every byte that comes back.

    Each request looks its chain of blocks up, loads the blocks that are there (each byte is
    compared with what must be in it), and stores the rest. In the end it says how much was found
    and how fast it was.

    **Loop lag**: a task sleeps 1 ms over and over while the requests run; what it oversleeps
    is how long a ready task waited for the event loop. The timer alone is good for about 0.1 ms.

    **Exit status**: 0 fine; 1 a loaded byte was wrong; 2 a mistake in the arguments or an
    unusable trace or directory; 130 interrupted.
    """
    if not math.isfinite(speed):
        raise ConfigError(f"--speed must be 0 or a positive number, not {speed}")
    setup = Setup(
        policy=policy,
        block_bytes=parse_size(block_bytes),
        hot=hot,
        warm=warm,
        cold=cold,
        cold_blocks=cold_blocks or DEFAULT_COLD_BLOCKS,
        concurrency=concurrency,
        speed=speed,
        uvloop=uvloop,
    )
    _check_room(setup)
    errors = Console(stderr=True)
    if cold is None and cold_blocks is not None:
        errors.print(
            "note: --cold-blocks means nothing without --cold", highlight=False, soft_wrap=True
        )
    if trace is None:
        workload = chat_workload(requests or DEFAULT_REQUESTS, seed=seed)
    else:
        workload = read_trace(trace, limit=requests)
    _show(_run(setup, workload, errors), errors, as_object=json)


def _show(result: Result, errors: Console, *, as_object: bool) -> None:
    if as_object:
        sys.stdout.write(as_json(result) + "\n")
    else:
        console = Console()
        for table in as_tables(result):
            console.print(table)
    if result.report.wrong_bytes:
        errors.print(
            f"kvoffload: {result.report.wrong_bytes} loaded bytes were not what was stored",
            style="red",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(1)


def _run(setup: Setup, workload: Workload, errors: Console) -> Result:
    # Twice a second is enough for people. Drawing holds the GIL for a millisecond or so, and more
    # of it would show in the lag of the event loop.
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=errors,
        refresh_per_second=2,
        transient=True,
        disable=not errors.is_terminal,
    )
    progress.add_task("replaying", total=len(workload.requests))
    (task,) = progress.tasks
    try:
        with progress, asyncio.Runner(loop_factory=loop_factory(setup.uvloop)) as runner:
            return runner.run(_replay(setup, workload, errors, task))
    except KeyboardInterrupt:
        errors.print(
            f"interrupted after {task.completed:.0f} of {task.total:.0f} requests",
            highlight=False,
            soft_wrap=True,
        )
        raise
    except MemoryError:
        raise ConfigError("there is not enough memory for the hot and warm tiers") from None


def loop_factory(uvloop: bool) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes the event loop; `None` for asyncio's own.

    Raises:
        ConfigError: uvloop isn't there.
    """
    if not uvloop:
        return None
    try:
        from uvloop import new_event_loop
    except ModuleNotFoundError:
        raise ConfigError("uvloop is not installed; use --no-uvloop") from None
    return new_event_loop


async def _replay(setup: Setup, workload: Workload, errors: Console, task: Task) -> Result:
    def on_request() -> None:
        # The plain attribute, for Progress.update takes the lock that the drawing thread holds.
        task.completed += 1

    manager = AsyncLRUManager(
        hot=MemoryTier(setup.hot, setup.block_bytes, name="hot"),
        warm=MemoryTier(setup.warm, setup.block_bytes, name="warm") if setup.warm else None,
        cold=DiskTier(setup.cold, setup.cold_blocks, setup.block_bytes) if setup.cold else None,
        policy=setup.policy,
    )
    # As a service does when it has started: what is there by now (the trace, the libraries) is not
    # looked through again and again by the full collections, which hold every thread.
    gc.collect()
    gc.freeze()
    async with manager:
        await anyio.to_thread.run_sync(_say_start, setup, workload, errors)
        report = await drive(
            manager,
            workload,
            block_bytes=setup.block_bytes,
            concurrency=setup.concurrency,
            speed=setup.speed,
            on_request=on_request,
        )
        closing = perf_counter()
    return Result(setup, workload, report, perf_counter() - closing)


def _say_start(setup: Setup, workload: Workload, errors: Console) -> None:
    errors.print(
        f"replaying {len(workload.requests):,} requests of {workload.name}: "
        f"{workload.num_blocks:,} blocks of {human_bytes(setup.block_bytes)}, "
        f"{workload.num_distinct_blocks:,} of them different",
        highlight=False,
        soft_wrap=True,
    )
    if setup.cold:
        errors.print(
            f"blocks in {setup.cold} stay there for the next run", highlight=False, soft_wrap=True
        )


def parse_size(text: str, option: str = "--block-bytes") -> int:
    """Return the bytes of a size like 64KiB that an option has; by default those of a block."""
    try:
        size = sizes.parse_size(text)
    except ConfigError as exc:
        raise ConfigError(f"{option} {exc}") from None
    if option != "--block-bytes":
        return size
    if not 1 <= size <= 1 << 30:
        raise ConfigError(f"--block-bytes must be from 1 byte to 1 GiB, not {text!r}")
    return size


def _check_room(setup: Setup) -> None:
    """Refuse what would only end in the kernel killing the process, or in a full disk."""
    cold_blocks = setup.cold_blocks if setup.cold else 0
    needed = sizes.memory_needed(
        memory_blocks=setup.hot + setup.warm,
        cold_blocks=cold_blocks,
        block_bytes=setup.block_bytes,
    )
    memory = sizes.memory_of_machine()
    if memory is not None and needed > memory:
        raise ConfigError(
            f"so many blocks need {human_bytes(needed)} of memory, "
            f"and this machine has {human_bytes(memory)}"
        )
    if setup.cold is not None:
        on_disk = cold_blocks * setup.block_bytes
        room = sizes.room_on_disk(setup.cold)
        if room is not None and on_disk > room:
            raise ConfigError(
                f"--cold-blocks asks for {human_bytes(on_disk)} in {setup.cold}, "
                f"and there is room for {human_bytes(room)}"
            )
