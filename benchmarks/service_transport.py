"""Blocks over a Unix socket: what the client and the service reach of bare httpx and uvicorn.

The same bytes, batches of 16 blocks of 2 MiB, in each direction: stored and loaded from the hot
tier by `AsyncLRUClient`, and sent and received by a bare httpx client and a bare uvicorn handler
that do nothing else. Both servers are processes of their own with the same settings; the rounds
alternate.

    python benchmarks/service_transport.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import httpx
import uvicorn
import uvloop
from starlette.types import ASGIApp, Receive, Scope, Send

from kvoffload import AsyncLRUManager, MemoryTier
from kvoffload.benching.machine import describe_machine
from kvoffload.client import AsyncLRUClient
from kvoffload.service.access import AccessControl
from kvoffload.service.app import create_app

MIB = 1024 * 1024
BLOCKS, BLOCK_BYTES = 16, 2 * MIB
BATCH_BYTES = BLOCKS * BLOCK_BYTES
PIECES = (64 * 1024, 256 * 1024, 2 * MIB)
"""Sizes in which the bare ones hand the bytes on; the fastest counts."""
LIMIT = 0.5


async def bare(scope: Scope, receive: Receive, send: Send) -> None:
    """Take a body, or send one, in pieces of the size that the path says."""
    assert scope["type"] == "http"
    received, is_over = 0, False
    while not is_over:
        message = await receive()
        received += len(message.get("body", b""))
        is_over = not message.get("more_body", False)
    size = BATCH_BYTES if scope["method"] == "GET" else 0
    assert size or received == BATCH_BYTES
    headers = [(b"content-length", str(size).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if size:
        piece = bytes(int(scope["path"].rpartition("/")[2]))
        for _ in range(size // len(piece)):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def served() -> ASGIApp:
    """Return the service over a manager with room for two batches."""
    return create_app(
        lambda: AsyncLRUManager(hot=MemoryTier(2 * BLOCKS, BLOCK_BYTES)),
        access=AccessControl(unprotected=True),
    )


def serve(what: str, socket: str) -> None:
    """Serve until told to stop."""
    app = bare if what == "bare" else served()
    uvicorn.run(app, uds=socket, http="httptools", loop="uvloop", log_level="warning")


@contextmanager
def serving(what: str, directory: Path) -> Iterator[str]:
    """Serve in a process of its own; yield the socket's path once it listens."""
    path = directory / f"{what}.sock"
    process = subprocess.Popen([sys.executable, __file__, "--serve", what, "--socket", str(path)])
    try:
        while not path.exists():
            if process.poll() is not None:
                raise SystemExit(f"the {what} server did not start")
            time.sleep(0.01)
        yield str(path)
    finally:
        process.terminate()
        process.wait()


async def rate(call: Callable[[], Awaitable[object]]) -> float:
    """Return the bytes a second of one call that moves a batch."""
    began = time.perf_counter()
    await call()
    return BATCH_BYTES / (time.perf_counter() - began)


async def measure(sockets: dict[str, str], rounds: int) -> dict[str, dict[str, float]]:
    """Return the medians of both, in each direction."""
    hashes = [f"block {number}" for number in range(BLOCKS)]
    payloads = [os.urandom(BLOCK_BYTES) for _ in hashes]
    whole = memoryview(b"".join(payloads))
    rates: dict[str, list[float]] = {}

    def note(what: str, found: float) -> None:
        rates.setdefault(what, []).append(found)

    async with (
        httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=sockets["bare"]), base_url="http://bare"
        ) as http,
        AsyncLRUClient(f"unix:{sockets['kvoffload']}") as kv,
    ):

        async def send(size: int) -> None:
            async def pieces() -> AsyncIterator[bytes]:
                for piece in cut[size]:
                    yield piece

            headers = {"Content-Length": str(BATCH_BYTES)}
            (await http.post("/", content=pieces(), headers=headers)).raise_for_status()

        async def receive(size: int) -> None:
            received = 0
            async with http.stream("GET", f"/{size}") as response:
                async for chunk in response.aiter_raw():
                    received += len(chunk)
            assert received == BATCH_BYTES

        async def store() -> None:
            result = await kv.store(hashes, payloads)
            assert len(result.stored) == BLOCKS

        async def load() -> None:
            async with kv.load(hashes) as lease:
                assert len(lease) == BLOCKS

        cut = {
            size: [bytes(whole[at : at + size]) for at in range(0, BATCH_BYTES, size)]
            for size in PIECES
        }
        for _ in range(rounds + 1):  # the first round makes connections and touches memory
            for size in PIECES:
                note(f"bare up {size}", await rate(partial(send, size)))
                note(f"bare down {size}", await rate(partial(receive, size)))
            await kv.clear()
            note("kvoffload up", await rate(store))
            note("kvoffload down", await rate(load))
        async with kv.load(hashes) as lease:
            assert all(view == given for view, given in zip(lease, payloads, strict=True))
    middle = {name: median(each[1:]) for name, each in rates.items()}
    return {
        direction: {
            "bare": max(middle[f"bare {direction} {size}"] for size in PIECES),
            "kvoffload": middle[f"kvoffload {direction}"],
        }
        for direction in ("up", "down")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--serve", choices=("bare", "kvoffload"), help=argparse.SUPPRESS)
    parser.add_argument("--socket", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.socket)
        return
    with (
        TemporaryDirectory() as name,
        serving("bare", Path(name)) as bare_socket,
        serving("kvoffload", Path(name)) as kit_socket,
    ):
        for what, value in describe_machine(Path(name)).items():
            print(f"{what}: {value}")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            sockets = {"bare": bare_socket, "kvoffload": kit_socket}
            found = runner.run(measure(sockets, options.rounds))
    is_good = True
    for direction, both in found.items():
        share = both["kvoffload"] / both["bare"]
        is_good = is_good and share >= LIMIT
        print(
            f"{direction:5} bare {both['bare'] / 1e9:5.2f} GB/s  kvoffload "
            f"{both['kvoffload'] / 1e9:5.2f} GB/s  ratio {share:4.2f}  (limit {LIMIT})"
        )
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
