"""Runs the suite under pytest: makes the session, gives each property its judge, and keeps what was found."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from lyra.conformance import session as sessions
from lyra.conformance.journal import journal
from lyra.conformance.judge import Judge
from lyra.conformance.launch import REPLAY, begin
from lyra.conformance.record import Failure
from lyra.conformance.registry import Declaration
from lyra.conformance.replay import describe, write_replay
from lyra.conformance.selection import selects
from lyra.conformance.subject import BackendError


def declaration_of(item: pytest.Item) -> Declaration | None:
    """What a property says of itself; None for an ordinary test."""
    marker = item.get_closest_marker("lyra")
    return marker.args[0] if marker else None


def property_name(item: pytest.Item) -> str:
    """`static::one_softmax[param]`: the module within properties/ and the function."""
    return f"{item.path.stem.removeprefix('test_')}::{item.name.removeprefix('test_')}"


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Make the session before the first property module is imported: its strategies read it."""
    begin(collector.config)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the properties that the options select, after pytest's own -k and -m: a shard is a part of all the rest."""
    session, replay, only = sessions.current(), config.stash[REPLAY], config.getoption("--lyra-only")
    declared = {item: declaration for item in items if (declaration := declaration_of(item))}
    kept = {
        item: declaration
        for item, declaration in declared.items()
        if (session.profile.includes(declaration.profile) if replay is None else property_name(item) == replay.property)
        and (only is None or selects(only, item.path.stem, item.name))
    }
    if session.shard is not None:
        chosen = session.shard.chosen({property_name(item): one.weight for item, one in kept.items()})
        if kept and not chosen and not hasattr(config, "workerinput"):  # workers have a controller that says it
            raise pytest.UsageError(session.shard.empty())
        kept = {item: one for item, one in kept.items() if property_name(item) in chosen}
    session.planned = {property_name(item): one for item, one in kept.items()}
    kept = {item: one for item, one in kept.items() if property_name(item) not in session.done}
    if len(kept) < len(declared):
        config.hook.pytest_deselected(items=[item for item in declared if item not in kept])
        items[:] = [item for item in items if item in kept or item not in declared]


@pytest.fixture
def judge(request: pytest.FixtureRequest) -> Judge:
    """The judge of the property that asks for it; skips where no backend has what the property needs."""
    declaration = declaration_of(request.node)
    if declaration is None:
        raise pytest.UsageError(f"{request.node.name}: only a property, declared with @prop, can ask for a judge")
    session = sessions.current()
    premises = declaration.premises if request.config.stash[REPLAY] is None else ()  # one case, whatever it meets
    names = [premise.name for premise in premises]
    prop = session.record.register(property_name(request.node), declaration.statements, declaration.summary, names)
    backends = [one for one in session.backends if one.name not in session.without.get(prop.name, ())]
    made = Judge(backends, session.record, prop, declaration.needs, premises)
    if not made.subjects:
        pytest.skip("unsupported: " + "; ".join(f"{name} {t.why_unsupported}" for name, t in prop.tallies.items()))
    return made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[Any]:
    """Time a property; put a replayed case in place of generated ones; add to a failure what a person needs."""
    declaration, session = declaration_of(item), sessions.current()
    if declaration is None:
        return (yield)
    replay = item.config.stash[REPLAY]
    if replay is not None and replay.case is not None:
        case = replay.case
        item.obj = lambda judge: declaration.check(case=case, judge=judge)  # type: ignore[attr-defined]
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
        blame(name, error)
        explain(name, error)
        raise
    finally:
        record.seconds += time.perf_counter() - started


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """What pytest counts as a failure the record has too, wherever it came from: the report decides over the run."""
    report = yield
    if report.failed and call.excinfo is not None and declaration_of(item) is not None:
        blame(property_name(item), call.excinfo.value)
    return report


def pytest_collection_finish(session: pytest.Session) -> None:
    """How many properties are to run."""
    sessions.current().record.planned += sum(declaration_of(item) is not None for item in session.items)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A property begins."""
    if declaration_of(item) is not None:
        journal.begin(property_name(item))


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """One more property is done, whatever came of it."""
    sessions.current().record.finished += declaration_of(item) is not None
    journal.end()


def blame(name: str, error: BaseException) -> None:
    """A property ended with an error: see that the record knows of it. What is a backend's is no other backend's."""
    record = sessions.current().record
    if any(failed == name for failed, _ in record.failures):
        return
    if isinstance(error, BackendError):
        cited = record.properties[name].statements
        record.fail(Failure(name, error.backend, cited, "errored", str(error), stage=None, case=None))
    else:
        record.suite_error(name, error)


def explain(name: str, error: Exception) -> None:
    """Write the replay file of every backend that failed in a property, and say so on the error."""
    record = sessions.current().record
    for key, failure in record.failures.items():
        if key[0] == name:
            record.failures[key] = failure = dataclasses.replace(failure, replay=str(write_replay(failure)))
            error.add_note(describe(failure))
