"""The service as its clients see it: a uvicorn process of its own, on a port of its own.

Only what no client can bring about is tested inside this process.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvoffload import (
    AsyncLRUManager,
    BlockNotFoundError,
    CapacityError,
    ClosedError,
    ConfigError,
    CorruptBlockError,
    LoadTimeoutError,
    MemoryTier,
    OffloadError,
    RejectReason,
    TierError,
    TierUnavailableError,
)

try:
    import httpx
    import uvicorn
    from examples.fastapi_server.problems import on_offload_error, rejection
    from examples.fastapi_server.transfer import LeasedResponse
    from starlette.requests import Request
    from starlette.types import Message
except ModuleNotFoundError as exc:
    optional = {"fastapi", "httpx", "pydantic", "pydantic_settings", "starlette", "uvicorn"}
    if exc.name not in optional or os.environ.get("CI") == "true":
        raise
    pytest.skip(f"the service needs the extras server and dev: {exc}", allow_module_level=True)

ROOT = Path(__file__).parents[2]
APP = "examples.fastapi_server.app:app"
BLOCK_BYTES = 8 * 1024 * 1024  # more than the sockets between a server and a client hold
JSON = {"content-type": "application/json"}
OCTETS = {"content-type": "application/octet-stream"}


class Server:
    """The service in a process of its own, at a port that the system chose."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.cold_path = folder / "cold"
        self.log = folder / "log"
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("KVOFFLOAD_")
        }
        defaults: dict[str, object] = {
            "hot_blocks": 4,
            "cold_blocks": 12,
            "cold_path": self.cold_path,
            "block_bytes": BLOCK_BYTES,
            "staging_bytes": 2 * BLOCK_BYTES,
        }
        for name, value in (defaults | settings).items():
            environment[f"KVOFFLOAD_{name.upper()}"] = str(value)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", uvicorn.__name__, "--port", "0", APP],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
            )
        self.port = 0

    def wait_until_ready(self) -> None:
        """Wait for the line that tells the port."""
        found = self.wait_for_line(r"Uvicorn running on http://127\.0\.0\.1:(\d+)")
        self.port = int(found[1])

    def wait_for_line(self, pattern: str) -> re.Match[str]:
        """Wait until the log has a line like this."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None
            found = re.search(pattern, self.log.read_text())
            if found:
                return found
            if ended:
                break
            time.sleep(0.02)
        pytest.fail(f"no {pattern!r} in the log:\n{self.log.read_text()}")

    def stop(self, *, known: str = "") -> None:
        """Terminate it as an orchestrator would; it must have nothing to complain of but this."""
        self.process.send_signal(signal.SIGTERM)
        try:
            # Uvicorn shuts down, and then dies of the signal that it was sent.
            assert self.process.wait(30) == -signal.SIGTERM
        finally:
            self.kill()
        log = self.log.read_text().replace(known, "")
        assert "Application shutdown complete" in log
        assert not re.search("Traceback|ERROR|exception|Warning", log), log

    def kill(self) -> None:
        """Leave nothing behind."""
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run one service for all tests that leave it as they found it."""
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        server.wait_until_ready()
        yield server
        server.stop()
    finally:
        server.kill()


@asynccontextmanager
async def connected(server: Server, namespace: str) -> AsyncIterator[httpx.AsyncClient]:
    """Be a client."""
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{server.port}",
        headers={"x-namespace": namespace},
        timeout=30,
    ) as client:
        yield client


@asynccontextmanager
async def tenant(server: Server, namespace: str) -> AsyncIterator[httpx.AsyncClient]:
    """Be a client that leaves the service at rest, and nothing in it."""
    async with connected(server, namespace) as client:
        yield client
        await until_at_rest(client)
        assert (await client.delete("/blocks")).status_code == 204


async def until_at_rest(client: httpx.AsyncClient) -> None:
    """Wait until nothing is pinned, pending or retired, for any namespace."""
    await until(client, lambda health: health["pinned"] == health["pending"] == 0)
    health = (await client.get("/healthz")).json()
    for tier in health["tiers"].values():
        assert tier["queue_depth"] == tier["pending_blocks"] == tier["retired_blocks"] == 0


async def until(client: httpx.AsyncClient, holds: Callable[[dict[str, int]], bool]) -> None:
    """Wait until something holds of the service's health."""
    for _ in range(500):
        health = (await client.get("/healthz")).raise_for_status().json()
        if holds(health):
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"still {health}")


def hash_of(name: object) -> str:
    """Make a block hash."""
    return hashlib.sha256(str(name).encode()).hexdigest()


def payload_of(hash_hex: str, size: int = 1000) -> bytes:
    """Make a payload that differs from every other one, all along."""
    return random.Random(hash_hex).randbytes(size)


def batch_of(payloads: Mapping[str, bytes], **more: object) -> bytes:
    """Make the body of a batch."""
    blocks = [{"hash": name, "size": len(data)} for name, data in payloads.items()]
    return json.dumps({"blocks": blocks, **more}).encode() + b"\n" + b"".join(payloads.values())


def problem_of(response: httpx.Response, status: int) -> dict[str, object]:
    """Check that a response is a problem of this status, and return it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, object] = response.json()
    assert problem["status"] == status
    assert problem["detail"]
    return problem


# Each endpoint


async def test_a_block_comes_back_as_it_was_stored(server: Server) -> None:
    """Of a size that takes several chunks, and one that takes one."""
    async with tenant(server, "one") as client:
        for size in (1, 1_000_000):
            name = hash_of(size)
            data = payload_of(name, size)
            put = await client.put(f"/blocks/{name}", content=data)
            assert (put.status_code, put.json()["stored"]) == (201, [name])
            got = await client.get(f"/blocks/{name.upper()}")
            assert got.status_code == 200
            assert got.headers["content-type"] == "application/octet-stream"
            assert got.headers["content-length"] == str(size)
            assert got.content == data


async def test_a_block_that_is_there_is_not_written_again(server: Server) -> None:
    """A hash stands for its bytes."""
    async with tenant(server, "again") as client:
        name = hash_of(0)
        await client.put(f"/blocks/{name}", content=b"first")
        put = await client.put(f"/blocks/{name}", content=b"second")
        assert put.status_code == 200
        assert put.json() == {"stored": [], "present": [name], "evicted": []}
        assert (await client.get(f"/blocks/{name}")).content == b"first"


async def test_a_block_that_is_not_there_is_named(server: Server) -> None:
    """The caller can tell which one to recompute."""
    async with tenant(server, "absent") as client:
        got = await client.get(f"/blocks/{hash_of(0)}")
        assert problem_of(got, 404)["block_hashes"] == [hash_of(0)]


async def test_a_prompt_is_stored_and_loaded_in_one_call(server: Server) -> None:
    """What fits hot memory is there, the rest is cold, and a batch can be handed on as it is."""
    payloads = {name: payload_of(name, 300_000) for name in map(hash_of, range(6))}
    hashes = [*payloads, hash_of("not computed yet")]
    async with tenant(server, "prompt") as client:
        stored = await client.post("/blocks", content=batch_of(payloads), headers=OCTETS)
        assert (stored.status_code, stored.json()["stored"]) == (201, list(payloads))
        found = (await client.post("/lookup", json={"hashes": hashes})).json()
        assert found["hit"] == 6
        assert [block["tier"] for block in found["blocks"]] == ["hot"] * 4 + ["cold"] * 2 + [None]
        assert [block["hash"] for block in found["blocks"]] == hashes
        assert found["blocks"][-1]["state"] == "absent"

        loaded = await client.post("/load", json={"hashes": hashes})
        assert loaded.status_code == 200
        assert loaded.content == batch_of(payloads)
        assert (await client.get("/stats")).json()["hits"] == 12
        await client.delete("/blocks")
        async with tenant(server, "another-prompt") as other:
            again = await other.post("/blocks", content=loaded.content, headers=OCTETS)
            assert again.json()["stored"] == list(payloads)
            assert (await other.get(f"/blocks/{hash_of(5)}")).content == payloads[hash_of(5)]


async def test_of_a_prompt_the_tail_leaves_first(server: Server) -> None:
    """Though its head was stored before it: the second call names the first one's blocks."""
    head, tail = hash_of("head"), hash_of("tail")
    async with tenant(server, "recency") as client:
        await client.post("/blocks", content=batch_of({head: b"h"}), headers=OCTETS)
        body = batch_of({tail: b"t"}, prefix=[head])
        assert (await client.post("/blocks", content=body, headers=OCTETS)).status_code == 201
        evicted = await client.post("/evict", json={"num_blocks": 1})
        assert evicted.json() == {"evicted": [tail]}


async def test_nothing_of_a_prompt_may_be_there(server: Server) -> None:
    """Then the batch is empty; that is an answer, not an error."""
    async with tenant(server, "nothing") as client:
        loaded = await client.post("/load", json={"hashes": []})
        assert (loaded.status_code, loaded.content) == (200, batch_of({}))
        loaded = await client.post("/load", json={"hashes": [hash_of(0)]})
        assert (loaded.status_code, loaded.content) == (200, batch_of({}))
        again = await client.post("/blocks", content=loaded.content, headers=OCTETS)
        assert again.status_code == 200


async def test_a_prefetch_brings_cold_blocks_up(server: Server) -> None:
    """The call returns at once; the blocks follow."""
    payloads = {name: payload_of(name) for name in map(hash_of, range(6))}
    async with tenant(server, "prefetch") as client:
        await client.post("/blocks", content=batch_of(payloads), headers=OCTETS)
        cold = [hash_of(4), hash_of(5)]
        await client.post("/evict", json={"hashes": [hash_of(0), hash_of(1)]})
        hinted = await client.post("/prefetch", json={"hashes": [*cold, hash_of("absent")]})
        assert (hinted.status_code, hinted.json()) == (202, {"queued": 2})
        await until(client, lambda health: health["tiers"]["hot"]["blocks"] == 4)  # type: ignore[index]
        found = (await client.post("/lookup", json={"hashes": cold})).json()
        assert [block["tier"] for block in found["blocks"]] == ["hot", "hot"]


async def test_blocks_can_be_evicted(server: Server) -> None:
    """By name, the coldest, or all of them; what is not there is not in the answer."""
    payloads = {name: payload_of(name) for name in map(hash_of, range(6))}
    async with tenant(server, "evict") as client:
        await client.post("/blocks", content=batch_of(payloads), headers=OCTETS)
        named = await client.post("/evict", json={"hashes": [hash_of(2), hash_of("absent")]})
        assert named.json() == {"evicted": [hash_of(2)]}
        coldest = await client.post("/evict", json={"num_blocks": 2})
        assert set(coldest.json()["evicted"]) == {hash_of(4), hash_of(5)}
        assert (await client.delete("/blocks")).status_code == 204
        found = (await client.post("/lookup", json={"hashes": list(payloads)})).json()
        assert {block["state"] for block in found["blocks"]} == {"absent"}


async def test_the_documentation_describes_every_endpoint(server: Server) -> None:
    """With binary bodies as such, problems as such, and examples."""
    async with tenant(server, "docs") as client:
        assert (await client.get("/docs")).status_code == 200
        document = (await client.get("/openapi.json")).json()
    operations = {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert set(operations) == {
        "PUT /blocks/{hash_hex}",
        "GET /blocks/{hash_hex}",
        "POST /blocks",
        "DELETE /blocks",
        "POST /load",
        "POST /lookup",
        "POST /prefetch",
        "POST /evict",
        "GET /stats",
        "GET /healthz",
    }
    for upload in ("PUT /blocks/{hash_hex}", "POST /blocks"):
        assert list(operations[upload]["requestBody"]["content"]) == [OCTETS["content-type"]]
    for download in ("GET /blocks/{hash_hex}", "POST /load"):
        content = operations[download]["responses"]["200"]["content"]
        assert list(content) == [OCTETS["content-type"]]
    for operation in operations.values():
        assert operation["description"]
        for status, response in operation["responses"].items():
            if status >= "400":
                assert list(response["content"]) == ["application/problem+json"]
    assert document["components"]["schemas"]["Eviction"]["examples"]


# Tenants


async def test_tenants_do_not_see_each_other(server: Server) -> None:
    """Neither by reading, nor by removing, nor by counting; nor does who sends no header."""
    name = hash_of(0)
    async with tenant(server, "a") as a, tenant(server, "b") as b, tenant(server, "") as nobody:
        assert (await a.put(f"/blocks/{name}", content=b"of a")).status_code == 201
        for other in (b, nobody):
            assert (await other.get(f"/blocks/{name}")).status_code == 404
            assert (await other.post("/lookup", json={"hashes": [name]})).json()["hit"] == 0
            assert (await other.post("/evict", json={"hashes": [name]})).json()["evicted"] == []
            assert (await other.post("/evict", json={"num_blocks": 9})).json()["evicted"] == []
            assert (await other.delete("/blocks")).status_code == 204
            stats = (await other.get("/stats")).json()
            assert (stats["stored"], stats["tiers"]["hot"]["blocks"]) == (0, 0)
        assert (await b.put(f"/blocks/{name}", content=b"of b")).status_code == 201
        assert (await a.get(f"/blocks/{name}")).content == b"of a"
        assert (await b.get(f"/blocks/{name}")).content == b"of b"
        assert (await a.get("/stats")).json()["stored"] == 1


# Many clients


async def test_many_clients_at_once_get_their_bytes(server: Server) -> None:
    """More blocks than slots, so that they move, leave and come back all the time."""
    names = [hash_of(number) for number in range(24)]
    payloads = {name: payload_of(name, 1000 + 40_000 * n) for n, name in enumerate(names)}
    outcomes: dict[tuple[str, int], int] = {}

    async def one_client(client: httpx.AsyncClient, seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(30):
            name = choose.choice(names)
            match choose.choice(["get", "get", "put", "load", "evict", "prefetch"]):
                case "get":
                    response = await client.get(f"/blocks/{name}")
                    if response.status_code == 200:
                        assert response.content == payloads[name]
                case "put":
                    response = await client.put(f"/blocks/{name}", content=payloads[name])
                case "load":
                    some = choose.sample(names, 2)
                    response = await client.post("/load", json={"hashes": some})
                    whole = {each: payloads[each] for each in some}
                    if response.status_code == 200:
                        assert response.content in [
                            batch_of(dict(list(whole.items())[:count])) for count in range(3)
                        ]
                case "evict":
                    response = await client.post("/evict", json={"hashes": [name]})
                case method:
                    response = await client.post(f"/{method}", json={"hashes": [name]})
            outcome = (response.request.method, response.status_code)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1

    async with tenant(server, "many") as client, asyncio.TaskGroup() as group:
        for seed in range(12):
            group.create_task(one_client(client, seed))
    # 404: not there; 507: more is read at this moment than there are buffers.
    assert {status for _, status in outcomes} <= {200, 201, 202, 404, 507}, outcomes
    assert outcomes["GET", 200] > 20, outcomes
    assert outcomes["PUT", 201] > 20, outcomes


# Clients that vanish, or dawdle


def break_at_close(client: socket.socket) -> None:
    """Make the close of a connection break it (RST), as a client that crashes does."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def head_of(request: str, namespace: str, *headers: str) -> bytes:
    """Make the head of a request that is sent by hand."""
    lines = [f"{request} HTTP/1.1", "host: localhost", f"x-namespace: {namespace}", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


@asynccontextmanager
async def by_hand(
    server: Server,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Talk to the service over a bare connection, and in the end break it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        yield reader, writer
    finally:
        break_at_close(writer.get_extra_info("socket"))
        writer.transport.abort()


async def start_download(server: Server, namespace: str, name: str) -> socket.socket:
    """Ask for a block, and take only the first bytes of it."""
    loop = asyncio.get_running_loop()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    await loop.sock_connect(client, ("127.0.0.1", server.port))
    await loop.sock_sendall(client, head_of(f"GET /blocks/{name}", namespace))
    assert (await loop.sock_recv(client, 100)).startswith(b"HTTP/1.1 200 ")
    return client


async def read_to_end(client: socket.socket) -> bytes:
    """Take what is left."""
    loop = asyncio.get_running_loop()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024 * 1024)
    parts = []
    while part := await loop.sock_recv(client, 1024 * 1024):
        parts.append(part)
    return b"".join(parts)


async def test_a_client_that_vanishes_during_a_download_leaves_no_pin(server: Server) -> None:
    """While it reads, its block can't be evicted; once it is gone, it can."""
    name = hash_of(0)
    async with tenant(server, "vanish") as client:
        await client.put(f"/blocks/{name}", content=payload_of(name, BLOCK_BYTES))
        with await start_download(server, "vanish", name) as download:
            break_at_close(download)
            assert (await client.get("/stats")).json()["pinned"] == 1
            evicted = await client.post("/evict", json={"hashes": [name]})
            assert evicted.json() == {"evicted": []}
        await until_at_rest(client)
        assert (await client.get("/stats")).json()["pinned"] == 0
        evicted = await client.post("/evict", json={"hashes": [name]})
        assert evicted.json() == {"evicted": [name]}


@pytest.mark.parametrize("length", ["content-length: 4000000", "transfer-encoding: chunked"])
@pytest.mark.parametrize("batch", [False, True])
async def test_a_client_that_vanishes_during_an_upload_stores_nothing(
    server: Server, batch: bool, length: str
) -> None:
    """Neither a part of a block nor a part of a batch, and it holds no slot meanwhile."""
    name = hash_of(0)
    target = "POST /blocks" if batch else f"PUT /blocks/{name}"
    part = batch_of({name: bytes(4_000_000)})[:100_000] if batch else bytes(100_000)
    if "chunked" in length:
        part = b"%x\r\n%b\r\n" % (len(part), part)
    head = head_of(target, "upload", "content-type: application/octet-stream", length)
    async with tenant(server, "upload") as client:
        before = (await client.get("/healthz")).json()
        async with by_hand(server) as (_, writer):
            writer.write(head + part)
            await writer.drain()
            during = (await client.get("/healthz")).json()
        await until_at_rest(client)
        after = (await client.get("/healthz")).json()
        for health in (during, after):
            assert health["pending"] == 0
            for tier in ("hot", "cold"):
                assert health["tiers"][tier]["blocks"] == before["tiers"][tier]["blocks"]
        assert (await client.get(f"/blocks/{name}")).status_code == 404


# Input that is not acceptable

NAME = hash_of("name")
BAD_REQUESTS: dict[str, tuple[int, str, str, bytes]] = {
    "odd number of digits": (422, "PUT", "/blocks/abc", b"x"),
    "no digits": (422, "GET", "/blocks/xyz_", b""),
    "hash too long": (422, "PUT", f"/blocks/{'ab' * 255}", b"x"),
    "empty body": (422, "PUT", f"/blocks/{NAME}", b""),
    "no JSON": (422, "POST", "/lookup", b"{"),
    "no object": (422, "POST", "/lookup", b"[]"),
    "no hashes": (422, "POST", "/load", b"{}"),
    "hashes of another type": (422, "POST", "/load", b'{"hashes": [1]}'),
    "hashes that are no list": (422, "POST", "/prefetch", b'{"hashes": "ab"}'),
    "unknown field": (422, "POST", "/prefetch", b'{"hashes": [], "urgent": true}'),
    "too many hashes": (422, "POST", "/lookup", json.dumps({"hashes": ["ab"] * 2049}).encode()),
    "too much JSON": (413, "POST", "/lookup", b" " * (512 * 1024 + 1)),
    "nothing to evict": (422, "POST", "/evict", b"{}"),
    "two ways to evict": (422, "POST", "/evict", b'{"hashes": ["ab"], "num_blocks": 1}'),
    "fewer than none": (422, "POST", "/evict", b'{"num_blocks": -1}'),
    "no such path": (404, "GET", "/block", b""),
    "no such method": (405, "PATCH", "/blocks", b""),
    "block too long": (413, "PUT", f"/blocks/{NAME}", bytes(BLOCK_BYTES + 1)),
    "batch without manifest": (422, "POST", "/blocks", b"\xff" * 100),
    "manifest of another form": (422, "POST", "/blocks", b'{"block": []}\n'),
    "bytes missing": (422, "POST", "/blocks", batch_of({NAME: b"12"})[:-1]),
    "bytes left over": (422, "POST", "/blocks", batch_of({NAME: b"12"}) + b"3"),
    "block of a batch empty": (422, "POST", "/blocks", batch_of({NAME: b""})),
    "block of a batch too long": (
        413,
        "POST",
        "/blocks",
        batch_of({NAME: bytes(BLOCK_BYTES + 1)}),
    ),
    "batch too long": (413, "POST", "/blocks", bytes(64 * 1024 * 1024 + 1)),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
async def test_bad_input_is_refused(server: Server, case: str) -> None:
    """With a status and a reason, and without a change."""
    status, method, path, body = BAD_REQUESTS[case]
    headers = OCTETS if path == "/blocks" else JSON
    async with tenant(server, "bad") as client:
        response = await client.request(method, path, content=body, headers=headers)
        problem_of(response, status)
        stats = (await client.get("/stats")).json()
        assert (stats["stored"], stats["rejected"]) == (0, 0)


async def test_a_namespace_is_checked(server: Server) -> None:
    """It is part of every key."""
    async with tenant(server, "") as client:
        for namespace in ("a b", "a" * 101, "a\\b"):
            response = await client.get("/stats", headers={"x-namespace": namespace})
            problem_of(response, 422)


async def test_a_body_that_grows_too_long_is_refused(server: Server) -> None:
    """It does not say how long it will be, so it is counted; the answer comes before its end."""
    megabyte = b"%x\r\n%b\r\n" % (1024 * 1024, bytes(1024 * 1024))
    async with tenant(server, "long") as client:
        async with by_hand(server) as (reader, writer):
            writer.write(head_of(f"PUT /blocks/{NAME}", "long", "transfer-encoding: chunked"))
            for _ in range(BLOCK_BYTES // len(megabyte) + 2):
                writer.write(megabyte)
                await writer.drain()
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 413 ")
        assert (await client.get(f"/blocks/{NAME}")).status_code == 404


async def test_what_finds_no_room_is_named(server: Server) -> None:
    """The head of a prompt is kept, for that is what a later prompt can use."""
    payloads = {name: payload_of(name) for name in map(hash_of, range(20))}
    async with tenant(server, "full") as client:
        stored = await client.post("/blocks", content=batch_of(payloads), headers=OCTETS)
        problem = problem_of(stored, 507)
        assert problem["rejected"] == dict.fromkeys(list(payloads)[16:], "full")
        assert problem["block_hashes"] == list(payloads)[16:]
        assert (await client.post("/lookup", json={"hashes": [*payloads]})).json()["hit"] == 16

        loaded = await client.post("/load", json={"hashes": [*payloads]})
        assert "staging_bytes" in str(problem_of(loaded, 507)["detail"])


# From start to end


async def test_blocks_survive_a_restart(tmp_path: Path) -> None:
    """Who is being served when the signal comes gets all the bytes; then all is made durable."""
    payloads = {name: payload_of(name, 500_000) for name in map(hash_of, range(6))}
    large = hash_of("large")
    payloads[large] = payload_of(large, BLOCK_BYTES)
    async with running(tmp_path) as server, connected(server, "restart") as client:
        stored = await client.post("/blocks", content=batch_of(payloads), headers=OCTETS)
        assert stored.status_code == 201
        with await start_download(server, "restart", large) as download:
            server.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(server.wait_for_line, "Waiting for connections to close")
            rest = await asyncio.wait_for(read_to_end(download), 20)
        assert rest.endswith(b"\r\n\r\n" + payloads[large])

    async with running(tmp_path) as server:
        async with connected(server, "restart") as client:
            found = (await client.post("/lookup", json={"hashes": list(payloads)})).json()
            assert found["hit"] == len(payloads)
            for name, data in payloads.items():
                assert (await client.get(f"/blocks/{name}")).content == data
        async with connected(server, "somebody-else") as client:
            assert (await client.get(f"/blocks/{large}")).status_code == 404


async def test_a_damaged_block_is_a_miss(tmp_path: Path) -> None:
    """A cold block is checked when it is read; its neighbours are served."""
    bad, good = hash_of("bad"), hash_of("good")
    async with running(tmp_path) as server, connected(server, "damage") as client:
        for name in (bad, good):
            await client.put(f"/blocks/{name}", content=payload_of(name))
    damaged = 0
    for file in server.cold_path.rglob("*"):
        data = file.read_bytes() if file.is_file() else b""
        if (at := data.find(payload_of(bad))) >= 0:
            with file.open("r+b") as slab:
                slab.seek(at + 500)
                slab.write(bytes([data[at + 500] ^ 1]))
            damaged += 1
    assert damaged == 1
    async with running(tmp_path) as server, connected(server, "damage") as client:
        got = await client.get(f"/blocks/{bad}")
        assert problem_of(got, 404)["block_hashes"] == [bad]
        assert (await client.get("/stats")).json()["corrupt"] == 1
        assert (await client.get(f"/blocks/{good}")).content == payload_of(good)
        put = await client.put(f"/blocks/{bad}", content=payload_of(bad))
        assert put.status_code == 201


async def test_one_process_has_a_cold_directory(tmp_path: Path) -> None:
    """A second one does not start, and says who has it."""
    async with running(tmp_path) as server:
        (tmp_path / "second").mkdir()
        second = Server(tmp_path / "second", cold_path=server.cold_path)
        try:
            assert await asyncio.to_thread(second.process.wait, 30) == 3
            assert f"process {server.process.pid}" in second.log.read_text()
        finally:
            second.kill()


async def test_a_client_that_dawdles_is_given_up(tmp_path: Path) -> None:
    """Neither a download that nobody reads nor an upload that stops lasts beyond its deadline."""
    name = hash_of(0)
    known = "ERROR:    ASGI callable returned without completing response."  # on purpose
    async with (
        running(tmp_path, known, transfer_timeout_s=2) as server,
        connected(server, "") as client,
    ):
        await client.put(f"/blocks/{name}", content=payload_of(name, BLOCK_BYTES))
        async with by_hand(server) as (reader, writer):
            writer.write(head_of(f"PUT /blocks/{NAME}", "", "content-length: 1000") + b"begun")
            with await start_download(server, "", name) as download:
                assert (await client.get("/stats")).json()["pinned"] == 1
                await until_at_rest(client)  # and the client is still there
                assert len(await read_to_end(download)) < BLOCK_BYTES
            assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 408 ")
        assert (await client.get(f"/blocks/{NAME}")).status_code == 404


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_the_session_of_the_readme_is_true(tmp_path: Path) -> None:
    """Each command of it gives what it is said to give, the service being restarted in between."""
    text = Path(__file__).with_name("README.md").read_text()
    sessions = re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    variables = "\n".join(sessions[0].splitlines()[:2])
    assert len(sessions) == 2
    for session in (sessions[0], variables + "\n\n" + sessions[1]):
        steps = [
            step.partition("\n") for step in re.split(r"^\$ ", session, flags=re.MULTILINE)[1:]
        ]
        async with running(tmp_path, block_bytes=65536) as server:
            script = "".join(f"{command}\nprintf '\\0'\n" for command, _, _ in steps)
            process = await asyncio.create_subprocess_exec(
                *("bash", "-c", script.replace(":8000", f":{server.port}")),
                cwd=tmp_path,
                stdout=asyncio.subprocess.PIPE,
            )
            output, _ = await process.communicate()
        told = [expected.strip() for _, _, expected in steps]
        assert [each.strip() for each in output.decode().split("\0")[:-1]] == told


@asynccontextmanager
async def running(folder: Path, known: str = "", **settings: object) -> AsyncIterator[Server]:
    """Run a service for one test, and stop it in good order."""
    server = Server(folder, **settings)
    try:
        await asyncio.to_thread(server.wait_until_ready)
        yield server
        await asyncio.to_thread(server.stop, known=known)
    finally:
        server.kill()


# In this process


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BlockNotFoundError("absent, or still being stored", block_hashes=[b"\xab"]), 404),
        (CorruptBlockError("bad bytes", tier="cold", block_hash=b"\xab"), 404),
        (ConfigError("too long"), 422),
        (TierError("no medium", tier="cold"), 503),
        (TierUnavailableError("try again", tier="cold", block_hash=b"\xab"), 503),
        (ClosedError("closed"), 503),
        (LoadTimeoutError("too slow"), 504),
        (CapacityError("all pinned"), 507),
    ],
)
async def test_each_error_has_its_status(error: OffloadError, status: int) -> None:
    """And names the block, where it concerns one; who should try again is told when."""
    response = await on_offload_error(Request({"type": "http"}), error)
    body = json.loads(bytes(response.body))
    assert (response.status_code, body["status"]) == (status, status)
    assert body["detail"] == str(error)
    names_one = getattr(error, "block_hashes", None) or getattr(error, "block_hash", None)
    assert body.get("block_hashes") == (["ab"] if names_one else None)
    assert ("retry-after" in response.headers) == (status == 503)


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (RejectReason.FULL, 507),
        (RejectReason.PINNED, 507),
        (RejectReason.NOT_ADMITTED, 507),
        (RejectReason.THROTTLED, 503),
        (RejectReason.FAILED, 503),
    ],
)
def test_each_rejection_has_its_status(reason: RejectReason, status: int) -> None:
    """Whether it is any use to try again is what matters to a client."""
    response = rejection({b"\xab": reason})
    assert response.status_code == status
    assert json.loads(bytes(response.body))["rejected"] == {"ab": reason.value}


@pytest.mark.parametrize("ending", ["refused", "cancelled", "too slow"])
async def test_no_pin_outlives_a_response(ending: str) -> None:
    """Whatever ends it: a server that tells that the client is gone, a cancellation, a deadline."""
    sent = asyncio.Event()

    async def send(message: Message) -> None:
        if message.get("body"):
            sent.set()
            if ending == "refused":
                raise OSError("client is gone")
            await asyncio.Event().wait()

    async def receive() -> Message:
        raise AssertionError("nothing to receive")

    async with AsyncLRUManager(hot=MemoryTier(2, BLOCK_BYTES)) as kv:
        await kv.store([b"block"], [bytes(BLOCK_BYTES)])
        timeout_s = 0.05 if ending == "too slow" else 60
        response = LeasedResponse(kv.load([b"block"]), timeout_s=timeout_s)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(response({"type": "http"}, receive, send))
            await sent.wait()
            if ending == "cancelled":
                assert kv.get_stats().pinned == 1
                task.cancel()
        assert kv.get_stats().pinned == 0
        assert kv.get_stats().tiers["hot"].retired_blocks == 0
        assert await kv.evict([b"block"]) == [b"block"]
