from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from kvoffload.cli.report import Result, Setup, as_json, as_tables, human_bytes
from kvoffload.workload import Latency, ReplayReport, TierReport, TraceRequest, Workload

SETUP = Setup(
    policy="weighted",
    block_bytes=65_536,
    hot=10_000,
    warm=40_000,
    cold=Path("cold"),
    cold_blocks=9_000_000,
    concurrency=8,
    speed=0.0,
    uvloop=True,
)
TIER = TierReport(
    medium="disk",
    capacity_blocks=9_000_000,
    blocks=4_500_000,
    hits=12_345_678,
    bytes_read=10**12,
    bytes_written=10**12,
    read_gb_per_s=12.3,
    write_gb_per_s=12.3,
    errors=0,
)
REPORT = ReplayReport(
    requests=1_234_567,
    blocks=98_765_432,
    hit_blocks=49_382_716,
    prefix_hit_ratio=0.5,
    seconds=1000.0,
    wrong_bytes=0,
    verified_bytes=10**12,
    failed_loads=0,
    rejected=0,
    evictions=12_345_678,
    promotions=12_345_678,
    demotions=12_345_678,
    io_errors=0,
    loop_lag_p99_ms=1.234,
    loop_lag_max_ms=123.456,
    late_max_s=1.5,
    lookup=Latency(1_234_567, 5.5, 12_345.6),
    load=Latency(0, 0.0, 0.0),
    store=Latency(1_234_567, 5.5, 12_345.6),
    tiers={"hot": replace(TIER, medium="cpu"), "cold": TIER},
)
RESULT = Result(SETUP, Workload("conversation", [TraceRequest(0, (1,))]), REPORT, 0.25)


def text(result: Result) -> list[str]:
    file = io.StringIO()
    console = Console(file=file, width=80)
    for table in as_tables(result):
        console.print(table)
    return [" ".join(line.split()) for line in file.getvalue().splitlines()]


def test_tables_say_what_happened_each_row_on_one_line() -> None:
    lines = text(RESULT)
    assert "Replay of conversation, policy weighted" in lines
    assert "requests 1,234,567 1,235 a second" in lines
    assert "prefix hits 50.0% 49,382,716 blocks found and not computed again" in lines
    assert "wrong bytes 0 931 GiB loaded and checked, all is as stored" in lines
    assert "time 1000.00 s then 0.25 s to close and save on disk" in lines
    assert "cold (disk) 549 GiB 50% 12,345,678 931 GiB 12.30 931 GiB 12.30" in lines
    assert "lookup 1,234,567 6 us 12,346 us" in lines
    assert "load 0 - -" in lines
    assert "loop lag 1.23 ms 123.46 ms" in lines


def test_trouble_is_shown_where_there_is_some() -> None:
    quiet = " ".join(text(RESULT))
    for word in ("rejected", "failed loads", "I/O errors", "late"):
        assert word not in quiet
    trouble = replace(REPORT, rejected=3, failed_loads=4, io_errors=5, wrong_bytes=6)
    lines = text(replace(RESULT, report=trouble, setup=replace(SETUP, speed=2.0, cold=None)))
    assert "rejected 3 blocks that no tier took" in lines
    assert "failed loads 4 requests whose blocks could not be loaded" in lines
    assert "I/O errors 5 blocks that could not be read, written, erased" in lines
    assert "wrong bytes 6 931 GiB loaded and checked, not all is as stored" in lines
    assert "late 1.50 s longest wait for a free worker" in lines
    assert "time 1000.00 s then 0.25 s to close" in lines


def test_json_has_what_the_tables_have() -> None:
    line = as_json(RESULT)
    assert "\n" not in line
    report = json.loads(line)
    assert report["workload"] == "conversation"
    assert report["close_seconds"] == 0.25
    assert report["load_us"] == {"calls": 0, "p50": 0.0, "p99": 0.0}
    assert report["tiers"]["cold"]["bytes_read"] == 10**12


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1000 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (65_536, "64 KiB"),
        (1_500_000, "1.43 MiB"),
        (1020 * 1024**2, "1020 MiB"),
        (3 << 30, "3 GiB"),
        (5 << 40, "5.0 TiB"),
        (5 << 50, "5,120.0 TiB"),
    ],
)
def test_sizes_are_readable(number: int, expected: str) -> None:
    assert human_bytes(number) == expected
