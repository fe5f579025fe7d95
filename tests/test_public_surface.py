"""What users import, and what importing it costs them."""

from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys
import types
from dataclasses import FrozenInstanceError, fields, is_dataclass
from importlib import resources
from pathlib import Path

import pytest

import kvoffload
from kvoffload import (
    AsyncLRUManager,
    LRUEntry,
    LRUManagerFactory,
    LRUOffloadManager,
    ManagerStats,
    MemoryTier,
    OffloadError,
    OffloadingManager,
    PrefetchingLRUManager,
    TieredLRUManager,
    TierStats,
    WeightedLRUManager,
)
from kvoffload.testing import ManualClock

NAMED_FOR = {
    "LRUEntry",
    "LRUOffloadManager",
    "WeightedLRUManager",
    "TieredLRUManager",
    "PrefetchingLRUManager",
    "AsyncLRUManager",
    "LRUManagerFactory",
}


def test_all_is_what_there_is() -> None:
    """A name is either public, in `__all__`, or not there."""
    found = {
        name
        for name, value in vars(kvoffload).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert found == set(kvoffload.__all__)
    assert list(kvoffload.__all__) == sorted(kvoffload.__all__)


def test_the_seven_classes_have_a_module_each() -> None:
    """A stranger finds each by its name."""
    modules = {name: getattr(kvoffload, name).__module__ for name in NAMED_FOR}
    assert len(set(modules.values())) == len(NAMED_FOR)


def test_typed() -> None:
    """Users' type checkers see our types."""
    assert resources.files("kvoffload").joinpath("py.typed").is_file()
    assert importlib.metadata.version("kvoffload")


def test_importing_needs_no_extra() -> None:
    """The core runs in an engine that has neither a web framework nor a terminal."""
    code = (
        "import sys, kvoffload, kvoffload.testing;"
        "extras = {'typer', 'rich', 'fastapi', 'uvicorn', 'pydantic', 'prometheus_client',"
        " 'opentelemetry', 'pytest', 'hypothesis', 'uvloop'};"
        "sys.exit(', '.join(extras & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr.strip()) == (0, "")


def test_every_error_has_one_base() -> None:
    """One except clause catches all that is ours, and each refines a builtin where one fits."""
    errors = [
        value
        for value in vars(kvoffload).values()
        if inspect.isclass(value) and issubclass(value, Exception) and "Warning" not in str(value)
    ]
    assert len(errors) == 14
    assert all(issubclass(error, OffloadError) for error in errors)
    assert issubclass(kvoffload.BlockNotFoundError, KeyError)
    assert issubclass(kvoffload.LoadTimeoutError, TimeoutError)
    assert issubclass(kvoffload.ConfigError, ValueError)
    assert str(kvoffload.BlockNotFoundError("no 'x'", block_hashes=["x"])) == "no 'x'"


@pytest.mark.parametrize(
    "manager",
    [
        LRUOffloadManager,
        WeightedLRUManager,
        TieredLRUManager,
        PrefetchingLRUManager,
        AsyncLRUManager,
    ],
)
def test_every_manager_has_the_signatures_of_the_contract(manager: type) -> None:
    """Later work adds keyword-only options with defaults, nothing else."""
    for name, method in inspect.getmembers(OffloadingManager, inspect.isfunction):
        if name.startswith("_") and name not in ("__aenter__", "__aexit__"):
            continue
        ours = getattr(manager, name)
        assert inspect.iscoroutinefunction(ours) == inspect.iscoroutinefunction(method), name
        assert list(inspect.signature(ours).parameters.values()) == list(
            inspect.signature(method).parameters.values()
        ), name


def test_stats_are_frozen_snapshots() -> None:
    """A reader can keep one and compare it with the next."""
    stats = ManagerStats()
    assert is_dataclass(stats)
    with pytest.raises(FrozenInstanceError):
        stats.hits = 1  # type: ignore[misc]  # the point of the test
    names = {field.name for field in fields(ManagerStats)}
    assert {"hits", "misses", "evictions", "promotions", "demotions", "rejected", "tiers"} <= names
    assert {"blocks_read", "bytes_written", "errors", "queue_depth"} <= {
        field.name for field in fields(TierStats)
    }


class TestLRUEntry:
    def test_defaults_beyond_the_first_two(self) -> None:
        """A hash and a slot make an entry."""
        clock = ManualClock(5.0)
        entry = LRUEntry("a", 3, clock=clock)
        assert (entry.block_hash, entry.slot) == ("a", 3)
        assert (entry.pin_count, entry.access_count, entry.size_weight) == (0, 0, 1.0)
        assert (entry.state, entry.access_time) == (kvoffload.BlockState.READY, 5.0)

    def test_priority(self) -> None:
        """Uses per second of age, which counts as a second at least, times the weight."""
        clock = ManualClock()
        entry = LRUEntry("a", 0, access_count=6, size_weight=2.0, clock=clock)
        assert entry.priority == 12.0
        clock.advance(0.5)
        assert entry.priority == 12.0
        clock.advance(2.5)
        assert entry.priority == 4.0


class TestFactory:
    async def test_defaults_make_working_managers(self, tmp_path: Path) -> None:
        """Each can be entered, stored to and loaded from as it is."""
        made: list[OffloadingManager] = [
            LRUManagerFactory.create_simple(),
            LRUManagerFactory.create_weighted(),
            LRUManagerFactory.create_tiered(cold_path=str(tmp_path)),
            LRUManagerFactory.create_async(),
        ]
        made.append(LRUManagerFactory.create_prefetching(source=made[0]))
        async with made[0]:
            for manager in made[1:]:
                async with manager:
                    await manager.store(["a"], [b"bytes"])
                    async with manager.load(["a"]) as lease:
                        assert bytes(lease[0]) == b"bytes"

    async def test_numbers_arrive(self, tmp_path: Path) -> None:
        """What was asked for is what the tiers have."""
        tiered = LRUManagerFactory.create_tiered(
            2, 3, 4, 16, block_bytes=8, cold_path=str(tmp_path)
        )
        sizes = {name: tier.capacity_blocks for name, tier in tiered.get_stats().tiers.items()}
        assert sizes == {"hot": 2, "warm": 3, "cold": 4}
        settings = kvoffload.ManagerSettings(
            hot_blocks=5, warm_blocks=6, cold_blocks=7, cold_path=str(tmp_path), block_bytes=8
        )
        front = LRUManagerFactory.create_async(settings)
        sizes = {name: tier.capacity_blocks for name, tier in front.get_stats().tiers.items()}
        assert sizes == {"hot": 5, "warm": 6, "cold": 7}

    def test_a_remote_tier_by_its_url(self) -> None:
        """What is told of it arrives; its password shows nowhere."""
        settings = kvoffload.ManagerSettings(
            remote_url="redis://:secret@127.0.0.1:1", remote_layout="a", remote_queue_bytes=5
        )
        assert "secret" not in repr(settings)
        manager = LRUManagerFactory.create_async(settings)
        told = manager._core.options.remote
        assert told is not None
        assert repr(told.tier) == "<ValkeyTier 'remote': 127.0.0.1:1>"
        assert (told.timeout_s, told.ttl_s, told.queue_bytes, told.admission) == (0.5, 1, 5, "all")
        assert LRUManagerFactory.create_async()._core.options.remote is None

    def test_wrong_numbers(self) -> None:
        """The error names the setting and what is allowed."""
        with pytest.raises(kvoffload.ConfigError, match="num_blocks must be an integer"):
            LRUManagerFactory.create_simple(0)
        with pytest.raises(kvoffload.ConfigError, match="block_tokens must be an integer"):
            LRUManagerFactory.create_simple(10, 0)
        with pytest.raises(kvoffload.ConfigError, match="frequency_weight must be a finite"):
            LRUManagerFactory.create_weighted(10, 16, -1.0)
        with pytest.raises(kvoffload.ConfigError, match="prefetch_lookahead must be an integer"):
            LRUManagerFactory.create_prefetching(
                10, 16, 0, source=LRUManagerFactory.create_simple()
            )
        with pytest.raises(kvoffload.ConfigError, match="cold_blocks and cold_path belong"):
            kvoffload.ManagerSettings(cold_blocks=5)
        with pytest.raises(kvoffload.ConfigError, match="remote_timeout_s must be finite and more"):
            kvoffload.ManagerSettings(remote_timeout_s=0)
        with pytest.raises(kvoffload.ConfigError, match="remote_queue_bytes must be an integer"):
            kvoffload.ManagerSettings(remote_queue_bytes=-1)
        with pytest.raises(kvoffload.ConfigError, match="remote_ttl_s must be finite and at least"):
            kvoffload.ManagerSettings(remote_ttl_s=-1)
        with pytest.raises(kvoffload.ConfigError, match="remote_admission must be 'all', 'likely'"):
            kvoffload.ManagerSettings(remote_admission="some")  # type: ignore[arg-type]  # tested
        with pytest.raises(kvoffload.ConfigError, match="url of a remote tier must be one of"):
            LRUManagerFactory.create_async(kvoffload.ManagerSettings(remote_url="cache"))
        with pytest.raises(kvoffload.ConfigError, match=r"unknown policy 'mru'.*lru.*weighted"):
            LRUManagerFactory.create_async(kvoffload.ManagerSettings(policy="mru"))

    def test_tiers_that_don_t_go_together(self) -> None:
        """Found before anything is opened."""
        hot = MemoryTier(1, 64)
        with pytest.raises(kvoffload.ConfigError, match="different names"):
            TieredLRUManager(hot, MemoryTier(1, 64))
        with pytest.raises(kvoffload.ConfigError, match=r"same block_bytes.*'hot': 64.*'warm': 65"):
            TieredLRUManager(hot, MemoryTier(1, 65, name="warm"))
        with pytest.raises(kvoffload.ConfigError, match="not a tier"):
            LRUOffloadManager("hot")  # type: ignore[arg-type]  # the point of the test
