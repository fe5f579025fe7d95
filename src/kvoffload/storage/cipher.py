"""Encryption of payloads and keys on disk: AES-256-GCM, by the optional `cryptography` package.

What is stored, and from which key and nonce, is told in docs/disk-format.md.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from ..errors import ConfigError
from ..keys import MAX_KEY_BYTES

KEY_BYTES = 32
SALT_BYTES = 16
TAG_BYTES = 16

CHECK_BYTES = SALT_BYTES + 16
"""Size of a key check: a salt, and what the key makes of it."""

SEALED_KEY_BYTES = 1 + MAX_KEY_BYTES + TAG_BYTES
"""Size of a sealed key, whatever the key's own length."""

MAX_PAYLOAD_BYTES = 2**36 - 32
"""What GCM can encrypt under one nonce."""

CACHED_SESSIONS = 1024
"""Sessions whose keys are kept; 3 KiB each, and 10 us to make anew."""

_SLOT_INFO = b"kvoffload slot key"
_CHECK_INFO = b"kvoffload key check"
_NONCE = struct.Struct("<IQ")  # purpose and sequence number
_PAYLOAD = 0
_RECORD = 1


class Cipher:
    """Seals the blocks of one session, and opens those of all sessions with the same key.

    Make a new one each time that a directory is opened: its random salt is what keeps two sessions
    from using a nonce twice under one key, whatever was copied, restored or forgotten between them.
    Within a session, seal one payload and one key a sequence number.

    Threads may call at once. Payloads are worked on without the GIL.

    Args:
        key: 32 random bytes. They show neither in a `repr` nor in a message.

    Attributes:
        salt: 16 bytes, this session's; keep them with what is sealed.

    Raises:
        ConfigError: The key isn't 32 bytes, or the `cryptography` package is missing.
    """

    def __init__(self, key: bytes | bytearray | memoryview) -> None:
        secret = _checked(key)
        self.salt = secrets.token_bytes(SALT_BYTES)
        # The key is in a closure: no dump of attributes shows it.
        try:
            self._derive = derive = _derivation(secret)
            self._session = lru_cache(CACHED_SESSIONS)(
                lambda salt: _SessionKey(derive(salt, _SLOT_INFO, KEY_BYTES))
            )
            self._session(self.salt)
        except ImportError as exc:
            raise ConfigError(
                "encryption needs the cryptography package: pip install 'kvoffload[encryption]'"
            ) from exc

    def new_check(self) -> bytes:
        """Return 32 bytes by which `checks` knows the key again, and which don't tell it."""
        salt = secrets.token_bytes(SALT_BYTES)
        return salt + self._derive(salt, _CHECK_INFO, CHECK_BYTES - SALT_BYTES)

    def checks(self, check: bytes) -> bool:
        """Tell whether `new_check` of the same key made these bytes."""
        salt, value = check[:SALT_BYTES], check[SALT_BYTES:]
        return hmac.compare_digest(value, self._derive(salt, _CHECK_INFO, CHECK_BYTES - SALT_BYTES))

    def seal(self, sequence: int, about: bytes, plain: memoryview, into: memoryview) -> bytes:
        """Encrypt a payload and return its 16-byte tag.

        Args:
            sequence: Number of the write, below 2**64; never twice in a session.
            about: What else the tag vouches for; `open` needs the same.
            plain: Bytes of the payload.
            into: As many bytes, which take the encrypted payload: other memory, or the very same.
        """
        return self._session(self.salt).encrypt(_NONCE.pack(_PAYLOAD, sequence), about, plain, into)

    def open(
        self,
        salt: bytes,
        sequence: int,
        about: bytes,
        tag: bytes,
        sealed: memoryview,
        into: memoryview,
    ) -> bool:
        """Decrypt a payload; if anything about it was changed, leave zeros and return `False`.

        Until it returns, `into` holds bytes that nobody has vouched for.

        Args:
            salt: Salt of the session that sealed it.
            sequence: As it was sealed.
            about: As it was sealed.
            tag: What `seal` returned.
            sealed: The encrypted payload.
            into: As many bytes, which take the payload: other memory, or the very same.
        """
        nonce = _NONCE.pack(_PAYLOAD, sequence)
        return self._session(salt).decrypt(nonce, about, tag, sealed, into)

    def seal_key(self, sequence: int, about: bytes, key: bytes) -> bytes:
        """Return a block's key of at most 255 bytes, padded and encrypted: 272 bytes with the tag.

        Raises:
            ValueError: It is longer.
        """
        padded = (bytes([len(key)]) + key).ljust(1 + MAX_KEY_BYTES, b"\0")
        return self._session(self.salt).aead.encrypt(_NONCE.pack(_RECORD, sequence), padded, about)

    def open_key(self, salt: bytes, sequence: int, about: bytes, sealed: bytes) -> bytes | None:
        """Return a block's key, or `None` if anything about it was changed."""
        session = self._session(salt)
        try:
            padded = session.aead.decrypt(_NONCE.pack(_RECORD, sequence), sealed, about)
        except session.invalid_tag:
            return None
        return padded[1 : 1 + padded[0]]


class _SessionKey:
    """AES-256-GCM with one key; many threads may use it.

    Attributes:
        aead: For small data, with the tag at its end: one call, but it can't do without copies.
        invalid_tag: The error of what doesn't decrypt.
    """

    def __init__(self, key: bytes) -> None:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers import Cipher as Gcm
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        from cryptography.hazmat.primitives.ciphers.algorithms import AES
        from cryptography.hazmat.primitives.ciphers.modes import GCM

        aes = AES(key)

        def gcm(nonce: bytes) -> Gcm[GCM]:
            return Gcm(aes, GCM(nonce))

        self.aead = AESGCM(key)
        self.invalid_tag = InvalidTag
        self._gcm = gcm

    def encrypt(self, nonce: bytes, about: bytes, plain: memoryview, into: memoryview) -> bytes:
        """Encrypt in a single update, for the library lets go of the GIL in it (since 50.0).

        In pieces it would be slower: two threads would hand the GIL to and fro.
        """
        gcm = self._gcm(nonce).encryptor()
        gcm.authenticate_additional_data(about)
        if plain:  # an empty view may be read-only, which the library refuses
            gcm.update_into(plain, into)
        gcm.finalize()
        return gcm.tag

    def decrypt(
        self, nonce: bytes, about: bytes, tag: bytes, sealed: memoryview, into: memoryview
    ) -> bool:
        """Decrypt, then check the tag, and take back what was decrypted if it is wrong."""
        gcm = self._gcm(nonce).decryptor()
        gcm.authenticate_additional_data(about)
        if sealed:
            gcm.update_into(sealed, into)
        try:
            gcm.finalize_with_tag(tag)
        except self.invalid_tag:
            if into:
                np.frombuffer(into, np.uint8).fill(0)  # without the GIL
            return False
        return True


def _derivation(secret: bytes) -> Callable[[bytes, bytes, int], bytes]:
    """Return HKDF-SHA256 of the secret, by salt, purpose and length in bytes."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return lambda salt, info, length: HKDF(SHA256(), length, salt, info).derive(secret)


def _checked(key: bytes | bytearray | memoryview) -> bytes:
    given: object = key  # whatever the annotation says
    if not isinstance(given, bytes | bytearray | memoryview):
        raise ConfigError(
            f"an encryption key must be {KEY_BYTES} bytes, not a {type(key).__name__}"
        )
    if len(secret := bytes(given)) != KEY_BYTES:
        raise ConfigError(f"an encryption key must be {KEY_BYTES} bytes, not {len(secret)}")
    return secret
