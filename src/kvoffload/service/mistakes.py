"""What is wrong with settings, and where each value came from; no pydantic needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from ..errors import ConfigError


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from.

    Attributes:
        kind: Which kind of place.
        name: Path of the file or name of the environment variable; empty for the others.
    """

    kind: Literal["default", "file", "environment", "argument"]
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.kind


DEFAULT = Origin("default")


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing that is wrong.

    Attributes:
        places: Keys that are concerned, each with where its value came from.
        text: What is wrong, what is allowed or what to do; never a secret.
    """

    places: Sequence[tuple[str, Origin]]
    text: str

    def __str__(self) -> str:
        keys = ", ".join(f"{key} ({origin})" if key else str(origin) for key, origin in self.places)
        return f"{keys}: {self.text}"


class SettingsError(ConfigError):
    """Settings are wrong: tells all mistakes at once.

    Attributes:
        mistakes: Each of them.
    """

    def __init__(self, mistakes: Iterable[Mistake]) -> None:
        self.mistakes = tuple(mistakes)
        lines = [str(mistake) for mistake in self.mistakes]
        if len(lines) == 1:
            super().__init__(lines[0])
        else:
            super().__init__(
                f"{len(lines)} mistakes in the settings:" + "".join(f"\n  {line}" for line in lines)
            )

    def __reduce__(self) -> tuple[type[SettingsError], tuple[tuple[Mistake, ...]]]:
        return type(self), (self.mistakes,)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that is most like this one."""
    (name,) = get_close_matches(name, sorted(known), n=1, cutoff=0.0)
    return name
