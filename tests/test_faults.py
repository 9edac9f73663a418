"""The faults: every anchor is live, a fault stays in its copy, and the suite kills it by the clause it breaks."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
from small_layers import CUT_LAYER
from typer.testing import CliRunner

from lyra.backends.protocol import CAPABILITIES, Backend, get_backend
from lyra.cli import application
from lyra.conformance.case import Case, Context, Problem
from lyra.conformance.faults.catalogue import Edit, Fault, FaultError, Patch, catalogue, parse, patched_source, select
from lyra.conformance.faults.crew import kill_all
from lyra.conformance.faults.inject import injected
from lyra.conformance.faults.kill import kill, stages_of
from lyra.conformance.launch import prepare_environment
from lyra.conformance.property_index import all_properties
from lyra.conformance.runner import run
from lyra.conformance.session import PROFILES, Session

BACKENDS = ("torch", "jax")
prepare_environment()


pytestmark = pytest.mark.usefixtures("empty_folder")


def a_fault(find: str, replace: str = "", file: str = "norm.py", backend: str = "torch") -> Fault:
    patch = Patch(file=file, edits=(Edit(find=find, replace=replace),))
    return Fault(id="made-up", breaks=("NORM-1",), does="something", backends={backend: patch})


def a_problem() -> Problem:
    return Case(CUT_LAYER, calls=(3,), batch=2, context=Context(tokens=5)).problem()


def answer(backend: Backend) -> np.ndarray:
    problem = a_problem()
    layer = backend.attention(problem.spec, problem.weights)
    return layer(problem.x, positions=problem.positions, static=problem.static).output


# the catalogue


def able(capability: str | None) -> list[str]:
    """The backends that can have a fault which needs a capability."""
    return [name for name in BACKENDS if capability is None or capability in get_backend(name).capabilities]


def test_every_anchor_is_live_in_every_backend() -> None:
    for fault in catalogue().values():
        assert set(fault.backends) == set(able(fault.needs)), fault.id
        for backend in fault.backends:
            module, source = patched_source(fault, backend)
            compile(source, module, "exec")
            assert source != Path(importlib.import_module(module).__file__ or "").read_text(encoding="utf-8")


@pytest.mark.parametrize("capability", sorted(set().union(*(get_backend(name).capabilities for name in BACKENDS))))
def test_every_capability_has_a_property_and_a_fault(capability: str) -> None:
    """A property asks for it, and a fault that only backends with it can have breaks what that property holds."""
    assert capability in CAPABILITIES
    held = {one for prop in all_properties().values() if capability in prop.needs for one in prop.statements}
    faults = [fault for fault in catalogue().values() if fault.needs == capability]
    assert any(set(fault.breaks) & held for fault in faults)


def test_every_clause_that_the_backends_implement_has_faults() -> None:
    clauses = {fault.clause for fault in catalogue().values()}
    assert clauses == {
        "ORDER", "NORM", "ROPE", "SCALE", "SPLIT", "IDENTITY", "STATIC", "LIVE", "POSITION", "STORED", "MASKED",
        "BATCH", "SLIDING", "CAPTURE", "SEQUENTIAL", "ARRAYS", "GRAD", "MESH", "DTYPE", "TOLERANCE",
    }  # fmt: skip
    assert len(catalogue()) >= 60


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("find", "why"), [("rms_norm(nothing", "is dead"), ("x", "is ambiguous: it stands")])
def test_an_anchor_must_stand_exactly_once(backend: str, find: str, why: str) -> None:
    with pytest.raises(FaultError, match=why) as refused, injected(a_fault(find, backend=backend), backend):
        pass
    assert all(part in str(refused.value) for part in ("'made-up'", repr(backend), "'norm.py'", repr(find)))


def test_an_anchor_must_stand_once_after_the_edits_before_it() -> None:
    edits = (Edit(find="rsqrt", replace="rsqrt rsqrt"), Edit(find="rsqrt", replace=""))
    fault = a_fault("x").model_copy(update={"backends": {"torch": Patch(file="norm.py", edits=edits)}})
    with pytest.raises(FaultError, match="is ambiguous: it stands 2 times"):
        patched_source(fault, "torch")


def test_what_a_catalogue_must_not_hold() -> None:
    good = (
        '[a]\nbreaks = ["NORM-1"]\ndoes = "x"\n'
        '[a.backends.torch]\nfile = "norm.py"\nedits = [{ find = "a", replace = "b" }]\n'
    )
    assert parse(good, "norm.toml")[0].id == "a"
    for text, why in [
        (good.replace("NORM-1", "NORM-9"), r"norm.toml: fault 'a' breaks \['NORM-9'\]"),
        (good.replace("does", "doe"), "fault 'a'"),
        (good.replace('find = "a"', 'find = ""'), "at least 1 character"),
        (good.replace("does", 'needs = "wings"\ndoes'), "needs 'wings', which is no capability"),
        ("a = 1", "expected a table"),
        ("[a", "not TOML"),
    ]:
        with pytest.raises(FaultError, match=why):
            parse(text, "norm.toml")


def test_faults_are_selected_by_id_clause_and_statement() -> None:
    everything = select([])
    assert everything == list(catalogue().values())
    assert [one.id for one in select(["norm-after-rope"])] == ["norm-after-rope"]
    assert {one.clause for one in select(["norm", "ROPE-3"])} == {"NORM", "ROPE"}
    with pytest.raises(FaultError, match="'no-such-fault' is no fault"):
        select(["no-such-fault"])
    with pytest.raises(FaultError, match="has no edit for backend 'jax'"):
        patched_source(a_fault("x"), "jax")


# injection


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fault_stays_in_its_copy(backend: str) -> None:
    """The faulty copy answers differently; the real backend's modules and bits are the same all the time."""
    pytest.importorskip(backend)
    real = get_backend(backend)
    before, modules = answer(real), {name: module for name, module in sys.modules.items() if backend in name}
    source = Path(sys.modules[f"lyra.backends.{backend}_impl.norm"].__file__ or "")
    files = [source, *source.parent.glob("__pycache__/norm.*")]
    contents = [file.read_bytes() for file in files]
    with injected(catalogue()["weight-without-one"], backend) as faulty:
        assert faulty.name == real.name
        assert type(faulty) is not type(real)
        assert np.abs(answer(faulty) - before).max() > 0.01
        assert np.array_equal(answer(real), before)
    assert np.array_equal(answer(real), before)
    assert np.array_equal(answer(get_backend(backend)), before)
    assert type(get_backend(backend)) is type(real)
    package = f"lyra.backends.{backend}_impl"
    assert {name: module for name, module in sys.modules.items() if name.startswith(package)} == {
        name: module for name, module in modules.items() if name.startswith(package)
    }
    assert getattr(sys.modules["lyra.backends"], f"{backend}_impl") is sys.modules[package]
    assert [file.read_bytes() for file in files] == contents


def test_the_real_backend_comes_back_after_an_error() -> None:
    real = get_backend("torch")
    fault = a_fault("import torch\n", "import torch\nraise RuntimeError('no')\n")
    with pytest.raises(FaultError, match="'made-up', backend 'torch': cannot be imported"), injected(fault, "torch"):
        pass
    assert type(get_backend("torch")) is type(real)
    with pytest.raises(ZeroDivisionError), injected(catalogue()["weight-without-one"], "torch"):
        raise ZeroDivisionError
    assert type(get_backend("torch")) is type(real)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fault_in_a_module_that_is_imported_late_is_killed(backend: str) -> None:
    pytest.importorskip(backend)
    verdict = kill(catalogue()["captured-keys-and-values-exchanged"], backend)
    assert (verdict.status, verdict.clause) == ("killed", "CAPTURE")


def test_a_traceback_shows_the_patched_line() -> None:
    fault = a_fault("    wide = x.float()", "    first = 1\n    wide = x.float() / (first - 1).nothing")
    with injected(fault, "torch") as faulty, pytest.raises(AttributeError) as raised:
        answer(faulty)
    frame = traceback.extract_tb(raised.value.__traceback__)[-1]
    assert frame.line == "wide = x.float() / (first - 1).nothing"
    assert frame.filename.endswith("norm.py with made-up")


# killing

REQUIRED = {
    "norm-after-rope": ("ORDER", {"q_norm", "k_norm", "q_rope", "k_rope"}),
    "tile-for-repeat-interleave": ("SPLIT", {"heads"}),
    "static-made-causal": ("STATIC", {"heads"}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", REQUIRED)
def test_the_suite_kills_a_fault_by_its_clause_and_names_the_stage(backend: str, name: str) -> None:
    pytest.importorskip(backend)
    clause, stages = REQUIRED[name]
    fault = catalogue()[name]
    assert fault.clause == clause
    with injected(fault, backend) as faulty:
        session = Session(backends=[faulty], profile=PROFILES["smoke"])
        outcome = run(session, fail_fast=True, only=stages_of(fault)[0])
    assert outcome.exit_code == 1
    assert not session.record.ok
    (failure,) = session.record.failures.values()
    assert failure.kind == "failed"
    assert failure.backend == backend
    assert failure.stage in stages
    assert {one.partition("-")[0] for one in failure.statements} & {clause}


@pytest.mark.parametrize("backend", BACKENDS)
def test_kill_tells_killed_from_broken(backend: str) -> None:
    pytest.importorskip(backend)
    verdict = kill(catalogue()["weight-without-one"], backend)
    assert (verdict.status, verdict.clause, verdict.statement) == ("killed", "NORM", "NORM-1")
    assert verdict.stage in {"q_norm", "k_norm"}
    assert verdict.property
    assert verdict.cases >= 1
    raising = a_fault("def rms_norm(", "def rms_norm(nothing, ", backend=backend)
    assert kill(raising, backend).status == "broken"


def test_what_changes_nothing_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that is none survives the whole suite: a verdict of killed is not given away."""
    monkeypatch.setitem(PROFILES, "smoke", PROFILES["smoke"].__class__("smoke", examples=1, sizes=2))
    verdict = kill(a_fault("wide = x.float()", "wide = 1.0 * x.float()"), "torch")
    assert verdict.status == "survived"
    assert verdict.property is None
    assert verdict.cases > 50


def test_only_the_properties_that_are_named_are_asked() -> None:
    verdict = kill(catalogue()["captured-keys-and-values-exchanged"], "torch", only="norm::")
    assert verdict.status == "survived"
    assert verdict.cases > 0


def test_a_suite_that_compares_nothing_lets_nothing_survive() -> None:
    with pytest.raises(FaultError, match="the suite compared nothing"):
        kill(catalogue()["weight-without-one"], "torch", only="no_property_has_this_name")


def test_the_command(tmp_path: Path) -> None:
    runner = CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1"})
    listed = runner.invoke(application(), ["faults", "--list", "--only", "ORDER"])
    assert listed.exit_code == 0
    assert "norm-after-rope" in listed.stdout
    path = tmp_path / "faults.json"
    done = runner.invoke(
        application(), ["faults", "--backend", "torch", "--only", "norm-after-rope", "--json", str(path)]
    )
    assert done.exit_code == 0, done.output
    assert "torch: 1 of 1 killed" in done.stdout
    assert '"stage": "q_rope"' in path.read_text()  # what stands in the trace where q_norm is expected
    assert runner.invoke(application(), ["faults", "--only", "nothing"]).exit_code == 2


def test_several_processes_give_the_verdicts_of_one() -> None:
    faults = [catalogue()["weight-without-one"], catalogue()["values-normed"]]
    work = [(fault, "torch") for fault in faults]
    found = dict(kill_all(work, workers=2))
    for place, fault in enumerate(faults):
        alone = kill(fault, "torch")
        assert (found[place].fault, found[place].status) == (fault.id, "killed")
        assert (found[place].property, found[place].cases) == (alone.property, alone.cases)


def test_a_fault_that_cannot_be_made_ends_the_other_processes_too() -> None:
    work = [(a_fault("no such line"), "torch"), (catalogue()["weight-without-one"], "torch")]
    with pytest.raises(FaultError, match="is dead"):
        list(kill_all(work, workers=2))
