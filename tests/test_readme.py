"""The README's code runs, and what it names is there."""

from __future__ import annotations

import collections
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from tests.remote.servers import Server
from tests.service.serving import serving

import kvoffload
import kvoffload.testing
from kvoffload.client import AsyncLRUClient
from kvoffload.integrations.fastapi import Manager, lifespan_manager

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_there_is_code() -> None:
    """Else the test below would pass on nothing."""
    assert len(BLOCKS) == 6


def test_code_runs_and_the_second_run_finds_the_blocks(tmp_path: Path) -> None:
    """As a newcomer would: paste it, run it, run it again."""
    script = tmp_path / "readme.py"
    code = BLOCKS[0].replace("/tmp/kvoffload-cold", str(tmp_path / "cold"))
    assert str(tmp_path) in code
    script.write_text(code, encoding="utf-8")
    outputs = []
    for _ in range(2):
        command = [sys.executable, "-W", "error", str(script)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        outputs.append(done.stdout)
    assert outputs[0].startswith("0 blocks found, 0 bytes")
    assert outputs[1].startswith("8 blocks found, 524288 bytes")


def test_the_settings_of_the_cold_tier_are_real() -> None:
    """Nothing is touched before it is opened, so the path of the example may be any."""
    names: dict[str, object] = {}
    exec(BLOCKS[1], names)
    assert repr(names["cold"]).endswith("20000 blocks of 2097152 bytes, closed>")


async def test_the_client_does_what_it_says() -> None:
    """Against a service on a Unix socket."""
    async with serving() as served:
        await served.store(["a"], [b"1"])
        code = (
            BLOCKS[3]
            .replace("/run/kv.sock", str(served.path))
            .replace("...", "found = request.hit")
        )
        body = "async def use(hashes):\n" + textwrap.indent(code, "    ") + "    return found"
        names: dict[str, Any] = {"AsyncLRUClient": AsyncLRUClient}
        exec(body, names)
        assert await names["use"](["a", "b"]) == 1


async def test_the_application_is_one() -> None:
    """With models of its own for prompt and answer."""
    names: dict[str, Any] = {
        "FastAPI": FastAPI,
        "Manager": Manager,
        "ManagerSettings": kvoffload.ManagerSettings,
        "lifespan_manager": lifespan_manager,
        "Prompt": dict[str, int],
        "Answer": int,
    }
    exec(BLOCKS[4].replace("...", "return await kv.lookup([])"), names)
    app = names["app"]
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://app") as http,
    ):
        assert (await http.post("/generate", json={})).json() == 0


async def test_a_block_past_one_machine(tmp_path: Path) -> None:
    """Stored by one manager and a hit for the next, through a server that is there."""
    with Server(tmp_path / "server") as server:
        code = (
            BLOCKS[5]
            .replace("redis://cache.internal:6379", server.url)
            .replace("...", "return await kv.lookup(['a']), await kv.store(['a'], [b'1'])")
        )
        names: dict[str, Any] = {
            "AsyncLRUManager": kvoffload.AsyncLRUManager,
            "MemoryTier": kvoffload.MemoryTier,
            "ValkeyTier": kvoffload.ValkeyTier,
        }
        exec("async def share():\n" + textwrap.indent(code, "    "), names)
        assert [(await names["share"]())[0] for _ in range(2)] == [0, 1]


async def test_what_a_request_can_say_is_real() -> None:
    """Inside the `async with` of a manager, with a chain at hand."""
    body = "async def show(kv, hashes):\n" + textwrap.indent(BLOCKS[2], "    ")
    names: dict[str, Any] = {"kvoffload": kvoffload}
    exec(body, names)
    async with kvoffload.LRUOffloadManager(kvoffload.MemoryTier(4, 8)) as kv:
        await kv.store(["a", "b"], [bytes(8)] * 2)
        await kv.store(["a", "c"], [bytes(8)] * 2)
        await names["show"](kv, ["a", "b"])
        assert [at.tier is None for at in kv.locate(["a", "b", "c"])] == [False, True, False]


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(link: str) -> None:
    """Every relative link is a file or folder of the repository."""
    assert (ROOT / link).exists()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:[A-Z][a-z]+|LRU)\w+)`", README))))
def test_names_exist(name: str) -> None:
    """What the README calls a class is one."""
    assert any(hasattr(module, name) for module in (kvoffload, kvoffload.testing, collections))


@pytest.mark.parametrize("script", ["scripts/demo", "scripts/test", ".ci/run"])
def test_scripts_can_be_run(script: str) -> None:
    """The two commands that the README opens with, and what the build machine runs."""
    path = ROOT / script
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(path)], check=True)
