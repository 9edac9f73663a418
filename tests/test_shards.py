"""Parts of the suite: shards whose reports add up to the report of one run, and pytest-xdist's workers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from lyra.cli import application
from lyra.conformance.property_index import all_properties
from lyra.conformance.report.data import Report
from lyra.conformance.report.markdown import markdown
from lyra.conformance.report.merge import merged, read_report
from lyra.conformance.session import PROFILES, Profile
from lyra.conformance.shard import FIXED_COST, Shard, places
from lyra.spec.errors import InputError

HERE = Path(__file__).parent
ONLY = "order or norm"
SLOWLY_DIFFERENT = {"started", "seconds", "property_seconds", "cases_per_second", "calls_per_second", "shards"}
"""What two runs of the same suite need not agree in."""


@pytest.fixture(autouse=True)
def _few_examples(empty_folder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder; what runs in this process takes few examples."""
    monkeypatch.setitem(PROFILES, "smoke", Profile("smoke", examples=4, sizes=2))


def lyra(*arguments: object) -> Result:
    return CliRunner().invoke(
        application(), [str(argument) for argument in arguments], env={"COLUMNS": "160", "NO_COLOR": "1"}
    )


@given(weights=st.dictionaries(st.text(max_size=4), st.floats(0.1, 5)), count=st.integers(1, 9), data=st.data())
def test_every_property_is_in_exactly_one_shard(weights: dict[str, float], count: int, data: st.DataObject) -> None:
    parts = [Shard(index, count).chosen(weights) for index in range(1, count + 1)]
    assert Counter(name for part in parts for name in part) == Counter(weights.keys())
    other_order = dict(data.draw(st.permutations(list(weights.items()))))
    assert [Shard(index, count).chosen(other_order) for index in range(1, count + 1)] == parts


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_shards_of_the_suite_are_balanced(count: int) -> None:
    weights = {name: declaration.weight for name, declaration in all_properties().items()}
    assert len(set(weights.values())) > 1
    loads = [0.0] * count
    for name, place in places(weights, count).items():
        loads[place - 1] += weights[name] + FIXED_COST
    assert max(loads) <= 1.05 * min(loads)


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "-1/2", "1/2/3", "a/b", "1/0", " 1/2"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"write i/n with 1 ≤ i ≤ n"):
        Shard.parse(text)


def run_of(path: Path, *options: object, backend: str = "quick_backends:SlightlyOff") -> tuple[Result, Report]:
    done = lyra("conform", "--only", ONLY, "--backend", backend, "--json", path, *options)
    return done, read_report(path)


def comparable(report: Report) -> dict[str, Any]:
    return report.model_dump(exclude=SLOWLY_DIFFERENT)


def test_the_reports_of_all_shards_add_up_to_that_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_of(tmp_path / "whole.json")[1]
    paths = [tmp_path / f"{index}.json" for index in (1, 2, 3)]
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    shards = [
        run_of(path, "--shard", f"{index}/3", "--junit", path.with_suffix(".xml"))
        for index, path in enumerate(paths, start=1)
    ]
    assert min(report.planned for _, report in shards) > 0
    tested = [one.count("<testcase ") for one in (path.with_suffix(".xml").read_text() for path in paths)]
    assert tested == [report.planned for _, report in shards]
    assert [f"Of shard {index} of 3: the others" in summary.read_text() for index in (1, 2, 3)] == [True] * 3
    summary.unlink()
    done = lyra("merge", *reversed(paths), "--json", "all.json", "--report", "all.html")
    assert done.exit_code == 1
    found = read_report(Path("all.json"))
    assert comparable(found) == comparable(whole)
    assert found.calls == whole.calls >= found.cases == whole.cases > 0
    assert found.failures
    assert found.shards is not None
    assert (found.shards.count, found.shards.present) == (3, [1, 2, 3])
    assert "off: does not conform" in done.stdout
    assert f"{found.cases:,} compared cases, {found.calls:,} calls" in " ".join(done.stdout.split())
    assert summary.read_text() == markdown(found) + "\n"
    page = Path("all.html").read_text()
    assert "cut short" not in page
    assert all(failure.picture in page.replace("&#x27;", "'") for failure in found.failures)
    for result, report in shards:
        part = f"shard {report.shards and report.shards.present[0]} of 3"
        assert f"Of {part}: the others are needed for a verdict" in result.stdout
    missing = lyra("merge", paths[0], paths[2], "--report", "part.html")
    assert missing.exit_code == 1
    assert "Cut short: shard 2 of 3 is missing" in missing.stdout
    assert "shard 2 of 3 is missing" in Path("part.html").read_text()
    assert "shard 2 is given" not in missing.stdout


def test_shards_pass_alone_and_together_only_if_all_are_there(tmp_path: Path) -> None:
    paths = [tmp_path / "1.json", tmp_path / "2.json"]
    for index, path in enumerate(paths, start=1):
        done, report = run_of(path, "--shard", f"{index}/2", backend="quick_backends:Right")
        assert done.exit_code == 0
        assert report.ok
        assert report.backends[0].verdict == "passed in this shard"
        counts = report.backends[0].counts
        assert counts["passed"] + counts["vacuous"] + counts["unsupported"] == report.planned
    one = lyra("merge", paths[0])
    assert one.exit_code == 1
    assert "right: cut short" in one.stdout
    both = lyra("merge", *paths)
    assert both.exit_code == 0
    assert "right: conforms" in both.stdout


def test_reports_that_are_not_of_one_run_are_refused(tmp_path: Path) -> None:
    one = run_of(tmp_path / "1.json", "--shard", "1/2", backend="quick_backends:Right")[1]
    again = one.model_copy(update={"seed": 7, "versions": {}})
    whole = one.model_copy(update={"shards": None})
    assert one.shards is not None
    other = one.model_copy(update={"shards": one.shards.model_copy(update={"count": 3, "present": [2]})})
    backend = one.model_copy(update={"backends": [one.backends[0].model_copy(update={"name": "another"})]})
    for wrong, words in (
        (again, "'b' and 'a' are not of one run: they differ in seed, versions"),
        (whole, "'b' is the report of a whole run"),
        (other, "differ in number of shards"),
        (backend, "differ in backends"),
        (one, "shard 1 is given twice, by 'a' and 'b'"),
    ):
        with pytest.raises(InputError, match=words):
            merged({"a": one, "b": wrong})
    (tmp_path / "bad.json").write_text('{"ok": true}')
    refused = lyra("merge", tmp_path / "bad.json")
    assert refused.exit_code == 2
    assert "is no report of this version of Lyra" in refused.stderr


def test_shards_may_have_run_on_different_hardware(tmp_path: Path) -> None:
    first, second = (
        run_of(tmp_path / f"{index}.json", "--shard", f"{index}/2", backend="quick_backends:Right")[1]
        for index in (1, 2)
    )
    for said, expected in (("GPU", "CPU; GPU"), ("CPU", "CPU"), (None, "CPU")):
        one, other = (
            report.model_copy(update={"backends": [report.backends[0].model_copy(update={"hardware": hardware})]})
            for report, hardware in ((first, "CPU"), (second, said))
        )
        assert merged({"a": one, "b": other}).backends[0].hardware == expected


def test_a_shard_with_nothing_to_run_is_refused_with_the_reason() -> None:
    done = lyra("conform", "--only", "every_stage", "--backend", "quick_backends:Right", "--shard", "99/99")
    assert done.exit_code == 2
    assert "error: shard 99/99 has nothing to run: fewer than 99 properties are selected" in done.stderr
    assert "Traceback" not in done.stderr


def plain_pytest(*options: str) -> subprocess.CompletedProcess[str]:
    """The suite as a user runs it, from an empty folder."""
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "--pyargs", "lyra.conformance", "-q"]
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run([*command, *options], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})


def test_workers_see_what_one_process_sees() -> None:
    pytest.importorskip("xdist")
    options = ["--lyra-backend", "quick_backends:SlightlyOff", "--lyra-only", ONLY, "--lyra-report", "page.html"]
    alone = plain_pytest(*options, "--lyra-json", "alone.json")
    written = {path: path.read_text() for path in Path(".lyra/cases").iterdir()}
    Path(".lyra").rename("before")
    spread = plain_pytest(*options, "--lyra-json", "spread.json", "-n", "2")
    assert alone.returncode == spread.returncode == 1, spread.stdout
    one, two = (read_report(Path(name)) for name in ("alone.json", "spread.json"))
    assert comparable(one) == comparable(two)
    assert len(two.properties) == two.planned == two.finished > 4
    assert f"lyra: {two.cases} compared cases, {two.calls} calls: " in spread.stdout
    assert {path: path.read_text() for path in Path(".lyra/cases").iterdir()} == written
    assert len(written) == len(two.failures) > 1
    assert two.failures[0].command in Path("page.html").read_text()


def test_what_cannot_be_followed_is_one_line_with_workers_too() -> None:
    pytest.importorskip("xdist")
    unknown = plain_pytest("-n", "2", "--lyra-backend", "torhc")
    assert unknown.returncode == 4
    assert "ERROR: unknown backend 'torhc'" in unknown.stderr
    shard = ("--lyra-backend", "quick_backends:Right", "--lyra-only", "every_stage", "--lyra-shard", "99/99")
    empty = plain_pytest(*shard, "-n", "1")
    assert empty.returncode == 4
    assert "shard 99/99 has nothing to run" in empty.stdout
    assert "INTERNALERROR" not in empty.stdout
