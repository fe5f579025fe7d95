"""A directory can be looked at from outside, told good from bad, and mended."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvoffload import ConfigError, DiskTier, TierLockedError
from kvoffload.keys import encode_key
from kvoffload.storage import format as fmt
from kvoffload.storage.inspection import Inspection, Inspector
from kvoffload.testing import payload_for

BLOCK = 4096
KEY = bytes(range(32))
NAMES = [b"one", b"two", b"three", b"four"]


async def fill(path: Path, key: bytes | None = None) -> None:
    tier = DiskTier(path, 8, BLOCK, encryption_key=key)
    await tier.open()
    payloads = [memoryview(payload_for(name, BLOCK - at)) for at, name in enumerate(NAMES)]
    keys = [encode_key(name, "tenant" if at else "") for at, name in enumerate(NAMES)]
    assert await tier.write(range(len(NAMES)), payloads, keys) == [None] * len(NAMES)
    await tier.close([3, 1, 0, 2])


def look(path: Path, key: bytes | None = None) -> Inspection:
    inspector = Inspector(path, key=key)
    try:
        return inspector.look()
    finally:
        inspector.close()


def bad_slots(path: Path, key: bytes | None = None) -> list[int]:
    inspector = Inspector(path, key=key)
    try:
        return [one.slot for one in inspector.verify()]
    finally:
        inspector.close()


def repair(path: Path, *, verify: bool, key: bytes | None = None) -> int:
    inspector = Inspector(path, key=key)
    try:
        return inspector.repair(verify=verify)
    finally:
        inspector.close()


def snapshot(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x20
    path.write_bytes(data)


def test_it_tells_what_is_there(tmp_path: Path) -> None:
    asyncio.run(fill(tmp_path))
    (tmp_path / "notes.txt").touch()
    found = look(tmp_path)
    assert (found.blocks, found.num_blocks, found.block_bytes) == (4, 8, BLOCK)
    assert found.payload_bytes == 4 * BLOCK - 6
    assert found.clean
    assert not found.is_damaged
    assert found.namespaces == {"": 1, "tenant": 3}
    assert found.foreign == ("notes.txt",)
    assert found.in_use_by is None
    inspector = Inspector(tmp_path)
    listed = list(inspector.blocks())
    inspector.close()
    assert [block.block_hash for block in listed] == [b"four", b"two", b"one", b"three"]
    assert bad_slots(tmp_path) == []


async def test_a_directory_in_use_can_be_seen_and_not_repaired(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 8, BLOCK)
    await tier.open()
    found = await asyncio.to_thread(look, tmp_path)
    assert found.in_use_by is not None
    assert int(found.in_use_by) > 1
    with pytest.raises(TierLockedError, match=found.in_use_by):
        await asyncio.to_thread(repair, tmp_path, verify=False)
    await tier.write([0], [memoryview(b"still alive")], [b"k"])
    await tier.close()


def test_an_encrypted_directory_without_its_key(tmp_path: Path) -> None:
    """Counted and checked as it lies there, for whoever keeps the disks has no key."""
    asyncio.run(fill(tmp_path, KEY))
    found = look(tmp_path)
    assert found.encrypted
    assert found.blocks == 4
    assert found.namespaces == {}
    assert bad_slots(tmp_path) == []
    assert look(tmp_path, KEY).namespaces == {"": 1, "tenant": 3}
    assert bad_slots(tmp_path, KEY) == []
    flip(tmp_path / "slab-000000", BLOCK + 7)
    assert bad_slots(tmp_path) == bad_slots(tmp_path, KEY) == [1]
    with pytest.raises(ConfigError, match="encryption_key"):
        repair(tmp_path, verify=True)
    with pytest.raises(ConfigError, match="another encryption_key"):
        look(tmp_path, bytes(32))
    assert repair(tmp_path, verify=True, key=KEY) == 3


def test_a_repair_drops_what_is_bad_and_keeps_the_order_of_use(tmp_path: Path) -> None:
    path = tmp_path / "cold"
    asyncio.run(fill(path))
    flip(path / "slab-000000", BLOCK + 7)  # the payload of "two"
    flip(path / "records", 2 * 512 + 100)  # the record of "three"
    (path / "header-1").unlink()
    assert look(path).is_damaged
    assert bad_slots(path) == [1]
    assert repair(path, verify=True) == 2
    again = look(path)
    assert not again.is_damaged
    assert again.clean
    asyncio.run(check_all(path, 8, None, [3, 0]))


@pytest.mark.parametrize("what", ["nothing", "a file", "an empty directory", "another version"])
def test_what_is_no_cold_tier_of_ours_is_named(tmp_path: Path, what: str) -> None:
    path = tmp_path / "cold"
    if what == "a file":
        path.touch()
    elif what == "an empty directory":
        path.mkdir()
    elif what == "another version":
        asyncio.run(fill(path))
        header = fmt.pack_header(fmt.Header(BLOCK, 8, generation=99, version=77))
        (path / "header-0").write_bytes(header)
    with pytest.raises(ConfigError, match=str(path)):
        look(path)


@pytest.fixture(scope="module")
def originals() -> Iterator[dict[bool, Path]]:
    with tempfile.TemporaryDirectory() as place:
        paths = {sealed: Path(place) / str(sealed) for sealed in (False, True)}
        for sealed, path in paths.items():
            asyncio.run(fill(path, KEY if sealed else None))
        yield paths


@settings(max_examples=60, deadline=None)
@given(data=st.data(), sealed=st.booleans())
def test_any_damage_is_told_and_mended(
    originals: dict[bool, Path], data: st.DataObject, sealed: bool
) -> None:
    """Looking changes nothing and never breaks; after a repair every block that is there is right.

    The damage is any bytes in any file, files cut short, and files that are gone.
    """
    key = KEY if sealed else None
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "cold"
        shutil.copytree(originals[sealed], path)
        for file in sorted(path.iterdir()):
            kind = data.draw(st.sampled_from(["good", "good", "flip", "cut", "gone", "rubbish"]))
            content = file.read_bytes()
            if kind == "flip" and content:
                flip(file, data.draw(st.integers(0, min(len(content), 4 * 512) - 1)))
            elif kind == "cut":
                file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
            elif kind == "rubbish":
                file.write_bytes(data.draw(st.binary(max_size=1200)))
            elif kind == "gone":
                file.unlink()
        before = snapshot(path)
        try:
            inspector = Inspector(path, key=key)
        except ConfigError:
            assert snapshot(path) == before
            return
        try:
            inspector.look()
            inspector.verify()
            list(inspector.blocks())
            assert snapshot(path) == before
            left = inspector.repair(verify=True)
            mended = inspector.look()
            assert not mended.is_damaged
            assert mended.blocks == left
            slots = [block.slot for block in inspector.blocks()]
            assert inspector.verify() == []
        finally:
            inspector.close()
        asyncio.run(check_all(path, mended.num_blocks, key, slots))


async def check_all(path: Path, num_blocks: int, key: bytes | None, slots: list[int]) -> None:
    tier = DiskTier(path, num_blocks, BLOCK, encryption_key=key)
    found = await tier.open()
    assert tier.recovery is not None
    assert tier.recovery.clean
    assert [block.slot for block in found] == slots
    stored = {encode_key(name, "tenant" if at else ""): name for at, name in enumerate(NAMES)}
    for block in found:
        buffer = bytearray(block.size)
        assert await tier.read([block.slot], [memoryview(buffer)]) == [None]
        assert bytes(buffer) == payload_for(stored[block.key], block.size)
    await tier.close()
