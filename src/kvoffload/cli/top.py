"""The command `kvoffload top`."""

from __future__ import annotations

import json as jsonlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live

from ..errors import ConfigError
from .overview import ServiceClient, UnreachableError
from .top_view import View

if TYPE_CHECKING:
    from .overview import Overview


def top(
    url: Annotated[
        str,
        typer.Argument(
            help="The service: `http://HOST:PORT`, or `unix:/PATH.sock`.",
            metavar="URL",
            show_default=False,
        ),
    ] = "http://127.0.0.1:8401",
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the token: one with the right admin, on all namespaces. By default "
            "that of the environment variable `KVOFFLOAD_TOKEN`, if there is one.",
            show_default=False,
        ),
    ] = None,
    token: Annotated[
        # Hidden: a secret in the arguments is there for all to see.
        str | None, typer.Option(envvar="KVOFFLOAD_TOKEN", hidden=True)
    ] = None,
    interval: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Seconds from one look to the next.")
    ] = 1.0,
    once: Annotated[
        bool,
        typer.Option("--once", help="Print how it is now, with the rates of one interval; stop."),
    ] = False,
    json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print what the service says as one JSON object a line; with `--once` just one.",
        ),
    ] = False,
) -> None:
    """Watch a running service: tiers, rates, hit ratios, latencies, namespaces.

    Rates are those of the last interval, all else is since the start. A service that goes away is
    waited for. Ctrl-C ends it.

    **Exit status**: 0 fine; 2 a mistake in the arguments, or a service that can't be reached,
    refuses the token or is none of kvoffload's; 130 interrupted.
    """
    if token_file is not None:
        token = token_file.read_text(encoding="utf-8", errors="replace").strip()
        if not token:
            raise ConfigError(f"{token_file} holds no token")
    with ServiceClient(url, token or None) as service:
        # What is wrong from the start is an error; later it may pass.
        overview = service.overview()
        if json:
            _print_json(service, overview, interval, once=once)
        else:
            _show(service, overview, interval, once=once)


def _print_json(service: ServiceClient, overview: Overview, interval: float, *, once: bool) -> None:
    while True:
        sys.stdout.write(jsonlib.dumps(overview.raw) + "\n")
        sys.stdout.flush()
        if once:
            return
        time.sleep(interval)
        overview = service.overview()


def _show(service: ServiceClient, overview: Overview, interval: float, *, once: bool) -> None:
    console = Console()
    view = View(overview)
    if once:
        time.sleep(interval)
        view.advance(service.overview())
        console.print(view)
        return
    on_screen = console.is_terminal
    with Live(view, console=console, screen=on_screen, auto_refresh=False) as live:
        while True:
            live.refresh()
            time.sleep(interval)
            try:
                view.advance(service.overview())
            except UnreachableError as exc:
                view.trouble = str(exc)
            if not on_screen:
                console.print(view)
