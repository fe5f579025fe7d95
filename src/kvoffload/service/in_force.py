"""The settings that are in force, one by one, fit to be shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, SecretStr

from ..sizes import human_bytes
from .mistakes import Origin

if TYPE_CHECKING:
    from .settings import ServiceSettings

TIERS = ("hot", "warm", "cold")
_SIZES = frozenset(
    (
        *TIERS,
        "block_bytes",
        "max",
        "max_body",
        "min_free",
        "remote_queue_bytes",
        "reserved",
        "staging",
    )
)


@dataclass(frozen=True, slots=True)
class InForce:
    """One setting.

    Attributes:
        key: Its name; nested ones with dots.
        value: Its value, as JSON has it; `"set"` in place of a secret.
        text: The value as people read it.
        origin: Where it came from.
    """

    key: str
    value: object
    text: str
    origin: Origin


def in_force(settings: ServiceSettings) -> Iterator[InForce]:
    """Yield each setting, without any secret."""
    for path, value in _walk(settings, ()):
        shown = _as_json(value)
        text = _as_text(path, shown)
        if path[0] in TIERS and shown:
            text += f", {getattr(settings, path[0]) // settings.block_bytes:,} blocks"
        yield InForce(".".join(path), shown, text, settings.origin(*path))


def _walk(model: BaseModel, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], object]]:
    for name in type(model).model_fields:
        value = getattr(model, name)
        here = (*path, name)
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from _walk(inner, (*here, key))
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            for number, inner in enumerate(value):
                yield from _walk(inner, (*here, str(number)))
        elif not path or value is not None:
            yield here, value


def _as_json(value: object) -> object:
    if isinstance(value, SecretStr):
        return "set"
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _as_text(path: tuple[str, ...], value: object) -> str:
    if value is None or value in ([], {}):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and path[-1] in _SIZES:
        return human_bytes(value) if value else "0"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}"
    return repr(value) if value == "" else str(value)
