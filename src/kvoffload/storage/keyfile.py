"""The encryption key as it is written down."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError

KEY_BYTES = 32


def parse_key(data: bytes) -> bytes:
    """Return the key in 32 bytes, or in 64 hex digits with blanks around them.

    Raises:
        ConfigError: It is neither. Says so without showing it.
    """
    if len(data) == KEY_BYTES:
        return data
    try:
        key = bytes.fromhex(data.decode("ascii").strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError("must hold 32 bytes, or 64 hex digits")
    return key


def read_key(path: Path) -> bytes:
    """Return the key in a file.

    Raises:
        ConfigError: The file holds none.
        OSError: It can't be read.
    """
    try:
        return parse_key(path.read_bytes())
    except ConfigError as exc:
        raise ConfigError(f"{path} {exc}") from None
