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
MINE = "quick_backends"


def test_exit_codes() -> None:
    right = conform(*QUICK, f"{MINE}:Right")
    assert right.exit_code == 0, right.stdout
    assert "right: conforms. 1 passed, 0 failed, 0 errored, 0 vacuous, 0 unsupported" in right.stdout
    wrong = conform(*QUICK, f"{MINE}:Zeros")
    assert wrong.exit_code == 1
    assert "zeros: does not conform. 0 passed, 1 failed" in wrong.stdout
    raising = conform(*QUICK, f"{MINE}:Raises")
    assert raising.exit_code == 1
    assert "raises: does not conform. 0 passed, 0 failed, 1 errored" in raising.stdout
    unable = conform("--only", "live and causal", "--backend", f"{MINE}:Modest")
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
    assert conform("--backend", f"{MINE}:Right", "--replay", path).exit_code == 0


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
    assert "names no property" in refused("--backend", f"{MINE}:Right", "--only", "nothing_of_the_kind")
    (tmp_path / "case.json").write_text('{"property": "order::gone", "case": null}')
    assert "names no property" in refused("--backend", f"{MINE}:Right", "--replay", tmp_path / "case.json")
    for text in ("", "[]", '{"property": "x"}', '{"property": "x", "case": {"calls": [1]}}'):
        (tmp_path / "case.json").write_text(text)
        assert "case" in refused("--backend", "torch", "--replay", tmp_path / "case.json")


ODD_OPTIONS: dict[str, tuple[str, str]] = {
    "--only=": ("", "--only '' is no expression"),
    "--only= ": (" ", "is no expression"),
    "--only=()": ("()", "is no expression"),
    "--only=rope or ()": ("rope or ()", "is no expression"),
    "--only=deep": ("(" * 3000, "is no expression"),
    "--spec=": ("", "'' is neither a .toml file nor a preset"),
    "--seed=-1": ("-1", "the seed is -1; expected a whole number from 0 to 4294967295"),
    "--seed=2**32": (str(2**32), "the seed is 4294967296"),
    "--seed=2**999": (str(2**999), "expected a whole number from 0 to 4294967295"),
    "--shard=": ("", "'' is no shard"),
    "--shard=0/0": ("0/0", "'0/0' is no shard"),
    "--shard=1/99999999999": ("1/99999999999", "'1/99999999999' is no shard; write i/n with 1 ≤ i ≤ n ≤ 10000"),
    "--shard=nines": ("1/" + "9" * 5000, "is no shard"),
    "--shard=٣/٤": ("٣/٤", "'٣/٤' is no shard"),
    "--shard=nan": ("nan/nan", "'nan/nan' is no shard"),
}


@pytest.mark.parametrize("option", ODD_OPTIONS)
def test_options_that_cannot_be_followed_are_refused_before_a_process_starts(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.Popen", None)
    value, words = ODD_OPTIONS[option]
    assert words in refused(f"{option.partition('=')[0]}={value}")


@pytest.mark.parametrize("option", ["--only=", "--seed=-1", "--shard=1/99999999999", "--spec="])
def test_the_same_options_of_pytest_are_refused_in_a_line(option: str) -> None:
    value, words = ODD_OPTIONS[option]
    arguments = ["--pyargs", "lyra.conformance", "-q", f"--lyra-{option[2:].partition('=')[0]}={value}"]
    done = subprocess.run([sys.executable, "-P", "-m", "pytest", *arguments], capture_output=True, text=True)
    assert done.returncode == 4, done.stdout
    assert words in done.stderr
    assert "INTERNALERROR" not in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_backend_that_cannot_be_loaded_is_a_line_too() -> None:
    Path("broken.py").write_text("def f():\n    raise ValueError('no\\ndevice')\nf()")
    sys.path.insert(0, os.getcwd())
    try:
        line = refused("--backend", "broken:Backend")
    finally:
        sys.path.remove(os.getcwd())
    assert line == ("error: backend 'broken:Backend' cannot be imported: ValueError: no device (broken.py, line 2)")


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
    shown = conform(*arguments, "--backend", f"{MINE}:SlightlyOff", "--backend", f"{MINE}:Modest").stdout
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
    assert min(off["failed"], off["unsupported"], modest["passed"], modest["unsupported"]) > 0
    assert len(data["failures"]) == off["failed"]
    for failure in data["failures"]:
        assert failure["replay"] in shown
        assert failure["message"][:60] in shown
        assert failure["command"] in page.read_text()
    assert junit.read_text().count("<testcase") == len(data["properties"])


def test_plain_pytest_runs_the_suite_from_an_empty_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "pytest", "--pyargs", "lyra.conformance", "--lyra-backend", f"{MINE}:Right"]
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    quick = ["-k", "layer_equals_oracle", "-q"]
    right = subprocess.run([*command, *quick], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert right.returncode == 0, right.stdout
    assert "1 passed" in right.stdout
    assert "lyra: 96 compared cases" in right.stdout
    command[-1] = f"{MINE}:Zeros"
    wrong = subprocess.run([*command, *quick], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert wrong.returncode == 1
    assert "against the oracle" in wrong.stdout
    command[-1] = f"{MINE}:Modest"
    unable = subprocess.run(
        [*command, "-k", "live and causal", "-q"], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert unable.returncode == 1, "nothing was compared, which is no pass for pytest either"
    command[-1] = "torhc"
    usage = subprocess.run([*command, *quick], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert usage.returncode == 4
    assert "unknown backend 'torhc'" in usage.stderr
