"""Servers that the tests of a module share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .object_servers import Moto, ObjectServer, Seaweed
from .servers import Server


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Server:
    """Return a server that is empty, and may not be stopped."""
    with shared_server.client() as client:
        client.flushall()
    return shared_server


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """Return a server that is the test's own."""
    with Server(tmp_path / "server") as server:
        yield server


@pytest.fixture(scope="session")
def shared_seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    with Seaweed(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@pytest.fixture
def seaweed(shared_seaweed: Seaweed) -> Iterator[Seaweed]:
    """Return a server that may be stopped, and is as it was afterwards; it is not empty."""
    yield shared_seaweed
    shared_seaweed.go_on()


@pytest.fixture(scope="session")
def shared_moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    with Moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture
def moto(shared_moto: ObjectServer) -> Iterator[ObjectServer]:
    """Return a server that may be stopped, and then has forgotten everything."""
    yield shared_moto
    shared_moto.go_on()


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """Return a prefix of the test's own in a bucket."""
    return tmp_path.name
