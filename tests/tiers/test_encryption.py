"""With a key, the directory tells nothing but sizes, and what was tampered with is a miss."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash

from kvoffload import AsyncLRUManager, ConfigError, CorruptBlockError, DiskTier, MemoryTier
from kvoffload.storage import format as fmt
from kvoffload.testing import payload_for

KEY = bytes(range(32))
BLOCK = 4096


def make(
    path: Path, key: bytes | None = KEY, num_blocks: int = 8, *, direct_io: str = "auto"
) -> DiskTier:
    return DiskTier(path, num_blocks, BLOCK, encryption_key=key, direct_io=direct_io)


async def fill(path: Path, *names: bytes, key: bytes | None = KEY) -> None:
    tier = make(path, key)
    await tier.open()
    payloads = [memoryview(payload_for(name, BLOCK)) for name in names]
    assert await tier.write(range(len(names)), payloads, names) == [None] * len(names)
    await tier.close()


async def contents(tier: DiskTier) -> dict[bytes, bytes | None]:
    """Open, read every block that is there (`None`: it does not check), and close."""
    found: dict[bytes, bytes | None] = {}
    for block in await tier.open():
        buffer = bytearray(block.size)
        (outcome,) = await tier.read([block.slot], [memoryview(buffer)])
        assert outcome is None or isinstance(outcome, CorruptBlockError)
        if outcome is not None:
            assert bytes(buffer) == bytes(block.size), "bytes that nobody vouches for were left"
        found[block.key] = bytes(buffer) if outcome is None else None
    await tier.close()
    return found


def snapshot(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != "lock"}


@pytest.mark.parametrize("direct_io", ["auto", "off"])
async def test_blocks_come_back_after_a_restart(tmp_path: Path, direct_io: str) -> None:
    await fill(tmp_path, b"one", b"two")
    assert await contents(make(tmp_path, direct_io=direct_io)) == {
        b"one": payload_for(b"one", BLOCK),
        b"two": payload_for(b"two", BLOCK),
    }


async def test_nothing_readable_is_on_the_disk(tmp_path: Path) -> None:
    """Neither tokens' KV nor hashes nor the tenant's name, in no file."""
    cold = DiskTier(tmp_path / "cold", 8, BLOCK, encryption_key=KEY)
    async with AsyncLRUManager(
        hot=MemoryTier(1, BLOCK), cold=cold, namespace="a-tenant-of-ours"
    ) as manager:
        for name in ("first-hash", "second-hash"):
            await manager.store([name], [payload_for(name, BLOCK)])
    everything = b"".join(snapshot(tmp_path / "cold").values())
    for secret in (b"first-hash", b"second-hash", b"a-tenant-of-ours", KEY):
        assert secret not in everything
    for name in ("first-hash", "second-hash"):
        assert payload_for(name, BLOCK)[:16] not in everything
        fingerprint = xxhash.xxh3_64_intdigest(payload_for(name, BLOCK)).to_bytes(8, "little")
        assert fingerprint not in everything
    assert KEY.hex() not in repr(vars(cold))
    assert repr(KEY)[2:-1] not in repr(vars(cold))


@pytest.mark.parametrize(
    ("made_with", "opened_with", "advice"),
    [
        (KEY, None, "is encrypted: give the encryption_key"),
        (KEY, bytes(32), "another encryption_key"),
        (None, KEY, "without encryption_key"),
    ],
)
@pytest.mark.parametrize("headers", ["there", "lost"])
async def test_a_key_that_does_not_fit_is_refused_and_changes_nothing(
    tmp_path: Path, made_with: bytes | None, opened_with: bytes | None, advice: str, headers: str
) -> None:
    """A typo in a secret store must not cost the cache, with a damaged header neither."""
    path = tmp_path / "cold"
    await fill(path, b"one", key=made_with)
    if headers == "lost":
        (path / "header-0").unlink()
        (path / "header-1").write_bytes(bytes(512))
        advice = "encryption_key"
    before = snapshot(path)
    with pytest.raises(ConfigError, match=advice) as caught:
        await make(path, opened_with).open()
    assert str(path) in str(caught.value)
    assert snapshot(path) == before
    assert await contents(make(path, made_with)) == {b"one": payload_for(b"one", BLOCK)}


@pytest.mark.parametrize("key", [b"short", bytes(33), "x" * 32, 7])
def test_a_key_of_another_size_is_refused_at_once(tmp_path: Path, key: object) -> None:
    with pytest.raises(ConfigError, match="encryption key must be 32 bytes"):
        make(tmp_path / "cold", key)  # type: ignore[arg-type]  # the point
    assert not (tmp_path / "cold").exists()


def sealed_again(sector: bytes) -> bytes:
    """Give a record that was changed a good checksum, as somebody who knows the format would."""
    return sector[:504] + fmt.checksum(sector[:504]).to_bytes(8, "little")


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


@pytest.mark.parametrize("at", [*range(24, 32), 48, 64, 200, 335, 336, 351, 352, 367])
async def test_a_forged_record_is_a_miss(tmp_path: Path, at: int) -> None:
    """Sequence, checksum, sealed key, salt, tag: each is vouched for, and the others go on."""
    path = tmp_path / "cold"
    await fill(path, b"one", b"two")
    records = (path / "records").read_bytes()
    (path / "records").write_bytes(sealed_again(flip(records[:512], at)) + records[512:])
    tier = make(path)
    found = await contents(tier)
    assert found.get(b"one") is None
    assert found[b"two"] == payload_for(b"two", BLOCK)


async def test_a_forged_payload_is_a_miss(tmp_path: Path) -> None:
    """Also with the checksum that belongs to it."""
    path = tmp_path / "cold"
    await fill(path, b"one", b"two")
    slab = flip((path / "slab-000000").read_bytes(), 100)
    (path / "slab-000000").write_bytes(slab)
    assert await contents(make(path)) == {b"one": None, b"two": payload_for(b"two", BLOCK)}


async def test_payloads_can_not_change_places(tmp_path: Path) -> None:
    """Somebody who can write to the directory could else hand one user's KV to another."""
    path = tmp_path / "cold"
    await fill(path, b"one", b"two")
    slab = (path / "slab-000000").read_bytes()
    (path / "slab-000000").write_bytes(slab[BLOCK : 2 * BLOCK] + slab[:BLOCK] + slab[2 * BLOCK :])
    assert await contents(make(path)) == {b"one": None, b"two": None}


async def test_a_block_that_is_not_encrypted_is_none_of_ours(tmp_path: Path) -> None:
    """Planted by somebody who has no key, with a right checksum."""
    await fill(tmp_path / "cold", b"one")
    await fill(tmp_path / "plain", b"evil", b"evil too", key=None)
    records = (tmp_path / "cold" / "records").read_bytes()
    planted = (tmp_path / "plain" / "records").read_bytes()[512:1024]
    (tmp_path / "cold" / "records").write_bytes(records[:512] + planted + records[1024:])
    tier = make(tmp_path / "cold")
    assert await contents(tier) == {b"one": payload_for(b"one", BLOCK)}
    assert tier.recovery is not None
    assert tier.recovery.damaged == 1


async def test_every_opening_has_a_salt_of_its_own(tmp_path: Path) -> None:
    """A copy of the directory goes on with the numbers of the original: nonces must not repeat."""
    await fill(tmp_path / "a", b"one")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    seen: set[tuple[bytes, int]] = set()
    for path in (tmp_path / "a", tmp_path / "b", tmp_path / "a"):
        tier = make(path)
        await tier.open()
        await tier.write([1], [memoryview(payload_for(b"two", BLOCK))], [b"two"])
        await tier.close()
        record = fmt.parse_record((path / "records").read_bytes()[512:1024], 1)
        assert record is not None
        assert record.seal is not None
        seen.add((record.seal.salt, record.sequence))
    assert len({salt for salt, _ in seen}) == 3


async def test_fewer_slots_move_sealed_blocks(tmp_path: Path) -> None:
    """A block that is copied to a lower slot is still what its record says."""
    names = [b"k%d" % n for n in range(8)]
    await fill(tmp_path, *names)
    assert await contents(make(tmp_path, num_blocks=3)) == {
        name: payload_for(name, BLOCK) for name in names[5:]
    }
    assert set(await contents(make(tmp_path, num_blocks=3))) == set(names[5:])


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: flip(data, 60)])
async def test_a_lost_header_is_made_anew(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "cold"
    await fill(path, b"one")
    for copy in (path / "header-0", path / "header-1"):
        copy.write_bytes(damage(copy.read_bytes()))
    tier = make(path)
    assert await contents(tier) == {b"one": payload_for(b"one", BLOCK)}
    assert tier.recovery is not None
    assert tier.recovery.header_rebuilt
    assert await contents(make(path)) == {b"one": payload_for(b"one", BLOCK)}
    with pytest.raises(ConfigError, match="another encryption_key"):
        await make(path, bytes(32)).open()


async def test_the_key_check_outlives_what_is_written(tmp_path: Path) -> None:
    """An empty directory too belongs to its key."""
    await fill(tmp_path)
    with pytest.raises(ConfigError, match="another encryption_key"):
        await make(tmp_path, bytes(32)).open()
    header = fmt.parse_header((tmp_path / "header-0").read_bytes())
    assert header is not None
    assert fmt.parse_header(fmt.pack_header(replace(header, clean=False))) is not None
