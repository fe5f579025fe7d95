"""The command as a process of its own: exit status, standard output, standard error."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = ("--hot", "64", "--warm", "64", "--block-bytes", "4KiB", "--requests", "60")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "kvoffload.cli", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=60, check=False
    )


def replay_json(*arguments: object) -> dict[str, object]:
    result = run("replay", "--json", *arguments)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert isinstance(report, dict)
    assert result.stdout == json.dumps(report) + "\n"
    return report


def test_json_is_one_object_and_nothing_else() -> None:
    report = replay_json(*SMALL)
    numbers = {
        "requests",
        "blocks",
        "prefix_hit_ratio",
        "seconds",
        "wrong_bytes",
        "loop_lag_p99_ms",
        "loop_lag_max_ms",
        "evictions",
        "promotions",
        "demotions",
        "rejected",
        "io_errors",
        "failed_loads",
    }
    assert {name for name in numbers if isinstance(report[name], int | float)} == numbers
    assert report["requests"] == 60
    assert report["wrong_bytes"] == 0
    assert report["policy"] == "weighted"
    assert isinstance(report["prefix_hit_ratio"], float)
    assert 0.2 < report["prefix_hit_ratio"] < 1
    for call in ("lookup_us", "load_us", "store_us"):
        assert isinstance(times := report[call], dict)
        assert 0 < times["p50"] <= times["p99"]
    assert isinstance(tiers := report["tiers"], dict)
    assert list(tiers) == ["hot", "warm"]
    assert {"hits", "bytes_read", "bytes_written"} <= set(tiers["hot"])
    assert tiers["hot"]["bytes_written"] > 0
    assert sum(tier["hits"] for tier in tiers.values()) > 0


def test_cold_blocks_are_there_in_the_next_run(tmp_path: Path) -> None:
    options = ("--cold", tmp_path / "cold", "--cold-blocks", "4096", *SMALL)
    first, second = replay_json(*options), replay_json(*options, "--no-uvloop", "--policy", "lru")
    assert isinstance(first["prefix_hit_ratio"], float)
    assert first["prefix_hit_ratio"] < 0.95
    assert second["prefix_hit_ratio"] == 1.0
    assert isinstance(tiers := second["tiers"], dict)
    assert tiers["cold"]["hits"] > 0
    assert second["wrong_bytes"] == 0


def test_people_get_tables_on_stdout_and_the_rest_on_stderr() -> None:
    result = run("replay", *SMALL)
    assert result.returncode == 0, result.stderr
    for word in ("prefix hits", "wrong bytes", "hot (cpu)", "warm (cpu)", "lookup", "loop lag"):
        assert word in result.stdout
    assert result.stderr.startswith("replaying 60 requests of generated-chat-0: ")
    assert len(result.stderr.splitlines()) == 1


def test_a_mistake_is_one_line_and_status_2(tmp_path: Path) -> None:
    trace = tmp_path / "bad.jsonl"
    trace.write_text('{"timestamp": 0, "hash_ids": [1]}\n{"timestamp": 0}\n')
    result = run("replay", trace)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == f"kvoffload: error: {trace}, line 2: hash_ids is missing\n"


@pytest.mark.skipif(os.name != "posix", reason="interrupts are sent as POSIX signals")
@pytest.mark.parametrize("loop", ["--uvloop", "--no-uvloop"])
def test_ctrl_c_ends_it_cleanly(tmp_path: Path, loop: str) -> None:
    """At its own speed the generated traffic takes minutes, so it is under way for sure."""
    # A background job of a shell ignores interrupts, and so do its children, these tests maybe.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from kvoffload.cli import main; sys.exit(main())"
    )
    options = ["--speed", "1", "--cold", str(tmp_path), loop, *SMALL[:-2]]
    with subprocess.Popen(
        [sys.executable, "-c", program, "replay", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        try:
            assert process.stderr.readline().startswith("replaying 1,000 requests")
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130
    assert stdout == ""
    assert re.fullmatch(
        rf"(blocks in {re.escape(str(tmp_path))} stay there for the next run\n)?"
        r"interrupted after \d+ of 1000 requests\n",
        stderr,
    )


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    with subprocess.Popen(
        command("replay", *SMALL), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        stderr = process.stderr.read()
    assert process.returncode == 1
    assert b"Traceback" not in stderr
    assert b"BrokenPipe" not in stderr


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_the_extra_is_named_when_it_is_missing(missing: str) -> None:
    program = (
        f"import sys; sys.modules['{missing}'] = None; import kvoffload; "
        "from kvoffload.cli import main; sys.exit(main(['replay']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "pip install 'kvoffload[cli]'" in result.stderr


def test_the_library_alone_imports_neither_typer_nor_rich() -> None:
    program = (
        "import sys, kvoffload, kvoffload.cli, kvoffload.workload; "
        "print({'typer', 'click', 'rich'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.stdout, result.stderr) == ("set()\n", "")
