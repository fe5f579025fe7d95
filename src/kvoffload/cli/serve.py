"""The command `kvoffload serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .config import SettingsFile


def _option(help: str, *names: str, size: bool = False) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(
        *names, help=help, show_default=False, metavar="SIZE" if size else None
    )
    return option


def serve(
    settings: SettingsFile = None,
    hot: Annotated[str | None, _option("Hot tier, in memory.", size=True)] = None,
    warm: Annotated[str | None, _option("Warm tier, in memory.", size=True)] = None,
    cold: Annotated[str | None, _option("Cold tier, on disk.", size=True)] = None,
    cold_path: Annotated[
        Path | None, _option("Directory of the cold tier; its blocks **stay for the next run**.")
    ] = None,
    block_bytes: Annotated[str | None, _option("Longest block.", size=True)] = None,
    remote_url: Annotated[
        str | None,
        _option(
            "Engine that machines share, as `redis://cache:6379`. Other users of this machine "
            "see options: with a password, set `KVOFFLOAD_REMOTE_URL`."
        ),
    ] = None,
    remote_layout: Annotated[
        str | None,
        _option("What the payloads look like; **blocks are shared where it is the same**."),
    ] = None,
    remote_timeout_s: Annotated[
        float | None, _option("Seconds that a call to the engine may take.")
    ] = None,
    remote_ttl_s: Annotated[
        float | None, _option("Seconds that its answer to a lookup is believed.")
    ] = None,
    remote_queue_bytes: Annotated[
        str | None, _option("Blocks that may wait to be sent to it.", size=True)
    ] = None,
    remote_admission: Annotated[
        str | None, _option("Which blocks are sent to it: `all`, `reused` or `likely`.")
    ] = None,
    staging: Annotated[
        str | None, _option("Buffers for blocks on their way from the disk.", size=True)
    ] = None,
    policy: Annotated[str | None, _option("Order of eviction: `weighted`, `lru`, ...")] = None,
    host: Annotated[str | None, _option("Address to listen on.")] = None,
    port: Annotated[int | None, _option("Port to listen on; 0 for any.")] = None,
    uds: Annotated[
        Path | None, _option("Unix socket to listen on, instead of host and port.")
    ] = None,
    unprotected: Annotated[
        bool | None,
        _option(
            "Let in everybody who can connect; on loopback or a Unix socket alone.", "--unprotected"
        ),
    ] = None,
    token_file: Annotated[
        list[Path] | None,
        _option(
            "File with a token that may read and write in all namespaces; can be given more than "
            "once. Other tokens: in the settings file."
        ),
    ] = None,
    dashboard: Annotated[
        bool | None, _option("Whether there is a page at `/`.", "--dashboard/--no-dashboard")
    ] = None,
    drain_timeout_s: Annotated[
        float | None, _option("Seconds that calls under way get to end when it stops.")
    ] = None,
    close_timeout_s: Annotated[
        float | None,
        _option("Seconds for flushing when it stops, and as much for closing the tiers."),
    ] = None,
    log_level: Annotated[
        str | None, _option("`critical`, `error`, `warning`, `info` or `debug`.")
    ] = None,
) -> None:
    """Serve blocks over HTTP to the processes of this machine, or to others.

    Options go before the environment (`KVOFFLOAD_HOT=8GiB`), that before the settings file, and
    that before the defaults; `kvoffload config` shows them and all that there are no options for.
    A SIZE is a number of bytes, or text like 8GiB.

    SIGTERM or Ctrl-C lets calls under way end, writes what is in memory alone to the cold tier,
    and stops; a second one stops at once.

    **Exit status**: 0 stopped in good order; 1 the cache could not be closed in good order; 2 a
    mistake in the settings, or another process has the port, the socket or the cold directory;
    143 or 130 stopped at once.
    """
    from ..service.server import serve as run
    from ..service.settings import ServiceSettings

    given = {
        "hot": hot,
        "warm": warm,
        "cold": cold,
        "cold_path": cold_path,
        "block_bytes": block_bytes,
        "remote_url": remote_url,
        "remote_layout": remote_layout,
        "remote_timeout_s": remote_timeout_s,
        "remote_ttl_s": remote_ttl_s,
        "remote_queue_bytes": remote_queue_bytes,
        "remote_admission": remote_admission,
        "staging": staging,
        "policy": policy,
        "host": host,
        "port": port,
        "uds": uds,
        "unprotected": unprotected,
        "dashboard": dashboard,
        "tokens": [{"token_file": path} for path in token_file or ()] or None,
        "drain_timeout_s": drain_timeout_s,
        "close_timeout_s": close_timeout_s,
        "log_level": log_level,
    }
    arguments = {key: value for key, value in given.items() if value is not None}
    status = run(ServiceSettings(settings=settings, **arguments))
    if status:
        raise typer.Exit(status)
