"""How results look: a table for people in the terminal, and its cells for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from lyra.quantities import duration, size
from lyra.terminal import new_table

from .results import Result
from .row import Finding

COLUMNS = ("row", "figure", "measured", "quartiles", "target", "")

VERDICTS = {True: Text("met", "green"), False: Text("missed", "bold red"), None: Text()}

AXES = {"static": "static tokens S", "tokens": "live tokens T of the call", "batch": "rows B", "contexts": "contexts"}
"""What grows along a sweep, by the option that sets it."""


def table(results: Sequence[Result], machine: dict[str, Any]) -> Table:
    """Every finding of the races and counts."""
    made = new_table(machine_line(machine))
    for name in COLUMNS:
        made.add_column(name, justify="right" if name in {"measured", "quartiles", "target"} else "left")
    for result in results:
        for number, finding in enumerate(result.findings):
            made.add_row(result.name if number == 0 else "", *cells(finding), VERDICTS[finding.met])
        if result.findings:
            made.add_section()
    return made


def cells(finding: Finding) -> tuple[str, str, str, str]:
    """What it is, the value, its quartiles and its bound."""
    between = "" if finding.low is None or finding.high is None else f"{finding.low:.2f} to {finding.high:.2f}"
    return finding.what, amount(finding.value, finding.unit), between, bound(finding)


def bound(finding: Finding) -> str:
    """≥ 3.5, ≤ 1.3, or nothing."""
    if finding.at_least is not None:
        return f"≥ {amount(finding.at_least, finding.unit)}"
    return "" if finding.at_most is None else f"≤ {amount(finding.at_most, finding.unit)}"


def amount(value: float, unit: str) -> str:
    """A value with its unit, for people."""
    if unit == "bytes":
        return size(round(value))
    if unit == "s":
        return duration(value)
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
    return f"{text}{unit}" if unit == "×" else f"{text} {unit}".strip()


def machine_line(machine: dict[str, Any]) -> str:
    """The machine and its rates in one line."""
    rates = machine["rates"]
    return (
        f"{machine['processor']}, {machine['threads']} threads: reads {rates['bandwidth'] / 1e9:.1f} GB/s, multiplies "
        f"{_products(rates, 'float32', 'GFLOP/s ')}, {_products(rates, 'bfloat16')}"
    )


def _products(rates: Mapping[str, float], dtype: str, unit: str = "") -> str:
    """The rate of a dtype's products, and how wide they were where the usual ones would have taken too long."""
    rate, width = rates[dtype] / 1e9, rates.get(f"{dtype} width")
    narrow = "" if width is None else f" (of width {width:.0f}; wider ones take too long)"
    return f"{rate:,.{0 if rate >= 10 else 1}f} {unit}in {dtype}{narrow}"
