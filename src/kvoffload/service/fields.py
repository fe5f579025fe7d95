"""Types of single settings: what is taken as a size or a time; what is said of a wrong one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import ErrorDetails

from ..checks import check_watermarks
from ..errors import ConfigError
from ..keys import check_namespace
from ..policy import POLICIES
from ..sizes import parse_size
from .mistakes import nearest

MOST_BYTES = 1 << 60


def _size(value: object) -> object:
    if isinstance(value, str):
        value = parse_size(value)
    if type(value) is not int:
        raise ConfigError(f"must be a size like 65536, 64KiB or 2 GiB, not {value!r}")
    if not 0 <= value <= MOST_BYTES:
        raise ConfigError(f"must be a size from 0 to 1 EiB, not {value}")
    return value


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ConfigError(f"must be a number, not {value!r}")
    return value


def _or_none(value: object) -> object:
    return None if isinstance(value, str) and value.strip().lower() == "none" else value


def _list(value: object) -> object:
    """Take `a, b` for a list, as environment variables have it."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return value


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _path(value: object) -> object:
    if not isinstance(value, str | Path):
        raise ConfigError(f"must be a path, not {value!r}")
    if not str(value) or "\0" in str(value):
        raise ConfigError("must be a path, and is empty or has a NUL in it")
    return Path(value).expanduser()


def _policy(value: str) -> str:
    if value not in POLICIES:
        raise ConfigError(f"must be one of {', '.join(sorted(POLICIES))}, not {value!r}")
    return value


def _namespace(value: str) -> str:
    return check_namespace(value)


def _filled(value: str) -> str:
    if not value.strip():
        raise ConfigError("is empty")
    return value


def _some(value: Sequence[Any]) -> Sequence[Any]:
    if not value:
        raise ConfigError("is empty")
    return value


Size = Annotated[int, BeforeValidator(_size)]
Count = Annotated[int, BeforeValidator(_number), Field(ge=1, le=1 << 31)]
Seconds = Annotated[float, BeforeValidator(_number), Field(gt=0, le=1e9, allow_inf_nan=False)]
SecondsOrZero = Annotated[float, BeforeValidator(_number), Field(ge=0, le=1e9, allow_inf_nan=False)]
SecondsOrNone = Annotated[Seconds | None, BeforeValidator(_or_none)]
Port = Annotated[int, BeforeValidator(_number), Field(ge=0, le=65535)]
Watermarks = Annotated[
    tuple[float, float], BeforeValidator(_list), AfterValidator(check_watermarks)
]
FilePath = Annotated[Path, BeforeValidator(_path)]
Namespace = Annotated[str, AfterValidator(_namespace)]
Policy = Annotated[str, AfterValidator(_policy)]
Filled = Annotated[str, AfterValidator(_filled)]
Lower = BeforeValidator(_lower)
Listed = BeforeValidator(_list)
Some = AfterValidator(_some)


def is_secret(path: Sequence[str]) -> bool:
    """Tell whether what is at a path in the settings must not be shown.

    A whole token is, in whatever shape it came, and so is the hash of one: it may be a token in
    the wrong place. A URL may have a password.
    """
    shown = ("namespaces", "rights", "token_file")
    return path[0] in ("encryption_key", "remote_url") or (
        path[0] == "tokens" and not (len(path) > 2 and path[2] in shown)
    )


def describe(error: ErrorDetails, known: Mapping[str, Sequence[str]]) -> str:
    """Return what is wrong in our words, without a secret.

    Args:
        error: What pydantic says, without the input if that is secret.
        known: The keys that there are within each key, and at the top in `""`.
    """
    kind, path = error["type"], [str(part) for part in error["loc"]]
    if kind == "extra_forbidden":
        names = known["" if len(path) == 1 else path[0]]
        return f"there is no such key; the nearest is {nearest(path[-1], names)}"
    if kind == "value_error":
        return str(error["ctx"]["error"])
    text = error["msg"].replace("Input should be", "must be")
    if is_secret(path) or "input" not in error:
        return text
    return f"{text}, not {_shown(error['input'])}"


def _shown(value: object) -> str:
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
