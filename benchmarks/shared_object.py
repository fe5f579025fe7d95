"""SeaweedFS in `shared_tier.py`: `obstore` driven bare beside `ObjectStoreTier`, over S3."""

from __future__ import annotations

import json
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import anyio
import obstore
from obstore.exceptions import BaseError
from obstore.store import ObjectStore, S3Store, from_url
from shared_engine import BLOCK_BYTES, Engine

from kvoffload import ObjectStoreTier

REQUESTS = 4
"""Payloads under way at a time, for both."""
BUCKET = "blocks"
_KEY, _SECRET = "key", "secret"


@contextmanager
def engine(url: str | None) -> Iterator[Engine]:
    """Run a server, or take the store at `url`, with what the environment says of it."""
    if url is not None:
        yield Engine(_Client(from_url(url)), ObjectStoreTier(url, pool=REQUESTS))
        return
    with tempfile.TemporaryDirectory(prefix="kvoffload-bench.") as directory:
        ports = [_free_port() for _ in range(8)]
        server = subprocess.Popen(
            _command(Path(directory), ports), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        endpoint = f"http://127.0.0.1:{ports[0]}"
        store = S3Store(
            BUCKET,
            endpoint=endpoint,
            region="us-east-1",
            access_key_id=_KEY,
            secret_access_key=_SECRET,
            client_options={"allow_http": True},
            retry_config={"max_retries": 0},
        )
        options = {"endpoint": endpoint, "region": "us-east-1"}
        options |= {"access_key_id": _KEY, "secret_access_key": _SECRET}
        try:
            _wait_for(store)
            yield Engine(
                _Client(store), ObjectStoreTier(f"s3://{BUCKET}", pool=REQUESTS, options=options)
            )
        finally:
            server.kill()
            server.wait()


class _Client:
    """The client: so many requests at a time, one for each block; a GET of its range is fastest."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def put(self, names: Sequence[str], payloads: Sequence[bytes]) -> None:
        async def lane(first: int) -> None:
            for number in range(first, len(names), REQUESTS):
                await obstore.put_async(self._store, names[number], payloads[number])

        async with anyio.create_task_group() as tasks:
            for first in range(REQUESTS):
                tasks.start_soon(lane, first)

    async def get(self, names: Sequence[str]) -> None:
        async def lane(first: int) -> None:
            for number in range(first, len(names), REQUESTS):
                value = await obstore.get_range_async(
                    self._store, names[number], start=0, end=BLOCK_BYTES
                )
                assert len(value) == BLOCK_BYTES

        async with anyio.create_task_group() as tasks:
            for first in range(REQUESTS):
                tasks.start_soon(lane, first)

    async def delete(self, names: Sequence[str]) -> None:
        await obstore.delete_async(self._store, list(names))


def _command(directory: Path, ports: Sequence[int]) -> list[str]:
    credentials = [{"accessKey": _KEY, "secretKey": _SECRET}]
    identity = {"name": "bench", "credentials": credentials, "actions": ["Admin"]}
    (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
    names = ("s3", "master", "volume", "filer")
    ports_of = {f"{name}.port": port for name, port in zip(names, ports[:4], strict=True)}
    ports_of |= {f"{name}.port.grpc": port for name, port in zip(names, ports[4:], strict=True)}
    settings = {
        **ports_of,
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3": "true",
        "s3.config": directory / "s3.json",
        "s3.localSocket": directory / "s3.sock",
        "filer.localSocket": directory / "filer.sock",
        "dir": directory,
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": 1000,
        "volume.max": 40,
    }
    weed = str(Path(sysconfig.get_path("scripts")) / "weed")
    return [weed, "server", *(f"-{name}={value}" for name, value in settings.items())]


def _wait_for(store: ObjectStore) -> None:
    """Wait until it takes an object; a bucket is made for the first."""
    deadline = time.monotonic() + 60
    while True:
        try:
            obstore.put(store, "probe", b"")
            return
        except (BaseError, OSError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
