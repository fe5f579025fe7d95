"""One server for all tests of the client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from tests.client.hosting import Host, hosting


@pytest.fixture(scope="session")
def host() -> Iterator[Host]:
    # pytest's own directories have names that are too long for a socket.
    with TemporaryDirectory(prefix="kvo") as directory, hosting(Path(directory)) as running:
        yield running


@pytest.fixture
def socket_path() -> Iterator[Path]:
    with TemporaryDirectory(prefix="kvo") as directory:
        yield Path(directory) / "service.sock"
