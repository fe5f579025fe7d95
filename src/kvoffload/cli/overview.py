"""What a running service says of itself, fetched and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from ..errors import ConfigError, OffloadError
from ..metrics import ManagerStats, TierStats
from ..types import Medium, TierState

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from _typeshed import DataclassInstance

    _Record = TypeVar("_Record", bound=DataclassInstance)

TIMEOUT_S = 5.0
_PATH = "/v1/overview"


class UnreachableError(OffloadError):
    """The service can't be reached now, or takes no calls; later it may answer."""


@dataclass(frozen=True, slots=True)
class NamespaceUse:
    """One namespace of a service; counters in blocks, from the opening of the manager.

    Attributes:
        hits: Blocks that were looked up and ready.
        misses: Those that weren't.
        blocks: Blocks that it has, in all tiers.
        bytes: Payload bytes of those.
        max_bytes: Its quota; `None` for none.
        reserved_bytes: What others can't take from it.
    """

    hits: int = 0
    misses: int = 0
    blocks: int = 0
    bytes: int = 0
    max_bytes: int | None = None
    reserved_bytes: int = 0


@dataclass(frozen=True, slots=True)
class OperationLatency:
    """How long one kind of operation took; `None` before there was one."""

    count: int = 0
    p50_s: float | None = None
    p95_s: float | None = None
    p99_s: float | None = None


@dataclass(frozen=True, slots=True)
class LoopLag:
    """How long a task that is ready waits for the service's event loop."""

    p50_s: float | None = None
    p99_s: float | None = None
    max_s: float | None = None


@dataclass(frozen=True, slots=True)
class Overview:
    """A service at one moment.

    Attributes:
        version: Of kvoffload.
        uptime_s: Seconds since it started.
        draining: Whether it takes no new work and is about to end.
        sessions: Clients that hold something, or could.
        requests_total: HTTP requests so far.
        stats: Of all namespaces together.
        namespaces: Each one by itself.
        latencies: By operation.
        loop_lag: Of its event loop.
        raw: All of it, as it came.
    """

    version: str
    uptime_s: float
    draining: bool
    sessions: int
    requests_total: int
    stats: ManagerStats
    namespaces: Mapping[str, NamespaceUse]
    latencies: Mapping[str, OperationLatency]
    loop_lag: LoopLag
    raw: Mapping[str, object] = field(repr=False)


def parse_overview(text: str | bytes) -> Overview:
    """Return what the JSON says; fields of other versions are passed over.

    Raises:
        ValueError: It is no overview.
    """
    raw = json.loads(text)
    if not isinstance(raw, dict):
        raise ValueError("no JSON object")
    try:
        stats = raw["stats"]
        tiers = {name: _tier(tier) for name, tier in stats["tiers"].items()}
        return Overview(
            version=str(raw["version"]),
            uptime_s=_number(raw["uptime_s"]),
            draining=bool(raw["draining"]),
            sessions=int(_number(raw["sessions"])),
            requests_total=int(_number(raw["requests_total"])),
            stats=_record(ManagerStats, stats, tiers=tiers),
            namespaces={
                name: _record(NamespaceUse, one) for name, one in raw["namespaces"].items()
            },
            latencies={
                name: _record(OperationLatency, one) for name, one in raw["latencies"].items()
            },
            loop_lag=_record(LoopLag, raw["loop_lag"]),
            raw=raw,
        )
    except (KeyError, TypeError, AttributeError) as exc:
        raise ValueError(f"{type(exc).__name__}: {exc}") from exc


def _tier(tier: Mapping[str, object]) -> TierStats:
    medium, state = Medium(tier["medium"]), TierState(tier["state"])
    return _record(TierStats, tier, medium=medium, state=state)


def _record(kind: type[_Record], data: Mapping[str, object], **given: object) -> _Record:
    names = [each.name for each in fields(kind) if each.name in data and each.name not in given]
    optional = kind in (NamespaceUse, OperationLatency, LoopLag)
    numbers = {
        name: None if optional and data[name] is None else _number(data[name]) for name in names
    }
    return kind(**numbers, **given)


def _number(value: object) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return value


class ServiceClient:
    """Asks one service for its overview; blocks, so it is for the command line alone.

    Args:
        url: `http://host:port`, `https://host:port` or `unix:/path.sock`.
        token: Bearer token; `None` for none.

    Raises:
        ConfigError: The URL or the token is none.
        ModuleNotFoundError: httpx is not installed.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        # Late, for it takes a while to import and no other command needs it.
        import httpx

        self._httpx = httpx
        self._url = url
        base, socket = _parse_url(url)
        headers = {}
        if token is not None:
            if not token or not all("!" <= char <= "~" for char in token):
                raise ConfigError("a token is visible ASCII characters, without spaces")
            headers["Authorization"] = f"Bearer {token}"
        self._has_token = token is not None
        self._client = httpx.Client(
            base_url=base,
            headers=headers,
            timeout=TIMEOUT_S,
            transport=None if socket is None else httpx.HTTPTransport(uds=socket),
            # No proxy of the environment stands between us and a socket.
            trust_env=socket is None,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._client.close()

    def overview(self) -> Overview:
        """Return how the service is now.

        Raises:
            UnreachableError: It can't be reached, or takes no calls now.
            OffloadError: It refuses, or is no service of kvoffload.
        """
        try:
            response = self._client.get(_PATH)
        except self._httpx.TimeoutException:
            message = f"{self._url} did not answer within {TIMEOUT_S:g} s"
            raise UnreachableError(message) from None
        except self._httpx.TransportError as exc:
            raise UnreachableError(f"cannot connect to {self._url}: {exc}") from None
        status = response.status_code
        if status == 401:
            if self._has_token:
                raise OffloadError(f"{self._url} does not know this token")
            raise OffloadError(
                f"{self._url} wants a token: give --token-file, or set KVOFFLOAD_TOKEN"
            )
        if status == 403:
            raise OffloadError(
                f"this token may not see all of {self._url}: "
                "it needs the right admin, on all namespaces"
            )
        if status in (429, 503):
            why = "has too much to do" if status == 429 else "takes no calls now"
            raise UnreachableError(f"{self._url} {why}: it answered {status}")
        if status != 200:
            raise OffloadError(
                f"{self._url} is no kvoffload service: it answered {status} to GET {_PATH}"
            )
        try:
            return parse_overview(response.content)
        except ValueError:
            raise OffloadError(
                f"{self._url} is no kvoffload service, or one of another version: "
                f"what it answered to GET {_PATH} is no overview"
            ) from None


def _parse_url(url: str) -> tuple[str, str | None]:
    """Return the base URL, and the path of the socket if it is one."""
    if url.startswith("unix:"):
        path = url.removeprefix("unix:").removeprefix("//")
        if path:
            return "http://kvoffload", path
    else:
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            usable = None
        if usable and "@" in parts.netloc:
            raise ConfigError("the URL must not hold a user or a password; a token goes in a file")
        if usable and not (parts.query or parts.fragment):
            return url.rstrip("/"), None
    raise ConfigError(f"URL must be http://HOST:PORT or unix:/PATH.sock, not {url!r}")
