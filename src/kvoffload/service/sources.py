"""Where settings come from: arguments, the environment, a file; and which value came from where."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource

from .mistakes import DEFAULT, Mistake, Origin, nearest

PREFIX = "KVOFFLOAD_"
FILE_VARIABLE = "KVOFFLOAD_SETTINGS"
CLIENTS_VARIABLE = "KVOFFLOAD_TOKEN"
"""A client's token, which `kvoffload top` takes from there; no setting of a service."""
DEFAULT_FILE = Path("kvoffload.toml")
NESTED = frozenset(("namespaces", "tokens"))
"""Keys that have keys of their own."""

_LISTS = frozenset(("namespaces", "rights"))

Keys = tuple[str, ...]


class EnvironmentSource(PydanticBaseSettingsSource):
    """`KVOFFLOAD_HOT=8GiB`, and for nested keys `KVOFFLOAD_TOKENS__0__TOKEN_FILE=...` or JSON.

    Attributes:
        variables: Name of the variable for each path that one names.
        mistakes: What is wrong with the variables.
    """

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        super().__init__(settings_cls)
        self.variables: dict[Keys, str] = {}
        self.mistakes: list[Mistake] = []

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Return one value; of the base class, which calls it nowhere itself."""
        return self().get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        """Return what the environment says."""
        fields = self.settings_cls.model_fields
        values: dict[str, Any] = {}
        named = [
            (name.removeprefix(PREFIX).lower().split("__"), name)
            for name in os.environ
            if name.startswith(PREFIX) and name not in (FILE_VARIABLE, CLIENTS_VARIABLE)
        ]
        # Shorter ones first: JSON for a whole key, then the keys in it.
        for path, name in sorted(named, key=lambda item: (len(item[0]), item[1])):
            if path[0] not in fields or (len(path) > 1 and path[0] not in NESTED):
                known = nearest(name, [FILE_VARIABLE, *(PREFIX + key.upper() for key in fields)])
                self._wrong(name, f"there is no such setting; the nearest is {known}")
            else:
                self._place(values, tuple(path), name)
        if isinstance(tokens := values.get("tokens"), dict):
            values["tokens"] = self._as_list(tokens)
        return values

    def _place(self, values: dict[str, Any], path: Keys, name: str) -> None:
        text = os.environ[name]
        value: Any = text
        if len(path) > 1 and not all(path):
            self._wrong(name, "there is a key missing before or after '__'")
            return
        if (len(path) < 3 or path[-1] in _LISTS) and text.lstrip()[:1] in ("[", "{"):
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                # What json says of it is left out, for it might quote a secret.
                self._wrong(name, "is no valid JSON")
                return
        for key in path[:-1]:
            values = values.setdefault(key, {})
            if not isinstance(values, dict):
                self._wrong(name, f"another variable sets all of {path[0]}")
                return
        if path[-1] in values:
            self._wrong(name, "another variable sets this too")
            return
        values[path[-1]] = value
        self.variables[path] = name

    def _as_list(self, tokens: dict[str, Any]) -> list[Any]:
        numbers = sorted(tokens, key=lambda key: (len(key), key))
        if numbers != [str(number) for number in range(len(numbers))]:
            names = sorted(name for path, name in self.variables.items() if path[0] == "tokens")
            self._wrong(names[0], "number the tokens 0, 1, 2 ..., as in KVOFFLOAD_TOKENS__0__TOKEN")
            return []
        return [tokens[number] for number in numbers]

    def _wrong(self, name: str, text: str) -> None:
        self.mistakes.append(Mistake([("", Origin("environment", name))], text))

    def origin(self, path: Keys) -> Origin:
        """Return which variable gave the value at a path."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.variables:
                return Origin("environment", self.variables[path[:length]])
        return Origin("environment", PREFIX + path[0].upper())


class FileSource(PydanticBaseSettingsSource):
    """A TOML file.

    Args:
        settings_cls: The settings.
        given: The file, if an argument names it.

    Attributes:
        path: The file that is read; `None` where there is none.
        mistakes: What is wrong with it.
    """

    def __init__(self, settings_cls: type[BaseSettings], given: Path | None) -> None:
        super().__init__(settings_cls)
        self.mistakes: list[Mistake] = []
        self.path = given
        self._named_by: Origin | None = None
        if given is not None:
            self._named_by = Origin("argument")
        elif name := os.environ.get(FILE_VARIABLE):
            self.path = Path(name)
            self._named_by = Origin("environment", FILE_VARIABLE)
        elif DEFAULT_FILE.is_file():
            self.path = DEFAULT_FILE
        if self.path is not None:
            self.path = self.path.expanduser()

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Return one value; of the base class, which calls it nowhere itself."""
        return self().get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        """Return what the file says."""
        if self.path is None:
            return {}
        try:
            return tomllib.loads(self.path.read_bytes().decode())
        except OSError as exc:
            text = f"the settings file {self.path} can't be read: {exc.strerror}"
        except UnicodeDecodeError:
            text = f"the settings file {self.path} is no UTF-8"
        except tomllib.TOMLDecodeError as exc:
            where = str(exc).rpartition("(")[2].rstrip(")")
            text = f"the settings file {self.path} is no valid TOML {where}"
        self.mistakes.append(Mistake([("settings", self._named_by or DEFAULT)], text))
        return {}

    def origin(self, path: Keys) -> Origin:
        """Return that the file gave the value at a path."""
        return Origin("file", str(self.path))


class Gathered:
    """The values of all sources, the first of which goes before the next ones.

    Args:
        settings_cls: The settings.
        arguments: Values given in the program.
        file: The file, if an argument names it.

    Attributes:
        values: What is to be validated.
        origins: Where each comes from, by its path; what is not in here is a default.
        mistakes: What is wrong with the sources themselves.
        file: The file that was read.
    """

    def __init__(
        self, settings_cls: type[BaseSettings], arguments: dict[str, Any], file: Path | None
    ) -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[Keys, Origin] = {}
        from_file = FileSource(settings_cls, file)
        from_environment = EnvironmentSource(settings_cls)
        given = InitSettingsSource(settings_cls, init_kwargs=arguments)
        self._merge(self.values, from_file(), (), from_file.origin)
        self._merge(self.values, from_environment(), (), from_environment.origin)
        self._merge(self.values, given(), (), lambda _path: Origin("argument"))
        self.mistakes = from_file.mistakes + from_environment.mistakes
        self.file = from_file.path

    def _merge(
        self,
        values: dict[str, Any],
        more: Mapping[str, Any],
        path: Keys,
        origin: Callable[[Keys], Origin],
    ) -> None:
        for key, value in more.items():
            here = (*path, str(key))
            if isinstance(value, dict) and isinstance(values.get(key), dict):
                self._merge(values[key], value, here, origin)
                continue
            for old in [old for old in self.origins if old[: len(here)] == here]:
                del self.origins[old]
            values[key] = dict(value) if isinstance(value, dict) else value
            self.origins.update((leaf, origin(leaf)) for leaf in _leaves(value, here))

    def origin(self, path: Keys) -> Origin:
        """Return where the value at a path came from."""
        return find_origin(self.origins, path)


def find_origin(origins: Mapping[Keys, Origin], path: Keys) -> Origin:
    """Return where the value at a path, or what is in it or above it, came from."""
    for known, origin in origins.items():
        if known[: len(path)] == path or path[: len(known)] == known:
            return origin
    return DEFAULT


def _leaves(value: object, path: Keys) -> Iterator[Keys]:
    """Yield the paths of what has no keys of its own."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, str(key)))
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            yield from _leaves(inner, (*path, str(number)))
    else:
        yield path
