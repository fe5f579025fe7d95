"""The chat service as its clients see it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

try:
    import httpx
    from examples.smollm.serving import ChatService, running
    from tests.service.in_thread import until
except ModuleNotFoundError as exc:
    optional = {"fastapi", "httpx", "pydantic", "pydantic_settings", "starlette", "uvicorn"}
    if exc.name not in optional or os.environ.get("CI") == "true":
        raise
    pytest.skip(f"the service needs the extras server and dev: {exc}", allow_module_level=True)

QUESTION = [{"role": "user", "content": "the lamp must not go out, and the ships pass at night"}]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatService]:
    """Run one service for all tests that leave it as they found it."""
    folder = tmp_path_factory.mktemp("service")
    with running(folder, pool_pages=40, max_prompt_tokens=600) as service:
        yield service


def ask(service: ChatService, messages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Return the events of an answer by name, the pieces of text joined."""
    events: dict[str, Any] = {"text": ""}
    body = {"messages": messages, "max_tokens": 20} | more
    with httpx.stream("POST", f"{service.url}/chat", json=body, timeout=30) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        for event in "".join(response.iter_text()).split("\n\n")[:-1]:
            first, second = event.split("\n")
            name, data = first.removeprefix("event: "), json.loads(second.removeprefix("data: "))
            assert events or name == "origin"
            events[name] = events["text"] + data if name == "text" else data
    return events


def test_an_answer_is_streamed_with_where_its_prompt_came_from(service: ChatService) -> None:
    """Computed once, then restored; and the same to the token, also without any cache."""
    first = ask(service, QUESTION)
    assert first["origin"]["computed_tokens"] == first["origin"]["prompt_tokens"]
    assert "without" not in first
    again = ask(service, QUESTION, compare=True)
    assert (again["done"], again["text"]) == (first["done"], first["text"])
    assert again["origin"]["loaded_tokens"]["hot"] > 64
    assert again["origin"]["computed_tokens"] <= 16
    assert again["without"]["same"]
    assert again["without"]["first_token_s"] > 0
    until(service.is_idle)


def test_a_next_turn_brings_the_answer_back_as_tokens(service: ChatService) -> None:
    """Text would not always be cut into the same tokens."""
    said = ask(service, QUESTION)
    turns = [*QUESTION, {"role": "assistant", "tokens": said["done"]}]
    origin = ask(service, [*turns, {"role": "user", "content": "and?"}])["origin"]
    assert origin["computed_tokens"] <= 16 + len("and?") + 20


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"messages": []}, 422),
        ({"messages": [{"role": "stranger", "content": ""}]}, 422),
        ({"messages": [{"role": "assistant", "tokens": [9999]}]}, 422),
        ({"messages": [{"role": "assistant", "tokens": [-1]}]}, 422),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, 413),
        ({"messages": QUESTION, "max_tokens": 700}, 503),
    ],
)
def test_what_cannot_be_answered_is_refused(
    service: ChatService, body: dict[str, Any], status: int
) -> None:
    """With a status that says whose matter it is; a full pool may be tried again."""
    response = httpx.post(f"{service.url}/chat", json=body, timeout=30)
    assert response.status_code == status
    assert response.json()["detail"]
    assert ("retry-after" in response.headers) == (status == 503)
    until(service.is_idle)


def test_a_client_that_vanishes_leaves_nothing(service: ChatService) -> None:
    """In the middle of an answer: its pages and pins are free with the token under way."""
    body = {"messages": QUESTION, "max_tokens": 300}
    with (
        service.stuck() as is_decoding,
        httpx.stream("POST", f"{service.url}/chat", json=body, timeout=30) as response,
    ):
        assert next(response.iter_text()).startswith("event: origin")
        assert is_decoding()
        assert not service.is_idle()
    until(service.is_idle)
    stats = httpx.get(f"{service.url}/stats").json()
    assert stats["pinned"] == 0


def test_what_was_said_survives_a_restart(tmp_path: Path) -> None:
    """In the cold tier's directory."""
    with running(tmp_path, cold_path=tmp_path / "cold") as service:
        said = ask(service, QUESTION)["done"]
    with running(tmp_path, cold_path=tmp_path / "cold") as service:
        again = ask(service, QUESTION)
    assert again["done"] == said
    assert set(again["origin"]["loaded_tokens"]) == {"cold"}
