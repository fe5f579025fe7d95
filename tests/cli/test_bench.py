"""`kvoffload bench`: every row for real with small sizes, what it leaves, and mistakes."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kvoffload.benching.disk
import kvoffload.cli.bench
from kvoffload import OffloadError
from kvoffload.benching.rows import NotMeasured
from kvoffload.benching.suite import ROWS
from kvoffload.cli import main

SMALL = ("--block-bytes", "64KiB", "--size", "1MiB", "--seconds", "0.2")


def check(report: dict[str, Any]) -> None:
    """Check that all rows are there and make sense."""
    assert {"processor", "cores", "kernel", "python", "file system", "event loop"} == set(
        report["machine"]
    )
    assert (report["block_bytes"], report["size_bytes"]) == (65536, 1 << 20)
    rows = {row["name"]: row for row in report["rows"]}
    missing = {row["name"] for row in report["not_measured"]}
    assert missing <= {"cold load, direct"}
    assert list(rows) == [name for name in ROWS if name not in missing]
    for row in rows.values():
        for figures in (("limit", "reached", "ratio"), ("limit_median", "reached_median")):
            assert all(math.isfinite(row[name]) and row[name] > 0 for name in figures), row
        of = {"reached / limit": row["reached"] / row["limit"]}
        of["limit / reached"] = 1 / of["reached / limit"]
        assert row["ratio"] == pytest.approx(of[row["ratio_is"]])
        assert (row["unit"] == "GB/s") == (row["ratio_is"] == "reached / limit")
        assert row["limit_is"]
        assert row["reached_is"]
        assert row["rounds"] >= 3
    units = {name: row["unit"] for name, row in rows.items() if row["unit"] != "GB/s"}
    assert units == {
        "lease of hot blocks": "us",
        "one cold block": "us",
        "hop to a thread": "us",
        "event loop lag": "ms",
    }


@pytest.mark.parametrize("loop", ["--uvloop", "--no-uvloop"])
def test_json_has_every_row_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], loop: str
) -> None:
    assert main(["bench", "--json", "--cold", str(tmp_path), loop, *SMALL]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    check(report)
    assert report["machine"]["event loop"] == ("uvloop" if loop == "--uvloop" else "asyncio")
    assert captured.err.splitlines()[-1].startswith("measuring with 16 blocks of 64 KiB in ")
    assert list(tmp_path.iterdir()) == []


def test_as_a_process_people_get_tables(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "kvoffload.cli", "bench", *SMALL],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "TMPDIR": str(tmp_path), "COLUMNS": "80"},
    )
    assert result.returncode == 0, result.stderr
    for word in ("processor: ", "limit", "kvoffload", "ratio", *ROWS):
        assert word in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert f"in {tmp_path}" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="these are POSIX signals")
@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
@pytest.mark.parametrize("loop", ["--uvloop", "--no-uvloop"])
def test_a_signal_leaves_nothing(
    tmp_path: Path, number: signal.Signals, status: int, word: str, loop: str
) -> None:
    """With so many seconds it is still at it for sure."""
    # A background job of a shell ignores interrupts, and so do its children, these tests maybe.
    # What is measured first is the disk: the directory isn't empty when the signal comes.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "import kvoffload.cli.bench as bench; show = bench._measure\n"
        "async def measure(setup, on_step, killed):\n"
        "    def step(what, number, steps):\n"
        "        on_step(what, number, steps)\n"
        "        if what == 'durable store':\n"
        "            (setup.place / 'here').touch(); print('at it', file=sys.stderr, flush=True)\n"
        "    return await show(setup, step, killed)\n"
        "bench._measure = measure\n"
        "from kvoffload.cli import main; sys.exit(main())"
    )
    options = ["--cold", str(tmp_path), loop, *SMALL[:-1], "20"]
    with subprocess.Popen(
        [sys.executable, "-c", program, "bench", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        try:
            while (line := process.stderr.readline()) != "at it\n":
                assert line, "it ended"
            assert [path.name[:16] for path in tmp_path.iterdir()] == ["kvoffload-bench-"]
            process.send_signal(number)
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == status
    assert stdout == ""
    assert stderr == f"{word}; nothing is left\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--cold nowhere", "--cold must be a directory that is there, not 'nowhere'"),
        ("--block-bytes much", "--block-bytes must be a size"),
        ("--block-bytes 100", "--block-bytes must be at least 4 KiB"),
        ("--block-bytes 2GiB", "--block-bytes must be from 1 byte to 1 GiB"),
        ("--size much", "--size must be a size"),
        ("--size 16MiB", "--size must be that of 16 blocks at least, 32 MiB, not 16 MiB"),
        ("--size 0", "--size must be that of 16 blocks at least"),
        ("--size 9999TiB", "of memory, and this machine has"),
        ("--seconds 0", "--seconds must be more than 0"),
        ("--seconds nan", "--seconds must be more than 0"),
        ("--seconds 9999999", "--seconds must be more than 0 and at most 3600"),
        ("--seconds soon", "--seconds"),
        ("more", "more"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: str,
    complaint: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("kvoffload: error: ")
    assert complaint in line
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    assert main(["bench", "--cold", str(tmp_path), *SMALL]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"in {tmp_path}, and there is room for 1 MiB" in line


def test_memory_that_poses_as_a_disk_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def nothing(*_arguments: object) -> list[NotMeasured]:
        return [NotMeasured("cold load, direct", "there is [none]")]

    monkeypatch.setattr(kvoffload.cli.bench, "measure", nothing)
    monkeypatch.setattr(
        kvoffload.cli.bench, "describe_machine", lambda _path: {"file system": "tmpfs on tmpfs"}
    )
    assert main(["bench", "--cold", str(tmp_path), *SMALL]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith(f"warning: {tmp_path} is in memory (tmpfs)")
    assert "not measured: there is [none]" in " ".join(captured.out.split())


@pytest.mark.parametrize("block_bytes", ["4KiB", "6000"])
def test_blocks_that_direct_io_does_not_take(
    block_bytes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--cold", str(tmp_path), "--block-bytes", block_bytes, "--size", "256KiB"]
    assert main(["bench", "--json", *options, "--seconds", "0.1"]) == 0
    report = json.loads(capsys.readouterr().out)
    if block_bytes == "6000":
        (missing,) = report["not_measured"]
        assert missing["name"] == "cold load, direct"
        assert missing["why"]
    assert len(report["rows"]) + len(report["not_measured"]) == len(ROWS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["wrong bytes", "a tier fails", "a bare call fails"])
def test_what_goes_wrong_is_one_line_and_nothing_is_left(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def failing(*_arguments: object) -> None:
        raise OffloadError("gone") if what == "a tier fails" else OSError("no more")

    if what == "wrong bytes":
        monkeypatch.setattr(kvoffload.benching.disk, "same_bytes", lambda *_: False)
    else:
        monkeypatch.setattr(kvoffload.cli.bench, "measure", failing)
    status = 1 if what == "wrong bytes" else 2
    assert main(["bench", "--cold", str(tmp_path), *SMALL]) == status
    line = capsys.readouterr().err.splitlines()[-1]
    told = {"wrong bytes": "other bytes were loaded", "a tier fails": "gone"}
    assert line.startswith("kvoffload: error: ")
    assert told.get(what, "no more") in line
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def failing(*_arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(kvoffload.cli.bench, "measure", failing)
    assert main(["bench", "--cold", str(tmp_path), *SMALL]) == 2
    assert "not enough memory" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
