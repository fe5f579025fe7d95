"""Hashes and canonical keys: the same in every process, reversible, and never confused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvoffload import BlockHash, ConfigError, hash_blocks
from kvoffload.keys import (
    MAX_KEY_BYTES,
    check_chain,
    check_hashes,
    check_key_lengths,
    check_namespace,
    decode_key,
    encode_key,
)

# Computed once with hashlib alone, from the formula in the documentation.
PLAIN_AND_NAMED = [
    "83dd1156925454002a4899a6359e8c400ef8bf17d4dc33a94164219f9f01970a",
    "ca6641c5df33753491e8c00d27e34733c2879a8d2d308e3c2eefafc3787a8990",
    "eb009f039dc28d38805c352fd965f77d1b2298a886fd6bc56e20c48440235e62",
    "f9eb8a093ea0d15927155d0d02cf347463f272732e42061f9c33a88dd864a3af",
]

HASHES = st.one_of(
    st.binary(max_size=64),
    st.text(max_size=16),
    st.integers(-(2**200), 2**200),
)
TOKENS = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40)


class TestHashBlocks:
    def test_fixed_vector(self) -> None:
        """Blocks on disk and on other machines are found by these very hashes."""
        plain = hash_blocks(range(32), 16)
        named = hash_blocks(range(32), 16, namespace="tenant")
        assert [each.hex() for each in plain + named] == PLAIN_AND_NAMED

    def test_same_in_a_child_with_another_hash_seed(self) -> None:
        """Python's own hash() differs from process to process; it must have no part in this."""
        code = (
            "from kvoffload import hash_blocks;"
            "print([h.hex() for h in hash_blocks(range(32), 16, namespace='tenant')])"
        )
        seen = {
            subprocess.run(
                [sys.executable, "-c", code],
                env={**os.environ, "PYTHONHASHSEED": seed},
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            for seed in ("1", "2")
        }
        here = [each.hex() for each in hash_blocks(range(32), 16, namespace="tenant")]
        assert seen == {f"{here}\n"}

    @given(tokens=TOKENS, block_tokens=st.integers(1, 9), whole=st.integers(0, 5))
    def test_a_chain_goes_on_from_its_parent(
        self, tokens: list[int], block_tokens: int, whole: int
    ) -> None:
        """An engine hashes a chat turn by turn and gets what hashing it at once gives."""
        cut = whole * block_tokens
        head = hash_blocks(tokens[:cut], block_tokens, namespace="n")
        parent = head[-1] if head else b""
        tail = hash_blocks(tokens[cut:], block_tokens, parent=parent, namespace="n")
        assert head + tail == hash_blocks(tokens, block_tokens, namespace="n")

    @given(tokens=st.lists(st.integers(0, 9), min_size=8, max_size=8), place=st.integers(0, 7))
    def test_a_token_changes_its_block_and_all_after(self, tokens: list[int], place: int) -> None:
        """Equal hash means equal bytes of the block and of all its prefix."""
        other = [*tokens[:place], tokens[place] + 1, *tokens[place + 1 :]]
        same = [a == b for a, b in zip(hash_blocks(tokens, 2), hash_blocks(other, 2), strict=True)]
        assert same == [number < place // 2 for number in range(4)]

    def test_namespaces_and_block_sizes_differ(self) -> None:
        """Another tenant's, or another geometry's, blocks are never found."""
        chains = [
            hash_blocks(range(32), 16),
            hash_blocks(range(32), 16, namespace="a"),
            hash_blocks(range(32), 16, namespace="b"),
            hash_blocks(range(32), 8),
        ]
        hashes = [each for chain in chains for each in chain]
        assert len(set(hashes)) == len(hashes)

    def test_what_is_left_over_has_no_hash(self) -> None:
        """A partial block has not all its bytes yet."""
        assert hash_blocks(range(31), 16) == hash_blocks(range(16), 16)
        assert hash_blocks([], 16) == []

    def test_arrays_and_lists_agree(self) -> None:
        """Token ids come as lists, and as arrays of whatever integer type and byte order."""
        want = hash_blocks(list(range(64)), 16)
        for dtype in ("<i4", ">i4", "<u8", "<i8", ">i8", "u2"):
            assert hash_blocks(np.arange(64).astype(dtype), 16) == want
        assert hash_blocks(np.arange(128)[::2] // 2, 16) == want

    @pytest.mark.parametrize(
        "tokens", [[1.5] * 16, ["a"] * 16, [2**63] * 16, [[1, 2]] * 16, np.full(16, 2**63 + 1)]
    )
    def test_what_is_no_token(self, tokens: list[int]) -> None:
        """Rounding 1.5 to 1 would give one prompt the blocks of another."""
        with pytest.raises(ConfigError, match="token_ids"):
            hash_blocks(tokens, 16)

    @pytest.mark.parametrize("block_tokens", [0, -1, 1.0, True, "16"])
    def test_wrong_block_tokens(self, block_tokens: int) -> None:
        """Says what is allowed."""
        with pytest.raises(ConfigError, match="block_tokens must be an integer of at least 1"):
            hash_blocks([1, 2, 3], block_tokens)


class TestCanonicalKeys:
    @given(block_hash=HASHES, namespace=st.text(max_size=20))
    @example(block_hash=0, namespace="")
    @example(block_hash=-128, namespace="")
    @example(block_hash="\ud800", namespace="")
    def test_reversible(self, block_hash: bytes | str | int, namespace: str) -> None:
        """A reopened tier gives back the very hashes, types included."""
        try:
            check_namespace(namespace)
        except ConfigError:
            return
        decoded = decode_key(encode_key(block_hash, namespace))
        assert decoded == (namespace, block_hash)
        assert type(decoded[1]) is type(block_hash)

    def test_types_and_namespaces_are_told_apart(self) -> None:
        """1, "1" and b"1" are three blocks, and where a namespace ends can't be shifted."""
        pairs: list[tuple[bytes | str | int, str]] = [
            (1, ""),
            ("1", ""),
            (b"1", ""),
            (49, ""),
            (b"b", "a"),
            (b"", "ab"),
            (b"ab", ""),
        ]
        assert len({encode_key(*pair) for pair in pairs}) == len(pairs)

    @given(data=st.binary(max_size=40))
    def test_any_bytes_decode_or_are_refused(self, data: bytes) -> None:
        """Rubbish on a disk is not taken for a key that says something else."""
        try:
            namespace, block_hash = decode_key(data)
        except ValueError:
            return
        assert encode_key(block_hash, namespace) == data

    def test_longest(self) -> None:
        """A record has room for so many bytes and no more."""
        assert len(encode_key(b"x" * (MAX_KEY_BYTES - 2 - 6), "tenant")) == MAX_KEY_BYTES


ODD_HASHES = st.one_of(
    HASHES,
    st.binary(min_size=240, max_size=260),
    st.text(min_size=60, max_size=130),
    st.sampled_from((True, None, 1.5, np.int64(3))),
)


@given(chain=st.lists(ODD_HASHES, max_size=4), namespace=st.sampled_from(("", "n" * 100)))
def test_a_chain_is_checked_as_its_hashes_and_their_lengths_are(
    chain: list[BlockHash], namespace: str
) -> None:
    """The short way of plain hashes lets through just what the long one does."""

    def outcome(check: Callable[[], Sequence[BlockHash]]) -> object:
        try:
            return check()
        except (ConfigError, TypeError) as exc:
            return type(exc), str(exc)

    def one_by_one() -> Sequence[BlockHash]:
        hashes = check_hashes(chain)
        check_key_lengths(hashes, namespace)
        return hashes

    assert outcome(lambda: check_chain(chain, namespace)) == outcome(one_by_one)
