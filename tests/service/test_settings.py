"""Settings of the service: where they come from, what is refused, and that no secret shows."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import traceback
from pathlib import Path
from typing import Any

import pytest

from kvoffload import ConfigError, LRUManagerFactory, ManagerSettings, NamespaceShare

try:
    from kvoffload.service.access import ANYONE, Principal, Right
    from kvoffload.service.limits import Limits
    from kvoffload.service.settings import NamespaceSettings, ServiceSettings, TokenSettings
except ModuleNotFoundError as exc:
    if exc.name not in {"pydantic", "pydantic_settings"} or os.environ.get("CI") == "true":
        raise
    pytest.skip(f"the service needs the extra server: {exc}", allow_module_level=True)

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
OPEN: dict[str, Any] = {"unprotected": True}
SECRET = "Correct-Horse.Battery~Staple"  # what can be a token, and can be found in any text
HEX = "9f" * 32


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("KVOFFLOAD_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def mistakes(**values: Any) -> list[str]:
    """Return what is said of wrong settings, line by line."""
    with pytest.raises(ConfigError) as caught:
        ServiceSettings(**values)
    assert type(caught.value).__name__ == "SettingsError"
    assert caught.value.__context__ is None  # pydantic's error would show what was given
    first, *more = str(caught.value).splitlines()
    if not more:
        return [first]
    assert first == f"{len(more)} mistakes in the settings:"
    return [line.strip() for line in more]


# Where they come from


def test_defaults_are_those_of_the_manager() -> None:
    settings = ServiceSettings(**OPEN)
    assert (settings.host, settings.port, settings.block_bytes) == ("127.0.0.1", 8401, 2 * MIB)
    assert settings.manager_settings() == ManagerSettings(
        hot_blocks=512, block_bytes=2 * MIB, staging_bytes=256 * MIB, shares={}
    )


def test_arguments_before_environment_before_file_before_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('hot = "64MiB"\nwarm = "64MiB"\nport = 1\nunprotected = true\n')
    monkeypatch.setenv("KVOFFLOAD_WARM", "128 MiB")
    monkeypatch.setenv("KVOFFLOAD_PORT", "2")
    settings = ServiceSettings(settings=file, port=3)
    assert (settings.hot, settings.warm, settings.port) == (64 * MIB, 128 * MIB, 3)
    assert settings.file == file
    origins = {key: (origin.kind, origin.name) for key, origin in settings.origins().items()}
    assert origins["hot"] == ("file", str(file))
    assert origins["warm"] == ("environment", "KVOFFLOAD_WARM")
    assert origins["port"] == ("argument", "")
    assert origins["cold"] == ("default", "")


def test_nested_keys_of_all_sources_come_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kvoffload.toml").write_text(
        'unprotected = true\n[namespaces.team-a]\nmax = "8GiB"\nreserved = "64MiB"\n'
    )
    monkeypatch.setenv("KVOFFLOAD_NAMESPACES", '{"team-a": {"reserved": "32MiB"}}')
    monkeypatch.setenv("KVOFFLOAD_NAMESPACES__TEAM_B__MAX", "2GiB")
    settings = ServiceSettings(namespaces={"c": {"max": GIB}})
    assert settings.namespaces == {
        "team-a": NamespaceSettings(max=8 * GIB, reserved=32 * MIB),
        "team_b": NamespaceSettings(max=2 * GIB),
        "c": NamespaceSettings(max=GIB),
    }
    assert {
        key: str(origin)
        for key, origin in settings.origins().items()
        if key.startswith("namespaces")
    } == {
        "namespaces.team-a.max": "kvoffload.toml",
        "namespaces.team-a.reserved": "KVOFFLOAD_NAMESPACES",
        "namespaces.team_b.max": "KVOFFLOAD_NAMESPACES__TEAM_B__MAX",
        "namespaces.team_b.reserved": "default",
        "namespaces.c.max": "argument",
        "namespaces.c.reserved": "default",
    }


def test_tokens_of_the_environment_replace_those_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "kvoffload.toml"
    file.write_text('[[tokens]]\ntoken = "a"\n[[tokens]]\ntoken = "b"\nrights = ["read"]\n')
    both = ServiceSettings()
    assert [token.rights for token in both.tokens] == [["read", "write"], ["read"]]
    assert str(both.origin("tokens", "1", "rights")) == "kvoffload.toml"
    monkeypatch.setenv("KVOFFLOAD_TOKENS__0__TOKEN", "c")
    monkeypatch.setenv("KVOFFLOAD_TOKENS__0__NAMESPACES", "one, two")
    settings = ServiceSettings()
    (token,) = settings.tokens
    assert token.namespaces == ["one", "two"]
    assert str(settings.origin("tokens", "0", "token")) == "KVOFFLOAD_TOKENS__0__TOKEN"
    assert str(settings.origin("tokens", "0", "rights")) == "default"


def test_the_file_is_named_by_argument_or_environment_or_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(("kvoffload.toml", "environment.toml", "argument.toml"), 1):
        (tmp_path / name).write_text(f"port = {number}\n")
    assert ServiceSettings(**OPEN).port == 1
    monkeypatch.setenv("KVOFFLOAD_SETTINGS", "environment.toml")
    assert ServiceSettings(**OPEN).port == 2
    assert ServiceSettings(settings="argument.toml", **OPEN).port == 3


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "settings (argument): the settings file f.toml can't be read: No such file"),
        (b"port = \xff", "settings (argument): the settings file f.toml is no UTF-8"),
        (b"[[tokens]]\ntoken = 'half", "the settings file f.toml is no valid TOML at"),
    ],
)
def test_an_unusable_file(content: bytes | None, complaint: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "f.toml").write_bytes(content)
    (line,) = mistakes(settings="f.toml", **OPEN)
    assert complaint in line
    assert "half" not in line


def test_everything_reaches_the_manager(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "block_bytes": "64KiB",
        "hot": "1MiB",
        "warm": 200_000,
        "cold": "1 MB",
        "cold_path": tmp_path / "cold",
        "policy": "lru",
        "prefetch_lookahead": 5,
        "promote_threshold": 6,
        "cold_admission": "reused",
        "watermarks": "0.1, 0.2",
        "when_full": "reject",
        "write_policy": "through",
        "fsync": "always",
        "direct_io": "off",
        "io_timeout_s": "none",
        "min_free": "1KiB",
        "encryption_key": HEX,
        "remote_url": "redis://:secret@cache",
        "remote_layout": "model/bf16",
        "remote_timeout_s": 0.25,
        "remote_ttl_s": 0,
        "remote_queue_bytes": "1GiB",
        "remote_admission": "reused",
        "staging": "8MiB",
        "reservation_ttl_s": 7,
        "close_timeout_s": 8,
        "namespace": "mine",
        "namespaces": {"a": {"max": "1MiB", "reserved": "64KiB"}, "": {}},
    }
    made = ServiceSettings(**given, **OPEN).manager_settings()
    assert made == ManagerSettings(
        hot_blocks=16,
        warm_blocks=3,
        cold_blocks=15,
        cold_path=tmp_path / "cold",
        block_bytes=65536,
        policy="lru",
        prefetch_lookahead=5,
        promote_threshold=6,
        cold_admission="reused",
        watermarks=(0.1, 0.2),
        when_full="reject",
        write_policy="through",
        fsync="always",
        direct_io="off",
        io_timeout_s=None,
        min_free_bytes=1024,
        encryption_key=bytes.fromhex(HEX),
        staging_bytes=8 * MIB,
        reservation_ttl_s=7.0,
        close_timeout_s=8.0,
        namespace="mine",
        shares={"a": NamespaceShare(max_bytes=MIB, reserved_bytes=65536), "": NamespaceShare()},
        remote_url="redis://:secret@cache",
        remote_layout="model/bf16",
        remote_timeout_s=0.25,
        remote_ttl_s=0.0,
        remote_queue_bytes=GIB,
        remote_admission="reused",
    )
    LRUManagerFactory.create_async(made)


def test_tokens_open_what_they_are_bound_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("second\r\n")
    access = ServiceSettings(
        tokens=[
            {"token": "first"},
            {"token_file": "file", "namespaces": ["a", "b"], "rights": ["read"]},
            {"token_sha256": hashlib.sha256(b"third").hexdigest().upper(), "rights": ["admin"]},
        ]
    ).access()
    assert access.is_protected
    assert access.principal("first") == Principal(None, frozenset({Right.READ, Right.WRITE}))
    assert access.principal("second") == Principal(frozenset("ab"), frozenset({Right.READ}))
    assert access.principal("third") == Principal(None, frozenset({Right.ADMIN}))
    assert access.principal("fourth") is access.principal(None) is None
    assert ServiceSettings(**OPEN).access().principal(None) == ANYONE


def test_everything_reaches_the_limits() -> None:
    settings = ServiceSettings(
        max_body="8MiB",
        max_batch_blocks=2,
        max_concurrent=3,
        max_sessions=4,
        session_ttl_s=5,
        body_timeout_s=6,
        drain_timeout_s=7,
        **OPEN,
    )
    assert settings.limits() == Limits(
        max_body_bytes=8 * MIB,
        max_batch_blocks=2,
        max_concurrent=3,
        max_sessions=4,
        session_ttl_s=5.0,
        body_timeout_s=6.0,
        drain_timeout_s=7.0,
    )
    assert ServiceSettings(**OPEN).limits() == Limits()


# Sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * GIB),
        ("512 MiB", 512 * MIB),
        (" 512mib ", 512 * MIB),
        ("1.5GiB", 3 * GIB // 2),
        ("2G", 2 * GIB),
        ("10MB", 10_000_000),
        ("4194304", 4 * MIB),
        (4 * MIB, 4 * MIB),
    ],
)
def test_sizes_as_people_write_them(text: str | int, size: int) -> None:
    assert ServiceSettings(hot=text, **OPEN).hot == size


@pytest.mark.parametrize(
    ("size", "complaint"),
    [
        ("8GB of", "must be a size like 65536, 64KiB or 2 GiB, not '8GB of'"),
        ("-1GiB", "must be a size like"),
        (-1, "must be a size from 0 to 1 EiB, not -1"),
        (8.5, "must be a size like"),
        (True, "must be a size like"),
        (None, "must be a size like"),
        ("", "must be a size like"),
        ("0.3KiB", "must be a whole number of bytes, not '0.3KiB'"),
        ("1" * 5000, "must be a size like"),
        ("99999999TiB", "must be a size from 0 to 1 EiB"),
        ("1MiB", "1 MiB has no room for one block of 2 MiB; it must be at least that"),
        (0, "0 B has no room for one block of 2 MiB"),
    ],
)
def test_sizes_that_are_none(size: object, complaint: str) -> None:
    (line,) = mistakes(hot=size, **OPEN)
    assert line.startswith(f"hot (argument): {complaint}")


def test_sizes_are_whole_blocks_and_no_more() -> None:
    made = ServiceSettings(hot="5MiB", warm="2MiB", **OPEN).manager_settings()
    assert (made.hot_blocks, made.warm_blocks) == (2, 1)


# What is refused


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"hit": "1GiB"}, "hit (argument): there is no such key; the nearest is hot"),
        (
            {"namespaces": {"a": {"maxx": 1}}},
            "namespaces.a.maxx (argument): there is no such key; the nearest is max",
        ),
        ({"warm": "1MiB"}, "warm (argument): 1 MiB has no room for one block of 2 MiB; it must be"),
        ({"block_bytes": 0}, "block_bytes (argument): must be from 1 byte to 1 GiB, not 0 B"),
        (
            {"block_bytes": "2GiB"},
            "block_bytes (argument): must be from 1 byte to 1 GiB, not 2 GiB",
        ),
        ({"max_body": "1MiB"}, "max_body (argument): 1 MiB has no room for one block of 2 MiB"),
        ({"hot": "900TiB"}, "hot (argument), staging (default): need 900.2 TiB of memory, with"),
        (
            {"staging": "900TiB"},
            "hot (default), staging (argument): need 900.0 TiB of memory, with the bookkeeping",
        ),
        (
            {"cold": "1000TiB", "cold_path": "c", "block_bytes": "512MiB", "hot": "1GiB"},
            "cold (argument): need 1,000.0 TiB in c, and there is room for",
        ),
        (
            {"cold": "1000TiB", "cold_path": "c", "block_bytes": "256KiB", "hot": "1MiB"},
            "hot (argument), staging (default), cold (argument): need 2.0 TiB of memory, with the",
        ),
        (
            {"cold": "1000TiB", "cold_path": "c", "block_bytes": 4096},
            "cold (argument): 1,000.0 TiB are more than 4294967295 blocks of 4 KiB",
        ),
        (
            {"cold": "4MiB", "cold_path": "c", "min_free": "1000TiB"},
            "cold (argument), min_free (argument): need 1,000.0 TiB in c, and there is room for",
        ),
        ({"cold": "4MiB"}, "cold (argument): 4 MiB on disk need a directory: set cold_path, or"),
        ({"cold_path": "c"}, "cold_path (argument): there is a directory and no size for it"),
        ({"cold_path": 5}, "cold_path (argument): must be a path, not 5"),
        ({"cold_path": ""}, "cold_path (argument): must be a path, and is empty"),
        ({"remote_url": "http://cache"}, "remote_url (argument): the url of a remote tier must be"),
        ({"remote_url": "redis://c:x"}, "remote_url (argument): the port or the database is no"),
        ({"remote_url": 5}, "remote_url (argument): must be a valid string"),
        ({"remote_timeout_s": 0}, "remote_timeout_s (argument): must be greater than 0, not 0"),
        ({"remote_ttl_s": -1}, "remote_ttl_s (argument): must be greater than or equal to 0, not"),
        ({"remote_queue_bytes": "many"}, "remote_queue_bytes (argument): must be a size like"),
        (
            {"remote_admission": "some"},
            "remote_admission (argument): must be 'all', 'likely' or 'reused', not 'some'",
        ),
        ({"remote_layout": 5}, "remote_layout (argument): must be a valid string, not 5"),
        ({"policy": "best"}, "policy (argument): must be one of arc, fifo, lru, s3fifo, weighted"),
        ({"watermarks": [0.5, 0.2]}, "watermarks (argument): watermarks are two shares"),
        ({"fsync": "never"}, "fsync (argument): must be 'flush' or 'always', not 'never'"),
        ({"io_timeout_s": 0}, "io_timeout_s (argument): must be greater than 0, not 0"),
        (
            {"session_ttl_s": float("nan")},
            "session_ttl_s (argument): must be greater than 0, not NaN",
        ),
        ({"port": 65536}, "port (argument): must be less than or equal to 65535, not 65536"),
        ({"port": True}, "port (argument): must be a number, not True"),
        ({"host": ""}, "host (argument): is empty"),
        ({"uds": "s", "port": 1}, "uds (argument), port (argument): a service listens on a Unix"),
        ({"uds": "s" * 108}, "uds (argument): the path of a Unix socket has at most 107 bytes"),
        ({"uds": "no/s"}, "uds (argument): no is no directory"),
        (
            {"host": "0.0.0.0"},
            "unprotected (argument), host (argument): everybody who reaches 0.0.0.0 could read",
        ),
        ({"host": "example.org"}, "unprotected (argument), host (argument): everybody who"),
        ({"tokens": [{"token": "a"}]}, "unprotected (argument), tokens (argument): tokens protect"),
        (
            {"namespaces": {"a": {"reserved": "600MiB"}, "b": {"reserved": "600MiB"}}},
            "namespaces.a.reserved (argument), namespaces.b.reserved (argument): 1.17 GiB are "
            "reserved together, in whole blocks, and all tiers together have 1 GiB",
        ),
        (
            {"hot": "4MiB", "namespaces": {name: {"reserved": 2 * MIB + 1} for name in "ab"}},
            "namespaces.a.reserved (argument), namespaces.b.reserved (argument): 8 MiB are "
            "reserved together, in whole blocks, and all tiers together have 4 MiB",
        ),
        (
            {"namespaces": {"a": {"max": "4MiB", "reserved": "6MiB"}}},
            "namespaces.a.reserved (argument), namespaces.a.max (argument): 6 MiB are reserved, "
            "and at most 4 MiB may be had",
        ),
        ({"namespaces": {"a": {"max": 1}}}, "namespaces.a.max (argument): 1 B has no room"),
        ({"namespaces": {"*": {}}}, "namespaces.* (argument): '*' stands for all namespaces"),
        ({"namespaces": {"n" * 200: {}}}, f"namespaces.{'n' * 200} (argument): a namespace has at"),
        ({"log_level": "loud"}, "log_level (argument): must be 'critical', 'error', 'warning',"),
        ({"encryption_key": HEX, "encryption_key_file": "f"}, "encryption_key (argument), encry"),
        ({"encryption_key_file": "f"}, "encryption_key_file (argument): the file f can't be read"),
    ],
)
def test_a_mistake_says_its_key_and_origin(given: dict[str, Any], complaint: str) -> None:
    (line,) = mistakes(**(OPEN | given))
    assert line.startswith(complaint)


@pytest.mark.parametrize(
    ("tokens", "complaint"),
    [
        ([{}], "tokens.0 (argument): needs one of token, token_file and token_sha256"),
        ([{"token": "a", "token_file": "f"}], "tokens.0 (argument): needs one of"),
        ([{"token": ""}], "tokens.0.token (argument): is empty"),
        ([{"token_file": "empty"}], "tokens.0.token_file (argument): the file is empty"),
        ([{"token_file": "no"}], "tokens.0.token_file (argument): the file no can't be read: No"),
        ([{"token_sha256": "ab"}], "tokens.0.token_sha256 (argument): must be 64 hex digits"),
        (
            [{"token_sha256": hashlib.sha256(b"").hexdigest()}],
            "tokens.0.token_sha256 (argument): is the hash of an empty token",
        ),
        (
            [{"token": "a"}, {"token": "b"}, {"token_file": "a"}],
            "tokens.2 (argument): the same token as tokens.0",
        ),
        (
            [{"token": "a"}, {"token_sha256": hashlib.sha256(b"a").hexdigest()}],
            "tokens.1 (argument): the same token as tokens.0",
        ),
        ([{"token": "a", "rights": []}], "tokens.0.rights (argument): is empty"),
        ([{"token": "a", "rights": ["reed"]}], "tokens.0.rights.0 (argument): must be 'read', "),
        ([{"token": "a", "namespaces": ["*", "b"]}], "tokens.0.namespaces (argument): '*' is all"),
        ([{"tokken": "a"}], "tokens.0.tokken (argument): there is no such key; the nearest is "),
        ("a", "tokens (argument): must be a valid list"),
    ],
)
def test_a_token_that_is_none(tokens: object, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "a").write_text("a\n")
    (line,) = mistakes(tokens=tokens)
    assert line.startswith(complaint)


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"HTO": "1"}, "KVOFFLOAD_HTO: there is no such setting; the nearest is KVOFFLOAD_HOT"),
        ({"HOT_BLOCKS": "1"}, "KVOFFLOAD_HOT_BLOCKS: there is no such setting; the nearest is "),
        ({"HOT__SIZE": "1"}, "KVOFFLOAD_HOT__SIZE: there is no such setting; the nearest is "),
        ({"TOKENS": "[1"}, "KVOFFLOAD_TOKENS: is no valid JSON"),
        ({"TOKENS__1__TOKEN": "x"}, "KVOFFLOAD_TOKENS__1__TOKEN: number the tokens 0, 1, 2"),
        ({"TOKENS____TOKEN": "x"}, "KVOFFLOAD_TOKENS____TOKEN: there is a key missing"),
        ({"PORT": "1", "port": "2"}, "KVOFFLOAD_port: another variable sets this too"),
        ({"NAMESPACES": "[]", "NAMESPACES__A__MAX": "1"}, "KVOFFLOAD_NAMESPACES__A__MAX: another"),
        ({"COLD_PATH": ""}, "cold_path (KVOFFLOAD_COLD_PATH): must be a path, and is empty"),
        ({"HOT": ""}, "hot (KVOFFLOAD_HOT): must be a size like 65536, 64KiB or 2 GiB, not ''"),
        ({"PORT": "x"}, "port (KVOFFLOAD_PORT): must be a valid integer"),
    ],
)
def test_a_mistake_in_the_environment_names_the_variable(
    variables: dict[str, str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"KVOFFLOAD_{name}", value)
    found = mistakes(unprotected="TOKENS" not in str(variables))
    assert [line for line in found if line.startswith(complaint)]


def test_the_token_of_a_client_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """`kvoffload top` has it in the same environment."""
    monkeypatch.setenv("KVOFFLOAD_TOKEN", SECRET)
    assert not ServiceSettings(**OPEN).tokens
    with pytest.raises(ConfigError, match=r"\(KVOFFLOAD_TOKEN is for clients\)"):
        ServiceSettings().access()


def test_all_mistakes_come_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of single values, of several together and of the sources, in one error."""
    (tmp_path / "kvoffload.toml").write_text(
        'hot = "lots"\ncold = "4MiB"\nnamespaces.a.max = "x"\n'
        '[[tokens]]\ntoken = "a"\n[[tokens]]\nrights = 5\ntoken = "b"\n[[tokens]]\ntoken = "a"\n'
    )
    monkeypatch.setenv("KVOFFLOAD_NOTHING", "1")
    found = mistakes(port=-1, namespaces={"b": {"reserved": "9TiB", "max": "8TiB"}})
    beginnings = (
        "KVOFFLOAD_NOTHING: there is no such setting",
        "hot (kvoffload.toml): must be a size",
        "port (argument): must be greater than or equal to 0, not -1",
        "tokens.1.rights (kvoffload.toml): must be a valid list, not 5",
        "namespaces.a.max (kvoffload.toml): must be a size",
        "cold (kvoffload.toml): 4 MiB on disk need a directory",
        "namespaces.b.reserved (argument), namespaces.b.max (argument): 9.0 TiB are reserved",
        "tokens.2 (kvoffload.toml): the same token as tokens.0",
    )
    assert len(found) == len(beginnings)
    for line, beginning in zip(found, beginnings, strict=True):
        assert line.startswith(beginning)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "localhost"])
def test_unprotected_on_loopback(host: str) -> None:
    assert ServiceSettings(host=host, **OPEN).host == host


def test_unprotected_on_a_unix_socket() -> None:
    assert ServiceSettings(uds="socket", **OPEN).uds == Path("socket")


def test_a_container_with_less_memory(tmp_path: Path) -> None:
    from kvoffload.sizes import _limits_of_groups

    (tmp_path / "cgroup").write_text("4:memory:/a/b\n3:cpu:/\n0::/c/d\n")
    for path, text in (
        ("memory/a/b/memory.limit_in_bytes", "5000"),
        ("memory/memory.limit_in_bytes", "9000"),
        ("c/memory.max", "max"),
        ("c/d/memory.max", "7000"),
        ("memory.max", "1"),
    ):
        file = tmp_path / "groups" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    limits = _limits_of_groups(tmp_path / "cgroup", tmp_path / "groups")
    assert limits == [5000, 9000, 7000, 1]
    assert _limits_of_groups(tmp_path / "none", tmp_path) == []


# Secrets


def secrets_everywhere() -> list[tuple[dict[str, str], dict[str, Any]]]:
    """Return settings with a secret in a good place or a bad one: environment, and arguments."""
    return [
        ({}, {"tokens": [{"token": SECRET}]}),
        ({}, {"tokens": [{"token": SECRET}, {"token": SECRET}]}),
        ({}, {"tokens": [{"token": SECRET + " two"}]}),
        ({}, {"tokens": [{"token": [SECRET]}]}),
        ({}, {"tokens": [{"token": {"a": SECRET}}]}),
        ({}, {"tokens": [{"token_sha256": SECRET}]}),
        ({}, {"tokens": [{"tokn": SECRET}]}),
        ({}, {"tokens": [{"token": SECRET, "rights": "reed"}]}),
        ({}, {"tokens": [SECRET]}),
        ({}, {"tokens": SECRET}),
        ({}, {"tokens": {"x": SECRET}}),
        ({}, {"tokens": [{"token_file": "file"}]}),
        ({}, {"tokens": [{"token_file": "long"}]}),
        ({}, {"encryption_key": SECRET}),
        ({}, {"encryption_key": (SECRET + 32 * "x")[:32]}),
        ({}, {"encryption_key": [SECRET]}),
        ({}, {"encryption_key_file": "file"}),
        ({}, {"remote_url": f"redis://:{SECRET}@cache"}),
        ({}, {"remote_url": f"http://:{SECRET}@cache"}),
        ({}, {"remote_url": f":{SECRET}@cache"}),
        ({}, {"remote_url": f"redis://:{SECRET}@cache:port"}),
        ({}, {"remote_url": [f"redis://:{SECRET}@cache"]}),
        ({}, {"remote_url": f"redis://:{SECRET}@cache", "hot": 1}),
        ({"REMOTE_URL": f"redis://:{SECRET}@cache"}, {}),
        ({"REMOTE_URL": f'["{SECRET}'}, {}),
        ({"REMOTE_URL__X": SECRET}, {}),
        ({"TOKEN": SECRET}, {}),
        ({"TOKENS": SECRET}, {}),
        ({"TOKENS": f'["{SECRET}'}, {}),
        ({"TOKENS": f'["{SECRET}"]'}, {}),
        ({"TOKENS": f'[{{"token": "{SECRET}"}}, "{SECRET}"]'}, {}),
        ({"TOKENS__0": SECRET}, {}),
        ({"TOKENS__0__TOKEN": SECRET}, {}),
        ({"TOKENS__0__TOKN": SECRET}, {}),
        ({"TOKENS__0__TOKEN": SECRET, "TOKENS__0__TOKEN__X": SECRET}, {}),
        ({"ENCRYPTION_KEY": SECRET}, {}),
        ({"ENCRYPTION_KEY__X": SECRET}, {}),
    ]


@pytest.mark.parametrize(("variables", "given"), secrets_everywhere())
def test_no_secret_shows(
    variables: dict[str, str],
    given: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text(f"{SECRET}\n")
    (tmp_path / "long").write_text(f"{SECRET}\n" * 9999)
    for name, value in variables.items():
        monkeypatch.setenv(f"KVOFFLOAD_{name}", value)
    try:
        settings = ServiceSettings(**given)
    except ConfigError as exc:
        shown = [repr(exc), "".join(traceback.format_exception(exc)), repr(vars(exc))]
    else:
        shown = [repr(settings), str(settings), repr(list(settings.in_force()))]
        shown += [repr(settings.model_dump()), settings.model_dump_json()]
        shown += [repr(settings.manager_settings())]
    assert shown
    for text in shown:
        assert SECRET not in text
        assert hashlib.sha256(SECRET.encode()).hexdigest() not in text


def test_no_key_shows(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(bytes.fromhex(HEX))
    for given in ({"encryption_key": HEX}, {"encryption_key_file": "key"}):
        settings = ServiceSettings(**given, **OPEN)
        assert settings.manager_settings().encryption_key == bytes.fromhex(HEX)
        for text in (repr(settings), repr(vars(settings)), repr(list(settings.in_force()))):
            assert HEX not in text
            assert repr(bytes.fromhex(HEX)) not in text


def test_settings_can_be_read_again_and_do_not_change() -> None:
    settings = ServiceSettings(tokens=[TokenSettings.model_validate({"token": SECRET})])
    with pytest.raises(Exception, match="frozen"):
        settings.port = 1
    assert copy.copy(settings) == settings
    values = {setting.key: setting.value for setting in settings.in_force()}
    assert values["tokens.0.token"] == "set"
    assert json.loads(json.dumps(values)) == values


def test_mistakes_travel_between_processes() -> None:
    """As errors do that a worker process sends to its parent."""
    with pytest.raises(ConfigError) as caught:
        ServiceSettings(port=-1)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)


def test_without_tokens_nobody_may_do_anything() -> None:
    """No mistake by itself, for the cache may be used inside of an application alone."""
    settings = ServiceSettings()
    assert not settings.lets_somebody_in
    with pytest.raises(ConfigError, match=r"tokens \(default\): there are none, so nobody"):
        settings.access()
