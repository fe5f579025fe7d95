"""Block hashes: making them, checking them, and their canonical bytes outside the process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence, Sized
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .checks import check_count
from .errors import ConfigError
from .types import BlockHash

MAX_KEY_BYTES = 255
"""Longest canonical key, namespace included."""

_EXACT_TYPES = frozenset((bytes, str, int))
_TAGS = {bytes: b"b", str: b"s", int: b"i"}


def hash_blocks(
    token_ids: Sequence[int] | NDArray[np.integer],
    block_tokens: int,
    *,
    parent: bytes = b"",
    namespace: str = "",
) -> list[bytes]:
    """Hash the full blocks of a prompt, each chained to all its prefix (SHA-256).

    The same in every process and on every machine: it depends on the arguments alone. Going on
    from the last hash of a prefix gives the same chain:
    `hash_blocks(a + b, n) == (h := hash_blocks(a, n)) + hash_blocks(b, n, parent=h[-1])`
    where `a` is whole blocks.

    Args:
        token_ids: Token ids, each within a signed 64-bit integer.
        block_tokens: Tokens a block; what is left over at the end has no hash.
        parent: Hash of the block before the first one.
        namespace: Isolation domain; other namespaces give other hashes.

    Returns:
        One hash of 32 bytes for each full block.

    Raises:
        ConfigError: `block_tokens` is less than 1, a token id is no 64-bit integer, or `parent` or
            `namespace` is of another type.
    """
    check_count("block_tokens", block_tokens)
    check_namespace(namespace)
    if not isinstance(parent, bytes | bytearray | memoryview):
        raise ConfigError(f"parent must be the hash of a block, in bytes, not {parent!r}")
    if not isinstance(token_ids, Sized):
        raise ConfigError(f"token_ids must be a flat sequence of integers, not {token_ids!r}")
    count = len(token_ids) // block_tokens
    try:
        tokens = np.asarray(token_ids)
        if count and not (tokens.ndim == 1 and tokens.dtype.kind in "iu"):
            raise TypeError(f"got {tokens.ndim} dimensions of {tokens.dtype}")
        if tokens.dtype == np.uint64 and tokens.size and int(tokens.max()) > 2**63 - 1:
            raise OverflowError(f"got {int(tokens.max())}")
        data = memoryview(tokens[: count * block_tokens].astype("<i8", copy=False).tobytes())
    except (TypeError, ValueError, OverflowError) as exc:
        raise ConfigError(
            f"token_ids must be a flat sequence of signed 64-bit integers: {exc}"
        ) from exc
    # The namespace enters every link, so a chain can be continued from its parent alone.
    name = namespace.encode()
    start = hashlib.sha256(b"kvoffload" + len(name).to_bytes(8, "little") + name)
    hashes: list[bytes] = []
    previous = bytes(parent)
    step = 8 * block_tokens
    for offset in range(0, len(data), step):
        link = start.copy()
        link.update(len(previous).to_bytes(8, "little") + previous)
        link.update(data[offset : offset + step])
        previous = link.digest()
        hashes.append(previous)
    return hashes


def check_hashes(block_hashes: Iterable[BlockHash]) -> Sequence[BlockHash]:
    """Return the hashes as a list or tuple, or say what is wrong with them.

    Raises:
        TypeError: Not a sequence of `bytes`, `str` or `int`.
    """
    if type(block_hashes) is not list and type(block_hashes) is not tuple:
        if isinstance(block_hashes, bytes | bytearray | str | memoryview):
            raise TypeError(
                "block_hashes must be a sequence of hashes, not one hash: wrap it in a list"
            )
        if not isinstance(block_hashes, Iterable):
            raise TypeError(
                f"block_hashes must be a sequence of hashes, not {type(block_hashes).__name__}"
            )
        block_hashes = list(block_hashes)
    # One pass in C; subclasses take the slow road.
    if not _EXACT_TYPES.issuperset(map(type, block_hashes)):
        for block_hash in block_hashes:
            if not isinstance(block_hash, bytes | str | int) or isinstance(block_hash, bool):
                raise TypeError(
                    f"a block hash is bytes, str or int (convert others), not "
                    f"{type(block_hash).__name__}: {block_hash!r}"
                )
    return block_hashes


@lru_cache(1024)
def _room_for_hash(namespace: str) -> int:
    """Return how many bytes a hash may have in a key of this namespace."""
    return MAX_KEY_BYTES - len(encode_key("", namespace))


def check_key_lengths(block_hashes: Sequence[BlockHash], namespace: str) -> None:
    """Check that each hash has a canonical key.

    Raises:
        ConfigError: The key would be longer than `MAX_KEY_BYTES`.
    """
    room = _room_for_hash(namespace)
    try:
        # A character has at most four bytes, so this settles nearly every call in one pass in C.
        if 4 * max(map(len, block_hashes), default=0) <= room:  # type: ignore[arg-type]  # see below
            return
    except TypeError:
        pass  # an int has no length
    for block_hash in block_hashes:
        length = len(block_hash) if type(block_hash) is bytes else len(_hash_bytes(block_hash))
        if length > room:
            raise ConfigError(
                f"a block hash of {length} bytes is too long: with namespace {namespace!r} "
                f"at most {room} bytes fit the canonical key of {MAX_KEY_BYTES}"
            )


def check_chain(block_hashes: Sequence[BlockHash], namespace: str) -> Sequence[BlockHash]:
    """Return the hashes as a list or tuple, if each of them has a canonical key.

    Raises:
        TypeError: Not a sequence of `bytes`, `str` or `int`.
        ConfigError: A key would be longer than `MAX_KEY_BYTES`.
    """
    if type(block_hashes) is list or type(block_hashes) is tuple:
        room = _room_for_hash(namespace)
        for block_hash in block_hashes:
            if type(block_hash) is not bytes or len(block_hash) > room:
                break
        else:
            return block_hashes  # a request is short: one plain loop is the fastest
    hashes = check_hashes(block_hashes)
    check_key_lengths(hashes, namespace)
    return hashes


def encode_key(block_hash: BlockHash, namespace: str) -> bytes:
    """Return the canonical key: type tag, length of the namespace, namespace, hash.

    `1`, `"1"` and `b"1"` give different keys.
    """
    name = namespace.encode()
    tag = _TAGS.get(type(block_hash))
    if tag is None:
        tag = next(tag for kind, tag in _TAGS.items() if isinstance(block_hash, kind))
    return b"%b%c%b%b" % (tag, len(name), name, _hash_bytes(block_hash))


def decode_key(key: bytes) -> tuple[str, BlockHash]:
    """Return namespace and hash of a canonical key.

    Raises:
        ValueError: The bytes are no canonical key.
    """
    if len(key) < 2 or len(key) < 2 + key[1]:
        raise ValueError(f"not a canonical key: {key!r}")
    tag, name, rest = key[:1], key[2 : 2 + key[1]], key[2 + key[1] :]
    namespace = name.decode()
    block_hash: BlockHash
    match tag:
        case b"b":
            block_hash = rest
        case b"s":
            block_hash = rest.decode("utf-8", "surrogatepass")
        case b"i":
            block_hash = int.from_bytes(rest, "big", signed=True)
        case _:
            raise ValueError(f"not a canonical key: {key!r}")
    if encode_key(block_hash, namespace) != key:
        raise ValueError(f"not a canonical key: {key!r}")
    return namespace, block_hash


def show_hash(block_hash: BlockHash) -> str:
    """Return a hash as people read it in messages: bytes as the beginning of their hex digits."""
    if isinstance(block_hash, bytes) and len(block_hash) > 8:
        return f"{block_hash[:8].hex()}..."
    return repr(block_hash)


def check_namespace(namespace: str) -> str:
    """Return the namespace, or say why it can't be one.

    Raises:
        ConfigError: Not a `str`, or longer than 128 bytes of UTF-8.
    """
    if not isinstance(namespace, str):
        raise ConfigError(f"namespace must be a str, not {namespace!r}")
    try:
        length = len(namespace.encode())
    except UnicodeEncodeError as exc:
        raise ConfigError(f"namespace must be valid Unicode: {namespace!r}") from exc
    if length > 128:
        raise ConfigError(f"a namespace has at most 128 bytes of UTF-8, this one {length}")
    return namespace


def _hash_bytes(block_hash: BlockHash) -> bytes:
    if isinstance(block_hash, bytes):
        return bytes(block_hash)
    if isinstance(block_hash, str):
        return block_hash.encode("utf-8", "surrogatepass")
    return block_hash.to_bytes((block_hash.bit_length() + 8) // 8, "big", signed=True)
