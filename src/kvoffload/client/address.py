"""Where a service is, and how one says who calls."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from ..errors import ConfigError


@dataclass(frozen=True, slots=True)
class Address:
    """Where a service is.

    Attributes:
        base: What the paths of its calls are appended to.
        socket: Path of its Unix socket, if it is reached by one.
        shown: As people read it in messages.
    """

    base: str
    socket: str | None
    shown: str

    @property
    def is_secure(self) -> bool:
        """Whether it is reached by TLS."""
        return self.base.startswith("https:")


def parse_address(url: str) -> Address:
    """Return what a URL says.

    Raises:
        ConfigError: It is none of `http://host:port`, `https://host:port`, `unix:/path`; a path
            may follow the port.
    """
    if not isinstance(url, str):
        raise ConfigError(f"url must be a str, not {type(url).__name__}")
    scheme, _, rest = url.partition(":")
    if scheme == "unix":
        path = "/" + rest.lstrip("/") if rest.startswith("/") else rest
        if not path:
            raise ConfigError("a Unix socket has a path: unix:/run/kvoffload.sock")
        return Address("http://localhost", path, f"unix:{path}")
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname)
        has_port = parts.port is None or parts.port > 0  # raises where it is no number
    except ValueError:
        is_good = has_port = False
    if not (is_good and has_port) or "@" in parts.netloc or parts.query or parts.fragment:
        # What was given is not repeated: it may have a password in it.
        raise ConfigError(
            "url must be http://host:port, https://host:port or unix:/path/to.sock, without user "
            "and password (a token goes into token=), query or fragment"
        )
    base = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
    return Address(base, None, base)


def check_token(token: str | None) -> str | None:
    """Return the token as it is.

    Raises:
        ConfigError: It can't be sent. The message does not show it.
    """
    if token is None:
        return None
    if not isinstance(token, str) or not token or not all("!" <= each <= "~" for each in token):
        raise ConfigError("token must be printable ASCII without spaces")
    return token
