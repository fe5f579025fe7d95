"""Arguments and mistakes in them, in this process: it is `main` that the command calls."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer

import kvoffload.cli.replay
from kvoffload import MemoryTier, OffloadError
from kvoffload.cli import main
from kvoffload.testing import FaultyTier

SMALL = ("--hot", "64", "--warm", "64", "--block-bytes", "512", "--requests", "20")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"kvoffload {version('kvoffload')}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_the_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "replay" in out
    assert "--version" in out


def test_help_of_replay_explains_lag_status_and_persistence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["replay", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Loop lag: a task sleeps 1 ms" in out
    assert "Exit status: 0 fine; 1 a loaded byte was wrong; 2 a mistake" in out
    assert "stay for the next run" in out
    for option in ("--policy", "--hot", "--warm", "--cold", "--cold-blocks", "--block-bytes"):
        assert option in out
    for option in ("--concurrency", "--speed", "--json", "--uvloop", "--no-uvloop", "--seed"):
        assert option in out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("play", "No such command 'play'"),
        ("replay --hit 5", "No such option"),
        ("replay --hot 0", "--hot"),
        ("replay --hot many", "--hot"),
        ("replay --warm -1", "--warm"),
        ("replay --cold c --cold-blocks 0", "--cold-blocks"),
        ("replay --concurrency 0", "--concurrency"),
        ("replay --requests 0", "--requests"),
        ("replay --speed -1", "--speed"),
        ("replay --speed nan", "speed"),
        ("replay --speed inf", "speed"),
        ("replay --block-bytes 0", "--block-bytes"),
        ("replay --block-bytes -5", "--block-bytes"),
        ("replay --block-bytes 64XB", "--block-bytes must be a size"),
        ("replay --block-bytes 2GiB", "--block-bytes must be from 1 byte to 1 GiB"),
        ("replay --hot 99999999999", "of memory, and this machine has"),
        ("replay --cold c --cold-blocks 999999999999", "of memory, and this"),
        (
            "replay --hot 1 --warm 0 --block-bytes 1GiB --cold c --cold-blocks 9999999",
            "in c, and there is room for",
        ),
        ("replay --policy random", "random"),
        ("replay no/such/trace", "can't read the trace no/such/trace"),
        ("replay .", "can't read the trace .: Is a directory"),
        ("replay one two", "two"),
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
    assert main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("kvoffload: error: ")
    assert complaint in line
    assert list(tmp_path.iterdir()) == []


def test_an_unusable_cold_directory_is_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("not a directory")
    for cold in (file, file / "below"):
        assert main(["replay", "--cold", str(cold), *SMALL]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("kvoffload: error: ")
        assert str(file) in captured.err
        assert captured.err.count("\n") == 1


def test_a_cold_directory_of_other_blocks_is_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cold = ["--cold", str(tmp_path / "cold"), "--cold-blocks", "64"]
    assert main(["replay", *cold, *SMALL]) == 0
    assert "stay there for the next run" in capsys.readouterr().err
    assert main(["replay", *cold, *SMALL, "--block-bytes", "1024"]) == 2
    captured = capsys.readouterr()
    assert "512" in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("65536", 65_536),
        ("1", 1),
        ("100B", 100),
        ("64KiB", 65_536),
        ("64k", 65_536),
        (" 2 MiB ", 2_097_152),
        ("1MB", 1_000_000),
        ("1G", 1 << 30),
    ],
)
def test_sizes_may_have_units(text: str, size: int) -> None:
    assert kvoffload.cli.replay.parse_size(text) == size


def test_a_trace_is_replayed_in_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "mine.jsonl"
    trace.write_text("".join(f'{{"timestamp": {i}, "hash_ids": [0, {i + 1}]}}\n' for i in range(9)))
    assert main(["replay", str(trace), "--json", "--concurrency", "1", *SMALL[:-1], "5"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["workload"], report["requests"], report["blocks"]) == ("mine", 5, 10)
    assert report["prefix_hit_ratio"] == 0.4


def test_no_warm_tier(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--json", *SMALL, "--warm", "0"]) == 0
    assert list(json.loads(capsys.readouterr().out)["tiers"]) == ["hot"]


def test_cold_blocks_without_a_cold_tier_are_remarked_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["replay", "--json", *SMALL, "--cold-blocks", "9"]) == 0
    assert "note: --cold-blocks means nothing without --cold\n" in capsys.readouterr().err


def damaged_memory(num_blocks: int, block_bytes: int, *, name: str) -> FaultyTier:
    """Return a tier that gets one byte of everything wrong and doesn't notice."""
    tier = FaultyTier(MemoryTier(num_blocks, block_bytes, name=name))
    tier.flip_byte("write", offset=77, silent=True, times=None)
    return tier


@pytest.mark.parametrize("form", ["tables", "json"])
def test_wrong_bytes_are_status_1(
    form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kvoffload.cli.replay, "MemoryTier", damaged_memory)
    options = ["--json"] if form == "json" else []
    assert main(["replay", *SMALL, "--warm", "0", *options]) == 1
    captured = capsys.readouterr()
    assert captured.err.endswith("loaded bytes were not what was stored\n")
    if form == "json":
        report = json.loads(captured.out)
        assert report["wrong_bytes"] == report["verified_bytes"] / 512 > 0
    else:
        assert "not all is as stored" in captured.out


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, typer.Abort])
def test_an_interrupt_is_status_130(
    interrupt: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Some versions of typer turn an interrupt into their own exception."""

    async def interrupted(*_arguments: object, **_options: object) -> None:
        raise interrupt

    monkeypatch.setattr(kvoffload.cli.replay, "drive", interrupted)
    assert main(["replay", *SMALL]) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[1:] in ([], ["interrupted after 0 of 20 requests"])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OffloadError("the tier\nis gone"), "the tier is gone"),
        (ExceptionGroup("both", [OffloadError("one"), OffloadError("two")]), "one"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "/x: No space left on device"),
        (OSError("out of luck"), "out of luck"),
    ],
    ids=repr,
)
def test_a_failure_during_the_replay_is_one_line(
    error: Exception,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def failing(*_arguments: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(kvoffload.cli.replay, "drive", failing)
    assert main(["replay", *SMALL]) == 2
    assert capsys.readouterr().err.splitlines()[1:] == [f"kvoffload: error: {line}"]


def test_a_defect_among_failures_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    async def failing(*_arguments: object, **_options: object) -> None:
        raise ExceptionGroup("both", [OffloadError("one"), ZeroDivisionError("a defect")])

    monkeypatch.setattr(kvoffload.cli.replay, "drive", failing)
    with pytest.raises(ExceptionGroup):
        main(["replay", *SMALL])


def test_without_uvloop_the_way_out_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert main(["replay", *SMALL]) == 2
    assert "uvloop is not installed; use --no-uvloop" in capsys.readouterr().err
    assert main(["replay", *SMALL, "--no-uvloop"]) == 0


def test_without_knowing_the_room_it_is_not_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_arguments: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sysconf", unknown)
    monkeypatch.setattr(shutil, "disk_usage", unknown)
    assert main(["replay", "--cold", str(tmp_path / "cold"), "--cold-blocks", "8", *SMALL]) == 0


def test_what_a_cold_directory_has_already_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    cold = tmp_path / "cold"
    options = ["replay", "--cold", str(cold), "--cold-blocks", "8", *SMALL]
    assert main(options) == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    assert main(options) == 0
    capsys.readouterr()
    assert main([*options, "--cold-blocks", "9999"]) == 2
    assert f"in {cold}, and there is room for" in capsys.readouterr().err


def test_an_error_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: object, **_options: object) -> MemoryTier:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(kvoffload.cli.replay, "MemoryTier", broken)
    with pytest.raises(ZeroDivisionError):
        main(["replay", *SMALL])


def test_too_little_memory_is_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_arguments: object, **_options: object) -> MemoryTier:
        raise MemoryError

    monkeypatch.setattr(kvoffload.cli.replay, "MemoryTier", broken)
    assert main(["replay", *SMALL]) == 2
    assert "not enough memory" in capsys.readouterr().err
