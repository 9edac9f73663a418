"""Properties are plain functions, a run is what its session says: nothing of one is left in the process for another."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from judging import judged
from quick_backends import Right, Zeros
from small_layers import CUT_LAYER

from lyra.conformance import properties
from lyra.conformance.launch import make_session
from lyra.conformance.premises import CONTEXT
from lyra.conformance.property_index import all_properties
from lyra.conformance.registry import prop
from lyra.conformance.report.data import report_data
from lyra.conformance.runner import run
from lyra.conformance.session import Profile

pytestmark = pytest.mark.usefixtures("empty_folder")
HERE = Path(__file__).parent
MODULES = sorted(path.stem for path in Path(properties.__path__[0]).glob("test_*.py"))

BARE = """
import gc, importlib, sys
modules = [importlib.import_module(f"lyra.conformance.properties.{name}") for name in sys.argv[1:]]
before = [vars(module).copy() for module in modules]
from lyra.conformance.session import Session
assert not [kept for kept in gc.get_objects() if isinstance(kept, Session)]
from lyra.conformance.property_index import all_properties
assert len(all_properties()) > 100
assert all(sys.modules[module.__name__] is module for module in modules)
assert all(vars(module)[name] is kept for module, names in zip(modules, before) for name, kept in names.items())
"""


def test_every_module_of_properties_imports_in_a_bare_interpreter_without_a_session() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", BARE, *MODULES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_property_takes_its_case_and_its_judge_and_nothing_is_wrapped_around_it() -> None:
    for name, declaration in all_properties().items():
        module, _, function = name.partition("::")
        found = getattr(importlib.import_module(f"lyra.conformance.properties.test_{module}"), f"test_{function}")
        assert found is declaration.check
        assert not hasattr(found, "hypothesis")
        if declaration.draws or declaration.named:
            assert {"case", "judge"} <= inspect.signature(found).parameters.keys()


@pytest.mark.parametrize("options", [{"case": st.none()}, {"case": lambda scope: st.none(), "named": lambda scope: {}}])
def test_a_strategy_that_is_ready_made_is_no_declaration(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="case=lambda scope: cases"):
        prop("STATIC-1", premise=CONTEXT, **options)


def test_a_run_leaves_every_module_where_it_was() -> None:
    judged(Right(), only="absent_stages")
    before = dict(sys.modules)
    judged(Zeros(), only="absent_stages or life_of_a_cache", seed=1)
    assert {name for name, module in before.items() if sys.modules.get(name) is not module} == set()


RUNS: dict[str, dict[str, Any]] = {
    "right": {"names": ["quick_backends:Right"], "profile": Profile("smoke", examples=4, sizes=2)},
    "wrong": {
        "names": ["quick_backends:SlightlyOff", "quick_backends:Right"],
        "profile": Profile("ci", examples=6, sizes=5, data=2),
        "seed": 3,
    },
    "of a spec": {
        "names": ["quick_backends:Right"],
        "profile": Profile("smoke", examples=4, sizes=3),
        "spec": "layer.toml",
    },
}
ONLY = "layer_equals_oracle or groups_of_every_size or life_of_a_cache"


def reported(name: str) -> Any:
    """What the report of a run says, apart from how long it took and from how things were rounded, which depends on
    where in memory an array lies.
    """
    session = make_session(**({"seed": 0, "spec": None} | RUNS[name]))
    assert not run(session, only=ONLY).could_not_run
    report = report_data(session, 1.0).model_dump(mode="json")
    for timing in ("started", "property_seconds", "cases_per_second", "calls_per_second"):
        del report[timing]
    report["distances"] = [(part["backend"], part["compared"], part["count"]) for part in report["distances"]]
    report["failures"] = [{key: part[key] for key in part if key != "message"} for part in report["failures"]]
    return json.loads(json.dumps(report))


def reported_elsewhere(*names: str) -> dict[str, Any]:
    """The same of runs one after the other in a process of their own."""
    code = (
        "import json, sys; from test_plain_properties import reported; "
        "print(json.dumps({name: reported(name) for name in sys.argv[1:]}))"
    )
    command = [sys.executable, "-c", code, *names]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(HERE)})
    assert done.returncode == 0, done.stderr
    reports: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return reports


def test_runs_in_one_process_are_what_they_are_in_processes_of_their_own() -> None:
    """In fresh ones all: what Hypothesis draws depends on the constants in the modules that a process has loaded."""
    CUT_LAYER.to_toml(Path("layer.toml"))
    together = reported_elsewhere(*RUNS)
    for name, report in together.items():
        (alone,) = reported_elsewhere(name).values()
        assert {key for key in report if report[key] != alone[key]} == set()
    assert len({json.dumps(report) for report in together.values()}) == len(RUNS)


def plain_pytest(*arguments: str) -> str:
    """What pytest says of the suite, from an empty folder; the right backend passes whatever is run."""
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "--lyra-backend=quick_backends:Right"]
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_collecting_only_names_every_property_and_runs_none() -> None:
    shown = plain_pytest("--pyargs", "lyra.conformance", "--collect-only", "-q")
    listed = {line.partition("::")[2].partition("[")[0] for line in shown.splitlines() if "::test_" in line}
    expected = {
        f"test_{name.partition('::')[2]}" for name, found in all_properties().items() if found.profile == "smoke"
    }
    assert listed == expected
    assert "compared cases" not in shown


def test_workers_run_what_k_selects() -> None:
    pytest.importorskip("xdist")
    shown = plain_pytest("--pyargs", "lyra.conformance", "-k", "rope and not distances", "-n", "2")
    assert "2 workers" in shown
    assert "compared cases" in shown
    named = [name for name in all_properties() if "rope" in name and "distances" not in name]
    assert f"{len(named)} passed" in shown


@pytest.mark.parametrize(
    "name",
    [
        "test_static.py::test_one_softmax_over_static_and_live",
        "test_split.py::test_groups_of_every_size[3-to-a-group]",
        "test_machine.py::test_life_of_a_cache",
    ],
)
def test_an_editor_runs_one_property_by_its_place_in_a_file(name: str) -> None:
    folder = Path(properties.__path__[0])
    assert "1 passed" in plain_pytest("-q", str(folder / name))
