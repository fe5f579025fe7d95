from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.service.exported import NAMES

HERE = Path(__file__).parents[2] / "examples" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((HERE / "kvoffload.json").read_text(encoding="utf-8"))
METRIC = re.compile(r"\bkvoffload_[a-z0-9_]+")
SELECTOR = re.compile(r"(kvoffload_[a-z0-9_]+)\{([^}]*)\}")
OF_HISTOGRAMS = ("_bucket", "_count", "_sum")


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[str]:
    for panel in panels():
        for target in panel["targets"]:
            yield target["expr"]


def exported_name(name: str) -> str:
    for suffix in OF_HISTOGRAMS:
        stem = name.removesuffix(suffix)
        if stem != name and stem in NAMES and NAMES[stem].kind == "histogram":
            return stem
    return name


def test_every_name_in_it_is_exported() -> None:
    queries = [each["query"]["query"] for each in DASHBOARD["templating"]["list"][1:]]
    for expression in [*expressions(), *queries]:
        names = METRIC.findall(expression)
        assert names, expression
        for name in names:
            assert exported_name(name) in NAMES, name
            assert NAMES[exported_name(name)].kind != "histogram" or name.endswith(OF_HISTOGRAMS)


def test_everything_that_is_exported_is_in_it() -> None:
    """Those of namespaces that nobody wants to see for each of 200 apart."""
    shown = {exported_name(name) for each in expressions() for name in METRIC.findall(each)}
    assert {name for name in set(NAMES) - shown if not name.startswith("kvoffload_namespace_")} == (
        set()
    )


def test_labels_are_those_of_the_metrics() -> None:
    everywhere = {"job", "instance"}
    for expression in expressions():
        allowed = set(everywhere)
        for name, selector in SELECTOR.findall(expression):
            labels = set(NAMES[exported_name(name)].labels)
            used = set(re.findall(r'(\w+)(?:=~?|!=|!~)"', selector))
            assert used >= everywhere, expression
            assert used <= labels | everywhere, expression
            allowed |= labels | ({"le"} if name.endswith("_bucket") else set())
        for group in re.findall(r"\bby \(([^)]*)\)", expression):
            assert {label.strip() for label in group.split(",")} <= allowed, expression
        for panel in panels():
            for target in panel["targets"]:
                if target["expr"] == expression:
                    legend = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
                    assert legend <= allowed, target


def test_counters_are_seen_as_rates_and_gauges_are_not() -> None:
    for expression in expressions():
        for match in METRIC.finditer(expression):
            name = match.group()
            is_rate = expression[: match.start()].endswith("rate(")
            kind = NAMES[exported_name(name)].kind
            assert is_rate == (kind in {"counter", "histogram"}), expression
    assert "histogram_quantile" in " ".join(expressions())


@pytest.mark.parametrize("pair", ["()", "{}", "[]"])
def test_brackets_match(pair: str) -> None:
    for expression in expressions():
        depth = 0
        for character in expression:
            depth += (character == pair[0]) - (character == pair[1])
            assert depth >= 0, expression
        assert depth == 0, expression


def test_it_has_what_grafana_imports() -> None:
    assert DASHBOARD["schemaVersion"] >= 39
    assert DASHBOARD["id"] is None
    assert DASHBOARD["uid"] == "kvoffload"
    assert DASHBOARD["title"] == "kvoffload"
    source, *others = DASHBOARD["templating"]["list"]
    assert (source["type"], source["name"], source["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    assert [variable["name"] for variable in others] == ["job", "instance"]
    needed = {each["id"] for each in DASHBOARD["__requires"] if each["type"] == "panel"}
    assert needed == {panel["type"] for panel in panels()}
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    everywhere = {"type": "prometheus", "uid": "${datasource}"}
    for panel in panels():
        assert panel["title"]
        assert panel["datasource"] == everywhere
        assert {"defaults", "overrides"} == set(panel["fieldConfig"])
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)
        assert all(target["datasource"] == everywhere for target in panel["targets"])


def test_rows_and_places() -> None:
    """No two panels overlap, and none reaches beyond the grid's 24 columns."""
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == [
        "Overview",
        "Tiers",
        "Latency",
        "Queues",
        "Prefetch",
        "Errors and tier states",
        "Namespaces",
        "Event loop",
    ]
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_names_in_the_readme_are_exported() -> None:
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    names = set(METRIC.findall(readme))
    assert names
    assert names <= set(NAMES)
    assert "credentials_file:" in readme
