"""The harness held to its promises: what is wrong fails, what raises is an error, what is lacking is counted apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from backends_for_tests import (
    LyingTrace,
    NoCapabilities,
    NullBackend,
    NullInput,
    NullNoise,
    NullZeros,
    Raises,
    SlightlyOff,
    Wrapped,
    WrongShape,
)
from hypothesis import HealthCheck, given, settings
from typer.testing import CliRunner, Result

from lyra.backends.protocol import Backend, get_backend, known_backends
from lyra.cli import application
from lyra.conformance.case import Case
from lyra.conformance.judge import has
from lyra.conformance.replay import Replay
from lyra.conformance.report.data import STATUSES
from lyra.conformance.runner import Run, run
from lyra.conformance.selection import selects
from lyra.conformance.session import Profile, Session, start
from lyra.conformance.strategies import block_cases, cases
from lyra.spec.errors import InputError

FEW = Profile("smoke", examples=2, frames=3)
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replay files and Hypothesis' own database go where nothing was before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def judged(*backends: Any, only: str | None = None, seed: int = 0, replay: str | None = None) -> Run:
    return run(Session(backends=backends, profile=FEW, seed=seed), only=only, replay=replay)


def statuses(outcome: Run, backend: str) -> dict[str, str]:
    return {name: prop.tally(backend).status for name, prop in outcome.record.properties.items()}


@pytest.mark.parametrize("null", [NullZeros(), NullInput(), NullNoise(), WrongShape()], ids=lambda b: b.name)
def test_a_null_backend_passes_no_property(null: NullBackend) -> None:
    outcome = judged(null)
    assert outcome.exit_code == 1
    assert not outcome.record.ok
    assert len(outcome.record.properties) == outcome.record.planned == outcome.record.finished
    passed = [name for name, status in statuses(outcome, null.name).items() if status in ("passed", "unsupported")]
    assert passed == []
    if not isinstance(null, WrongShape):  # its captured keys do not even fit a context
        assert outcome.record.count("failed") == len(outcome.record.properties)


def test_a_backend_that_raises_is_errored_and_never_failed() -> None:
    outcome = judged(Raises())
    assert set(statuses(outcome, "raises").values()) == {"errored"}
    assert outcome.exit_code == 1
    assert {failure.kind for failure in outcome.record.failures.values()} == {"errored"}
    assert all("RuntimeError: out of order" in failure.message for failure in outcome.record.failures.values())


def test_a_lacking_capability_is_counted_apart() -> None:
    modest, whole = NoCapabilities(), Wrapped()
    outcome = judged(modest, whole, only="order or live or batch")
    assert outcome.exit_code == 0
    assert outcome.record.ok
    seen = outcome.record.properties
    assert {prop.tally("wrapped").status for prop in seen.values()} == {"passed"}
    assert seen["order::layer_equals_oracle"].tally("modest").status == "passed"
    lacking = seen["batch::reordering_the_cache"].tally("modest")
    assert lacking.status == "unsupported"
    assert lacking.cases == 0
    assert lacking.why_unsupported == "lacks static, cache, reorder"
    assert outcome.record.count("unsupported") == sum(p.tally("modest").cases == 0 for p in seen.values()) > 0


def test_a_backend_that_can_do_nothing_asked_for_does_not_conform() -> None:
    outcome = judged(NoCapabilities(), only="live and causal")
    assert outcome.record.count("unsupported") == len(outcome.record.properties) > 0
    assert outcome.record.cases == 0
    assert not outcome.record.ok


def test_a_small_error_is_found_and_its_stage_named() -> None:
    outcome = judged(SlightlyOff(), only="layer_equals_oracle or calls_may_be_cut or every_stage")
    assert set(statuses(outcome, "off").values()) == {"failed"}
    assert {failure.stage for failure in outcome.record.failures.values()} == {"output"}


def test_a_trace_that_lies_is_found_though_the_output_is_right() -> None:
    outcome = judged(LyingTrace(), only="order or rope or tolerance")
    failed = {name for name, status in statuses(outcome, "liar").items() if status == "failed"}
    assert failed == {
        "order::absent_stages_leave_no_trace",
        "order::every_stage_equals_oracle",
        "rope::stages_of_the_rotation",
    }
    assert {outcome.record.failures[name, "liar"].stage for name in failed} == {"k_rope"}


class Broken(Wrapped):
    """Has neither reorder nor crop, though it says so."""

    name = "broken"

    def attention(self, spec: Any, weights: Any) -> Any:
        """A layer that can only be called."""
        layer = super().attention(spec, weights)
        return lambda x, **rest: layer(x, **rest)


def test_what_else_goes_wrong_is_an_error_of_that_backend_only() -> None:
    outcome = judged(Broken(), Wrapped(), only="reordering or cropping")
    assert set(statuses(outcome, "broken").values()) == {"errored"}
    assert set(statuses(outcome, "wrapped").values()) == {"passed"}
    assert not outcome.record.ok


def test_a_backend_is_not_blamed_for_one_that_cannot_capture() -> None:
    outcome = judged(Raises(), get_backend("torch"), only="attached_context")
    assert set(statuses(outcome, "raises").values()) == {"errored"}
    assert set(statuses(outcome, "torch").values()) == {"passed"}


def test_a_property_that_raises_by_itself_never_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_order(*_: object, **__: object) -> None:
        raise ZeroDivisionError("the oracle is out of order")

    monkeypatch.setattr("lyra.conformance.oracles.hf.HuggingFaceOracle.plain", out_of_order)
    outcome = judged(Wrapped(), only="test_equals_hugging_face and identity or layer_equals_oracle")
    assert statuses(outcome, "wrapped") == {
        "identity::equals_hugging_face": "errored",
        "order::layer_equals_oracle": "passed",
    }
    assert not outcome.record.ok
    (failure,) = outcome.record.failures.values()
    assert "the property itself raised ZeroDivisionError" in failure.message


class GivesUp(Wrapped):
    """Somebody presses Ctrl-C at its sixth layer."""

    name = "stopped"
    layers = 0

    def attention(self, spec: Any, weights: Any) -> Any:
        """A layer, or the interruption."""
        self.layers += 1
        if self.layers > 5:
            raise KeyboardInterrupt
        return super().attention(spec, weights)


def test_a_run_cut_short_is_no_pass() -> None:
    outcome = judged(GivesUp(), only="order and (layer_equals_oracle or every_stage)")
    assert 0 < outcome.record.finished < outcome.record.planned
    assert not outcome.broke
    assert not outcome.record.complete
    assert not outcome.record.failures
    assert not outcome.record.ok


@cache
def a_failure(folder: Path) -> Path:
    """The replay file of a failure of SlightlyOff."""
    outcome = judged(SlightlyOff(), only="layer_equals_oracle")
    (failure,) = outcome.record.failures.values()
    assert failure.replay is not None
    return Path(failure.replay).resolve()


def test_shrinking_gives_a_small_case(tmp_path: Path) -> None:
    case = Replay.read(str(a_failure(tmp_path))).case
    assert case is not None
    assert case.batch == 1
    assert case.tokens <= 4
    assert (case.seed, case.start, case.padding, case.flavour) == (0, 0, (), "normal")
    assert case.spec.num_attention_heads == 2


def test_a_replay_file_gives_the_failure_again(tmp_path: Path) -> None:
    path = a_failure(tmp_path)
    recorded = json.loads(path.read_text())
    again = judged(SlightlyOff(), replay=str(path))
    assert again.record.planned == again.record.cases == 1
    (failure,) = again.record.failures.values()
    assert (failure.property, failure.message, failure.stage) == (
        recorded["property"],
        recorded["message"],
        recorded["stage"],
    )
    assert judged(Wrapped(), replay=str(path)).record.ok


def test_a_replay_needs_no_profile(tmp_path: Path) -> None:
    """The command that a failure prints runs its property, though that belongs to a larger profile than the default."""
    path = a_failure(tmp_path)
    fields = json.loads(path.read_text()) | {"property": "static::parts_of_a_context_merge"}
    path.write_text(json.dumps(fields))
    assert judged(Wrapped(), replay=str(path)).record.planned == 1


def test_a_failure_of_a_block_is_shrunk_and_replayed_too() -> None:
    """Its block, and the layer whose cache it shares, come back from the file."""
    outcome = judged(SlightlyOff(), only="shared_cache_equals_oracle")
    (failure,) = outcome.record.failures.values()
    assert failure.replay is not None
    recorded = Replay.read(failure.replay).case
    assert recorded is not None
    assert recorded.block is not None
    assert (recorded.block.source, recorded.batch, recorded.seed) == ("own", 1, 0)
    (again,) = judged(SlightlyOff(), replay=failure.replay).record.failures.values()
    assert (again.message, again.stage) == (failure.message, "output")
    assert judged(Wrapped(), replay=failure.replay).record.ok


def drawn(seed: int) -> list[str]:
    """The cases of a run, as every backend under test is given them."""

    class Listens(Wrapped):
        name = "listens"
        seen: list[str]

        def attention(self, spec: Any, weights: Any) -> Any:
            self.seen.append(f"{spec} {sum(float(array.sum()) for array in weights.values())}")
            return super().attention(spec, weights)

    listening = Listens()
    listening.seen = []
    assert judged(listening, only="layer_equals_oracle or life_of_a_cache", seed=seed).record.ok
    return listening.seen


def test_the_seed_decides_the_cases() -> None:
    first = drawn(1)
    assert drawn(1) == first
    assert drawn(2) != first


def test_a_case_survives_its_json() -> None:
    start(Session())

    @settings(max_examples=50, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=cases() | block_cases() | block_cases(source="own"))
    def survives(case: Case) -> None:
        again = Case.from_json(case.to_json())
        assert again == case
        assert again.describe() == case.describe()
        one, two = case.problem(), again.problem()
        assert one.x.tobytes() == two.x.tobytes()
        assert one.described == two.described
        assert (one.own is None) == (case.block is None or case.block.source == "external")

    survives()


@pytest.mark.parametrize(
    ("expression", "holds"),
    [
        ("rope", False),
        ("static", True),
        ("STATIC-2 or one_softmax", True),
        ("static::one and not softmax", False),
        ("not (rope or order) and static::one_softmax", True),
        ("test_static::test_one", True),
    ],
)
def test_an_expression_selects_by_name(expression: str, holds: bool) -> None:
    assert selects(expression, "test_static", "test_one_softmax") is holds


@pytest.mark.parametrize("expression", ["", "and", "static static", "(static", "not", "__import__('os')"])
def test_what_is_no_expression_is_refused(expression: str) -> None:
    with pytest.raises(InputError, match="is no expression"):
        selects(expression, "test_static", "test_one")


def test_only_looks_at_names_and_at_no_folder() -> None:
    seen = judged(Wrapped(), only="rope and not huge").record.properties
    assert {name.partition("::")[0] for name in seen} == {"rope"}


def conform(*arguments: object) -> Result:
    environment = {"COLUMNS": "200", "NO_COLOR": "1"}
    return CliRunner().invoke(application(), ["conform", *map(str, arguments)], env=environment)


QUICK = ("--only", "layer_equals_oracle", "--backend")
MINE = "backends_for_tests"


def test_exit_codes() -> None:
    right = conform(*QUICK, f"{MINE}:Wrapped")
    assert right.exit_code == 0, right.stdout
    assert "wrapped: conforms. 1 passed, 0 failed, 0 errored, 0 unsupported" in right.stdout
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


@pytest.mark.parametrize("backend", [NullBackend(), Wrapped(), NoCapabilities()], ids=lambda b: b.name)
def test_the_backends_of_these_tests_are_what_they_claim(backend: Backend) -> None:
    assert has(backend, "model") == isinstance(backend, NullBackend)
    assert all(has(backend, capability) for capability in backend.capabilities)


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
