from __future__ import annotations

import re
from pathlib import Path

import httpx
from fastapi import FastAPI
from tests.service.exported import parse, values

from kvoffload.service.exposition import Exposition
from kvoffload.service.families import FAMILIES

DOCS = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")


def table() -> list[str]:
    rows = ["| metric | type | labels | what it says |", "| --- | --- | --- | --- |"]
    for family, _ in FAMILIES:
        labels = ", ".join(f"`{label}`" for label in family.labels)
        rows.append(f"| `{family.exported}` | {family.kind} | {labels} | {family.help} |")
    return rows


def test_the_table_has_all_metrics_and_no_other() -> None:
    found = [line for line in DOCS.splitlines() if line.startswith("|")]
    assert found == table(), "the table should be:\n" + "\n".join(table())


async def test_the_application_in_there_works() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    names: dict[str, object] = {"__name__": "docs"}
    exec(compile(code, "docs/metrics.md", "exec"), names)
    app = names["app"]
    assert isinstance(app, FastAPI)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://kv") as client,
    ):
        await app.state.kv.store(["a"], [b"x"])
        text = await client.get("/metrics")
        assert text.headers["content-type"] == Exposition.TEXT.content_type
        families = parse(text.content)
        assert values(families, "kvoffload_stored_blocks_total") == {(): 1}
        counts = values(families, "kvoffload_operation_duration_seconds_count")
        assert counts == {("store", "ok"): 1}
        accept = {"accept": "application/openmetrics-text;version=1.0.0"}
        openmetrics = await client.get("/metrics", headers=accept)
        assert openmetrics.headers["content-type"] == Exposition.OPENMETRICS.content_type
        assert set(parse(openmetrics.content, Exposition.OPENMETRICS)) == set(families)
