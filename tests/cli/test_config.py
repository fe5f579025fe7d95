"""The command `kvoffload config`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kvoffload.cli import main

try:
    import pydantic_settings  # noqa: F401  # only to see whether it is there
except ModuleNotFoundError as exc:
    if os.environ.get("CI") == "true":
        raise
    pytest.skip(f"the service needs the extra server: {exc}", allow_module_level=True)

SECRET = "Correct-Horse.Battery~Staple"
FILE = f"""
hot = "64MiB"
[[tokens]]
token = "{SECRET}"
namespaces = ["team-a"]
[namespaces.team-a]
max = "1GiB"
"""
REMOTE = f"""
remote_url = "redis://:{SECRET}@cache"
remote_layout = "model/bf16"
remote_queue_bytes = "1GiB"
"""


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("KVOFFLOAD_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "mine.toml").write_text(FILE)


def test_values_and_where_they_come_from(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVOFFLOAD_PORT", "7000")
    assert main(["config", "--settings", "mine.toml"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert rows["hot"] == ["64", "MiB,", "32", "blocks", "mine.toml"]
    assert rows["port"] == ["7000", "KVOFFLOAD_PORT"]
    assert rows["block_bytes"] == ["2", "MiB", "default"]
    assert rows["tokens.0.token"] == ["set", "mine.toml"]
    assert rows["tokens.0.rights"] == ["read,", "write", "default"]
    assert rows["namespaces.team-a.max"] == ["1", "GiB", "mine.toml"]
    assert SECRET not in out


def test_json_is_one_object_with_plain_values(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVOFFLOAD_SETTINGS", "mine.toml")
    assert main(["config", "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    assert found["file"] == "mine.toml"
    settings = found["settings"]
    assert settings["hot"] == {"value": 64 << 20, "origin": "file", "name": "mine.toml"}
    assert settings["warm"] == {"value": 0, "origin": "default", "name": None}
    assert settings["tokens.0.token"]["value"] == "set"
    assert settings["tokens.0.namespaces"]["value"] == ["team-a"]
    assert SECRET not in out


def test_a_shared_engine_shows_but_for_its_url(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kvoffload.toml").write_text(REMOTE)
    assert main(["config"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert rows["remote_url"] == ["set", "kvoffload.toml"]
    assert rows["remote_layout"] == ["model/bf16", "kvoffload.toml"]
    assert rows["remote_queue_bytes"] == ["1", "GiB", "kvoffload.toml"]
    assert rows["remote_timeout_s"] == ["0.5", "default"]
    assert SECRET not in out


def test_the_defaults_show_and_that_they_let_nobody_in(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["config", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["settings"]["tokens"]["origin"] == "default"
    (line,) = captured.err.splitlines()
    assert line.startswith("kvoffload: nobody may call a service with these settings")


def test_a_mistake_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVOFFLOAD_COLD", "1GiB")
    assert main(["config"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("kvoffload: error: cold (KVOFFLOAD_COLD): 1 GiB on disk need a dir")


def test_each_of_several_mistakes_has_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVOFFLOAD_HTO", "1GiB")
    monkeypatch.setenv("KVOFFLOAD_WARM", "8GB of")
    assert main(["config", "--settings", "mine.toml", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "kvoffload: error: 2 mistakes in the settings:",
        "  KVOFFLOAD_HTO: there is no such setting; the nearest is KVOFFLOAD_HOT",
        "  warm (KVOFFLOAD_WARM): must be a size like 65536, 64KiB or 2 GiB, not '8GB of'",
    ]


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--settings", "other.toml"]) == 2
    assert "settings (argument): the settings file other.toml can't be read" in (
        capsys.readouterr().err
    )


def test_help_tells_what_goes_before_what(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "The environment (KVOFFLOAD_HOT=8GiB) goes before the file" in out
    assert "Exit status: 0 fine; 2 settings are wrong" in out
