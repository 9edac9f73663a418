"""Which property holds which statement, and which fault would break it: SPEC.md to the suite and back."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from rich.table import Table
from rich.text import Text

from lyra.conformance.faults.catalogue import catalogue
from lyra.conformance.property_index import all_properties
from lyra.spec.clauses import clauses

from .data import Part

NOT_HELD = {
    "BATCH-4": "says how fast, not what: benchmarks measure it",
}
"""Statements that no property holds, and why. The harness's own tests refuse any other one, and a stale entry here."""

RELATION = "follows from other statements: what breaks it breaks those, where it stands in the catalogue"
SPEC = "is kept by the specs, contexts and fingerprints themselves, which are no backend's code"
NO_FAULT = {
    "SPLIT-6": SPEC,
    "SPLIT-7": RELATION,
    "STATIC-4": RELATION,
    "POSITION-3": RELATION,
    "STORED-3": SPEC,
    "STORED-6": SPEC,
    "SLIDING-2": SPEC,
    "CAPTURE-3": RELATION,
    "COMPOSE-1": SPEC,
    "COMPOSE-2": SPEC,
    "FINGERPRINT-1": SPEC,
    "FINGERPRINT-2": SPEC,
    "TOLERANCE-4": RELATION,
}
"""Statements that no catalogued fault breaks, and why. The harness's own tests refuse any other one."""


class HoldingPart(Part):
    """A property: its name in reports, what must hold, what has to come up in its cases, the capabilities it needs,
    the smallest profile it runs in.
    """

    name: str
    summary: str
    premises: list[str]
    needs: list[str]
    profile: str


class FaultPart(Part):
    """A fault of the catalogue: what goes wrong with it."""

    id: str
    does: str


class StatementPart(Part):
    """A statement of SPEC.md, the properties that hold it and the faults that break it."""

    id: str
    level: str
    text: str
    properties: list[HoldingPart]
    faults: list[FaultPart]
    not_held: str | None = Field(description="why no property holds it")


class ListedClause(Part):
    """A clause of SPEC.md."""

    name: str
    title: str
    statements: list[StatementPart]


class Listing(Part):
    """What `lyra conform --list --json` writes."""

    format: Literal[1]
    clauses: list[ListedClause]


def listing() -> Listing:
    """Every clause, in the order of SPEC.md."""
    holding: dict[str, list[HoldingPart]] = {}
    for name, declaration in all_properties().items():
        part = HoldingPart(
            name=name,
            summary=declaration.summary,
            premises=[premise.name for premise in declaration.premises],
            needs=list(declaration.needs),
            profile=declaration.profile,
        )
        for statement in declaration.statements:
            holding.setdefault(statement, []).append(part)
    breaking: dict[str, list[FaultPart]] = {}
    for fault in catalogue().values():
        for statement in fault.breaks:
            breaking.setdefault(statement, []).append(FaultPart(id=fault.id, does=fault.does))
    listed = [
        ListedClause(
            name=clause.name,
            title=clause.title,
            statements=[
                StatementPart(
                    id=statement.id,
                    level=statement.level,
                    text=statement.text,
                    properties=holding.get(statement.id, []),
                    faults=breaking.get(statement.id, []),
                    not_held=NOT_HELD.get(statement.id),
                )
                for statement in clause.statements
            ],
        )
        for clause in clauses().values()
    ]
    return Listing(format=1, clauses=listed)


def listing_table(found: Listing) -> Table:
    """Clause → statement → properties → faults, one row a statement."""
    table = Table(title="What holds each statement of SPEC.md", title_justify="left", show_lines=True)
    table.add_column("statement", no_wrap=True)
    table.add_column("says", style="dim", max_width=48)
    table.add_column("properties", overflow="fold")
    table.add_column("faults", overflow="fold")
    for clause in found.clauses:
        for statement in clause.statements:
            name = Text(f"{statement.id}\n", style="bold").append(statement.level, style="not bold dim")
            held = Text()
            for part in statement.properties:
                held.append("\n" if held else "").append(part.name)
                held.append(f"\n  premise: {'; '.join(part.premises)}" if part.premises else "", style="dim")
            if not statement.properties:
                held = Text(f"none: {statement.not_held}", style="yellow")
            table.add_row(name, Text(statement.text), held, Text("\n".join(part.id for part in statement.faults)))
    return table
