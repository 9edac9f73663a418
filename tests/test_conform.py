"""`lyra conform`, and the suite under plain pytest: exit codes, what is shown, what is written, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lyra.backends.protocol import known_backends
from lyra.cli import application
from lyra.conformance.report.data import STATUSES

pytestmark = pytest.mark.usefixtures("empty_folder")

HERE = Path(__file__).parent


def conform(*arguments: object) -> Result:
    environment = {"COLUMNS": "200", "NO_COLOR": "1"}
    return CliRunner().invoke(application(), ["conform", *map(str, arguments)], env=environment)


QUICK = ("--only", "layer_equals_oracle", "--backend")
MINE = "backends_for_tests"


def test_exit_codes() -> None:
    right = conform(*QUICK, f"{MINE}:Wrapped")
    assert right.exit_code == 0, right.stdout
    assert "wrapped: conforms. 1 passed, 0 failed, 0 errored, 0 vacuous, 0 unsupported" in right.stdout
    wrong = conform(*QUICK, f"{MINE}:NullZeros")
    assert wrong.exit_code == 1
    assert "zeros: does not conform. 0 passed, 1 failed" in wrong.stdout
    raising = conform(*QUICK, f"{MINE}:Raises")
    assert raising.exit_code == 1
    assert "raises: does not conform. 0 passed, 0 failed, 1 errored" in raising.stdout
    unable = conform("--only", "live and causal", "--backend", f"{MINE}:NoCapabilities")
    assert unable.exit_code == 1
    assert "modest: nothing compared. 0 passed, 0 failed, 0 errored, " in unable.stdout


def test_a_failure_is_shown_with_all_that_a_person_needs(tmp_path: Path) -> None:
    shown = conform(*QUICK, f"{MINE}:SlightlyOff")
    path = Path(".lyra/cases/order-layer_equals_oracle-off.json")
    for part in ("ORDER-1", "|Δ|/σ", "first diverging stage: output", "case: 2 Q / 1 KV heads", f"--replay {path}"):
        assert part in shown.stdout
    again = conform("--backend", f"{MINE}:SlightlyOff", "--replay", path)
    assert again.exit_code == 1
    assert "1 compared cases" in again.stdout
    assert conform("--backend", f"{MINE}:Wrapped", "--replay", path).exit_code == 0


def refused(*arguments: object) -> str:
    result = conform(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = filter(None, result.stderr.splitlines())  # a progress bar leaves an empty line
    return line


def test_usage_errors(tmp_path: Path) -> None:
    unknown = refused("--backend", "torhc")
    assert "'torhc'" in unknown
    assert all(name in unknown for name in known_backends())
    assert "no module 'nowhere'" in refused("--backend", "nowhere:Backend")
    assert "gemma-3-12b" in refused("--backend", "torch", "--spec", "gemma-3-13b")
    bad = tmp_path / "bad.toml"
    bad.write_text("hidden_size = 'wide'")
    assert "hidden_size" in refused("--backend", "torch", "--spec", bad)
    assert "cannot read the case" in refused("--backend", "torch", "--replay", tmp_path / "none.json")
    assert "there is no folder" in refused("--backend", "torch", "--report", tmp_path / "nowhere" / "report.html")
    assert "names no property" in refused("--backend", "torch", "--only", "nothing_of_the_kind")
    (tmp_path / "case.json").write_text('{"property": "order::gone", "case": null}')
    assert "names no property" in refused("--backend", "torch", "--replay", tmp_path / "case.json")
    for text in ("", "[]", '{"property": "x"}', '{"property": "x", "case": {"calls": [1]}}'):
        (tmp_path / "case.json").write_text(text)
        assert "case" in refused("--backend", "torch", "--replay", tmp_path / "case.json")


def test_the_json_holds_what_the_table_shows(tmp_path: Path) -> None:
    path, page, junit = (tmp_path / f"report.{kind}" for kind in ("json", "html", "xml"))
    arguments = (
        "--only",
        "order or capture or without_a_context",
        "--seed",
        3,
        "--json",
        path,
        "--report",
        page,
        "--junit",
        junit,
    )
    shown = conform(*arguments, "--backend", f"{MINE}:SlightlyOff", "--backend", f"{MINE}:NoCapabilities").stdout
    data = json.loads(path.read_text())
    assert not data["ok"]
    assert data["seed"] == 3
    assert [one["name"] for one in data["backends"]] == ["off", "modest"]
    assert f"{data['cases']:,} compared cases" in shown
    for backend in data["backends"]:
        found = [prop["backends"][backend["name"]]["status"] for prop in data["properties"]]
        assert backend["counts"] == {status: found.count(status) for status in STATUSES}
        counts = ", ".join(f"{number} {status}" for status, number in backend["counts"].items())
        assert f"{backend['name']}: {backend['verdict']}. {counts}" in shown
    off, modest = (backend["counts"] for backend in data["backends"])
    assert min(off["passed"], off["failed"], off["unsupported"], modest["unsupported"]) > 0
    assert len(data["failures"]) == off["failed"]
    for failure in data["failures"]:
        assert failure["replay"] in shown
        assert failure["message"][:60] in shown
        assert failure["command"] in page.read_text()
    assert junit.read_text().count("<testcase") == len(data["properties"])


def test_plain_pytest_runs_the_suite_from_an_empty_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "pytest", "--pyargs", "lyra.conformance", "--lyra-backend", "torch"]
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    quick = ["-k", "layer_equals_oracle", "-q"]
    right = subprocess.run([*command, *quick], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert right.returncode == 0, right.stdout
    assert "1 passed" in right.stdout
    assert "lyra: 96 compared cases" in right.stdout
    command[-1] = f"{MINE}:NullZeros"
    wrong = subprocess.run([*command, *quick], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert wrong.returncode == 1
    assert "against the oracle" in wrong.stdout
    command[-1] = "torhc"
    usage = subprocess.run([*command, *quick], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert usage.returncode == 4
    assert "unknown backend 'torhc'" in usage.stderr
