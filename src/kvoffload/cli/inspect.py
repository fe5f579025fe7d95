"""The command `kvoffload inspect`."""

from __future__ import annotations

import json as jsonlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from ..keys import show_hash
from ..sizes import human_bytes
from ..storage.inspection import BadBlock, FoundBlock, Inspection, Inspector
from ..storage.keyfile import read_key


def inspect(
    directory: Annotated[Path, typer.Argument(help="Directory of a cold tier.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every payload and check it.")
    ] = False,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Drop what is damaged and rebuild headers, as opening would; with `--verify` "
            "also drop blocks whose payload does not check.",
        ),
    ] = False,
    key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the encryption key: 32 bytes, or 64 hex digits.", show_default=False
        ),
    ] = None,
    blocks: Annotated[bool, typer.Option("--blocks", help="List each block.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
) -> None:
    """Show what a cold tier's directory holds, and check or mend it.

    Nothing is changed without `--repair`, and a directory that is in use can be looked at; its
    figures may move then.

    **Exit status**: 0 all is well, or was mended; 1 something is damaged; 2 a mistake in the
    arguments, no cold tier, another format version, or in use when it is to be repaired; 130
    interrupted.
    """
    inspector = Inspector(directory, key=None if key_file is None else read_key(key_file))
    try:
        found = inspector.look()
        bad = _verify(inspector, found) if verify else []
        was_damaged = found.is_damaged or bool(bad)
        if repair:
            left = inspector.repair(verify=verify)
        if json:
            listed = list(inspector.blocks()) if blocks else None
            sys.stdout.write(_as_json(found, bad, listed, repaired=repair) + "\n")
        else:
            console = Console()
            console.print(_as_table(found))
            for one in bad:
                console.print(f"block in slot {one.slot}: {escape(one.reason)}", highlight=False)
            if verify:
                console.print(
                    f"verified: {found.blocks:,} blocks, {len(bad):,} of them bad", highlight=False
                )
            if blocks:
                console.print(_as_list(inspector))
            if repair:
                console.print(f"repaired: {left} blocks are there now", highlight=False)
            elif was_damaged:
                console.print("damaged: --repair drops what is no good", highlight=False)
    finally:
        inspector.close()
    if was_damaged and not repair:
        raise typer.Exit(1)


def _verify(inspector: Inspector, found: Inspection) -> list[BadBlock]:
    errors = Console(stderr=True)
    with Progress(
        TextColumn("verifying"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    ) as progress:
        task = progress.add_task("verifying", total=found.payload_bytes)
        return inspector.verify(lambda size: progress.advance(task, size))


def _as_table(found: Inspection) -> Table:
    table = Table(box=box.SIMPLE, show_header=False, title=escape(str(found.path)))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    state = "closed in good order" if found.clean else "not closed"
    if found.in_use_by:
        state = f"in use by process {found.in_use_by}; figures may move"
    headers = {2: "both good", 1: "one of two is damaged", 0: "both damaged"}[found.good_headers]
    rows = {
        "state": state,
        "headers": f"{headers}, generation {found.generation}",
        "slots": f"{found.num_blocks:,} of {human_bytes(found.block_bytes)}"
        + (", encrypted" if found.encrypted else ""),
        "blocks": f"{found.blocks:,}, {human_bytes(found.payload_bytes)}",
        "free": f"{max(0, found.num_blocks - found.blocks):,}",
        "on disk": human_bytes(found.disk_bytes),
        "damaged records": f"{found.damaged:,}",
        "payload cut off": f"{found.cut_off:,}",
        "older copies": f"{found.duplicates:,}",
    }
    for namespace, count in sorted(found.namespaces.items(), key=lambda item: -item[1])[:20]:
        rows[f"namespace {namespace!r}"] = f"{count:,}"
    if found.encrypted and not found.namespaces and found.blocks:
        rows["namespaces"] = "encrypted: give --key-file"
    if found.foreign:
        rows["not of the tier"] = ", ".join(found.foreign)
    for name, value in rows.items():
        table.add_row(escape(name), escape(value))
    return table


def _as_list(inspector: Inspector) -> Table:
    table = Table("slot", "bytes", "sequence", "namespace", "hash", box=box.SIMPLE)
    for block in inspector.blocks():
        shown = "" if block.block_hash is None else show_hash(block.block_hash)
        table.add_row(
            str(block.slot),
            str(block.size),
            str(block.sequence),
            escape(block.namespace or ""),
            escape(shown),
        )
    return table


def _as_json(
    found: Inspection, bad: list[BadBlock], blocks: list[FoundBlock] | None, *, repaired: bool
) -> str:
    result = asdict(found) | {
        "path": str(found.path),
        "damaged_payloads": [asdict(one) for one in bad],
        "repaired": repaired,
    }
    if blocks is not None:
        result["block_list"] = [
            asdict(one)
            | {
                "block_hash": one.block_hash.hex()
                if isinstance(one.block_hash, bytes)
                else one.block_hash
            }
            for one in blocks
        ]
    return jsonlib.dumps(result)
