"""A Mooncake store for tests: its master and its storage nodes, on loopback ports."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from kvoffload.remote.mooncake_client import connect, parse_url

from .servers import free_port

LEASE_MS = 100
"""Milliseconds that a value which was asked for is not evicted."""


def why_not() -> str:
    """Return why there can be no store here; nothing if there can."""
    try:
        importlib.import_module("mooncake.store")
    except ImportError as exc:
        return f"needs mooncake-transfer-engine-non-cuda and libibverbs1: {exc}"
    return ""


needs_mooncake = pytest.mark.skipif(bool(why_not()), reason=why_not())


class Process:
    """One server process; `kill` and `start` again as a test likes."""

    def __init__(self, log: Path, program: str, port: int, *arguments: str) -> None:
        self.port = port
        self._log = log
        package = importlib.import_module("mooncake").__path__[0]
        self._command = [str(Path(package) / program), "--logtostderr", *arguments]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                    return
            except OSError:
                assert self._process.poll() is None, self._log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.01)

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def recover(self) -> None:
        if self._process is None:
            self.start()
        self.go_on()

    def pause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)  # all its threads have stopped

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


class MooncakeStore:
    """A master and nodes that it places values on."""

    def __init__(
        self, directory: Path, *, nodes: Sequence[str] = ("512MB",), arguments: Sequence[str] = ()
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        port, metrics_port = free_port(), free_port()
        self.master = Process(
            directory / "master.log",
            "mooncake_master",
            port,
            *("--rpc_address=127.0.0.1", f"--rpc_port={port}"),
            *("--metrics_host=127.0.0.1", f"--metrics_port={metrics_port}"),
            *(f"--default_kv_lease_ttl={LEASE_MS}", "--client_ttl=1", *arguments),
        )
        self.nodes: list[Process] = []
        for number, size in enumerate(nodes):
            port = free_port()
            self.nodes.append(
                Process(
                    directory / f"node{number}.log",
                    "mooncake_client",
                    port,
                    *("--host=127.0.0.1", f"--port={port}", "--metadata_server=P2PHANDSHAKE"),
                    f"--master_server_address=127.0.0.1:{self.master.port}",
                    f"--global_segment_size={size}",
                )
            )

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.master.port}"

    @property
    def url(self) -> str:
        return f"mooncake://{self.address}"

    @property
    def shared_memory_url(self) -> str:
        return f"mooncake+shm://127.0.0.1:{self.nodes[0].port}"

    @cached_property
    def client(self) -> Any:
        """Another's client, to see and meddle with what the store has."""
        connection, _ = connect(parse_url(f"{self.url}?buffer=16MiB"), "127.0.0.1", 0)
        return connection.store

    def flush(self) -> None:
        """Drop all values."""
        assert self.client.remove_all(True) >= 0

    def recover(self) -> None:
        """Have all processes run again, and no values."""
        for process in (self.master, *self.nodes):
            process.recover()
        deadline = time.monotonic() + 20
        while not self.takes_values():
            assert time.monotonic() < deadline, "no node works"
            time.sleep(0.01)
        self.flush()

    def takes_values(self) -> bool:
        """Whether all nodes work that the master knows; it places values on any of them."""
        codes = [self.client.upsert(f"probe{number}", b"value") for number in range(16)]
        return not any(codes)

    def __enter__(self) -> MooncakeStore:
        self.master.start()
        for node in self.nodes:
            node.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for process in (*self.nodes, self.master):
            process.kill()
