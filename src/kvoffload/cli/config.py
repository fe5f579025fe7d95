"""The command `kvoffload config`."""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from ..service.settings import ServiceSettings

SettingsFile = Annotated[
    Path | None,
    typer.Option(
        "--settings",
        help="TOML file with settings; by default the one that `KVOFFLOAD_SETTINGS` names, or "
        "`kvoffload.toml` in this directory if it is there.",
        show_default=False,
    ),
]


def config(
    settings: SettingsFile = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
) -> None:
    """Show the settings of the service that are in force, and where each came from.

    The environment (`KVOFFLOAD_HOT=8GiB`) goes before the file, and the file before the defaults;
    `kvoffload serve` takes options, which go before all. Secrets are shown as "set".

    **Exit status**: 0 fine; 2 settings are wrong: all mistakes are told.
    """
    from ..service.settings import ServiceSettings

    found = ServiceSettings(settings=settings)
    if json:
        sys.stdout.write(_as_json(found) + "\n")
    else:
        Console().print(_as_table(found))
    if not found.lets_somebody_in:
        print(
            "kvoffload: nobody may call a service with these settings: give tokens, or say "
            "unprotected",
            file=sys.stderr,
        )


def _as_json(settings: ServiceSettings) -> str:
    return jsonlib.dumps(
        {
            "file": None if settings.file is None else str(settings.file),
            "settings": {
                one.key: {
                    "value": one.value,
                    "origin": one.origin.kind,
                    "name": one.origin.name or None,
                }
                for one in settings.in_force()
            },
        }
    )


def _as_table(settings: ServiceSettings) -> Table:
    table = Table("setting", "value", "from", box=box.SIMPLE_HEAD)
    for column in table.columns:
        column.overflow = "fold"
    for one in settings.in_force():
        changed = one.origin.kind != "default"
        table.add_row(
            escape(one.key),
            escape(one.text),
            escape(str(one.origin)),
            style=None if changed else "dim",
        )
    return table
