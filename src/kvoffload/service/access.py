"""Who may do what: bearer tokens, each bound to namespaces and rights."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from ..errors import ConfigError


class Right(Enum):
    """What a token allows."""

    READ = "read"
    """Look up, load, prefetch; see counters and events of its namespaces."""
    WRITE = "write"
    """Store, evict and clear in its namespaces."""
    ADMIN = "admin"
    """Flush; with all namespaces also the counters and events of all of them, and the metrics."""


ALL_RIGHTS = frozenset(Right)


@dataclass(frozen=True, slots=True)
class Principal:
    """Whoever is behind a call.

    Attributes:
        namespaces: The namespaces that it sees; `None` for all.
        rights: What it may do there.
    """

    namespaces: frozenset[str] | None
    rights: frozenset[Right]

    def may(self, right: Right, namespace: str) -> bool:
        """Tell whether it may do this in a namespace."""
        return right in self.rights and (self.namespaces is None or namespace in self.namespaces)

    @property
    def sees_all(self) -> bool:
        """Whether it may look at all namespaces together."""
        return self.namespaces is None and Right.ADMIN in self.rights


ANYONE = Principal(None, ALL_RIGHTS)
"""Who calls a service that is not protected."""


@dataclass(frozen=True, slots=True)
class Token:
    """A bearer token, known by its digest alone, so that no dump or log can show it.

    Attributes:
        sha256: SHA-256 of the token.
        namespaces: The namespaces that it is bound to; `None` for all.
        rights: What it allows in them.

    Raises:
        ConfigError: The digest is none, or there is no namespace or no right.
    """

    sha256: bytes
    namespaces: frozenset[str] | None
    rights: frozenset[Right]

    def __post_init__(self) -> None:
        if len(self.sha256) != 32:
            raise ConfigError("a token's SHA-256 has 32 bytes (64 hexadecimal digits)")
        if not self.rights:
            raise ConfigError("a token without any right is of no use: name some of its rights")
        if self.namespaces is not None and not self.namespaces:
            raise ConfigError("a token without any namespace is of no use: name some, or all ('*')")

    @classmethod
    def of(
        cls,
        secret: str,
        namespaces: Iterable[str] | None = None,
        rights: Iterable[Right] = ALL_RIGHTS,
    ) -> Token:
        """Make one from the token itself, which is not kept."""
        names = None if namespaces is None else frozenset(namespaces)
        return cls(digest(secret), names, frozenset(rights))


def digest(secret: str) -> bytes:
    """Return the SHA-256 of a token as it stands in the `Authorization` header."""
    return hashlib.sha256(secret.encode()).digest()


class AccessControl:
    """Finds the principal of a token, in a time that tells nothing of the tokens there are.

    Args:
        tokens: The tokens that open the service.
        unprotected: Let everyone in who reaches it; only for a loopback address or a Unix socket.

    Raises:
        ConfigError: There are neither tokens nor `unprotected`, or both, or a token is there twice.
    """

    def __init__(self, tokens: Sequence[Token] = (), *, unprotected: bool = False) -> None:
        if not tokens and not unprotected:
            raise ConfigError(
                "no token would open this service: give it tokens, or say that it is unprotected"
            )
        if tokens and unprotected:
            raise ConfigError("a service is either unprotected or has tokens, not both")
        if len({token.sha256 for token in tokens}) < len(tokens):
            raise ConfigError(
                "a token is there twice; bind one token to several namespaces instead"
            )
        self.is_protected = not unprotected
        self._tokens = tuple(tokens)

    def principal(self, secret: str | None) -> Principal | None:
        """Return who has this token; `None` if it opens nothing."""
        if not self.is_protected:
            return ANYONE
        if secret is None:
            return None
        given = digest(secret)
        found: Principal | None = None
        for token in self._tokens:  # all of them, so that the time does not tell which
            if hmac.compare_digest(token.sha256, given):
                found = Principal(token.namespaces, token.rights)
        return found
