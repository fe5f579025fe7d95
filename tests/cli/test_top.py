"""`kvoffload top` against services that run, refuse, go away, or are none."""

from __future__ import annotations

import copy
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.service.in_thread import ServiceInThread, until

from kvoffload.cli import main
from kvoffload.cli.overview import parse_overview
from kvoffload.cli.top_view import View, duration, printable
from kvoffload.service.access import AccessControl, Right, Token

TOKEN, WEAK_TOKEN = "a-token-that-sees-all", "a-token-that-reads"
ACCESS = AccessControl([Token.of(TOKEN), Token.of(WEAK_TOKEN, ["team-a"], [Right.READ])])
TIER = {
    "medium": "cpu",
    "state": "serving",
    "capacity_blocks": 1000,
    "blocks": 950,
    "bytes": 950 << 16,
    "bytes_read": 0,
    "bytes_written": 0,
    "queue_depth": 3,
    "read_latency_s": 0.0005,
    "of_the_future": "whatever",
}
SPACE = {"hits": 30, "misses": 10, "blocks": 9, "bytes": 9 << 16, "max_bytes": None}
OVERVIEW: dict[str, Any] = {
    "version": "9.9",
    "time": 1e9,
    "uptime_s": 100.0,
    "draining": False,
    "stats": {"hits": 1000, "misses": 1000, "stored": 500, "tiers": {"hot": TIER}},
    "namespaces": {"": SPACE, "team\x1b[2J": SPACE | {"max_bytes": 1 << 30, "reserved_bytes": 1}},
    "latencies": {
        "load": {"count": 7, "sum_s": 1, "p50_s": 2.5e-5, "p95_s": 0.0025, "p99_s": 1.25},
        "store": {"count": 0, "p50_s": None, "p95_s": None, "p99_s": None},
    },
    "loop_lag": {"p50_s": 0.0001, "p99_s": 0.0123, "max_s": 0.2},
    "sessions": 2,
    "requests_total": 12345,
}


@pytest.fixture
def cold(tmp_path: Path) -> str:
    return str(tmp_path / "cold")


@pytest.fixture(autouse=True)
def no_token_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVOFFLOAD_TOKEN", raising=False)


def text(view: View, width: int = 80) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width).print(view)
    lines = file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    return [" ".join(line.split()) for line in lines]


def later(seconds: float, **stats: int) -> dict[str, Any]:
    overview = copy.deepcopy(OVERVIEW)
    overview["uptime_s"] += seconds
    for name, more in stats.items():
        overview["stats"][name] += more
    return overview


def parsed(overview: dict[str, Any]) -> Any:
    return parse_overview(json.dumps(overview))


def test_rates_are_those_between_two_looks() -> None:
    view = View(parsed(OVERVIEW))
    assert "hit ratio - overall 50.0% read - written -" in text(view)
    second = later(2, hits=300, misses=100, stored=50)
    second["stats"]["tiers"]["hot"]["bytes_read"] += 6 << 20
    view.advance(parsed(second))
    lines = text(view)
    assert lines[0] == "kvoffload 9.9 up 1 min 42 s 2 sessions 12,345 requests live"
    assert "hit ratio 75.0% overall 54.2% read 3 MiB/s written 0 B/s" in lines
    assert "found 150/s missed 50/s stored 25/s evicted 0/s" in lines
    assert "hot ██████████ 95% 950/1,000 59.4 MiB 3 MiB 0 B 3 500 us" in lines
    assert any(line.startswith("load 7 25 us 2.5 ms 1.25 s") for line in lines)
    assert any(line.startswith("store 0 - - -") for line in lines)
    assert any(line.startswith("loop lag 100 us 12.3 ms 200 ms") for line in lines)
    assert "own 30 10 75.0% 9 576 KiB - -" in lines


def test_a_restart_gives_no_rates_and_trouble_is_told() -> None:
    view = View(parsed(later(50)))
    view.advance(parsed(later(1)))
    assert "hit ratio - overall 50.0% read - written -" in text(view)
    view.trouble = "cannot connect to it"
    assert text(view)[0].endswith("requests cannot connect to it")
    view.advance(parsed(later(2) | {"draining": True}))
    assert text(view)[0].endswith("draining")


def test_a_tier_in_trouble_says_so_and_nothing_is_cut() -> None:
    overview = later(1)
    overview["stats"]["tiers"] = {
        "hot": TIER,
        "cold": TIER
        | {"state": "read_only", "blocks": 10_000_000, "capacity_blocks": 20_000_000}
        | {"bytes": 1000 << 30, "pending_blocks": 10},
    }
    overview["namespaces"] = {"n" * 100: SPACE | {"hits": 10**9, "bytes": 1 << 40}}
    lines = text(View(parsed(overview)))
    assert "cold █████▒···· 50% 10M/20M 1000 GiB - - 3 500 us" in lines
    assert "read only" in lines
    assert sum("…" in line for line in lines) == 1  # the name of the namespace


def test_an_engine_that_others_share_has_no_slots_and_a_queue() -> None:
    overview = later(1)
    far = {"medium": "remote", "capacity_blocks": 0, "blocks": 0, "bytes": 0}
    far |= {"state": "unavailable", "backlog_bytes": 3 << 20, "dropped_blocks": 12345}
    overview["stats"]["tiers"] = {"hot": TIER, "remote": TIER | far}
    lines = text(View(parsed(overview)))
    assert "remote - - 3 500 us" in lines
    assert lines[lines.index("remote - - 3 500 us") + 1] == "unavailable"
    assert any(line.endswith("to be sent 3 MiB") for line in lines)
    assert any(line.endswith("not sent 12,345") for line in lines)
    assert not any("to be sent" in line for line in text(View(parsed(OVERVIEW))))


def test_the_names_of_others_cannot_move_the_cursor() -> None:
    assert "team\\u{1b}[2J 30 10 75.0% 9 576 KiB 1 GiB 1 B" in text(View(parsed(OVERVIEW)), 100)
    assert printable("a\u202eb\n") == "a\\u{202e}b\\u{a}"


@pytest.mark.parametrize(
    ("seconds", "words"), [(9.9, "9 s"), (61, "1 min 1 s"), (3660, "1 h 1 min"), (90061, "1 d 1 h")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_once_prints_what_the_service_says(
    cold: str, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "socket") if kind == "unix" else None
    with ServiceInThread(cold, path=path) as service:
        service.store(range(5), "team-a")
        before = service.overview()
        assert main(["top", service.url, "--once", "--json"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        (line,) = out.splitlines()
        shown = json.loads(line)
        assert shown["stats"]["stored"] == 5
        moving = ("time", "uptime_s", "requests_total", "loop_lag")
        assert {k: v for k, v in shown.items() if k not in moving} == {
            k: v for k, v in before.items() if k not in moving
        }
        assert main(["top", service.url, "--once", "--interval", "0.1"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        lines = [" ".join(line.split()) for line in out.splitlines()]
        assert "team-a 0 0 - 5 20 KiB - -" in lines
        assert "found 0/s missed 0/s stored 0/s evicted 0/s" in lines


def test_tokens_come_from_a_file_or_the_environment(
    cold: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "token"
    with ServiceInThread(cold, access=ACCESS, token=TOKEN) as service:

        def status(*arguments: str) -> tuple[int, str]:
            code = main(["top", service.url, "--once", "--json", *arguments])
            error = capsys.readouterr().err
            assert TOKEN not in error
            return code, error

        assert status() == (
            2,
            f"kvoffload: error: {service.url} wants a token: give --token-file, "
            "or set KVOFFLOAD_TOKEN\n",
        )
        file.write_text(f"{TOKEN}\n")
        assert status("--token-file", str(file)) == (0, "")
        monkeypatch.setenv("KVOFFLOAD_TOKEN", TOKEN)
        assert status() == (0, "")
        file.write_text("another\n")
        error = f"kvoffload: error: {service.url} does not know this token\n"
        assert status("--token-file", str(file)) == (2, error)
        file.write_text(WEAK_TOKEN)
        code, error = status("--token-file", str(file))
        assert code == 2
        assert "may not see all of" in error
        for content, words in (("\n", "holds no token"), ("a b", "visible ASCII")):
            file.write_text(content)
            code, error = status("--token-file", str(file))
            assert (code, words in error, error.count("\n")) == (2, True, 1)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:1", "cannot connect to http://127.0.0.1:1: "),
        pytest.param(
            "unix:/nowhere/at-all.sock",
            "cannot connect to unix:/nowhere/at-all.sock: ",
            # httpcore leaves a socket that could not be connected to the garbage collector.
            marks=pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
        ),
        ("ftp://host", "URL must be http://HOST:PORT or unix:/PATH.sock, not 'ftp://host'"),
        ("unix:", "URL must be "),
        ("http://host:port", "URL must be "),
        ("http://[::1", "URL must be "),
        ("nonsense", "URL must be "),
        ("http://me:secret@host", "must not hold a user or a password"),
    ],
)
def test_a_mistake_is_one_line(url: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", url, "--once"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kvoffload: error: ")
    assert words in err
    assert err.count("\n") == 1
    assert "secret" not in err


class Answering(BaseHTTPRequestHandler):
    """Answers what its server was told to."""

    def do_GET(self) -> None:
        status, body = self.server.answer  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def answering() -> Iterator[HTTPServer]:
    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (404, b"nothing", "is no kvoffload service: it answered 404"),
        (302, b"", "is no kvoffload service: it answered 302"),
        (200, b"<html>", "is no overview"),
        (200, b"\xff", "is no overview"),
        (200, b"[]", "is no overview"),
        (200, b"{}", "is no overview"),
        (200, json.dumps(OVERVIEW | {"stats": []}).encode(), "is no overview"),
        (200, json.dumps(OVERVIEW | {"uptime_s": "long"}).encode(), "is no overview"),
        (429, b"{}", "has too much to do"),
        (503, b"{}", "takes no calls now"),
    ],
)
def test_what_is_no_service_is_one_line(
    answering: HTTPServer,
    status: int,
    body: bytes,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answering.answer = status, body  # type: ignore[attr-defined]
    url = f"http://127.0.0.1:{answering.server_address[1]}"
    assert main(["top", url, "--once", "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


PROGRAM = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from kvoffload.cli import main; sys.exit(main())"
)
"""A background job of a shell ignores interrupts, and so do its children, these tests maybe."""


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_on_a_terminal_it_waits_for_a_service_and_ctrl_c_leaves_all_as_it_was(cold: str) -> None:
    import pty

    seen = bytearray()

    def read(fd: int) -> None:
        while True:
            try:
                data = os.read(fd, 65536)
            except OSError:  # the other end is closed
                return
            if not data:
                return
            seen.extend(data)

    ours, theirs = pty.openpty()
    with ExitStack() as services:
        service = services.enter_context(ServiceInThread(cold))
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "top", service.url, "--interval", "0.1"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"},
        )
        os.close(theirs)
        reader = threading.Thread(target=read, args=(ours,))
        reader.start()
        try:
            until(lambda: b"live" in seen)
            service.store(range(5), "team-a")
            until(lambda: b"team-a" in seen)
            port = service.port
            services.close()
            until(lambda: b"cannot connect" in seen or b"takes no calls" in seen)
            seen.clear()
            with ServiceInThread(cold, port=port):
                until(lambda: b"live" in seen)
                process.send_signal(signal.SIGINT)
                assert process.wait(30) == 130
        finally:
            process.kill()
            process.wait()
            reader.join(30)
            os.close(ours)
    assert b"Traceback" not in seen
    assert seen.rstrip().endswith((b"\x1b[?1049l\x1b[?25h", b"\x1b[?25h\x1b[?1049l"))


def test_into_a_pipe_it_prints_look_after_look_until_ctrl_c(cold: str) -> None:
    with ServiceInThread(cold) as service:
        for options, line in (([], "kvoffload"), (["--json"], "{")):
            with subprocess.Popen(
                [sys.executable, "-c", PROGRAM, "top", service.url, "--interval", "0.1", *options],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            ) as process:
                assert process.stdout is not None
                try:
                    found = 0
                    while found < 2:
                        found += process.stdout.readline().startswith(line)
                    process.send_signal(signal.SIGINT)
                    _, err = process.communicate(timeout=30)
                finally:
                    process.kill()
            assert (process.returncode, err) == (130, "")
