"""Who calls, in which namespace, within which session."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Query, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from ..managers.async_lru_manager import NamespaceView
from ..retention import Retention, as_retention
from ..types import BlockHash
from .access import Principal, Right
from .authentication import authenticate
from .batches import check_batch
from .calls import Undo
from .problems import RefusedError
from .sessions import Session
from .state import Service, service_of
from .wire import CALL_HEADER, hashes_from_text

_bearer = HTTPBearer(auto_error=False, description="A token of the service")

NamespaceName = Annotated[
    str | None,
    Query(
        max_length=128,
        description="Isolation domain of the blocks; the service's own if left out",
    ),
]
SessionName = Annotated[
    str | None,
    Query(max_length=64, description="Session whose stream tells of this call"),
]
Everywhere = Annotated[
    bool, Query(alias="all", description="Of all namespaces, for tokens that see them all")
]
CallName = Annotated[
    str | None,
    Header(
        alias=CALL_HEADER,
        max_length=64,
        description="Name by which a call within a session can be taken back",
    ),
]


async def principal_of(
    request: Request,
    _credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Principal:
    """Return who calls.

    Raises:
        RefusedError: The token opens nothing.
    """
    return authenticate(request)


@dataclass(slots=True, eq=False)
class Caller:
    """One call: who, in which namespace, within which session if any."""

    service: Service
    principal: Principal
    namespace: str
    view: NamespaceView
    session: Session | None = None
    call: str | None = None

    def hashes(self, texts: Sequence[str]) -> list[BlockHash]:
        """Return the block hashes of a body.

        Raises:
            WireError: There are too many, or one is none.
        """
        check_batch(len(texts), self.service.limits)
        return hashes_from_text(texts)

    def tell(self, response: Response, block_hashes: Sequence[BlockHash] = ()) -> None:
        """Let the session's stream tell what the call did, and the answer name its last line."""
        response.headers.update(self.told(block_hashes))

    def told(self, block_hashes: Sequence[BlockHash] = ()) -> Mapping[str, str]:
        """Let the session's stream tell what the call did; return the headers of the answer."""
        return {} if self.session is None else self.session.tell(block_hashes)

    @property
    def member(self) -> Session:
        """The session of a call that has one."""
        assert self.session is not None
        return self.session

    def gave(self, undo: Undo) -> None:
        """Note how what the call gave to the session is given back if its client never learns."""
        if self.session is not None:
            self.session.calls.gave(self.call, undo)

    def check_sees_all(self) -> None:
        """Refuse what is for those who look at all namespaces together.

        Raises:
            RefusedError: The token does not.
        """
        if not self.principal.sees_all:
            raise RefusedError(
                403, "Forbidden", "this is for tokens with the right 'admin' in all namespaces"
            )

    def forbid_unless_lasting(self, retention: Retention | float | None) -> None:
        """Refuse a retention that lets blocks go for good to who may not write.

        Raises:
            RefusedError: It is one.
        """
        said = as_retention(retention)
        if said is not None and said.is_over:
            self.forbid_unless(Right.WRITE)

    def forbid_unless(self, right: Right) -> None:
        """Refuse what the token does not allow.

        Raises:
            RefusedError: It does not allow this here.
        """
        if not self.principal.may(right, self.namespace):
            raise RefusedError(
                403,
                "Forbidden",
                f"the token has no right to {right.value} in namespace {self.namespace!r}",
            )


def caller(right: Right) -> Callable[..., AsyncIterator[Caller]]:
    """Return the dependency for calls that need this right."""

    async def caller_with_right(
        request: Request,
        principal: Annotated[Principal, Depends(principal_of)],
        namespace: NamespaceName = None,
        session: SessionName = None,
        call: CallName = None,
    ) -> AsyncIterator[Caller]:
        service = service_of(request)
        namespace = service.name_of(namespace)
        found = Caller(service, principal, namespace, service.manager.namespace(namespace), None)
        found.forbid_unless(right)
        if session is None:
            yield found
            return
        found.session = service.sessions.find(session, namespace, principal)
        found.call = call
        with found.session.call(request.scope, call):
            yield found

    return caller_with_right


Reader = Annotated[Caller, Depends(caller(Right.READ), scope="request")]
Writer = Annotated[Caller, Depends(caller(Right.WRITE), scope="request")]
Admin = Annotated[Caller, Depends(caller(Right.ADMIN), scope="request")]


def member(right: Right) -> Callable[..., AsyncIterator[Caller]]:
    """Return the dependency for calls on what a session holds, which need this right."""

    async def member_with_right(
        request: Request,
        session: str,
        principal: Annotated[Principal, Depends(principal_of)],
        namespace: NamespaceName = None,
        call: CallName = None,
    ) -> AsyncIterator[Caller]:
        service = service_of(request)
        namespace = service.name_of(namespace)
        view = service.manager.namespace(namespace)
        found = Caller(service, principal, namespace, view)
        found.forbid_unless(right)
        found.session = service.sessions.find(session, namespace, principal)
        found.call = call
        with found.session.call(request.scope, call):
            yield found

    return member_with_right


ReadingMember = Annotated[Caller, Depends(member(Right.READ), scope="request")]
WritingMember = Annotated[Caller, Depends(member(Right.WRITE), scope="request")]


async def overseer(
    request: Request, principal: Annotated[Principal, Depends(principal_of)]
) -> Service:
    """Return the service to who may look at all of it.

    Raises:
        RefusedError: The token is not for all namespaces, or has no right to administer.
    """
    if not principal.sees_all:
        raise RefusedError(
            403, "Forbidden", "this is for tokens with the right 'admin' in all namespaces"
        )
    return service_of(request)


Overseen = Annotated[Service, Depends(overseer)]
