"""Traces of requests: the records, and reading them from JSON lines."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, cast

from ..errors import ConfigError

_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
        timestamp_ms: Arrival, in milliseconds from an origin that the whole trace shares.
        hash_ids: The prompt's blocks, head first; an equal id is an equal block with an equal
            prefix.
        input_length: Tokens of the prompt; 0 where the trace doesn't say.
        output_length: Tokens of the answer; 0 where the trace doesn't say.
    """

    timestamp_ms: float
    hash_ids: tuple[int, ...]
    input_length: int = 0
    output_length: int = 0


@dataclass(frozen=True)
class Workload:
    """Requests to replay.

    Attributes:
        name: Sets the blocks of this workload apart: the same id under another name is another
            block, so workloads that share a cold tier don't hit each other's blocks.
        requests: The requests, in the order in which they start.
    """

    name: str
    requests: Sequence[TraceRequest]

    @cached_property
    def chains(self) -> list[tuple[bytes, ...]]:
        """Block hashes of each request, 32 bytes each: SHA-256 of the name and the id."""
        prefix = hashlib.sha256(b"kvoffload workload\0" + self.name.encode() + b"\0")
        hashes: dict[int, bytes] = {}
        for request in self.requests:
            for hash_id in request.hash_ids:
                if hash_id not in hashes:
                    digest = prefix.copy()
                    digest.update(b"%d" % hash_id)
                    hashes[hash_id] = digest.digest()
        return [tuple(map(hashes.__getitem__, request.hash_ids)) for request in self.requests]

    @property
    def arrivals_s(self) -> list[float]:
        """When each request arrives, in seconds after the first."""
        if not self.requests:
            return []
        origin_ms = self.requests[0].timestamp_ms
        return [(request.timestamp_ms - origin_ms) / 1e3 for request in self.requests]

    @property
    def num_blocks(self) -> int:
        """Blocks of all requests together."""
        return sum(len(request.hash_ids) for request in self.requests)

    @property
    def num_distinct_blocks(self) -> int:
        """Different blocks among them."""
        return len({hash_id for request in self.requests for hash_id in request.hash_ids})


def read_trace(path: Path, *, limit: int | None = None) -> Workload:
    """Read a trace of JSON lines, plain or gzipped; blank lines are skipped.

    Each line is an object with `timestamp` (ms) and `hash_ids` (a list of integers), and maybe
    `input_length` and `output_length` (tokens); other fields are ignored.

    Args:
        path: The file; whether it is gzipped is told from its first bytes.
        limit: Requests to read; all by default.

    Returns:
        The workload, named after the file without its extensions.

    Raises:
        ConfigError: The file can't be read, a line is not a request (the message has its number),
            or there is no request at all.
    """
    requests: list[TraceRequest] = []
    number = 0
    try:
        with _open(path) as file:
            for line in file:
                if limit is not None and len(requests) >= limit:
                    break
                number += 1
                if text := line.strip():
                    requests.append(_parse(text))
    except ValueError as exc:
        raise ConfigError(f"{path}, line {number}: {exc}") from exc
    except (EOFError, gzip.BadGzipFile, zlib.error) as exc:
        raise ConfigError(f"{path}: damaged gzip data after line {number}: {exc}") from exc
    except OSError as exc:
        raise ConfigError(f"can't read the trace {path}: {exc.strerror or exc}") from exc
    if not requests:
        raise ConfigError(f"{path}: there is no request in this trace")
    name = path.name
    for extension in (".gz", ".jsonl", ".json"):
        name = name.removesuffix(extension)
    return Workload(name, requests)


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        gzipped = file.read(2) == _GZIP_MAGIC
    return cast("IO[bytes]", gzip.open(path, "rb")) if gzipped else path.open("rb")


def _parse(line: bytes) -> TraceRequest:
    """Return the request of one line.

    Raises:
        ValueError: Says what is wrong with the line.
    """
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except json.JSONDecodeError as exc:
        raise ValueError(f"not JSON: {exc.msg} at column {exc.colno}") from None
    except RecursionError:
        raise ValueError("not a request: nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"a request is a JSON object, not {_kind(record)}")
    for field in ("timestamp", "hash_ids"):
        if field not in record:
            raise ValueError(f"{field} is missing")
    timestamp = record["timestamp"]
    if type(timestamp) not in (int, float) or not math.isfinite(timestamp):
        raise ValueError(f"timestamp must be a finite number of milliseconds, not {timestamp!r}")
    hash_ids = record["hash_ids"]
    if not isinstance(hash_ids, list):
        raise ValueError(f"hash_ids must be a list of integers, not {_kind(hash_ids)}")
    for wrong in _others(hash_ids):
        raise ValueError(f"hash_ids must be integers, but has {wrong!r}")
    lengths = [record.get(field, 0) for field in ("input_length", "output_length")]
    for length in lengths:
        if type(length) is not int or length < 0:
            raise ValueError(
                f"input_length and output_length must be whole numbers from 0, not {length!r}"
            )
    return TraceRequest(timestamp, tuple(hash_ids), *lengths)


def _others(values: list[object]) -> Iterator[object]:
    # type() and not isinstance(), for JSON's true is an int in Python.
    return (value for value in values if type(value) is not int)


def _kind(value: object) -> str:
    match value:
        case dict():
            return "an object"
        case list():
            return "a list"
        case str():
            return "a string"
        case bool() | None:
            return json.dumps(value)
        case _:
            return "a number"
