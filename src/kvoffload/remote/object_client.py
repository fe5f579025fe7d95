"""Requests to an object store, through `obstore`, as few as a tier of blocks needs.

What they fail with is one kind of error, whose message shows neither credentials nor URLs.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from importlib import util
from typing import ClassVar, Literal, TypeAlias
from urllib.parse import urlsplit

from ..errors import ConfigError
from ..types import Buffer

SCHEMES = ("s3", "gs", "az", "file")
LIST_OBJECTS = 1000
"""Objects of one page of a listing, and deleted by one request: what S3 allows."""
BASE_CLIENT_OPTIONS: Mapping[str, object] = {"connect_timeout": "2s", "timeout": "30s"}
"""For a call without a deadline of its caller's; one that is cancelled ends at once."""
MAX_RETRIES = 2
"""A store in the cloud fails one request of some ten thousand, and means it: "try again"."""
FIRST_RETRY_S, MOST_RETRY_S, RETRY_TIMEOUT_S = 0.02, 0.1, 1.0
MOST_SHOWN = 3
"""Characters of an option's value that a message may have; it would be unreadable without any."""
EXIT_S = 0.05
"""Seconds that a process waits before the interpreter ends: a thread of obstore's that is telling
of a request's end then, and has woken the event loop but not gone on itself, would abort it."""

Options: TypeAlias = Mapping[str, object]

_STATUS = re.compile(r"status code: (\d{3})([A-Za-z ]*)")
_CODE = re.compile(r"<Code>([\w.-]+)</Code>")
_MESSAGE = re.compile(r"<Message>([^<]{1,200})")
_CAUSE = re.compile(r"(?:message|error): \"([^\"\\]{1,200})\"|(InvalidCertificate)\(\s*(\w+)")
_ENDPOINT = re.compile(r"(aws|azure|azure_storage)?_?endpoint(_url(_s3)?)?", re.IGNORECASE)
_ENDPOINTS = ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")


class RequestError(Exception):
    """The store did not do what it was asked.

    Attributes:
        is_refusal: Whether it answered, and it was no.
    """

    def __init__(self, message: str, *, is_refusal: bool) -> None:
        super().__init__(message)
        self.is_refusal = is_refusal


def check_url(url: str) -> str:
    """Return the URL of a store, if it is one.

    Raises:
        ConfigError: It is none, or `obstore` is not installed.
    """
    scheme = url.partition("://")[0].lower() if isinstance(url, str) and "://" in url else ""
    form = "s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or file:///folder"
    if scheme not in SCHEMES:
        raise ConfigError(f"url must be {form}; this one begins with {scheme[:16]!r}")
    parts = None
    with contextlib.suppress(ValueError):  # as the context of ours it would show what was given
        parts = urlsplit(url)
    if parts is None:
        raise ConfigError(f"url must be {form}; what is between // and / is no name")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            f"url must be {form}, without user, query or fragment: credentials go into options or "
            "the environment"
        )
    if bool(parts.netloc) == (scheme == "file") or (scheme == "file" and len(parts.path) < 2):
        raise ConfigError(f"url must be {form}, not {url!r}")
    if util.find_spec("obstore") is None:
        raise ConfigError("object stores need obstore: pip install 'kvoffload[s3]'")
    return url


class ObjectClient:
    """One store. Objects have names in it, and are there as a whole or not at all."""

    first_pid: ClassVar[int | None] = None
    """The process that had one first: obstore's threads are there, and in no fork of it."""

    def __init__(self, url: str, options: Options, client_options: Options) -> None:
        """Set it up; it takes some milliseconds, looks at the disk, and connects to nothing.

        Raises:
            ConfigError: An option is unknown or wrong, or the process is a fork of one that used
                an object store.
        """
        import obstore
        from obstore import exceptions, store

        if ObjectClient.first_pid not in (None, os.getpid()):
            raise ConfigError(
                "this process is a fork of one that used an object store, whose threads did not "
                "come along: fork before the first one is opened, or spawn"
            )
        if ObjectClient.first_pid is None:
            ObjectClient.first_pid = os.getpid()
            atexit.register(time.sleep, EXIT_S)

        self._errors = (exceptions.BaseError, OSError, NotImplementedError)
        self._exists = exceptions.AlreadyExistsError
        self._obstore = obstore
        self._mode: Literal["create", "overwrite"] = "create"
        scheme = urlsplit(url).scheme.lower()
        try:
            if scheme == "file":
                self._store = store.from_url(url, mkdir=True)
                return
            config = dict(options)
            _check_endpoint(config, _ENDPOINTS if scheme == "s3" else ())
            endpoints = [*config.values(), *(os.environ.get(name) for name in _ENDPOINTS)]
            is_plain = any(str(each).startswith("http://") for each in endpoints)
            if scheme == "s3" and not is_plain and not _has_unsigned_payload(config):
                # TLS keeps payloads as they are; a SHA-256 of each would cost as much as a copy.
                config["unsigned_payload"] = True
            client = {"allow_http": is_plain, **BASE_CLIENT_OPTIONS, **client_options}
            self._store = store.from_url(  # type: ignore[call-overload]  # a mapping is no TypedDict
                url, config=config, client_options=client, retry_config=_retries()
            )
        except (*self._errors, TypeError, ValueError) as exc:
            text = str(exc).partition("\n")[0]
            for value in map(str, [*options.values(), *client_options.values()]):
                text = text.replace(value, "...") if len(value) > MOST_SHOWN else text
            raise ConfigError(f"{url} can't be used with these options: {text}") from None

    async def size(self, name: str) -> int | None:
        """Return the bytes of an object, `None` where there is none.

        Raises:
            RequestError: The store does not say.
        """
        try:
            return int((await self._obstore.head_async(self._store, name))["size"])
        except FileNotFoundError:
            return None
        except self._errors as exc:
            failure = _failure(exc)
        raise failure

    async def read(self, name: str, most: int) -> memoryview | None:
        """Return the first bytes of an object, `None` where there is none.

        Raises:
            RequestError: The store does not give them.
        """
        try:
            value = await self._obstore.get_range_async(self._store, name, start=0, end=most)
            return memoryview(value)
        except FileNotFoundError:
            return None
        except self._errors as exc:
            if "status code: 416" in str(exc) or "range was invalid" in str(exc):
                return memoryview(b"")  # it has none
            failure = _failure(exc)
        raise failure

    async def create(self, name: str, value: Buffer) -> bool:
        """Write an object that is not there; say whether it wasn't.

        Where the store can't tell, what is there is written over.

        Cancelled, the request goes on looking at the value for a moment, on a thread of its own.

        Raises:
            RequestError: The store does not take it.
        """
        mode = self._mode
        try:
            await self._obstore.put_async(self._store, name, value, mode=mode, use_multipart=False)
        except self._exists:
            return False
        except self._errors as exc:
            failure = _failure(exc)
            if isinstance(exc, FileNotFoundError):  # what would hold the object: a bucket
                failure.is_refusal = False
            is_unknown = mode == "create" and _is_unknown(exc)
        else:
            return True
        if not is_unknown:
            raise failure
        self._mode = "overwrite"
        return await self.create(name, value)

    async def delete(self, names: Sequence[str]) -> None:
        """Delete objects, whether they are there or not.

        Raises:
            RequestError: The store does not do so.
        """
        for start in range(0, len(names), LIST_OBJECTS):
            await self._delete(names[start : start + LIST_OBJECTS])

    async def _delete(self, names: Sequence[str]) -> None:
        try:
            await self._obstore.delete_async(self._store, names)
            return
        except FileNotFoundError:
            failure = None
        except self._errors as exc:
            failure = _failure(exc)
        if failure is not None:
            raise failure
        if len(names) > 1:
            # Some stores say so of the first that is not there, and stop.
            for name in names:
                await self._delete([name])

    async def list(self, folder: str) -> AsyncIterator[list[str]]:
        """Yield the names of the objects in a folder, page by page.

        Raises:
            RequestError: The store does not list them.
        """
        try:
            async for page in self._obstore.list(self._store, folder, chunk_size=LIST_OBJECTS):
                yield [each["path"] for each in page]
            return
        except self._errors as exc:
            failure = _failure(exc)
        raise failure

    async def check(self, folder: str) -> None:
        """Make sure that there is a store, by listing a folder that is empty: cheap, and enough.

        Of an object that is not there a store without a bucket says nothing else than one with.

        Raises:
            RequestError: There is none.
        """
        try:
            await self._obstore.list_with_delimiter_async(self._store, folder)
            return
        except self._errors as exc:
            failure = _failure(exc)
        raise failure


def _failure(exc: BaseException) -> RequestError:
    """Return what to raise: the store's own words, without the rest of what it answered."""
    text = str(exc)
    status = _STATUS.search(text)
    found = [pattern.search(text) for pattern in (_CODE, _MESSAGE)]
    words = ": ".join(match[1] for match in found if match)
    if status:
        words = words or f"{status[1]}{status[2]}".strip()
    elif not words:
        first = text.partition("\n")[0].rpartition(" - ")[2]
        causes = [" ".join(filter(None, groups)) for groups in _CAUSE.findall(text)]
        words = ": ".join([re.sub(r"\S+://\S+|\?\S+", "", first).strip(), *causes[-1:]])
    is_local = "LocalFileSystem" in text or isinstance(exc, OSError)
    return RequestError(words, is_refusal=bool(status) or is_local)


def _retries() -> dict[str, object]:
    from datetime import timedelta

    return {
        "max_retries": MAX_RETRIES,
        "retry_timeout": timedelta(seconds=RETRY_TIMEOUT_S),
        "backoff": {
            "init_backoff": timedelta(seconds=FIRST_RETRY_S),
            "max_backoff": timedelta(seconds=MOST_RETRY_S),
            "base": 2,
        },
    }


def _has_unsigned_payload(config: Mapping[str, object]) -> bool:
    name = "unsigned_payload"
    given = {str(key).lower().removeprefix("aws_") for key in config}
    return name in given or f"AWS_{name.upper()}" in os.environ


def _check_endpoint(config: Mapping[str, object], variables: Sequence[str]) -> None:
    """Make sure of what the client would take, to panic with the first request.

    Args:
        config: Its options.
        variables: Names of the environment's, where no option says it.

    Raises:
        ConfigError: It is no URL.
    """
    given = {name: value for name, value in config.items() if _ENDPOINT.fullmatch(name)}
    for name, value in (given or {name: os.environ.get(name) for name in variables}).items():
        if value and not str(value).lower().startswith(("http://", "https://")):
            raise ConfigError(f"{name} must be a URL, as http://host:9000")


def _is_unknown(exc: BaseException) -> bool:
    """Tell whether a store has no conditional writes."""
    return isinstance(exc, NotImplementedError) or "status code: 501" in str(exc)
