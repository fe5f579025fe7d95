from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from kvoffload.errors import ConfigError
from kvoffload.workload import TraceRequest, Workload, read_trace

TRACES = Path(__file__).resolve().parents[3] / "shared" / "traces"

GOOD = {"timestamp": 5, "input_length": 600, "output_length": 7, "hash_ids": [1, 2]}


def write(path: Path, *lines: object) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def test_plain_and_gzipped_read_alike_whatever_the_file_is_called(tmp_path: Path) -> None:
    plain = write(tmp_path / "small.jsonl", GOOD, "", {"timestamp": 7.5, "hash_ids": [1, 3]})
    zipped = tmp_path / "small.jsonl.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    unmarked = tmp_path / "small"
    unmarked.write_bytes(zipped.read_bytes())
    expected = Workload("small", [TraceRequest(5, (1, 2), 600, 7), TraceRequest(7.5, (1, 3), 0, 0)])
    assert read_trace(plain) == read_trace(zipped) == read_trace(unmarked) == expected


def test_fields_that_we_do_not_know_are_ignored(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {**GOOD, "session": "x"})
    assert read_trace(path).requests == [TraceRequest(5, (1, 2), 600, 7)]


def test_limit_stops_before_the_next_line(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", GOOD, GOOD, "never looked at")
    assert len(read_trace(path, limit=2).requests) == 2


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not JSON"),
        ("[1, 2]", "a request is a JSON object, not a list"),
        ("null", "not null"),
        ("true", "not true"),
        ("7", "not a number"),
        ('"x"', "not a string"),
        ("[" * 100_000, "nested too deeply"),
        ({"hash_ids": [1]}, "timestamp is missing"),
        ({"timestamp": 1}, "hash_ids is missing"),
        ({**GOOD, "timestamp": "soon"}, "timestamp must be a finite number"),
        ({**GOOD, "timestamp": True}, "timestamp must be a finite number"),
        ({**GOOD, "timestamp": float("nan")}, "timestamp must be a finite number"),
        ({**GOOD, "timestamp": float("inf")}, "timestamp must be a finite number"),
        ({**GOOD, "hash_ids": {"1": 2}}, "hash_ids must be a list of integers, not an object"),
        ({**GOOD, "hash_ids": [1, "2"]}, "hash_ids must be integers, but has '2'"),
        ({**GOOD, "hash_ids": [1, True]}, "hash_ids must be integers, but has True"),
        ({**GOOD, "hash_ids": [1, 2.0]}, "hash_ids must be integers, but has 2.0"),
        ({**GOOD, "input_length": -1}, "whole numbers from 0, not -1"),
        ({**GOOD, "output_length": None}, "whole numbers from 0, not None"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, complaint: str) -> None:
    path = write(tmp_path / "t.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(ConfigError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert complaint in str(caught.value)


def test_bytes_that_are_no_text_are_a_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\xff\xfe{}\n")
    with pytest.raises(ConfigError, match=r"t\.jsonl, line 2: not UTF-8 text"):
        read_trace(path)


def test_a_missing_file_and_a_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"can't read the trace .*gone: No such file"):
        read_trace(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"can't read the trace .*: Is a directory"):
        read_trace(tmp_path)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_trace_without_requests_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match="there is no request"):
        read_trace(path)


def test_damaged_gzip_data_is_reported_with_the_last_good_line(tmp_path: Path) -> None:
    lines = [{**GOOD, "hash_ids": list(range(i, 40 * i + 9))} for i in range(200)]
    data = gzip.compress(write(tmp_path / "t.jsonl", *lines).read_bytes())
    cut, flipped, trailing = (tmp_path / name for name in ("cut.gz", "flipped.gz", "trailing.gz"))
    cut.write_bytes(data[: len(data) // 2])
    flipped.write_bytes(data[:-6] + bytes([data[-6] ^ 1]) + data[-5:])
    trailing.write_bytes(data + b"no gzip")
    for path in (cut, flipped, trailing):
        with pytest.raises(ConfigError, match=rf"{path}: damaged gzip data after line [1-9]"):
            read_trace(path)


def test_equal_ids_have_equal_hashes_within_one_workload_alone() -> None:
    requests = [TraceRequest(0, (1, 2, -3)), TraceRequest(1, (1, 2, 2**70))]
    one, other = Workload("a", requests).chains, Workload("b", requests).chains
    assert one[0][:2] == one[1][:2]
    hashes = [block_hash for chains in (one, other) for chain in chains for block_hash in chain]
    assert len(set(hashes)) == 8
    assert {len(block_hash) for block_hash in hashes} == {32}


def test_hashes_stay_what_they_are_so_that_a_cold_tier_stays_warm() -> None:
    ((block_hash,),) = Workload("conversation", [TraceRequest(0, (46,))]).chains
    assert block_hash.hex() == ("e75e64b802fb9758b984349a154d873d765247d6f05b2b175a71752ffa8b628b")


def test_arrivals_count_from_the_first_request() -> None:
    requests = [TraceRequest(ms, ()) for ms in (1500, 1500, 4000.5)]
    assert Workload("a", requests).arrivals_s == [0.0, 0.0, 2.5005]
    assert Workload("a", []).arrivals_s == []


def test_blocks_are_counted_with_and_without_repetition() -> None:
    workload = Workload("a", [TraceRequest(0, (1, 2)), TraceRequest(0, (1, 3, 4))])
    assert (workload.num_blocks, workload.num_distinct_blocks) == (5, 4)


@pytest.mark.skipif(not TRACES.is_dir(), reason=f"there are no recorded traces in {TRACES}")
def test_a_recorded_trace_reads_in_full() -> None:
    workload = read_trace(TRACES / "conversation_head.jsonl.gz")
    assert workload.name == "conversation_head"
    assert len(workload.requests) == 4812
    assert (workload.num_blocks, workload.num_distinct_blocks) == (125_601, 83_443)
