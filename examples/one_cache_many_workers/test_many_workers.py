"""The service and two workers for real: what one computed, the other one loads."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

try:
    import httpx
    import uvicorn

    import kvoffload.client
    import kvoffload.service.server  # noqa: F401  # only to see whether all is there
except ModuleNotFoundError as exc:
    optional = {"fastapi", "httptools", "httpx", "pydantic", "pydantic_settings", "uvicorn"}
    if exc.name not in optional or os.environ.get("CI") == "true":
        raise
    pytest.skip(f"this needs the extras cli, client and server: {exc}", allow_module_level=True)

ROOT = Path(__file__).parents[2]
APP = "examples.one_cache_many_workers.app:app"


def wait_for(holds: Callable[[], Any], what: str) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@contextmanager
def running(log: Path, line: str, *command: object, **more: object) -> Iterator[re.Match[str]]:
    """Run a process from its first log line of this kind until SIGTERM; it must end well."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KVOFFLOAD_")}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, command)],
            cwd=ROOT,
            env=kept | {name: str(value) for name, value in more.items()},
            stdout=file,
            stderr=file,
        )
    try:
        wait_for(lambda: re.search(line, log.read_text()) or process.poll() is not None, line)
        found = re.search(line, log.read_text())
        assert found, log.read_text()
        yield found
        process.send_signal(signal.SIGTERM)
        # Uvicorn itself dies of the signal in the end.
        assert process.wait(60) in (0, -signal.SIGTERM), log.read_text()
        assert not re.search("Traceback|ERROR", log.read_text()), log.read_text()
    finally:
        process.kill()
        process.wait()


@contextmanager
def service(folder: Path) -> Iterator[None]:
    """Run the service that has the cache."""
    options = ("--unprotected", "--uds", folder / "kv.sock", "--hot", "1MiB", "--cold", "4MiB")
    more = ("--cold-path", folder / "cold", "--block-bytes", "64KiB")
    log = folder / "service.log"
    with running(log, "listening on unix:", "kvoffload.cli", "serve", *options, *more):
        yield


@contextmanager
def workers(folder: Path) -> Iterator[str]:
    """Run two workers; yields their address."""
    log = folder / "workers.log"
    command = (uvicorn.__name__, "--workers", "2", "--port", "0", APP)
    url = f"unix:{folder / 'kv.sock'}"
    with running(log, r"running on (http://\S+)", *command, CACHE_URL=url) as found:
        wait_for(lambda: log.read_text().count("startup complete") == 2, "two workers")
        yield found[1]


PROMPT = {"token_ids": list(range(64))}


def ask(url: str) -> dict[str, Any]:
    """Ask one of the workers, which the system chooses: each call has its own connection."""
    answer: dict[str, Any] = (
        httpx.post(f"{url}/prefill", json=PROMPT, timeout=30).raise_for_status().json()
    )
    return answer


def test_what_one_worker_computed_the_other_one_loads(tmp_path: Path) -> None:
    """Also after all of them were started anew."""
    with service(tmp_path), workers(tmp_path) as url:
        answers: dict[int, dict[str, Any]] = {}

        def both_answered() -> bool:
            answer = ask(url)
            assert answer["from_cache"] == (4 if answers else 0)
            answers.setdefault(answer["worker"], answer)
            return len(answers) == 2

        wait_for(both_answered, "an answer of each worker")
        first, second = answers.values()
        assert (first["from_cache"], second["from_cache"]) == (0, 4)
        assert first["digest"] == second["digest"]
    with service(tmp_path), workers(tmp_path) as url:
        again = ask(url)
        assert (again["from_cache"], again["digest"]) == (4, first["digest"])


def test_workers_do_without_the_service_until_it_is_back(tmp_path: Path) -> None:
    """Only time is lost."""
    with ExitStack() as stack:
        with service(tmp_path):
            url = stack.enter_context(workers(tmp_path))
            digest = ask(url)["digest"]
        without = ask(url)
        assert (without["blocks"], without["from_cache"]) == (4, 0)
        assert without["digest"] == digest
        with service(tmp_path):
            wait_for(lambda: ask(url)["from_cache"] == 4, "the cache again")
            assert ask(url)["digest"] == digest
            stack.pop_all().close()
