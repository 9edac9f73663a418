"""Runs the suite under pytest: makes the session, gives each property its cases and its judge, keeps what was found."""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from lyra.conformance.generation import generated
from lyra.conformance.judge import Judge
from lyra.conformance.launch import begin
from lyra.conformance.record import Failure
from lyra.conformance.registry import Declaration
from lyra.conformance.replay import command, describe, write_replay
from lyra.conformance.selection import selects
from lyra.conformance.session import Session
from lyra.conformance.stash import REPLAY, SESSION
from lyra.conformance.subject import BackendError


def declaration_of(item: pytest.Item) -> Declaration | None:
    """What a property says of itself; None for an ordinary test."""
    marker = item.get_closest_marker("lyra")
    return marker.args[0] if marker else None


def property_name(item: pytest.Item) -> str:
    """`static::one_softmax[param]`: the module within properties/ and the function."""
    return f"{item.path.stem.removeprefix('test_')}::{item.name.removeprefix('test_')}"


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Make the session before the first property is collected."""
    begin(collector.config)


def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Give the folder of the properties a name that no word of -k is a part of, as "rope" is of "properties"."""
    if path.name != "properties":
        return None
    package: pytest.Package = pytest.Package.from_parent(parent, path=path)
    package.name = "."
    return package


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a property the cases that it names, one by one."""
    marker = metafunc.definition.get_closest_marker("lyra")
    if marker and marker.args[0].named is not None:
        cases = marker.args[0].named(metafunc.config.stash[SESSION].scope)
        metafunc.parametrize("case", cases.values(), ids=cases)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Put generated cases into a property that asks for them: as many, and of such sizes, as this run decides."""
    declaration = declaration_of(item)
    if declaration is not None and declaration.draws is not None:
        item.obj = generated(declaration, item.config.stash[SESSION])  # type: ignore[attr-defined]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a property whose cases Hypothesis draws, or any on a replayed case; pytest runs the others."""
    declaration, replay = declaration_of(pyfuncitem), pyfuncitem.config.stash.get(REPLAY, None)
    if declaration is None:
        return None
    if replay is not None and replay.case is not None:
        declaration.check(case=replay.case, judge=pyfuncitem.funcargs["judge"])
        return True
    if declaration.draws is None:
        return None
    names = inspect.signature(declaration.check).parameters.keys() - {"case"}
    pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names})
    return True


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the properties that the options select, after pytest's own -k and -m: a shard is a part of all the rest."""
    session, replay, only = config.stash[SESSION], config.stash[REPLAY], config.getoption("--lyra-only")
    declared = {item: declaration for item in items if (declaration := declaration_of(item))}
    kept = {
        item: declaration
        for item, declaration in declared.items()
        if (session.profile.includes(declaration.profile) if replay is None else property_name(item) == replay.property)
        and (only is None or selects(only, item.path.stem, item.name))
    }
    if session.shard is not None:
        chosen = session.shard.chosen({property_name(item): declaration.weight for item, declaration in kept.items()})
        if kept and not chosen and not hasattr(config, "workerinput"):  # workers have a controller that says it
            raise pytest.UsageError(session.shard.empty())
        kept = {item: some for item, some in kept.items() if property_name(item) in chosen}
    session.planned = {property_name(item): declaration for item, declaration in kept.items()}
    kept = {item: some for item, some in kept.items() if property_name(item) not in session.done}
    if len(kept) < len(declared):
        config.hook.pytest_deselected(items=[item for item in declared if item not in kept])
        items[:] = [item for item in items if item in kept or item not in declared]


@pytest.fixture
def suite(request: pytest.FixtureRequest) -> Session:
    """The run that a property is a part of."""
    return request.config.stash[SESSION]


@pytest.fixture
def case() -> None:
    """Stands for the case of a property whose cases are generated; each of them takes its place."""


@pytest.fixture
def judge(request: pytest.FixtureRequest) -> Judge:
    """The judge of the property that asks for it; skips where no backend has what the property needs."""
    declaration = declaration_of(request.node)
    if declaration is None:
        raise pytest.UsageError(f"{request.node.name}: only a property, declared with @prop, can ask for a judge")
    session = request.config.stash[SESSION]
    premises = declaration.premises if request.config.stash[REPLAY] is None else ()  # one case, whatever it meets
    names = [premise.name for premise in premises]
    prop = session.record.register(property_name(request.node), declaration.statements, declaration.summary, names)
    backends = [backend for backend in session.backends if backend.name not in session.without.get(prop.name, ())]
    judge = Judge(
        backends,
        session.record,
        prop,
        declaration.needs,
        premises,
        journal=session.journal,
        shared=session.shared,
        lost=session.lost.get(prop.name),
    )
    if not judge.subjects:
        pytest.skip("unsupported: " + "; ".join(f"{name} {t.why_unsupported}" for name, t in prop.tallies.items()))
    return judge


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[Any]:
    """Time a property; add to a failure what a person needs."""
    if declaration_of(item) is None:
        return (yield)
    session = item.config.stash[SESSION]
    started = time.perf_counter()
    name, record = property_name(item), session.record
    try:
        return (yield)
    except pytest.skip.Exception as skipped:
        record.left_out(name, str(skipped))
        raise
    except pytest.exit.Exception:
        raise
    except Exception as error:
        blame(session, name, error)
        explain(session, name, error)
        raise
    finally:
        record.seconds += time.perf_counter() - started


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """What pytest counts as a failure the record has too, wherever it came from: the report decides over the run."""
    report = yield
    if report.failed and call.excinfo is not None and declaration_of(item) is not None:
        blame(item.config.stash[SESSION], property_name(item), call.excinfo.value)
    return report


def pytest_collection_finish(session: pytest.Session) -> None:
    """How many properties are to run; none where the options were refused."""
    if (suite := session.config.stash.get(SESSION, None)) is not None:
        suite.record.planned += sum(declaration_of(item) is not None for item in session.items)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A property begins."""
    if declaration_of(item) is not None:
        item.config.stash[SESSION].journal.begin(property_name(item))


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """One more property is done, whatever came of it."""
    if declaration_of(item) is not None:
        session = item.config.stash[SESSION]
        session.record.finished += 1
        session.journal.end()


def blame(session: Session, name: str, error: BaseException) -> None:
    """A property ended with an error: see that the record knows of it. What is a backend's is no other backend's."""
    record = session.record
    if any(failed == name for failed, _ in record.failures):
        return
    if isinstance(error, BackendError):
        cited = record.properties[name].statements
        record.fail(Failure(name, error.backend, cited, "errored", str(error), stage=None, case=None))
    else:
        record.suite_error(name, error)


def explain(session: Session, name: str, error: Exception) -> None:
    """Write the replay file of every backend that failed in a property, and say so on the error."""
    record = session.record
    for key, failure in record.failures.items():
        if key[0] == name:
            record.failures[key] = failure = dataclasses.replace(failure, replay=str(write_replay(failure)))
            error.add_note(describe(failure, command(failure, session.requested_as)))
