"""The service as its OpenAPI description has it, against what hostile clients make of that."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import CheckFunction
from schemathesis.core.parameters import ParameterLocation
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

from kvoffload import AsyncLRUManager, MemoryTier
from kvoffload.service.access import AccessControl, Token
from kvoffload.service.app import create_app
from kvoffload.service.limits import Limits
from kvoffload.service.wire import BATCH, PREFIX, pack_header

BLOCK_BYTES = 64
AUTHORIZATION = {"Authorization": "Bearer fuzz"}
FUZZING = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
CHECKS: list[CheckFunction] = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
STREAMS = {"GET /v1/events", "GET /v1/sessions/{session}/stream"}
"""Answers that stay; their own tests read them."""


def manager() -> AsyncLRUManager:
    return AsyncLRUManager(
        hot=MemoryTier(64, BLOCK_BYTES), warm=MemoryTier(64, BLOCK_BYTES, name="warm")
    )


APP = create_app(
    manager, access=AccessControl([Token.of("fuzz")]), limits=Limits(body_timeout_s=5, max_held=500)
)
SCHEMA = schemathesis.openapi.from_dict(APP.openapi())
OPERATIONS = {
    found.ok().label: found.ok()
    for found in SCHEMA.get_all_operations()
    if isinstance(found, Ok) and found.ok().label not in STREAMS
}


@schemathesis.serializer(BATCH)
def batch_serializer(_context: schemathesis.SerializationContext, value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")


@contextmanager
def running() -> Iterator[str]:
    """Run the service in a thread with a loop of its own; give its address."""
    server = uvicorn.Server(uvicorn.Config(APP, port=0, log_config=None))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the service hangs"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running() as found:
        yield found


@pytest.fixture
def http(address: str) -> Iterator[httpx.Client]:
    """Return a client, and check at the end that no pin is left."""
    with httpx.Client(base_url=address, timeout=10, headers=AUTHORIZATION) as client:
        session = client.post("/v1/sessions").json()["session"]
        client.headers["X-Session"] = session
        yield client
        client.delete(f"/v1/sessions/{session}")
        stats = client.get("/v1/overview").json()["stats"]
        assert (stats["pinned"], stats["pending"]) == (0, 0)


@pytest.mark.parametrize("label", OPERATIONS)
def test_no_answer_that_is_not_described(label: str, address: str, http: httpx.Client) -> None:
    """Sessions and requests are real ones in half of the cases."""
    operation = OPERATIONS[label]
    session = http.headers["X-Session"]

    @FUZZING
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        mode = data.draw(st.sampled_from([GenerationMode.POSITIVE, GenerationMode.NEGATIVE]))
        case = data.draw(operation.as_strategy(generation_mode=mode))
        is_real = "session" in case.path_parameters and data.draw(st.booleans())
        if is_real and label != "DELETE /v1/sessions/{session}":
            case.path_parameters["session"] = session
            if "name" in case.path_parameters:
                opened = http.post(
                    f"/v1/sessions/{session}/requests", json={"block_hashes": ["s:a", "s:b"]}
                )
                if opened.status_code == 201:
                    case.path_parameters["name"] = opened.json()["request"]
        is_header_broken = _is_negative(case, ParameterLocation.HEADER)
        answer = case.call(base_url=address, timeout=10, headers=AUTHORIZATION)
        if answer.status_code >= 500:
            assert answer.status_code in (503, 507), answer.text
        # What was broken may have been mended here.
        mended = is_header_broken or (is_real and _is_negative(case, ParameterLocation.PATH))
        case.validate_response(answer, checks=CHECKS[:-1] if mended else CHECKS)

    run()


def _is_negative(case: schemathesis.Case[Any], where: ParameterLocation) -> bool:
    component = case.meta.components.get(where) if case.meta is not None else None
    return component is not None and component.mode is GenerationMode.NEGATIVE


GOOD = pack_header(["a", b"b", 3], [5, 0, 64]) + bytes(range(69))


@st.composite
def broken_batches(draw: st.DrawFn) -> bytes:
    """Return a batch that was cut, lengthened, or had some bytes overwritten."""
    body = bytearray(GOOD)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(body)))
        match draw(st.sampled_from(["cut", "write", "insert", "length"])):
            case "cut":
                del body[at:]
            case "write":
                body[at : at + 1] = draw(st.binary(min_size=1, max_size=4))
            case "insert":
                body[at:at] = draw(st.binary(min_size=1, max_size=9))
            case "length":
                body[:8] = PREFIX.pack(b"KVB1", draw(st.integers(0, 2**32 - 1)))
    return bytes(body)


def test_a_broken_batch_is_refused_or_stored_whole(http: httpx.Client) -> None:
    """Whatever it says was stored comes back with as many bytes as the batch gave it."""

    @settings(FUZZING, max_examples=200)
    @given(body=broken_batches())
    def run(body: bytes) -> None:
        answer = http.post("/v1/store", content=body, headers={"Content-Type": BATCH})
        assert answer.status_code in (200, 413, 422), answer.text
        located: Any = http.post(
            "/v1/locate", json={"block_hashes": ["s:a", "b:62", "i:3"]}
        ).json()["blocks"]
        if answer.status_code == 200:
            stored = answer.json()["stored"] + answer.json()["present"]
            loaded = http.post("/v1/load", json={"block_hashes": stored})
            assert loaded.status_code == 200
            http.post("/v1/clear")
        else:
            assert [each["state"] for each in located] == ["absent"] * 3

    run()
