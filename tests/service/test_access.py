"""Who may do what: no token sees, evicts or counts the blocks of another's namespace."""

from __future__ import annotations

import hmac
import logging

import anyio
import httpx
import pytest

from kvoffload import AsyncLRUManager, ConfigError, MemoryTier, NamespaceShare
from kvoffload.service.access import AccessControl, Principal, Right, Token
from kvoffload.service.wire import hashes_to_text

from .serving import BLOCK_BYTES, Served, bearer, serving

READER, WRITER, OTHER, ADMIN = "token-of-reader", "token-of-writer", "token-of-other", "token-admin"
ACCESS = AccessControl(
    [
        Token.of(READER, ["a"], [Right.READ]),
        Token.of(WRITER, ["a"], [Right.READ, Right.WRITE]),
        Token.of(OTHER, ["b"], [Right.READ, Right.WRITE, Right.ADMIN]),
        Token.of(ADMIN),
    ]
)
BLOCKS = hashes_to_text(["1", "2"])


async def call(
    served: Served, method: str, path: str, token: str | None, namespace: str, **json: object
) -> httpx.Response:
    headers = {} if token is None else bearer(token)
    query = {"namespace": namespace}
    body = json or None
    return await served.http.request(
        method, f"/v1/{path}", params=query, headers=headers, json=body
    )


async def put(served: Served, token: str, namespace: str) -> httpx.Response:
    return await served.store(
        ["1", "2"], [b"one", b"two"], query=f"?namespace={namespace}", headers=bearer(token)
    )


async def test_without_a_token_nothing_opens() -> None:
    async with serving(access=ACCESS) as served:
        for token in (None, "token", READER + "x"):
            answer = await call(served, "POST", "lookup", token, "a", block_hashes=BLOCKS)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"] == "Unauthorized"
        assert (await served.http.get("/livez")).status_code == 200
        assert (await served.http.get("/readyz")).status_code == 200


async def test_a_token_opens_its_namespaces_alone() -> None:
    async with serving(access=ACCESS) as served:
        for namespace in ("", "b", "A", "a "):
            answer = await call(served, "POST", "lookup", READER, namespace, block_hashes=BLOCKS)
            assert answer.status_code == 403, namespace
        answer = await call(served, "POST", "lookup", READER, "a", block_hashes=BLOCKS)
        assert answer.json() == {"hit": 0}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("evict", {"num_blocks": 1}),
        ("forget", {"block_hashes": BLOCKS}),
        ("clear", {}),
        ("flush", {}),
    ],
)
async def test_reading_is_not_writing(path: str, body: dict[str, object]) -> None:
    async with serving(access=ACCESS) as served:
        assert (await put(served, WRITER, "a")).status_code == 200
        answer = await call(served, "POST", path, READER, "a", **body)
        assert answer.status_code == 403
        assert (await put(served, READER, "a")).status_code == 403
        assert served.manager.namespace("a").get_stats().tiers["hot"].blocks == 2


async def test_no_token_touches_another_namespace() -> None:
    async with serving(access=ACCESS) as served:
        await put(served, WRITER, "a")
        answer = await call(served, "POST", "lookup", OTHER, "b", block_hashes=BLOCKS)
        assert answer.json() == {"hit": 0}
        answer = await call(served, "POST", "locate", OTHER, "b", block_hashes=BLOCKS)
        assert [each["state"] for each in answer.json()["blocks"]] == ["absent", "absent"]
        answer = await call(served, "POST", "load", OTHER, "b", block_hashes=BLOCKS)
        assert answer.status_code == 404
        answer = await call(served, "POST", "evict", OTHER, "b", block_hashes=BLOCKS)
        assert answer.json() == {"evicted": []}
        answer = await call(served, "POST", "evict", OTHER, "b", num_blocks=9)
        assert answer.json() == {"evicted": []}
        assert (await call(served, "POST", "clear", OTHER, "b")).status_code == 204
        stats = (await call(served, "GET", "stats", OTHER, "b")).json()
        assert (stats["stored"], stats["tiers"]["hot"]["blocks"]) == (0, 0)
        answer = await call(served, "POST", "load", READER, "a", block_hashes=BLOCKS)
        assert answer.content.endswith(b"onetwo")


async def test_only_who_administers_all_sees_all() -> None:
    async with serving(access=ACCESS) as served:
        for path in ("overview", "metrics"):
            for token in (READER, OTHER):
                url = f"/v1/{path}" if path != "metrics" else "/metrics"
                answer = await served.http.get(url, headers=bearer(token))
                assert answer.status_code == 403, path
        answer = await call(served, "POST", "flush", OTHER, "b")
        assert answer.status_code == 403
        answer = await served.http.get(
            "/v1/events", params={"all": "true", "namespace": "b"}, headers=bearer(OTHER)
        )
        assert answer.status_code == 403
        answer = await served.http.get("/v1/overview", headers=bearer(ADMIN))
        assert answer.status_code == 200
        assert (await call(served, "POST", "flush", ADMIN, "a")).status_code == 200


async def test_events_are_of_ones_own_namespace() -> None:
    async with serving(access=ACCESS) as served:
        lines: list[str] = []
        listening = anyio.Event()

        async def listen() -> None:
            async with served.http.stream(
                "GET", "/v1/events", params={"namespace": "a"}, headers=bearer(READER)
            ) as answer:
                async for line in answer.aiter_lines():
                    listening.set()
                    lines.append(line)
                    if line.startswith("data:"):
                        return

        async with anyio.create_task_group() as group:
            group.start_soon(listen)
            await listening.wait()
            await put(served, OTHER, "b")
            await put(served, WRITER, "a")
        data = [line for line in lines if line.startswith("data:")]
        assert len(data) == 1
        assert '"namespace":"a"' in data[0]


async def test_a_session_is_its_openers() -> None:
    async with serving(access=ACCESS) as served:
        opened = await call(served, "POST", "sessions", WRITER, "a")
        name = opened.json()["session"]
        for token, namespace in ((READER, "a"), (ADMIN, "a"), (OTHER, "b")):
            answer = await call(
                served,
                "POST",
                f"sessions/{name}/prepare_load",
                token,
                namespace,
                block_hashes=BLOCKS,
            )
            assert answer.status_code == 404
            assert answer.json()["error"] == "SessionNotFound"
        assert (await call(served, "DELETE", f"sessions/{name}", OTHER, "b")).status_code == 404
        assert (await call(served, "DELETE", f"sessions/{name}", WRITER, "a")).status_code == 204


async def test_no_token_shows_in_logs_or_answers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "a-secret-that-nobody-may-read"
    async with serving(access=ACCESS) as served:
        shown = ""
        for token in (secret, WRITER):
            answer = await call(served, "POST", "load", token, "a", block_hashes=BLOCKS)
            shown += answer.text + str(answer.headers)
        shown += repr(ACCESS) + repr(ACCESS.principal(WRITER)) + caplog.text
    assert secret not in shown
    assert WRITER not in shown


def test_all_tokens_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopping at the first that fits, or comparing byte by byte, would tell of the others."""
    compared: list[bytes] = []
    compare = hmac.compare_digest

    def noting(a: bytes, b: bytes) -> bool:
        compared.append(a)
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", noting)
    assert ACCESS.principal(READER) == Principal(frozenset("a"), frozenset([Right.READ]))
    assert len(compared) == 4
    assert ACCESS.principal("none") is None
    assert len(compared) == 8


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="no token would open"):
        AccessControl()
    with pytest.raises(ConfigError, match="not both"):
        AccessControl([Token.of("a")], unprotected=True)
    with pytest.raises(ConfigError, match="twice"):
        AccessControl([Token.of("a"), Token.of("a", ["b"])])
    with pytest.raises(ConfigError, match="without any right"):
        Token.of("a", None, [])
    with pytest.raises(ConfigError, match="without any namespace"):
        Token.of("a", [])
    with pytest.raises(ConfigError, match="32 bytes"):
        Token(b"short", None, frozenset(Right))


async def test_quotas_and_reserves_hold_over_http() -> None:
    """The quota in bytes of payload; what is reserved stays whatever the others store."""

    def shared() -> AsyncLRUManager:
        shares = {
            "a": NamespaceShare(max_bytes=3 * 1000),
            "b": NamespaceShare(reserved_bytes=2 * BLOCK_BYTES),
        }
        return AsyncLRUManager(hot=MemoryTier(8, BLOCK_BYTES), policy="lru", shares=shares)

    async with serving(make_manager=shared) as served:
        names = [f"{number}" for number in range(5)]
        answer = await served.store(names, [bytes(1000)] * 5, query="?namespace=a")
        body = answer.json()
        assert body["stored"] == hashes_to_text(names[:3])
        assert body["rejected"] == {"s:3": "quota", "s:4": "quota"}
        await served.store(["x", "y"], [bytes(BLOCK_BYTES)] * 2, query="?namespace=b")
        for name in ("c", "a", ""):
            for number in range(20):
                payload = [bytes(BLOCK_BYTES if name != "a" else 1000)]
                await served.store([f"{number}"], payload, query=f"?namespace={name}")
        overview = (await served.http.get("/v1/overview")).json()["namespaces"]
        assert overview["a"]["bytes"] <= overview["a"]["max_bytes"] == 3000
        assert overview["b"]["bytes"] == overview["b"]["reserved_bytes"] == 2 * BLOCK_BYTES
        metrics = (await served.http.get("/metrics")).text
        assert 'kvoffload_namespace_max_bytes{namespace="a",scope="named"} 3000' in metrics
