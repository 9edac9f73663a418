"""The faults: every pattern is live, a fault stays in its copy, and the suite kills it by the clause it breaks."""

from __future__ import annotations

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
from lyra.conformance.faults.catalogue import (
    Edit,
    Fault,
    FaultError,
    backend_package,
    catalogue,
    package_folder,
    parse,
    patched_sources,
    select,
)
from lyra.conformance.faults.inject import injected
from lyra.conformance.faults.kill import kill, stages_of
from lyra.conformance.faults.workers import kill_all
from lyra.conformance.launch import prepare_environment
from lyra.conformance.property_index import all_properties
from lyra.conformance.runner import run
from lyra.conformance.session import PROFILES, Session

BACKENDS = ("torch", "jax")
prepare_environment()


pytestmark = pytest.mark.usefixtures("empty_folder")


def a_fault(find: str, replace: str = "", where: str = "rms_norm", backend: str = "torch") -> Fault:
    edits = (Edit(where=where, find=find, replace=replace),)
    return Fault(id="made-up", breaks=("NORM-1",), does="something", backends={backend: edits})


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


def test_every_fault_can_be_made_in_every_backend() -> None:
    for fault in catalogue().values():
        wanted, modules = set(able(fault.needs)), {f"{name}-module" for name in able(fault.needs)}
        of_one_framework = bool(fault.backends) and set(fault.backends) <= modules  # how its own modules are wired
        assert set(fault.backends) == wanted or of_one_framework, fault.id
        for backend in fault.backends:
            patched = patched_sources(fault, backend)
            assert patched, (fault.id, backend)
            for file, source in patched.items():
                compile(source, file, "exec")


@pytest.mark.parametrize("capability", sorted(set().union(*(get_backend(name).capabilities for name in BACKENDS))))
def test_every_capability_has_a_property_and_a_fault(capability: str) -> None:
    """A property asks for it, and a fault that only backends with it can have breaks what that property holds."""
    assert capability in CAPABILITIES
    held = {
        statement for prop in all_properties().values() if capability in prop.needs for statement in prop.statements
    }
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
@pytest.mark.parametrize(("find", "why"), [("rsqrt($A)", "is dead"), ("$A * $B", "is ambiguous: it matches")])
def test_a_pattern_must_match_exactly_once(backend: str, find: str, why: str) -> None:
    with pytest.raises(FaultError, match=why) as refused, injected(a_fault(find, backend=backend), backend):
        pass
    named = ("'made-up'", repr(backend), "'norm.py'", "'rms_norm'", repr(find))
    assert all(part in str(refused.value) for part in named)


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("rms_norms", "there is no function or class 'rms_norms'"),
        ("normal.rms_norm", "there is no function or class 'normal.rms_norm'"),
        ("s_norm", "there is no function or class 's_norm'"),
        ("normal.py", "there is no file 'normal.py'"),
        ("forward", r"'forward' is ambiguous, it may be .*\w+\.\w+\.forward, \w+\.\w+\.forward"),
    ],
)
def test_where_an_edit_goes_must_be_one_definition(where: str, why: str) -> None:
    with pytest.raises(FaultError, match=why) as refused:
        patched_sources(a_fault("return $A", where=where), "torch")
    assert "'made-up', backend 'torch'" in str(refused.value)


def test_a_pattern_must_match_once_after_the_edits_before_it() -> None:
    edits = tuple(
        Edit(where="rms_norm", find="torch.rsqrt($A)", replace=made) for made in ("torch.rsqrt(torch.rsqrt($A))", "$A")
    )
    fault = a_fault("x").model_copy(update={"backends": {"torch": edits}})
    with pytest.raises(FaultError, match="is ambiguous: it matches 2 times"):
        patched_sources(fault, "torch")


def test_what_a_catalogue_must_not_hold() -> None:
    good = """
        [a]
        breaks = ["NORM-1"]
        does = "x"
        [a.backends]
        torch = [{ in = "rms_norm", find = "f($A)", replace = "$A" }]
    """
    assert parse(good, "norm.toml")[0].id == "a"
    for text, why in [
        (good.replace("NORM-1", "NORM-9"), r"norm.toml: fault 'a' breaks \['NORM-9'\]"),
        (good.replace("does", "doe"), "fault 'a'"),
        (good.replace('find = "f($A)"', 'find = ""'), "at least 1 character"),
        (good.replace('in = "rms_norm"', 'in = ""'), "at least 1 character"),
        (good.replace("f($A)", "f($A"), "no Python"),
        (good.replace("f($A)", "f($A); g($A)"), "not one expression or statement"),
        (good.replace("f($A)", "f($B)"), r"does not bind \$A"),
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
        patched_sources(a_fault("x"), "jax")


# injection


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fault_stays_in_its_copy(backend: str) -> None:
    """The faulty copy answers differently; the real backend's modules and bits are the same all the time."""
    pytest.importorskip(backend)
    real = get_backend(backend)
    package = backend_package(backend)
    before, modules = answer(real), dict(sys.modules)
    folder = package_folder(package)
    files = [folder / "norm.py", *folder.glob("__pycache__/norm.*")]
    contents = [file.read_bytes() for file in files]
    with injected(catalogue()["weight-without-one"], backend) as faulty:
        assert faulty.name == real.name
        assert type(faulty) is not type(real)
        assert np.abs(answer(faulty) - before).max() > 0.01
        assert np.array_equal(answer(real), before)
    assert np.array_equal(answer(real), before)
    assert np.array_equal(answer(get_backend(backend)), before)
    assert type(get_backend(backend)) is type(real)
    assert {name: module for name, module in sys.modules.items() if name in modules} == modules
    assert getattr(sys.modules["lyra.backends"], f"{backend}_impl") is sys.modules[package]
    assert [file.read_bytes() for file in files] == contents


def test_the_real_backend_comes_back_after_an_error() -> None:
    real = get_backend("torch")
    fault = a_fault("import torch", "import torch\nraise RuntimeError('no')", "norm.py")
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
    fault = a_fault("$WIDE = x.float()", "first = 1\n$WIDE = x.float() / (first - 1).nothing")
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
    assert {statement.partition("-")[0] for statement in failure.statements} & {clause}


@pytest.mark.parametrize("backend", BACKENDS)
def test_kill_tells_killed_from_broken(backend: str) -> None:
    pytest.importorskip(backend)
    verdict = kill(catalogue()["weight-without-one"], backend)
    assert (verdict.status, verdict.clause, verdict.statement) == ("killed", "NORM", "NORM-1")
    assert verdict.stage in {"q_norm", "k_norm"}
    assert verdict.property
    assert verdict.cases >= 1
    raising = a_fault("return store($A, $B)", "return store($A, $B).nothing", backend=backend)
    assert kill(raising, backend).status == "broken"


def test_what_changes_nothing_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that is none survives the whole suite: a verdict of killed is not given away."""
    monkeypatch.setitem(PROFILES, "smoke", PROFILES["smoke"].__class__("smoke", examples=1, sizes=2))
    verdict = kill(a_fault("x.float()", "1.0 * x.float()"), "torch")
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
    work = [(a_fault("no_such_line"), "torch"), (catalogue()["weight-without-one"], "torch")]
    with pytest.raises(FaultError, match="is dead"):
        list(kill_all(work, workers=2))


def test_a_fault_in_the_wiring_is_put_under_the_subject_that_shows_it() -> None:
    """The subject is copied too, and drives the copy of the backend; the real ones stay as they are."""
    edit = Edit(where="merge", find="$A.total * $WEIGHT_A + $B.total * $WEIGHT_B", replace="$A.total * $WEIGHT_A")
    fault = Fault(id="made-up", breaks=("STATIC-1",), does="x", backends={"torch-module": (edit,)})
    problem = a_problem()
    with injected(fault, "torch-module") as faulty:
        assert faulty.name == "torch-module"
        assert type(faulty).__module__.startswith("lyra.conformance.subjects__made_up_")
        layer = faulty.attention(problem.spec, problem.weights)
        assert type(layer).__module__.partition("__")[0] == "lyra.conformance.subjects"
        assert "__made_up_" in type(layer).__module__
    real = get_backend("torch-module")
    assert type(real).__module__ == "lyra.conformance.subjects.torch_module"
    assert kill(fault, "torch-module", only="static::one_softmax").status == "killed"
