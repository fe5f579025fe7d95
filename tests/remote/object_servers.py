"""Real servers that speak S3, for tests: SeaweedFS, and moto, which is another's idea of it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import boto3  # type: ignore[import-untyped]  # it has no types
import botocore.config  # type: ignore[import-untyped]  # as above
import botocore.exceptions  # type: ignore[import-untyped]  # as above

from kvoffload import ObjectStoreTier

from .servers import free_port, make_certificates

KEY, SECRET = "test-key", "s3cret"
BUCKET = "blocks"


class ObjectServer:
    """One server process; `kill` and `start` again as a test likes, it keeps its objects."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def options(self) -> dict[str, str]:
        """What the tier has to be told to find it."""
        return {
            "endpoint": f"http://127.0.0.1:{self.port}",
            "region": "us-east-1",
            "access_key_id": KEY,
            "secret_access_key": SECRET,
        }

    def tier(self, prefix: str, **settings: Any) -> ObjectStoreTier:
        """Return a tier on it that is not open."""
        return ObjectStoreTier(f"s3://{BUCKET}/{prefix}", **{"options": self.options, **settings})

    @contextmanager
    def client(self) -> Iterator[Any]:
        """Have another's client, to see and meddle with what the server has."""
        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.port}",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
            config=botocore.config.Config(retries={"total_max_attempts": 1}),
        )
        try:
            yield client
        finally:
            client.close()

    def names(self, prefix: str) -> list[str]:
        """Return the names of all objects under a prefix of the tier's."""
        with self.client() as client:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
            return [each["Key"] for page in pages for each in page.get("Contents", ())]

    def start(self) -> None:
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command(), stdout=log, stderr=log)
        self._until(self._serves)

    def kill(self) -> None:
        """End it at once; asked to end, SeaweedFS takes its time."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Make it serve, paused or killed as it may be."""
        if self._process is None:
            self.start()
        else:
            self._process.send_signal(signal.SIGCONT)

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _serves(self) -> bool:
        """Tell whether it takes an object."""
        with self.client() as client:
            try:
                client.put_object(Bucket=BUCKET, Key="probe", Body=bytes(100_000))
            except client.exceptions.NoSuchBucket:
                client.create_bucket(Bucket=BUCKET)
                return False
            except botocore.exceptions.ClientError:
                return False
        return True

    def _until(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                # Cheaper to ask than its S3.
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                if what():
                    return
            except (OSError, botocore.exceptions.BotoCoreError):
                assert self._process is not None
                assert self._process.poll() is None, (self.directory / "log").read_text()[-4000:]
            assert time.monotonic() < deadline, (self.directory / "log").read_text()[-4000:]
            time.sleep(0.05)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()


class Seaweed(ObjectServer):
    """SeaweedFS, all of it in one process.

    Args:
        volumes: Volumes of `volume_megabytes` that it may have.
    """

    def __init__(self, directory: Path, *, volumes: int = 40, volume_megabytes: int = 1000) -> None:
        super().__init__(directory)
        self._volumes = volumes
        self._volume_megabytes = volume_megabytes
        self._ports = [free_port() for _ in range(7)]
        self.tls_port = free_port()
        make_certificates(directory)
        identity = {
            "name": "test",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin"],
        }
        (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))

    def _command(self) -> list[str]:
        master, master_grpc, volume, volume_grpc, filer, filer_grpc, s3_grpc = self._ports
        settings = {
            "dir": self.directory,
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "master.telemetry": "false",
            "master.electionTimeout": "1s",  # or it takes 15 s to start again
            "master.port": master,
            "master.port.grpc": master_grpc,
            "master.volumeSizeLimitMB": self._volume_megabytes,
            "volume.port": volume,
            "volume.port.grpc": volume_grpc,
            "volume.max": self._volumes,
            "filer.port": filer,
            "filer.port.grpc": filer_grpc,
            "filer.localSocket": self.directory / "filer.sock",
            "s3": "true",
            "s3.port": self.port,
            "s3.port.grpc": s3_grpc,
            "s3.port.https": self.tls_port,
            "s3.cert.file": self.directory / "cert.pem",
            "s3.key.file": self.directory / "key.pem",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.config": self.directory / "s3.json",
            "s3.localSocket": self.directory / "s3.sock",
            "s3.autoCreateBucket": "false",
        }
        binary = Path(sysconfig.get_path("scripts")) / "weed"
        return [
            str(binary),
            "-logtostderr=true",
            "server",
            *(f"-{name}={value}" for name, value in settings.items()),
        ]


class Moto(ObjectServer):
    """What many test against AWS with; in memory, and lets everybody in."""

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
