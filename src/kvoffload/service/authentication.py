"""Who calls, found out before anything of a call is counted or read."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from .access import Principal
from .problems import RefusedError
from .state import service_of

PRINCIPAL = "kvoffload.principal"
"""Where the scope of a call has who calls."""


def authenticate(connection: HTTPConnection) -> Principal:
    """Return who calls.

    Raises:
        RefusedError: The token opens nothing, or a web page of somebody else's calls.
    """
    known = connection.scope.get(PRINCIPAL)
    if isinstance(known, Principal):
        return known
    access = service_of(connection).access
    if access is None:
        raise RefusedError(
            403, "Forbidden", "nobody may call these endpoints: the lifespan was given no access="
        )
    if not access.is_protected:
        _refuse_web_pages(connection)
    scheme, _, secret = connection.headers.get("authorization", "").partition(" ")
    is_bearer = scheme.lower() == "bearer" and bool(secret)
    principal = access.principal(secret if is_bearer else None)
    if principal is None:
        raise RefusedError(
            401,
            "Unauthorized",
            "the token opens nothing" if is_bearer else "this service wants a bearer token",
            headers={"WWW-Authenticate": "Bearer"},
        )
    connection.scope[PRINCIPAL] = principal
    return principal


def _refuse_web_pages(connection: HTTPConnection) -> None:
    """Refuse what a browser sends for a page from elsewhere: it reaches loopback too.

    A page can post to any address, and have a name of its own lead to this one.

    Raises:
        RefusedError: It is such a call.
    """
    headers = connection.headers
    host = _name_of(f"//{headers.get('host', '')}")
    name, port = connection.scope.get("server") or ("", None)
    is_tcp = port is not None
    if is_tcp and host not in ("localhost", name) and not _is_loopback(host):
        raise RefusedError(
            403,
            "Forbidden",
            f"an unprotected service is called by a loopback address, not as {host!r}",
        )
    origin = headers.get("origin")
    is_foreign = origin is not None and _name_of(origin) != host
    if is_foreign or headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        raise RefusedError(
            403, "Forbidden", "an unprotected service answers no pages from elsewhere"
        )


def _name_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
