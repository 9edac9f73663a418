"""The map from SPEC.md to the suite: every MUST is held or excused, and every property cites what it holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lyra.cli import application
from lyra.conformance.faults.catalogue import catalogue
from lyra.conformance.premises import CONTEXT, Premise
from lyra.conformance.property_index import all_properties
from lyra.conformance.registry import prop
from lyra.conformance.report.traceability import NO_FAULT, NOT_HELD, listing
from lyra.spec.clauses import clauses, statements


def test_every_must_is_held_by_a_property_or_listed_with_its_reason() -> None:
    cited = {statement for declaration in all_properties().values() for statement in declaration.statements}
    assert cited <= set(statements())
    assert set(NOT_HELD) <= set(statements())
    bare = {name for name, statement in statements().items() if statement.level == "MUST"} - cited - set(NOT_HELD)
    assert bare == set(), "cite these statements in a property, or say in NOT_HELD why none holds them"
    assert cited & set(NOT_HELD) == set(), "these statements are held now: take them out of NOT_HELD"


def test_every_must_is_broken_by_a_fault_or_listed_with_its_reason() -> None:
    broken = {statement for fault in catalogue().values() for statement in fault.breaks}
    assert set(NO_FAULT) <= set(statements())
    whole = {name for name, statement in statements().items() if statement.level == "MUST"} - set(NOT_HELD)
    assert whole - broken - set(NO_FAULT) == set(), (
        "break these statements by a fault, or say in NO_FAULT why none does"
    )
    assert broken & set(NO_FAULT) == set(), "faults break these statements now: take them out of NO_FAULT"


def test_the_listing_is_the_whole_of_the_spec_and_of_the_suite() -> None:
    found = listing()
    assert [clause.name for clause in found.clauses] == list(clauses())
    assert [one.id for clause in found.clauses for one in clause.statements] == list(statements())
    listed = {part.name for clause in found.clauses for one in clause.statements for part in one.properties}
    assert listed == set(all_properties())
    assert all(bool(one.properties) != bool(one.not_held) for clause in found.clauses for one in clause.statements)
    assert any(statement.faults for clause in found.clauses for statement in clause.statements)


def test_conform_list(tmp_path: Path) -> None:
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(application(), ["conform", "--list", *map(str, arguments)], env={"COLUMNS": "160"})
        assert result.exit_code == 0
        return result.stdout

    shown = run()
    assert all(statement in shown for statement in statements())
    assert "static::one_softmax_over_static_and_live" in shown
    assert "norm-after-rope" in shown
    assert "none: says how fast" in shown
    data = json.loads(run("--json", "-"))
    assert data == listing().model_dump()
    run("--json", tmp_path / "list.json")
    assert json.loads((tmp_path / "list.json").read_text()) == data


def test_a_property_cites_statements_that_there_are_and_says_what_must_hold() -> None:
    def says(judge: object) -> None:
        """Something holds."""

    def silent(judge: object) -> None: ...

    declared = prop("STATIC-1", premise=CONTEXT)(says).pytestmark[0].args[0]
    assert (declared.statements, declared.premises) == (("STATIC-1",), (CONTEXT,))
    for cited in ((), ("STATIC-99",), ("STATIC-1", "nothing")):
        with pytest.raises(ValueError, match="must cite statements of SPEC"):
            prop(*cited, premise=CONTEXT)
    with pytest.raises(ValueError, match="says in its docstring"):
        prop("STATIC-1", premise=CONTEXT)(silent)
    for premises in ((), (CONTEXT, CONTEXT)):
        with pytest.raises(ValueError, match="says what it is about"):
            prop("STATIC-1", premise=premises)
    with pytest.raises(ValueError, match="how it is never met"):
        Premise("nothing in particular")
