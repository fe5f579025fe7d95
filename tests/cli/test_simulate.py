"""`kvoffload simulate`: what it prints, for people and for programs, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvoffload.cli import main
from kvoffload.workload import chat_workload, read_trace, simulate


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "chat.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for request in chat_workload(300, seed=5).requests:
            record = {"timestamp": request.timestamp_ms, "hash_ids": list(request.hash_ids)}
            file.write(json.dumps(record) + "\n")
    return path


def results_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, object]]:
    assert main(["simulate", *map(str, arguments), "--json"]) == 0
    output = capsys.readouterr().out
    report = json.loads(output)
    assert output == json.dumps(report) + "\n", "one JSON object and nothing else"
    results = report["results"]
    assert isinstance(results, list)
    return results


def test_each_policy_at_each_size(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Per cent are of the distinct blocks; what is printed is what `simulate` returns."""
    results = results_of(
        capsys, trace, "--policies", "lru,weighted,optimal", "--sizes", "5%,40,100%"
    )
    workload = read_trace(trace)
    distinct = workload.num_distinct_blocks
    capacities = sorted({distinct * 5 // 100, 40, distinct})
    assert [(each["policy"], each["capacity"]) for each in results] == [
        (policy, capacity) for policy in ("lru", "weighted", "optimal") for capacity in capacities
    ]
    for each in results:
        capacity = each["capacity"]
        assert isinstance(capacity, int)
        expected = simulate(workload, str(each["policy"]), capacity)
        assert each["trace"] == "chat"
        assert each["prefix_hit_ratio"] == expected.prefix_hit_ratio
        assert each["block_hit_ratio"] == expected.block_hit_ratio


def test_a_table_for_people(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", str(trace), "--policies", "fifo", "--sizes", "30"]
    assert main([*arguments, "--block-bytes", "1MiB"]) == 0
    output = capsys.readouterr().out
    assert "chat: prefix hits in %" in output
    assert "fifo" in output
    assert "30 MiB" in output


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_picture(trace: Path, tmp_path: Path, suffix: str) -> None:
    picture = tmp_path / f"hits{suffix}"
    arguments = ["--policies", "lru", "--sizes", "20,40", "--plot", str(picture)]
    assert main(["simulate", str(trace), *arguments]) == 0
    start = picture.read_bytes()[:200]
    assert start.startswith(b"\x89PNG") if suffix == ".png" else b"<?xml" in start


def test_advice(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The number it gives does reach the ratio."""
    arguments = ["simulate", str(trace), "--policies", "lru", "--advise"]
    assert main([*arguments, "0.2", "--json"]) == 0
    (advice,) = json.loads(capsys.readouterr().out)["advice"]
    workload = read_trace(trace)
    assert simulate(workload, "lru", advice["capacity"]).prefix_hit_ratio >= 0.2
    assert main([*arguments, "1.0"]) == 0
    assert "never" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "mru"], "unknown policy 'mru': choose from arc"),
        (["--policies", ","], "--policies is empty"),
        (["--sizes", "lots"], "--sizes takes blocks (1000) or per cent (5%), not 'lots'"),
        (["--sizes", "0"], "--sizes takes at least 1 block"),
        (["--sizes", "1.5"], "--sizes takes whole blocks"),
        (["--plot", "hits.pdf"], "ends in .png or .svg"),
        (["--advise", "1.5"], "--advise"),
    ],
)
def test_mistakes(
    trace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    """Told in one line, before any work."""
    assert main(["simulate", str(trace), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out


def test_a_trace_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "nowhere.jsonl"]) == 2
    assert "can't read the trace nowhere.jsonl" in capsys.readouterr().err
