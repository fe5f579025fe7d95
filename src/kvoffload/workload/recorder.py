"""The trace of a live manager: what `kvoffload simulate` and `kvoffload replay` read."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self, cast

import anyio

from ..errors import ConfigError
from ..managers.contract import Contract
from ..types import Key

_log = logging.getLogger("kvoffload")

WRITE_EVERY = 1000
"""Requests that are written at a time."""
MAX_WAITING = 100_000
"""Requests that may wait to be written; beyond it they are dropped, and counted."""


class TraceRecorder:
    """Writes each request that an open manager serves to a file, as long as it is entered.

        async with TraceRecorder(kv, "requests.jsonl.gz", block_tokens=16):
            ...

    One JSON object a line: `timestamp` (ms since the start), `input_length` (tokens), and
    `hash_ids`, the chain's blocks as numbers of 53 bits that tell nothing of the hashes. A request
    is what counts as one use: a request scope, a `load`, or a `touch`. Lines are written off the
    loop, in jobs of the manager's, a thousand at a time; on exit, also by cancellation, what waits
    is written. Leave it before the manager.

    Args:
        manager: Whose requests.
        path: A new file; gzipped if its name ends in `.gz`.
        block_tokens: Tokens of a block, for `input_length`.

    Attributes:
        requests: Requests taken down so far.
        dropped: Requests that could not be written, or came faster than they could be.

    Raises:
        ConfigError: On entry, if the file is there already or can't be made.
    """

    def __init__(self, manager: Contract, path: str | Path, *, block_tokens: int = 0) -> None:
        self.requests = 0
        self.dropped = 0
        self._core = manager._core
        self._path = Path(path)
        self._block_tokens = block_tokens
        self._waiting: list[tuple[float, tuple[Key, ...]]] = []
        self._started_s = 0.0
        self._file: IO[bytes] | None = None
        self._writing = anyio.Lock()
        self._scheduled = False

    async def __aenter__(self) -> Self:
        """Make the file and begin."""
        self._core.check()
        try:
            self._file = await asyncio.to_thread(self._open)
        except OSError as exc:
            raise ConfigError(
                f"can't record into {self._path}: {exc.strerror or exc}; name a new file"
            ) from exc
        self._started_s = time.monotonic()
        self._core.index.users.append(self._take_down)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop, and write what waits."""
        self._core.index.users.remove(self._take_down)
        await self._core.jobs.start(lambda _: self._finish()).result()

    def _take_down(self, keys: Sequence[Key]) -> None:
        if len(self._waiting) >= MAX_WAITING:
            self.dropped += 1
            return
        self.requests += 1
        self._waiting.append((time.monotonic(), tuple(keys)))
        if len(self._waiting) >= WRITE_EVERY and not self._scheduled:
            self._scheduled = True
            self._core.jobs.start(lambda _: self._write_waiting())

    async def _write_waiting(self) -> None:
        async with self._writing:
            self._scheduled = False
            waiting = self._take_waiting()
            try:
                await asyncio.to_thread(self._write, waiting)
            except OSError as exc:
                self.dropped += len(waiting)
                _log.warning("%d requests could not be recorded: %s", len(waiting), exc)

    async def _finish(self) -> None:
        await self._write_waiting()
        await asyncio.to_thread(self._close)

    def _take_waiting(self) -> list[tuple[float, tuple[Key, ...]]]:
        waiting, self._waiting = self._waiting, []
        return waiting

    # On a thread

    def _open(self) -> IO[bytes]:
        file = self._path.open("xb")
        if self._path.suffix != ".gz":
            return file
        return cast("IO[bytes]", gzip.GzipFile(fileobj=file, mode="wb"))

    def _write(self, waiting: Sequence[tuple[float, tuple[Key, ...]]]) -> None:
        assert self._file is not None
        for at_s, keys in waiting:
            record = {
                "timestamp": round((at_s - self._started_s) * 1e3, 3),
                "input_length": len(keys) * self._block_tokens,
                "hash_ids": [_number(key) for key in keys],
            }
            self._file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")

    def _close(self) -> None:
        assert self._file is not None
        inner = getattr(self._file, "fileobj", None)
        self._file.close()
        if inner is not None:
            inner.close()


def _number(key: Key) -> int:
    """Return a number for a key, which JSON readers of other languages take too."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 11
