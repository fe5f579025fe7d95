"""`kvoffload inspect` as a process of its own: exit status, standard output, standard error."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvoffload import AsyncLRUManager, DiskTier, MemoryTier
from kvoffload.testing import payload_for

BLOCK = 4096
KEY = bytes(range(32))


async def _fill(path: Path, key: bytes | None) -> None:
    cold = DiskTier(path, 8, BLOCK, encryption_key=key)
    async with AsyncLRUManager(hot=MemoryTier(1, BLOCK), cold=cold) as manager:
        for number in range(4):
            await manager.store([number], [payload_for(number, BLOCK)])
        await manager.namespace("[tenant]").store(["x"], [payload_for("x", BLOCK)])


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    path = tmp_path / "cold"
    asyncio.run(_fill(path, None))
    return path


def inspect(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvoffload.cli", "inspect", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_good_directory(cold: Path) -> None:
    result = inspect(cold, "--verify", "--blocks")
    assert result.returncode == 0, result.stderr
    assert "closed in good order" in result.stdout
    assert "verified: 5 blocks, 0 of them bad" in result.stdout
    assert "[tenant]" in result.stdout
    assert result.stderr == ""


def test_json_is_one_object(cold: Path) -> None:
    result = inspect(cold, "--json", "--blocks", "--verify")
    found = json.loads(result.stdout)
    assert (found["blocks"], found["damaged_payloads"], found["clean"]) == (5, [], True)
    assert {block["block_hash"] for block in found["block_list"]} == {0, 1, 2, 3, "x"}


def test_damage_is_one_and_after_a_repair_all_is_well(cold: Path) -> None:
    slab = bytearray((cold / "slab-000000").read_bytes())
    slab[100] ^= 1
    (cold / "slab-000000").write_bytes(slab)
    assert inspect(cold).returncode == 0, "payloads were read without --verify"
    result = inspect(cold, "--verify")
    assert result.returncode == 1
    assert "block in slot 0: does not match its checksum" in result.stdout
    result = inspect(cold, "--verify", "--repair")
    assert result.returncode == 0
    assert "repaired: 4 blocks are there now" in result.stdout
    assert inspect(cold, "--verify").returncode == 0


@pytest.mark.parametrize("text", [KEY, KEY.hex().encode() + b"\n"])
def test_the_key_comes_from_a_file(tmp_path: Path, text: bytes) -> None:
    asyncio.run(_fill(tmp_path / "cold", KEY))
    (tmp_path / "key").write_bytes(text)
    result = inspect(tmp_path / "cold", "--verify", "--key-file", tmp_path / "key")
    assert result.returncode == 0, result.stderr
    assert "[tenant]" in result.stdout
    assert "encrypted: give --key-file" in inspect(tmp_path / "cold").stdout


@pytest.mark.parametrize("what", ["nowhere", "no tier", "bad key"])
def test_mistakes_are_one_line_and_two(tmp_path: Path, cold: Path, what: str) -> None:
    (tmp_path / "key").write_bytes(b"short")
    arguments: dict[str, list[object]] = {
        "nowhere": [tmp_path / "nowhere"],
        "no tier": [tmp_path],
        "bad key": [cold, "--key-file", tmp_path / "key"],
    }
    result = inspect(*arguments[what])
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("kvoffload: error: ")
    assert result.stderr.count("\n") == 1
