"""Where a server is, as people write it."""

from __future__ import annotations

import ssl
from dataclasses import replace
from urllib.parse import parse_qs, unquote, urlsplit

from ..errors import ConfigError
from .resp import Address

_PLAIN_SCHEMES = ("redis", "valkey")
_TLS_SCHEMES = ("rediss", "valkeys")


def parse_url(
    url: str, username: str | None, password: str | None, ssl_context: ssl.SSLContext | None
) -> tuple[Address, bool]:
    """Return the address, and whether it wants TLS.

    Raises:
        ConfigError: It is none. The message does not show the URL, which may have a password.
    """
    scheme, mark, rest = url.partition("://")
    if not mark:
        scheme, rest = "unix", url
    try:
        parts = urlsplit(f"{scheme}://{rest}")
        port = parts.port
        text = parts.path.strip("/") if scheme != "unix" else ""
        text = parse_qs(parts.query).get("database", parse_qs(parts.query).get("db", [text]))[0]
        database = int(text or 0)
    except ValueError as exc:
        raise ConfigError("url: the port or the database is no number") from exc
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
    )
