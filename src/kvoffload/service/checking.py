"""Settings that are fine one by one and wrong together, or for this machine."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..remote.engines import remote_tier
from ..sizes import human_bytes, memory_needed, memory_of_machine, room_on_disk
from ..storage.keyfile import parse_key
from .mistakes import Mistake
from .sources import Gathered, Keys

if TYPE_CHECKING:
    from .settings import ServiceSettings, TokenSettings

MOST_BLOCK_BYTES = 1 << 30
MOST_SLOTS = (1 << 32) - 1
MOST_SOCKET_PATH = 107
"""Bytes that fit the address of a Unix socket on Linux."""
MOST_SECRET_FILE = 1 << 16

# What may stand in an Authorization header (RFC 6750).
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*", re.ASCII)
_EMPTY = hashlib.sha256(b"").digest()


class Checker:
    """Looks at settings that were validated one by one.

    Args:
        settings: The settings.
        gathered: Where they came from.
        wrong: Paths of what is known to be wrong, and is in `settings` as if it weren't given.

    Attributes:
        mistakes: What is wrong, after `check`.
        digests: SHA-256 of each token.
        encryption_key: The key of the cold tier.
    """

    def __init__(
        self, settings: ServiceSettings, gathered: Gathered, wrong: Collection[Keys]
    ) -> None:
        self._settings = settings
        self._gathered = gathered
        self._wrong = set(wrong)
        self.mistakes: list[Mistake] = []
        self.digests: list[bytes] = []
        self.encryption_key: bytes | None = None

    def check(self) -> None:
        """Find all mistakes."""
        self._check_block_bytes()
        self._check_sizes()
        self._check_cold()
        self._check_memory()
        self._check_disk()
        self._check_remote()
        self._check_shares()
        self._check_reserved()
        self._check_tokens()
        self._check_key()
        self._check_address()
        self._check_protection()

    def _add(self, text: str, *places: str | Keys) -> None:
        """Say what is wrong with values at some places."""
        paths = [(place,) if isinstance(place, str) else place for place in places]
        self._wrong.update(paths)
        self.mistakes.append(
            Mistake([(".".join(path), self._gathered.origin(path)) for path in paths], text)
        )

    def _fine(self, *keys: str) -> bool:
        """Tell whether nothing is known to be wrong with these."""
        return self._wrong.isdisjoint((key,) for key in keys)

    def _given(self, key: str) -> bool:
        return self._gathered.origin((key,)).kind != "default"

    # Sizes

    def _check_block_bytes(self) -> None:
        size = self._settings.block_bytes
        if self._fine("block_bytes") and not 1 <= size <= MOST_BLOCK_BYTES:
            self._add(f"must be from 1 byte to 1 GiB, not {human_bytes(size)}", "block_bytes")

    def _check_sizes(self) -> None:
        if not self._fine("block_bytes"):
            return
        settings = self._settings
        one = human_bytes(settings.block_bytes)
        for tier, size in (("hot", settings.hot), ("warm", settings.warm), ("cold", settings.cold)):
            least = "" if tier == "hot" else ", or 0 for none"
            if size < settings.block_bytes and (size or tier == "hot"):
                self._add(
                    f"{human_bytes(size)} has no room for one block of {one}; it must be at least "
                    f"that{least}",
                    tier,
                )
            elif size // settings.block_bytes > MOST_SLOTS:
                self._add(f"{human_bytes(size)} are more than {MOST_SLOTS} blocks of {one}", tier)
        if self._fine("max_body") and settings.max_body < settings.block_bytes:
            self._add(
                f"{human_bytes(settings.max_body)} has no room for one block of {one}", "max_body"
            )

    def _check_cold(self) -> None:
        settings = self._settings
        if not self._fine("cold", "cold_path"):
            return
        if settings.cold and settings.cold_path is None:
            self._add(
                f"{human_bytes(settings.cold)} on disk need a directory: set cold_path, "
                "or cold to 0",
                "cold",
            )
        elif settings.cold_path is not None and not settings.cold:
            self._add("there is a directory and no size for it: set cold too", "cold_path")

    def _check_memory(self) -> None:
        if not self._fine("block_bytes", "hot", "warm", "cold", "staging"):
            return
        settings = self._settings
        one = settings.block_bytes
        needed = memory_needed(
            memory_blocks=settings.hot // one + settings.warm // one,
            cold_blocks=settings.cold // one,
            block_bytes=one,
            staging_bytes=settings.staging,
        )
        memory = memory_of_machine()
        if memory is not None and needed > memory:
            takers = [name for name in ("hot", "warm", "staging") if getattr(settings, name)]
            if settings.cold // one > (settings.hot + settings.warm) // one:
                takers.append("cold")  # its bookkeeping may be what there is too much of
            self._add(
                f"need {human_bytes(needed)} of memory, with the bookkeeping for each block of "
                f"every tier, and this machine has {human_bytes(memory)}",
                *takers,
            )

    def _check_disk(self) -> None:
        settings = self._settings
        if settings.cold_path is None or not self._fine("cold", "cold_path", "min_free"):
            return
        room = room_on_disk(settings.cold_path)
        if room is not None and settings.cold + settings.min_free > room:
            takers = ["cold", "min_free"] if settings.min_free else ["cold"]
            self._add(
                f"need {human_bytes(settings.cold + settings.min_free)} in {settings.cold_path}, "
                f"and there is room for {human_bytes(room)}",
                *takers,
            )

    def _check_remote(self) -> None:
        settings = self._settings
        if settings.remote_url is None or not self._fine("remote_url", "remote_layout"):
            return
        try:
            remote_tier(settings.remote_url.get_secret_value(), layout=settings.remote_layout)
        except ConfigError as exc:  # which never shows the URL
            self._add(str(exc).removeprefix("url: "), "remote_url")

    # Namespaces

    def _check_shares(self) -> None:
        for name, share in self._settings.namespaces.items():
            here = ("namespaces", name)
            if name == "*":
                self._add("'*' stands for all namespaces, and can't be the name of one", here)
            for key, size in (("max", share.max), ("reserved", share.reserved or None)):
                if size is not None and size < self._settings.block_bytes:
                    one = human_bytes(self._settings.block_bytes)
                    self._add(
                        f"{human_bytes(size)} has no room for one block of {one}", (*here, key)
                    )
            if share.max is not None and share.reserved > share.max:
                self._add(
                    f"{human_bytes(share.reserved)} are reserved, and at most "
                    f"{human_bytes(share.max)} may be had",
                    (*here, "reserved"),
                    (*here, "max"),
                )

    def _check_reserved(self) -> None:
        settings = self._settings
        if not self._fine("block_bytes", "hot", "warm", "cold", "namespaces"):
            return
        one = settings.block_bytes
        slots = sum(size // one for size in (settings.hot, settings.warm, settings.cold))
        # Rounded up, as the manager does: each namespace gets its own in whole blocks.
        reserved = sum(-(-share.reserved // one) for share in settings.namespaces.values())
        if reserved > slots:
            self._add(
                f"{human_bytes(reserved * one)} are reserved together, in whole blocks, and all "
                f"tiers together have {human_bytes(slots * one)}",
                *(
                    ("namespaces", name, "reserved")
                    for name, share in settings.namespaces.items()
                    if share.reserved
                ),
            )

    # Secrets

    def _check_tokens(self) -> None:
        seen: dict[bytes, int] = {}
        for number, token in enumerate(self._settings.tokens):
            here = ("tokens", str(number))
            if here in self._wrong:
                continue
            if "*" in token.namespaces and len(token.namespaces) > 1:
                self._add("'*' is all namespaces already", (*here, "namespaces"))
            digest = self._digest(token, here)
            if digest is None:
                continue
            if digest in seen:
                self._add(
                    f"the same token as tokens.{seen[digest]}; give each of them one of its own",
                    here,
                )
            seen.setdefault(digest, number)
            self.digests.append(digest)

    def _digest(self, token: TokenSettings, here: Keys) -> bytes | None:
        """Return the hash of a token, or say what is wrong with it."""
        given = [
            name
            for name in ("token", "token_file", "token_sha256")
            if getattr(token, name) is not None
        ]
        if len(given) != 1:
            several = f", and there are {' and '.join(given)}" if given else ""
            self._add(f"needs one of token, token_file and token_sha256{several}", here)
            return None
        at = (*here, given[0])
        if token.token_sha256 is not None:
            try:
                digest = bytes.fromhex(token.token_sha256.get_secret_value())
            except ValueError:
                digest = b""
            if len(digest) != 32:
                self._add("must be 64 hex digits", at)
            elif digest == _EMPTY:
                self._add("is the hash of an empty token", at)
            else:
                return digest
            return None
        if token.token is not None:
            text = token.token.get_secret_value()
        else:
            assert token.token_file is not None
            data = self._read(token.token_file, at)
            if data is None:
                return None
            text = data.decode("latin-1").removesuffix("\n").removesuffix("\r")
        if not text:
            self._add("is empty" if token.token_file is None else "the file is empty", at)
        elif not _TOKEN.fullmatch(text):
            self._add(
                "a token has letters, digits and -._~+/ alone, and maybe = at its end, for it "
                "goes into a header",
                at,
            )
        else:
            return hashlib.sha256(text.encode()).digest()
        return None

    def _check_key(self) -> None:
        settings = self._settings
        try:
            if settings.encryption_key is not None:
                if settings.encryption_key_file is not None:
                    self._add(
                        "there is the key, and a file for it: give one",
                        "encryption_key",
                        "encryption_key_file",
                    )
                text = settings.encryption_key.get_secret_value()
                # 32 characters are no key: what people can type is too easy to guess.
                data = b"" if len(text) == 32 else text.encode(errors="replace")
                self.encryption_key = parse_key(data)
            elif settings.encryption_key_file is not None:
                found = self._read(settings.encryption_key_file, ("encryption_key_file",))
                if found is not None:
                    self.encryption_key = parse_key(found)
        except ConfigError:
            if settings.encryption_key is not None:
                self._add("must be 64 hex digits", "encryption_key")
            else:
                self._add("the file must have 32 bytes, or 64 hex digits", "encryption_key_file")

    def _read(self, path: Path, at: Keys) -> bytes | None:
        """Return what is in a small file, or say what is wrong with it."""
        try:
            with path.open("rb") as file:
                data = file.read(MOST_SECRET_FILE + 1)
        except OSError as exc:
            self._add(f"the file {path} can't be read: {exc.strerror}", at)
            return None
        if len(data) > MOST_SECRET_FILE:
            self._add(f"the file {path} is too long to hold a secret", at)
            return None
        return data

    # Who may connect

    def _check_address(self) -> None:
        uds = self._settings.uds
        if uds is None or not self._fine("uds"):
            return
        if others := [key for key in ("host", "port") if self._given(key)]:
            self._add("a service listens on a Unix socket or on a port, not both", "uds", *others)
        if (length := len(os.fsencode(uds))) > MOST_SOCKET_PATH:
            self._add(
                f"the path of a Unix socket has at most {MOST_SOCKET_PATH} bytes, not {length}",
                "uds",
            )
        elif not uds.parent.is_dir():
            self._add(f"{uds.parent} is no directory", "uds")

    def _check_protection(self) -> None:
        settings = self._settings
        if not self._fine("tokens", "unprotected"):
            return
        if settings.unprotected:
            if settings.tokens:
                self._add(
                    "tokens protect nothing when the service is unprotected: leave one of them out",
                    "unprotected",
                    "tokens",
                )
            elif (
                settings.uds is None
                and self._fine("host", "uds")
                and not _is_loopback(settings.host)
            ):
                self._add(
                    f"everybody who reaches {settings.host} could read and delete all blocks: "
                    "give tokens, or listen on 127.0.0.1 or on a Unix socket (uds)",
                    "unprotected",
                    "host",
                )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
