"""Settings of the service: from arguments, the environment, a TOML file, and defaults."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, PrivateAttr, SecretBytes, SecretStr, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from ..config import ManagerSettings
from ..shares import NamespaceShare
from .access import AccessControl, Right, Token
from .checking import Checker
from .fields import (
    Count,
    FilePath,
    Filled,
    Listed,
    Lower,
    Namespace,
    Policy,
    Port,
    Seconds,
    SecondsOrNone,
    SecondsOrZero,
    Size,
    Some,
    Watermarks,
    describe,
)
from .in_force import InForce, in_force
from .limits import Limits
from .mistakes import Mistake, Origin, SettingsError
from .sources import CLIENTS_VARIABLE, PREFIX, Gathered, Keys, find_origin

MIB, GIB = 1 << 20, 1 << 30

_T = TypeVar("_T")
_Listed = Annotated[list[_T], Listed, Some]


class TokenSettings(BaseModel):
    """One token, which clients send as `Authorization: Bearer ...`; given in one of three ways.

    Attributes:
        token: The token itself.
        token_file: A file with the token in one line.
        token_sha256: Its SHA-256 in hexadecimal, so that the settings don't give it away.
        namespaces: Namespaces that it opens, or `"*"` for all.
        rights: What it allows there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    token: SecretStr | None = None
    token_file: FilePath | None = None
    token_sha256: SecretStr | None = None
    namespaces: _Listed[Namespace] = ["*"]
    rights: _Listed[Literal["read", "write", "admin"]] = ["read", "write"]


class NamespaceSettings(BaseModel):
    """What one namespace may take, and what is kept for it.

    Attributes:
        max: Bytes that it may have in all tiers together; no limit by default.
        reserved: Bytes up to which nothing of it is evicted for another namespace.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    max: Size | None = None
    reserved: Size = 0


class ServiceSettings(BaseSettings):
    """What a service is made from.

    Arguments go before the environment (`KVOFFLOAD_HOT=8GiB`; nested keys with two underscores,
    `KVOFFLOAD_TOKENS__0__TOKEN_FILE=...`, in lower case then, or as JSON), that before a TOML
    file, and that before the defaults. A size is a number of bytes or text like `"8GiB"`; tiers
    get as many whole blocks as fit theirs. A relative path starts in the working directory.

    Args:
        settings: The TOML file; by default the one that `KVOFFLOAD_SETTINGS` names, or
            `kvoffload.toml` in the working directory if it is there.
        values: Any of the attributes.

    Attributes:
        block_bytes: Size of a block's slot; a cold directory keeps the one that it was made with.
        hot: Size of the hot tier, in memory.
        warm: Size of the warm tier, in memory; 0 for none.
        cold: Size of the cold tier, on disk; 0 for none.
        cold_path: Directory of the cold tier.
        policy: Eviction policy; see `AsyncLRUManager`, also for the next ones.
        prefetch_lookahead: Hinted blocks that are read at a time.
        promote_threshold: Uses in a lower tier that promote a block.
        cold_admission: What is written to the cold tier.
        watermarks: Shares of a tier's slots between which room is made ahead.
        when_full: What a store does that meets no room made ahead.
        write_policy: When blocks are written to the cold tier.
        fsync: When the cold tier makes sure of its writes; see `DiskTier`, also for the next ones.
        direct_io: Whether the cold tier bypasses the page cache.
        io_timeout_s: Seconds that a file operation may take; `"none"` for any time.
        min_free: Bytes that the cold tier leaves free on the file system.
        encryption_key: Key of an encrypted cold tier, 64 hex digits.
        encryption_key_file: A file with it, in 32 bytes or 64 hex digits.
        remote_url: Engine that this service shares with others, as `redis://cache:6379`; see
            `kvoffload.remote_tier`. It may have a password, so it is never shown.
        remote_layout: What the payloads look like: model, number format, parallel ranks. Services
            that share blocks have the same one.
        remote_timeout_s: Seconds that a call to the engine may take; see `AsyncLRUManager`, also
            for the next ones.
        remote_ttl_s: Seconds that its answer to a lookup is believed.
        remote_queue_bytes: Bytes of blocks that may wait to be sent to it.
        remote_admission: Which blocks are sent to it.
        staging: Budget of the buffers for blocks that have no address of their own.
        reservation_ttl_s: Seconds until a two-phase holder that never completes is given up.
        close_timeout_s: Seconds for draining and flushing at close, and as much for the tiers.
        namespace: Isolation domain of the manager itself.
        host: Address to listen on.
        port: Port to listen on; 0 for any that is free.
        uds: Unix socket to listen on, instead of host and port.
        unprotected: Whether everybody who can connect may do everything; on loopback or a Unix
            socket alone.
        dashboard: Whether there is a page at `/`.
        tokens: Who may do what.
        namespaces: Shares of namespaces, by name.
        max_body: Longest body of a request.
        max_batch_blocks: Most blocks in a request.
        max_concurrent: Most requests at once.
        max_sessions: Most sessions at once.
        session_ttl_s: Seconds until a session without its stream and without any call ends.
        body_timeout_s: Seconds that a body may take to come.
        drain_timeout_s: Seconds that requests under way get to end when the service stops.
        log_level: What is logged: this and what is more severe.

    Raises:
        SettingsError: Settings are wrong; a `ConfigError` that tells all mistakes, each with its
            key and where the value came from, and no secret.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        validate_default=False,
    )

    block_bytes: Size = 2 * MIB
    hot: Size = GIB
    warm: Size = 0
    cold: Size = 0
    cold_path: FilePath | None = None
    policy: Policy = "weighted"
    prefetch_lookahead: Count = 4
    promote_threshold: Count = 3
    cold_admission: Literal["all", "likely", "reused"] = "all"
    watermarks: Watermarks = (0.02, 0.05)
    when_full: Literal["reject", "wait"] = "wait"
    write_policy: Literal["back", "through"] = "back"
    fsync: Literal["flush", "always"] = "flush"
    direct_io: Literal["auto", "on", "off"] = "auto"
    io_timeout_s: SecondsOrNone = 30.0
    min_free: Size = 0
    encryption_key: SecretStr | None = None
    encryption_key_file: FilePath | None = None
    remote_url: SecretStr | None = None
    remote_layout: str = ""
    remote_timeout_s: Seconds = 0.5
    remote_ttl_s: SecondsOrZero = 1.0
    remote_queue_bytes: Size = 256 * MIB
    remote_admission: Literal["all", "likely", "reused"] = "all"
    staging: Size = 256 * MIB
    reservation_ttl_s: Seconds = 600.0
    close_timeout_s: SecondsOrZero = 30.0
    namespace: Namespace = ""
    host: Filled = "127.0.0.1"
    port: Port = 8401
    uds: FilePath | None = None
    unprotected: bool = False
    dashboard: bool = True
    tokens: list[TokenSettings] = []
    namespaces: dict[Namespace, NamespaceSettings] = {}
    max_body: Size = 512 * MIB
    max_batch_blocks: Count = 4096
    max_concurrent: Count = 64
    max_sessions: Count = 1024
    session_ttl_s: Seconds = 60.0
    body_timeout_s: Seconds = 30.0
    drain_timeout_s: Seconds = 30.0
    log_level: Annotated[Literal["critical", "error", "warning", "info", "debug"], Lower] = "info"

    _file: Path | None = PrivateAttr(default=None)
    _origins: dict[Keys, Origin] = PrivateAttr(default_factory=dict)
    _digests: list[bytes] = PrivateAttr(default_factory=list)
    _encryption_key: SecretBytes | None = PrivateAttr(default=None)

    def __init__(self, *, settings: str | Path | None = None, **values: Any) -> None:
        file = None if settings is None else Path(settings)
        gathered = Gathered(type(self), values, file)
        mistakes = list(gathered.mistakes)
        wrong: set[Keys] = set()
        errors: list[ErrorDetails] = []
        try:
            super().__init__(**gathered.values)
        except ValidationError as exc:
            errors = exc.errors(include_url=False)
        # Not inside the `except`: the context of the error would have what was given, secrets too.
        if errors:
            for error in errors:
                path = tuple(str(part) for part in error["loc"] if part != "[key]")
                place = (".".join(path), gathered.origin(path))
                mistakes.append(Mistake([place], describe(error, _KNOWN)))
            wrong = _leave_out(gathered.values, errors)
            super().__init__(**gathered.values)
        checker = Checker(self, gathered, wrong)
        checker.check()
        mistakes += checker.mistakes
        if mistakes:
            raise SettingsError(mistakes)
        self._file = gathered.file
        self._origins = gathered.origins
        self._digests = checker.digests
        if checker.encryption_key is not None:
            self._encryption_key = SecretBytes(checker.encryption_key)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the one source that is left: `Gathered` has put the others together."""
        return (init_settings,)

    @property
    def file(self) -> Path | None:
        """The settings file that was read, if there was one."""
        return self._file

    def origin(self, *path: str) -> Origin:
        """Return where a value came from.

        Args:
            path: Its key, and the keys within that: `("namespaces", "team-a", "max")`.
        """
        return find_origin(self._origins, path)

    def in_force(self) -> Iterator[InForce]:
        """Yield each setting with its value and where that came from; secrets as `"set"`."""
        return in_force(self)

    def origins(self) -> dict[str, Origin]:
        """Return where each value came from, by its key with dots."""
        return {setting.key: setting.origin for setting in in_force(self)}

    def manager_settings(self) -> ManagerSettings:
        """Return the manager's part."""
        one, key = self.block_bytes, self._encryption_key
        return ManagerSettings(
            hot_blocks=self.hot // one,
            warm_blocks=self.warm // one,
            cold_blocks=self.cold // one,
            cold_path=self.cold_path,
            block_bytes=one,
            policy=self.policy,
            prefetch_lookahead=self.prefetch_lookahead,
            promote_threshold=self.promote_threshold,
            namespace=self.namespace,
            staging_bytes=self.staging,
            reservation_ttl_s=self.reservation_ttl_s,
            cold_admission=self.cold_admission,
            watermarks=self.watermarks,
            when_full=self.when_full,
            write_policy=self.write_policy,
            close_timeout_s=self.close_timeout_s,
            fsync=self.fsync,
            direct_io=self.direct_io,
            io_timeout_s=self.io_timeout_s,
            min_free_bytes=self.min_free,
            encryption_key=key.get_secret_value() if key else None,
            shares=self.shares(),
            remote_url=self.remote_url.get_secret_value() if self.remote_url else None,
            remote_layout=self.remote_layout,
            remote_timeout_s=self.remote_timeout_s,
            remote_ttl_s=self.remote_ttl_s,
            remote_queue_bytes=self.remote_queue_bytes,
            remote_admission=self.remote_admission,
        )

    @property
    def lets_somebody_in(self) -> bool:
        """Whether there are tokens, or everybody may do everything."""
        return bool(self.tokens) or self.unprotected

    def shares(self) -> dict[str, NamespaceShare]:
        """Return what namespaces may have at most, and what is kept for them."""
        return {
            name: NamespaceShare(max_bytes=share.max, reserved_bytes=share.reserved)
            for name, share in self.namespaces.items()
        }

    def access(self) -> AccessControl:
        """Return who may do what.

        Raises:
            SettingsError: Nobody may do anything: there are no tokens, and it is not unprotected.
        """
        if not self.lets_somebody_in:
            raise SettingsError([Mistake([("tokens", self.origin("tokens"))], _nobody())])
        tokens = [
            Token(
                digest,
                None if "*" in token.namespaces else frozenset(token.namespaces),
                frozenset(map(Right, token.rights)),
            )
            for digest, token in zip(self._digests, self.tokens, strict=True)
        ]
        return AccessControl(tokens, unprotected=self.unprotected)

    def limits(self) -> Limits:
        """Return how much the service takes on."""
        return Limits(
            max_body_bytes=self.max_body,
            max_batch_blocks=self.max_batch_blocks,
            max_concurrent=self.max_concurrent,
            max_sessions=self.max_sessions,
            session_ttl_s=self.session_ttl_s,
            body_timeout_s=self.body_timeout_s,
            drain_timeout_s=self.drain_timeout_s,
        )


def _nobody() -> str:
    """Say what to do where neither tokens nor `unprotected` are given."""
    clients = f" ({CLIENTS_VARIABLE} is for clients)" if CLIENTS_VARIABLE in os.environ else ""
    return (
        "there are none, so nobody could do anything: give some, as [[tokens]] in the settings "
        "file or as KVOFFLOAD_TOKENS__0__TOKEN_FILE, or say unprotected "
        f"(KVOFFLOAD_UNPROTECTED=true, --unprotected) on loopback or a Unix socket{clients}"
    )


_KNOWN = {
    "": list(ServiceSettings.model_fields),
    "tokens": list(TokenSettings.model_fields),
    "namespaces": list(NamespaceSettings.model_fields),
}


def _leave_out(values: dict[str, Any], errors: Sequence[ErrorDetails]) -> set[Keys]:
    """Take what is wrong out of the values, as little as may be; return the paths of it."""
    wrong: set[Keys] = set()
    for error in errors:
        key, *within = error["loc"]
        there = values.get(str(key))
        if key == "tokens" and within and isinstance(there, list | tuple):
            # Others keep their numbers.
            values["tokens"] = [*there]
            values["tokens"][int(within[0])] = TokenSettings()
        elif key == "namespaces" and within and isinstance(there, dict):
            there.pop(within[0], None)
        else:
            values.pop(str(key), None)
            within = []
        wrong.add((str(key), *map(str, within[:1])))
    return wrong
