"""The command `kvoffload serve` as a process of its own, and clients of it."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from kvoffload.cli import main

try:
    import httpx

    from kvoffload.service import server as _server  # noqa: F401  # only whether all is there
    from kvoffload.service.wire import BATCH, pack_header
except ModuleNotFoundError as exc:
    optional = {"fastapi", "httptools", "httpx", "pydantic", "pydantic_settings", "uvicorn"}
    if exc.name not in optional or os.environ.get("CI") == "true":
        raise
    pytest.skip(f"the service needs the extras server and dev: {exc}", allow_module_level=True)

SMALL = ("--hot", "1MiB", "--block-bytes", "64KiB", "--staging", "1MiB")
OPEN = ("--unprotected", *SMALL)
TOKEN = "Correct-Horse.Battery~Staple"


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("KVOFFLOAD_")}


def wait_for(holds: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


class Service:
    """A service in a process of its own."""

    def __init__(self, folder: Path, *options: object, code: str = "") -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    *(("-c", code) if code else ("-m", "kvoffload.cli")),
                    "serve",
                    *map(str, options),
                ],
                cwd=folder,
                env=environment(),
                stdout=log,
                stderr=log,
            )

    def ready(self) -> Service:
        """Wait for the line that tells where it listens."""
        wait_for(
            lambda: "listening on" in self.lines() or self.process.poll() is not None, "no log line"
        )
        assert "listening on" in self.lines(), self.lines()
        return self

    def lines(self) -> str:
        return self.log.read_text()

    def client(self, **options: object) -> httpx.Client:
        """Return a client at the place that the log tells."""
        found = re.search(r"listening on (unix:(\S+)|http://\S+);", self.lines())
        assert found, self.lines()
        if found[2]:
            transport = httpx.HTTPTransport(uds=found[2])
            return httpx.Client(transport=transport, base_url="http://service", timeout=30)
        return httpx.Client(base_url=found[1], timeout=30)

    def send(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def status(self) -> int:
        """Wait until it ends; return its exit status."""
        return self.process.wait(60)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Stop it in good order."""
        self.send(number)
        assert self.status() == 0, self.lines()
        assert not re.search("Traceback|ERROR|Warning", self.lines()), self.lines()
        assert self.lines().endswith("INFO kvoffload: stopped\n")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Start services that do not outlive the test."""
    with ExitStack() as stack:

        def start_one(*options: object, name: str = "service", code: str = "") -> Service:
            service = Service(tmp_path / name, *options, code=code)
            stack.callback(service.process.wait)
            stack.callback(service.process.kill)
            return service

        yield start_one


Start = Callable[..., Service]


def batch(payloads: dict[bytes, bytes]) -> bytes:
    header = pack_header(list(payloads), [len(data) for data in payloads.values()])
    return header + b"".join(payloads.values())


def store(client: httpx.Client, payloads: dict[bytes, bytes]) -> None:
    answer = client.post("/v1/store", content=batch(payloads), headers={"content-type": BATCH})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["stored"]) == len(payloads)


@contextmanager
def half_sent(client: httpx.Client, service: Service) -> Iterator[Callable[[], bytes]]:
    """Have a call under way whose body has not come in whole; yields what ends it."""
    body = batch({b"late": b"x" * 1000})
    head = (
        f"POST /v1/store HTTP/1.1\r\nhost: s\r\ncontent-type: {BATCH}\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )

    def calls() -> int:
        return int(client.get("/v1/overview").json()["requests_total"])  # does not count itself

    before = calls()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(service.folder / "socket"))
        sock.sendall(head.encode() + body[:-10])
        wait_for(lambda: calls() > before, "not taken on")

        def finish() -> bytes:
            sock.sendall(body[-10:])
            answer = b""
            while piece := sock.recv(65536):
                answer += piece
            return answer

        yield finish


# Starting and stopping


def test_a_restart_finds_the_cold_blocks(start: Start, tmp_path: Path) -> None:
    """SIGTERM flushes what is in memory alone."""
    options = (*OPEN, "--cold", "1MiB", "--cold-path", tmp_path / "cold", "--port", 0)
    payloads = {bytes([number]): bytes([number]) * 60_000 for number in range(12)}
    first = start(*options, name="first").ready()
    with first.client() as client:
        store(client, payloads)
    first.stop()
    second = start(*options, name="second").ready()
    with second.client() as client:
        texts = [f"b:{name.hex()}" for name in payloads]
        assert client.post("/v1/lookup", json={"block_hashes": texts}).json() == {"hit": 12}
        loaded = client.post("/v1/load", json={"block_hashes": texts}).content
        assert loaded.endswith(b"".join(payloads.values()))
    second.stop(signal.SIGINT)


def test_one_line_tells_what_there_is(start: Start, tmp_path: Path) -> None:
    options = (*OPEN, "--port", 0, "--warm", "2MiB", "--cold", "3MiB", "--cold-path", "c")
    service = start(*options).ready()
    (line,) = [line for line in service.lines().splitlines() if "listening" in line]
    assert re.search(
        r" INFO kvoffload: listening on http://127\.0\.0\.1:\d+; hot 1 MiB, warm 2 MiB, "
        r"cold 3 MiB in c, in blocks of 64 KiB; unprotected$",
        line,
    )
    with service.client() as client:
        assert client.get("/readyz").json() == {
            "status": "ready",
            "tiers": {"hot": "serving", "warm": "serving", "cold": "serving"},
        }
    service.stop()


def test_a_token_protects_it_and_is_not_told(start: Start, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    service = start(*SMALL, "--uds", "socket", "--token-file", tmp_path / "token").ready()
    assert "protected by 1 token\n" in service.lines()
    with service.client() as client:
        body = {"block_hashes": ["s:a"]}
        assert client.post("/v1/lookup", json=body).status_code == 401
        client.headers["authorization"] = f"Bearer {TOKEN}"
        assert client.post("/v1/lookup", json=body).json() == {"hit": 0}
    service.stop()
    assert TOKEN not in service.lines()


def test_options_go_before_the_environment_and_the_file(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('hot = "4MiB"\nwarm = "4MiB"\nblock_bytes = "64KiB"\n')
    service = start("--settings", file, "--hot", "2MiB", "--unprotected", "--uds", "s").ready()
    assert "hot 2 MiB, warm 4 MiB, in blocks of 64 KiB; unprotected" in service.lines()
    service.stop()


def test_it_drains(start: Start) -> None:
    """While a call is under way: not ready, no other calls, no streams; then it ends well."""
    service = start(*OPEN, "--uds", "socket").ready()
    with service.client() as client, half_sent(client, service) as finish:
        with client.stream("GET", "/v1/events") as events:
            pieces = events.iter_raw()
            assert next(pieces).startswith(b":")
            service.send()
            assert b"".join(pieces) == b""  # ended, and in good order
        wait_for(lambda: client.get("/readyz").status_code == 503, "still ready")
        assert client.get("/readyz").json()["status"] == "draining"
        assert client.get("/livez").status_code == 200
        refused = client.post("/v1/lookup", json={"block_hashes": []})
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        assert service.process.poll() is None
        assert b" 200 OK\r\n" in finish()
    assert service.status() == 0
    assert not (service.folder / "socket").exists()


def test_a_call_that_never_ends_is_given_up(start: Start) -> None:
    service = start(*OPEN, "--uds", "socket", "--drain-timeout-s", "0.2").ready()
    with service.client() as client, half_sent(client, service):
        service.send()
        assert service.status() == 0, service.lines()
    assert service.lines().endswith("INFO kvoffload: stopped\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(start: Start, number: signal.Signals) -> None:
    service = start(*OPEN, "--uds", "socket").ready()
    with service.client() as client, half_sent(client, service):
        service.send()
        wait_for(lambda: client.get("/readyz").status_code == 503, "still ready")
        service.send(number)
        assert service.status() == 128 + number
    assert "told to stop a second time" in service.lines()
    assert not (service.folder / "socket").exists()


def test_a_signal_while_it_starts(start: Start) -> None:
    """Whenever it comes, everything is left in good order."""
    service = start(*OPEN, "--uds", "socket")
    wait_for(lambda: (service.folder / "socket").exists(), "no socket")
    service.stop()
    assert not (service.folder / "socket").exists()


FAILING = """
import sys
from contextlib import asynccontextmanager
from kvoffload.cli import main
from kvoffload.service import server

make = server.create_app

def create_app(*arguments, **options):
    app = make(*arguments, **options)
    lifespan = app.router.lifespan_context

    @asynccontextmanager
    async def failing(app):
        async with lifespan(app):
            if {first!r} == "start":
                raise {error}
            yield
            raise {error}

    app.router.lifespan_context = failing
    return app

server.create_app = create_app
sys.exit(main())
"""


def test_what_could_not_be_closed_is_status_1(start: Start) -> None:
    code = FAILING.format(first="end", error="OSError('no good')")
    service = start(*OPEN, "--uds", "socket", code=code).ready()
    service.send()
    assert service.status() == 1
    assert "ERROR kvoffload: the cache was not closed in good order: no good" in service.lines()
    assert not (service.folder / "socket").exists()


def test_too_little_memory_is_status_2(start: Start) -> None:
    """The system may have promised to others what the machine has."""
    service = start(
        *OPEN, "--uds", "socket", code=FAILING.format(first="start", error="MemoryError")
    )
    assert service.status() == 2
    assert service.lines() == (
        "kvoffload: error: there is not enough memory for the hot and warm tiers\n"
    )
    assert not (service.folder / "socket").exists()


# Where it listens


def test_the_socket_is_for_our_user_alone(start: Start) -> None:
    service = start(*OPEN, "--uds", "socket").ready()
    assert stat.S_IMODE((service.folder / "socket").stat().st_mode) == 0o600
    service.stop()
    assert not (service.folder / "socket").exists()


def test_a_socket_that_a_crash_left_is_replaced(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    first = start(*OPEN, "--uds", path, name="first").ready()
    first.process.kill()
    first.status()
    assert path.is_socket()
    second = start(*OPEN, "--uds", path, name="second").ready()
    with second.client() as client:
        assert client.get("/livez").status_code == 200
    second.stop()


def test_a_socket_in_use_is_refused(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    first = start(*OPEN, "--uds", path, name="first").ready()
    second = start(*OPEN, "--uds", path, name="second")
    assert second.status() == 2
    assert second.lines() == (
        f"kvoffload: error: a process listens on {path} already: use that service, stop it, or "
        "give this one another path\n"
    )
    with first.client() as client:
        assert client.get("/livez").status_code == 200
    first.stop()


def test_another_file_is_never_removed(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    service = start(*OPEN, "--uds", path)
    assert service.status() == 2
    assert service.lines().startswith(f"kvoffload: error: {path} is there already and is no socket")
    assert path.read_text() == "mine"


def test_a_port_in_use_is_one_line(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        service = start(*OPEN, "--port", port)
        assert service.status() == 2
    assert service.lines() == (
        f"kvoffload: error: port {port} of 127.0.0.1 is in use: stop the process that listens "
        "there, or give this service another port\n"
    )


# The cold directory


def test_a_cold_directory_in_use_names_the_cure(start: Start, tmp_path: Path) -> None:
    options = (*OPEN, "--cold", "1MiB", "--cold-path", tmp_path / "cold", "--uds", "socket")
    first = start(*options, name="first").ready()
    second = start(*options, name="second")
    assert second.status() == 2
    (line,) = second.lines().splitlines()
    assert line.startswith("kvoffload: error: tier 'cold': ")
    assert f"in use by process {first.process.pid};" in line
    assert "`kvoffload serve --uds SOCKET`" in line
    assert "`kvoffload.client.AsyncLRUClient('unix:SOCKET')` in each worker" in line
    assert not (second.folder / "socket").exists()
    first.stop()


def test_a_second_worker_names_the_cure(tmp_path: Path) -> None:
    """Each worker of uvicorn opens the same directory; the first one gets it."""
    (tmp_path / "two_workers.py").write_text(
        "from fastapi import FastAPI\n"
        "from kvoffload import ManagerSettings\n"
        "from kvoffload.integrations.fastapi import lifespan_manager\n"
        "settings = ManagerSettings(hot_blocks=4, cold_blocks=4, cold_path='cold')\n"
        "app = FastAPI(lifespan=lifespan_manager(settings))\n"
    )
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "--workers", "2", "--port", "0", "two_workers:app"],
            cwd=tmp_path,
            env=environment(),
            stdout=file,
            stderr=file,
        )
    try:
        wait_for(lambda: "TierLockedError" in log.read_text(), "no error")
        assert re.search(
            r"TierLockedError: .*in use by process \d+; .*AsyncLRUClient\('unix:", log.read_text()
        )
    finally:
        process.terminate()
        process.wait(60)


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "tokens (default): there are none, so nobody could do anything"),
        (("--unprotected", "--host", "0.0.0.0"), "everybody who reaches 0.0.0.0 could read"),
        ((*OPEN, "--host", "no.such.host.invalid"), "unprotected (argument), host (argument)"),
        (("--token-file", "none"), "tokens.0.token_file (argument): the file none can't be read"),
        ((*OPEN, "--uds", "s", "--port", "1"), "uds (argument), port (argument): a service"),
        (("--hot", "8GB of"), "hot (argument): must be a size"),
        ((*OPEN, "--cold", "1MiB"), "cold (argument): 1 MiB on disk need a directory"),
        ((*OPEN, "--remote-url", "cache:6379"), "remote_url (argument): the url of a remote tier"),
        ((*OPEN, "--remote-admission", "some"), "remote_admission (argument): must be 'all', "),
        ((*OPEN, "--remote-queue-bytes", "x"), "remote_queue_bytes (argument): must be a size"),
        ((*OPEN, "--port", "x"), "--port"),
        ((*OPEN, "--settings", "none"), "settings (argument): the settings file none can't"),
        ((*OPEN, "--log-level", "loud"), "log_level (argument): must be 'critical'"),
    ],
)
def test_a_mistake_is_status_2(
    arguments: tuple[str, ...],
    complaint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["serve", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert complaint in captured.err
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_cold_directory_of_other_blocks_is_status_2(start: Start, tmp_path: Path) -> None:
    cold = ("--cold", "1MiB", "--cold-path", tmp_path / "cold", "--uds", tmp_path / "socket")
    start(*OPEN, *cold, name="first").ready().stop()
    second = start(*OPEN, *cold, "--block-bytes", "32KiB", name="second")
    assert second.status() == 2
    (line,) = second.lines().splitlines()
    assert line.startswith("kvoffload: error: ")
    assert "65536" in line


def test_without_the_extra_it_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("kvoffload.service")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pydantic_settings", None)
    assert main(["serve"]) == 2
    assert capsys.readouterr().err == (
        "kvoffload: error: this needs pydantic_settings, which is not installed; install it with: "
        "pip install 'kvoffload[server]'\n"
    )


def test_help_tells_status_and_signals(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "SIGTERM or Ctrl-C lets calls under way end" in out
    assert "Exit status: 0 stopped in good order; 1" in out
