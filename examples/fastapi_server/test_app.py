"""The example as its users meet it: a uvicorn process, asked, stopped and started again."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]


@contextmanager
def running(folder: Path, **environment: str) -> Iterator[httpx.Client]:
    """Run the application on a Unix socket; at the end it must stop in good order."""
    path = folder / "socket"
    command = [sys.executable, "-m", "uvicorn", "examples.fastapi_server.app:app"]
    process = subprocess.Popen(
        [*command, "--uds", str(path), "--log-level", "warning"],
        cwd=ROOT,
        env=os.environ | {"COLD_PATH": str(folder / "cold")} | environment,
    )
    try:
        transport = httpx.HTTPTransport(uds=str(path), retries=0)
        with httpx.Client(transport=transport, base_url="http://app", timeout=20) as client:
            while not _listens(path):
                assert process.poll() is None, "the application did not start"
            yield client
    finally:
        process.terminate()
        assert process.wait(30) in (0, -15)  # uvicorn raises the signal again, once it is done


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def ask(client: httpx.Client, tokens: int) -> dict[str, object]:
    """Return the answer to the prompt of the first so many tokens."""
    answer = client.post("/generate", json={"token_ids": list(range(tokens))})
    assert answer.status_code == 200, answer.text
    body: dict[str, object] = answer.json()
    return body


def test_a_longer_prompt_pays_for_its_new_tokens_only(tmp_path: Path) -> None:
    """Also after a restart, and the answers are the same."""
    with running(tmp_path) as client:
        first = ask(client, 100)
        assert (first["restored_tokens"], first["computed_tokens"]) == (0, 100)
        again = ask(client, 100)
        assert (again["restored_tokens"], again["computed_tokens"]) == (96, 4)
        assert again["text"] == first["text"]
        longer = ask(client, 170)
        assert longer["restored_tokens"] == 96
        assert client.get("/cache/v1/stats").json()["stored"] == 10
    with running(tmp_path) as client:
        restarted = ask(client, 170)
        assert restarted == {"text": longer["text"], "restored_tokens": 160, "computed_tokens": 10}


def test_the_cache_itself_is_for_operators(tmp_path: Path) -> None:
    """Who has no token sees none of it, who may only read does not clear it."""
    with running(tmp_path, OPERATOR_TOKEN="open") as client:
        ask(client, 32)
        assert client.get("/cache/metrics").status_code == 401
        bearer = {"Authorization": "Bearer open"}
        assert "kvoffload_" in client.get("/cache/metrics", headers=bearer).text
        answer = client.post("/cache/v1/clear", headers=bearer)
        assert answer.status_code == 403
