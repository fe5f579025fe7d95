"""What is sealed comes back to who has the key, and nothing else comes back to anybody."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from kvoffload.errors import ConfigError
from kvoffload.storage import cipher as module
from kvoffload.storage.cipher import Cipher

KEY = bytes(range(32))
SEQUENCES = st.integers(0, 2**63 - 1)
ABOUTS = st.binary(max_size=600)
PAYLOADS = st.one_of(
    st.binary(max_size=100),
    st.builds(
        lambda piece, size: (piece * size)[:size], st.binary(min_size=1), st.integers(0, 9999)
    ),
)
KEYS = st.binary(max_size=255)


def seal(cipher: Cipher, sequence: int, about: bytes, plain: bytes) -> tuple[bytes, bytes]:
    into = bytearray(len(plain))
    tag = cipher.seal(sequence, about, memoryview(plain), memoryview(into))
    return bytes(into), tag


def unseal(
    cipher: Cipher, salt: bytes, sequence: int, about: bytes, tag: bytes, sealed: bytes
) -> tuple[bool, bytes]:
    into = bytearray(b"\xaa" * len(sealed))
    good = cipher.open(salt, sequence, about, tag, memoryview(sealed), memoryview(into))
    return good, bytes(into)


def flips(data: bytes) -> Iterator[bytes]:
    """Yield the data with one bit flipped, for each bit."""
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


# Round trips


@given(SEQUENCES, ABOUTS, PAYLOADS)
def test_a_payload_comes_back(sequence: int, about: bytes, plain: bytes) -> None:
    """Also in another session, as after a restart."""
    writer = Cipher(KEY)
    sealed, tag = seal(writer, sequence, about, plain)
    assert (len(sealed), len(tag)) == (len(plain), 16)
    for reader in (writer, Cipher(KEY)):
        assert unseal(reader, writer.salt, sequence, about, tag, sealed) == (True, plain)


@given(SEQUENCES, ABOUTS, PAYLOADS)
def test_in_place_is_the_same(sequence: int, about: bytes, plain: bytes) -> None:
    cipher = Cipher(KEY)
    buffer = bytearray(plain)
    view = memoryview(buffer)
    tag = cipher.seal(sequence, about, view, view)
    assert (bytes(buffer), tag) == seal(cipher, sequence, about, plain)
    assert cipher.open(cipher.salt, sequence, about, tag, view, view)
    assert buffer == plain
    tag = cipher.seal(sequence, about, view, view)
    assert not cipher.open(cipher.salt, sequence + 1, about, tag, view, view)
    assert not any(buffer)


@given(SEQUENCES, ABOUTS, KEYS)
def test_a_key_comes_back(sequence: int, about: bytes, key: bytes) -> None:
    writer = Cipher(KEY)
    sealed = writer.seal_key(sequence, about, key)
    assert len(sealed) == 272  # which tells nothing of its length
    for reader in (writer, Cipher(KEY)):
        assert reader.open_key(writer.salt, sequence, about, sealed) == key


def test_a_payload_of_no_bytes_is_vouched_for_too() -> None:
    """Views of nothing may be read-only, and the library wants a writable buffer."""
    cipher = Cipher(KEY)
    nothing = memoryview(b"")
    tag = cipher.seal(1, b"about", nothing, nothing)
    assert cipher.open(cipher.salt, 1, b"about", tag, nothing, nothing)
    assert not cipher.open(cipher.salt, 2, b"about", tag, nothing, nothing)


def test_a_key_too_long_is_refused_before_it_is_cut() -> None:
    with pytest.raises(ValueError, match="256"):
        Cipher(KEY).seal_key(1, b"", bytes(256))


# Tampering


def test_any_flipped_bit_is_found_and_leaves_no_payload() -> None:
    cipher = Cipher(KEY)
    plain, about, sequence, salt = b"the bytes of a tenant", b"about", 77, cipher.salt
    sealed, tag = seal(cipher, sequence, about, plain)
    refused = (False, bytes(len(plain)))
    for wrong in flips(sealed):
        assert unseal(cipher, salt, sequence, about, tag, wrong) == refused
    for wrong in flips(tag):
        assert unseal(cipher, salt, sequence, about, wrong, sealed) == refused
    for wrong in flips(salt):
        assert unseal(cipher, wrong, sequence, about, tag, sealed) == refused
    for wrong in (*flips(about), about[:-1], about + b"\0", b""):
        assert unseal(cipher, salt, sequence, wrong, tag, sealed) == refused
    for bit in range(64):
        assert unseal(cipher, salt, sequence ^ 1 << bit, about, tag, sealed) == refused


def test_any_flipped_bit_of_a_key_is_found() -> None:
    cipher = Cipher(KEY)
    about, sequence, salt = b"about", 77, cipher.salt
    sealed = cipher.seal_key(sequence, about, b"tenant/hash")
    for wrong in (*flips(sealed), sealed[:-1], sealed[1:], sealed + b"\0", b""):
        assert cipher.open_key(salt, sequence, about, wrong) is None
    for wrong in flips(salt):
        assert cipher.open_key(wrong, sequence, about, sealed) is None
    for wrong in (*flips(about), b""):
        assert cipher.open_key(salt, sequence, wrong, sealed) is None
    for bit in range(64):
        assert cipher.open_key(salt, sequence ^ 1 << bit, about, sealed) is None


@given(st.data(), st.integers(1, 100_000))
def test_one_flipped_bit_of_a_long_payload_is_found(data: st.DataObject, size: int) -> None:
    cipher = Cipher(KEY)
    sealed, tag = seal(cipher, 1, b"", b"\x55" * size)
    bit = data.draw(st.integers(0, 8 * size - 1))
    wrong = bytearray(sealed)
    wrong[bit // 8] ^= 1 << bit % 8
    assert unseal(cipher, cipher.salt, 1, b"", tag, bytes(wrong)) == (False, bytes(size))


@given(st.integers(0, 255))
def test_another_key_opens_nothing(bit: int) -> None:
    ours = Cipher(KEY)
    other_key = bytearray(KEY)
    other_key[bit // 8] ^= 1 << bit % 8
    theirs = Cipher(other_key)
    sealed, tag = seal(ours, 1, b"", b"payload")
    assert unseal(theirs, ours.salt, 1, b"", tag, sealed) == (False, bytes(7))
    assert theirs.open_key(ours.salt, 1, b"", ours.seal_key(1, b"", b"key")) is None


def test_what_is_sealed_as_a_key_opens_as_no_payload() -> None:
    """Both are AES-256-GCM with one key; the nonce tells them apart."""
    cipher = Cipher(KEY)
    sealed = cipher.seal_key(1, b"", b"key")
    assert not unseal(cipher, cipher.salt, 1, b"", sealed[256:], sealed[:256])[0]
    payload, tag = seal(cipher, 1, b"", bytes(256))
    assert cipher.open_key(cipher.salt, 1, b"", payload + tag) is None


# The check of the key


@given(st.integers(0, 255))
def test_the_right_key_checks_and_another_does_not(bit: int) -> None:
    check = Cipher(KEY).new_check()
    assert len(check) == 32
    assert Cipher(KEY).checks(check)
    other_key = bytearray(KEY)
    other_key[bit // 8] ^= 1 << bit % 8
    assert not Cipher(other_key).checks(check)


def test_a_damaged_check_is_no_check() -> None:
    cipher = Cipher(KEY)
    check = cipher.new_check()
    for wrong in (*flips(check), check[:-1], check + b"\0", bytes(32), b""):
        assert not cipher.checks(wrong)


def test_checks_differ() -> None:
    """Who compares the headers of two directories must not learn that they share a key."""
    cipher = Cipher(KEY)
    assert cipher.new_check()[:16] != cipher.new_check()[:16]
    assert cipher.new_check()[16:] != cipher.new_check()[16:]


# Nonces


@given(
    st.sets(st.tuples(st.integers(0, 2), SEQUENCES, st.booleans()), min_size=2, max_size=30),
)
def test_no_keystream_comes_twice(uses: set[tuple[int, int, bool]]) -> None:
    """A nonce that comes twice under a key gives away both plaintexts, and the power to forge.

    Sealing zeros shows the keystream, and the keystream tells key and nonce apart from any other.
    """
    sessions = [Cipher(KEY) for _ in range(3)]
    seen = set()
    for session, sequence, is_record in uses:
        if is_record:
            seen.add(sessions[session].seal_key(sequence, b"", b"")[:256])
        else:
            seen.add(seal(sessions[session], sequence, b"", bytes(256))[0])
    assert len(seen) == len(uses)


def test_every_session_has_a_salt_of_its_own() -> None:
    """Two copies of a directory go on, with the same sequence numbers and different blocks."""
    assert len({Cipher(KEY).salt for _ in range(100)}) == 100


# The format, as a stranger would read and write it


def documented_key(salt: bytes) -> AESGCM:
    return AESGCM(HKDF(SHA256(), 32, salt, b"kvoffload slot key").derive(KEY))


def documented_nonce(purpose: int, sequence: int) -> bytes:
    return purpose.to_bytes(4, "little") + sequence.to_bytes(8, "little")


@given(SEQUENCES, ABOUTS, PAYLOADS, KEYS)
def test_what_is_sealed_is_as_documented(
    sequence: int, about: bytes, plain: bytes, key: bytes
) -> None:
    cipher = Cipher(KEY)
    aead = documented_key(cipher.salt)
    sealed, tag = seal(cipher, sequence, about, plain)
    assert aead.decrypt(documented_nonce(0, sequence), sealed + tag, about) == plain
    sealed_key = cipher.seal_key(sequence, about, key)
    padded = aead.decrypt(documented_nonce(1, sequence), sealed_key, about)
    assert padded == bytes([len(key)]) + key + bytes(255 - len(key))


@given(st.binary(min_size=16, max_size=16), SEQUENCES, ABOUTS, PAYLOADS, KEYS)
def test_what_is_written_as_documented_opens(
    salt: bytes, sequence: int, about: bytes, plain: bytes, key: bytes
) -> None:
    cipher = Cipher(KEY)
    aead = documented_key(salt)
    payload = aead.encrypt(documented_nonce(0, sequence), plain, about)
    assert unseal(cipher, salt, sequence, about, payload[-16:], payload[:-16]) == (True, plain)
    padded = bytes([len(key)]) + key + bytes(255 - len(key))
    sealed_key = aead.encrypt(documented_nonce(1, sequence), padded, about)
    assert cipher.open_key(salt, sequence, about, sealed_key) == key


@given(st.binary(min_size=16, max_size=16))
def test_the_check_is_as_documented(salt: bytes) -> None:
    value = HKDF(SHA256(), 16, salt, b"kvoffload key check").derive(KEY)
    assert Cipher(KEY).checks(salt + value)


# Settings


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_a_key_is_any_bytes(wrap: Callable[[bytes], bytes | bytearray | memoryview]) -> None:
    assert Cipher(wrap(KEY)).checks(Cipher(KEY).new_check())


def test_a_key_is_copied() -> None:
    """Who cares for secrets wipes the buffer that the key came in."""
    key = bytearray(KEY)
    cipher = Cipher(key)
    key[:] = bytes(32)
    assert cipher.checks(Cipher(KEY).new_check())


@pytest.mark.parametrize(
    ("key", "what"),
    [
        (b"", "32 bytes, not 0"),
        (b"secret".ljust(31, b"!"), "32 bytes, not 31"),
        (b"secret".ljust(33, b"!"), "32 bytes, not 33"),
        ("secret".ljust(32, "!"), "32 bytes, not a str"),
        (None, "32 bytes, not a NoneType"),
    ],
)
def test_another_key_is_refused_and_not_shown(key: bytes, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        Cipher(key)
    assert "secret" not in str(caught.value)


def test_nothing_shows_the_key() -> None:
    """Logs and crash reports print objects and their attributes, and sometimes pickle them."""
    cipher = Cipher(b"secret" * 5 + b"!!")
    session = cipher._session(cipher.salt)
    assert "secret" not in f"{cipher!r} {cipher} {vars(cipher)} {session!r} {vars(session)}"
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        pickle.dumps(cipher)


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "cryptography"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install 'kvoffload\[encryption\]'"):
        Cipher(KEY)


def test_the_package_is_imported_for_a_key_alone() -> None:
    """It is optional, and the import costs those time and memory who don't encrypt."""
    code = (
        "import sys, kvoffload, kvoffload.storage.cipher as cipher\n"
        "assert 'cryptography' not in sys.modules\n"
        "cipher.Cipher(bytes(32))\n"
        "assert 'cryptography' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Threads


def test_many_threads_share_a_cipher(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more sessions than are cached, so that keys come and go under their feet."""
    monkeypatch.setattr(module, "CACHED_SESSIONS", 2)
    reader = Cipher(KEY)
    writers = [Cipher(KEY) for _ in range(5)]
    start = threading.Barrier(8)

    def work(thread: int) -> bool:
        start.wait()
        for number in range(100):
            sequence = 1000 * thread + number
            writer = writers[sequence % 5]
            plain = sequence.to_bytes(8, "little") * 1000
            sealed, tag = seal(writer, sequence, b"", plain)
            if unseal(reader, writer.salt, sequence, b"", tag, sealed) != (True, plain):
                return False
            sealed_key = writer.seal_key(sequence, b"", plain[:8])
            if reader.open_key(writer.salt, sequence, b"", sealed_key) != plain[:8]:
                return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(8)))


def test_keys_of_old_sessions_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that was opened for years has records of as many salts as it was opened."""
    monkeypatch.setattr(module, "CACHED_SESSIONS", 3)
    cipher = Cipher(KEY)
    before = sum(type(thing) is module._SessionKey for thing in gc.get_objects())
    for number in range(20):
        cipher.open_key(number.to_bytes(16, "little"), 1, b"", bytes(272))
    after = sum(type(thing) is module._SessionKey for thing in gc.get_objects())
    assert after <= before + 2


@pytest.mark.parametrize("opening", [False, True])
def test_other_threads_run_while_a_payload_is_worked_on(opening: bool) -> None:
    """A payload took the GIL for its whole length, and the event loop stood still.

    Nobody is forced to give the GIL away here: only who lets go of it lets others run.
    """
    cipher = Cipher(KEY)
    plain, sealed = memoryview(bytearray(2**25)), memoryview(bytearray(2**25))
    tag = cipher.seal(1, b"", plain, sealed)

    def others_ran() -> bool:
        go, ran = threading.Event(), threading.Event()

        def follow() -> None:
            go.wait()
            ran.set()

        other = threading.Thread(target=follow)
        other.start()
        go.set()
        if opening:
            assert cipher.open(cipher.salt, 1, b"", tag, sealed, plain)
        else:
            cipher.seal(1, b"", plain, sealed)
        answer = ran.is_set()
        other.join()
        return answer

    interval = sys.getswitchinterval()
    sys.setswitchinterval(3600)
    try:
        # More than once, for the system may be slow to wake the other thread.
        assert any(others_ran() for _ in range(50))
    finally:
        sys.setswitchinterval(interval)
