"""`MooncakeTier` on a real store: what every remote tier does, and what is its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvoffload import MooncakeTier
from kvoffload.testing import RemoteTierContract

from .mooncake_servers import MooncakeStore, needs_mooncake

pytestmark = needs_mooncake


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MooncakeStore]:
    with MooncakeStore(tmp_path_factory.mktemp("mooncake")) as store:
        yield store


class Emptied:
    @pytest.fixture(autouse=True)
    def engine(self, shared_store: MooncakeStore) -> None:
        shared_store.flush()
        self.store = shared_store


class TestMooncakeTier(Emptied, RemoteTierContract):
    def make_tier(self, tmp_path: Path, *, layout: str = "") -> MooncakeTier:
        return MooncakeTier(self.store.url, layout=layout)


class TestMooncakeTierThroughSharedMemory(Emptied, RemoteTierContract):
    def make_tier(self, tmp_path: Path, *, layout: str = "") -> MooncakeTier:
        return MooncakeTier(self.store.shared_memory_url, layout=layout)
