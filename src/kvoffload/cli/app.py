"""The typer application: commands, `--version`, and errors as one line."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from ..errors import OffloadError
from ..service.mistakes import SettingsError
from . import EXIT_INTERRUPTED, EXIT_MISTAKE
from .bench import bench
from .config import config
from .inspect import inspect
from .replay import replay
from .serve import serve
from .simulate import simulate
from .top import top

app = typer.Typer(
    name="kvoffload",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(replay)
app.command()(inspect)
app.command()(simulate)
app.command()(bench)
app.command()(serve)
app.command()(config)
app.command()(top)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvoffload {version('kvoffload')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _kvoffload(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Keep the KV-cache blocks of language models in memory and on disk."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def run(argv: list[str]) -> int:
    """Run one command; return the exit status."""
    command = typer.main.get_command(app)
    try:
        status = command.main(argv, prog_name="kvoffload", standalone_mode=False)
    except typer.Abort:
        return EXIT_INTERRUPTED
    except Exception as exc:
        message = _mistake(exc)
        if message is None:
            raise
        print(f"kvoffload: error: {message}", file=sys.stderr)
        return EXIT_MISTAKE
    return int(status or 0)


def _mistake(exc: BaseException) -> str | None:
    """Return what to tell the user; `None` if the error is a defect of ours.

    That is one line, but for settings with several mistakes.
    """
    if isinstance(exc, BaseExceptionGroup):
        messages = [_mistake(inner) for inner in exc.exceptions]
        return None if None in messages else messages[0]
    # typer's usage errors; where their classes live depends on its version.
    if callable(describe := getattr(exc, "format_message", None)):
        return " ".join(str(describe()).split())
    if isinstance(exc, SettingsError):
        return str(exc)
    if isinstance(exc, OffloadError):
        return " ".join(str(exc).split())
    if isinstance(exc, OSError) and not isinstance(exc, BrokenPipeError):
        return f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc)
    return None
