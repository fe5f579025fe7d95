"""Where a server is, as people write it."""

from __future__ import annotations

import contextlib
import ssl
from dataclasses import replace
from urllib.parse import parse_qs, unquote, urlsplit

from ..errors import ConfigError
from .resp import Address

_PLAIN_SCHEMES = ("redis", "valkey")
_TLS_SCHEMES = ("rediss", "valkeys")


_OPTIONS = frozenset(("database", "db", "cluster"))
_ESCAPES = "in a password, write # / ? @ as %23 %2F %3F %40"


def parse_url(
    url: str, username: str | None, password: str | None, ssl_context: ssl.SSLContext | None
) -> tuple[Address, bool, bool]:
    """Return the address, whether it wants TLS, and whether it is one of a cluster.

    Raises:
        ConfigError: It is none. The message does not show the URL, which may have a password.
    """
    scheme, mark, rest = url.partition("://")
    scheme = scheme.lower()
    if not mark:
        scheme, rest = "unix", url
    parts = database = None
    with contextlib.suppress(ValueError):  # as the context of ours it would show what was given
        parts = urlsplit(f"{scheme}://{rest}")
        port = parts.port
        query = parse_qs(parts.query, keep_blank_values=True)
        options = {key: values[-1] for key, values in query.items()}
        text = parts.path.strip("/") if scheme != "unix" else ""
        database = int(options.get("database", options.get("db", text)) or 0)
    if parts is None or database is None:
        raise ConfigError(f"url: the port or the database is no number; {_ESCAPES}")
    if parts.fragment or not options.keys() <= _OPTIONS:
        raise ConfigError(f"url: all that can follow are ?database= and ?cluster=true; {_ESCAPES}")
    if (told := options.get("cluster", "false")) not in ("true", "false"):
        raise ConfigError("url: cluster must be true or false")
    if password is None and parts.password is not None:
        password = unquote(parts.password)
    if username is None and parts.username:
        username = unquote(parts.username)
    wants_tls = scheme in _TLS_SCHEMES
    if ssl_context is not None and not wants_tls:
        raise ConfigError("ssl_context needs a URL that begins with rediss:// or valkeys://")
    if scheme == "unix" and parts.path:
        path = unquote(parts.path)
        host = (parts.hostname or "") if not mark else ""
        address = Address(path=host + path, database=database)
    elif scheme in (*_PLAIN_SCHEMES, *_TLS_SCHEMES) and parts.hostname:
        address = Address(host=parts.hostname, port=port or 6379, database=database)
    else:
        raise ConfigError(
            "url must be redis://host:port, valkey://..., rediss://... or valkeys://... (TLS), "
            f"unix:///path or the path of a socket; this one begins with {scheme[:16]!r}"
        )
    if address.database < 0:
        raise ConfigError(f"url: the database must be at least 0, not {address.database}")
    return (
        replace(address, username=username, password=password, ssl_context=ssl_context),
        wants_tls,
        told == "true",
    )
