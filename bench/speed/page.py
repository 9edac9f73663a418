"""The page of the benchmark, docs/performance.md, and its pictures, made from results."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lyra.quantities import duration, size
from lyra.spec.files import write_atomically
from lyra.studies.figures import save
from lyra.terminal import visible

from .figures import cost_figure
from .machine import BUFFER
from .measure import DISTURBED, TURN
from .results import Result
from .row import Finding
from .rows import all_rows
from .show import AXES, cells, machine_line

INTRODUCTION = """# Performance

Every row is measured side by side in one run, and this page is written by the run itself:

```bash
make performance
```

which is `lyra bench --json build/bench.json --page docs/performance.md`. `lyra bench --only decode` measures the rows
whose names begin so, `lyra bench --list` names them, `lyra bench --quick` is the short report that CI keeps.
Rows that were measured apart are joined by `--from`, once for each file.

{machine}. {versions}.

## Method

- Contestants work in turns: one stretch of about {turn:.0f} ms each, in an order that moves on from round to round. A
  figure is the median of the ratios of the rounds (rival / Lyra: above 1 Lyra is faster), with their quartiles.
- Each framework has a process of its own, and only one works at a time, so that neither's threads and memory matter to
  the other (row `frame`). Contestants of one framework share its process.
- The floor of a row is the time in which this machine reads the bytes that no implementation can avoid, or does the
  operations at the rate of its matrix products, whichever is longer. Both rates are measured anew beside every row, the
  bandwidth over {buffer}, more than caches hold. Where keys fit into the caches a step can be below its floor.
- A round in which other processes kept more than {disturbed:.0%} of a core busy is taken again.
- A row that would take a machine more than ten minutes (`--row-limit`) has fewer rounds, or is named as out of its
  reach. Where a processor has no products in bfloat16, smaller ones are timed.
- float32 everywhere unless a row says otherwise; weights and keys are random where nothing depends on them.

## Figures

"""

ELSEWHERE = """
## Elsewhere

How many cases a second the conformance suite compares, and where their time goes, is in
[conformance in CI](conformance-in-ci.md).
"""

HEAD = "| Row | Figure | Measured | Quartiles | Target | |\n|---|---|---|---|---|---|"
WORDS = {True: "met", False: "**missed**", None: ""}


def write_page(path: Path, machine: dict[str, Any], results: Sequence[Result]) -> None:
    """Write the page and, in the folder `images` beside it, a picture of every sweep."""
    images = path.parent / "images"
    images.mkdir(exist_ok=True)
    for result in results:
        if result.series is not None:
            save(cost_figure(result.what, result.option, result.series), images / picture(result))
    write_atomically(path, page(machine, results).encode())


def page(machine: dict[str, Any], results: Sequence[Result]) -> str:
    """The Markdown text."""
    versions = words(", ".join(f"{name} {version}" for name, version in machine["versions"].items()))
    of_machine = words(machine_line(machine))
    text = INTRODUCTION.format(
        disturbed=DISTURBED, machine=of_machine, versions=versions, turn=TURN * 1e3, buffer=size(BUFFER)
    )
    measured = [result for result in results if result.findings]
    text += "\n".join([HEAD, *(line for result in measured for line in _lines(result))]) + "\n"
    text += "".join(_details(result) for result in measured)
    sweeps = [result for result in results if result.series is not None]
    if sweeps:
        text += "\n## Costs that grow\n\nBoth axes are logarithmic; the grey line is the floor.\n"
        text += "".join(_sweep(result) for result in sweeps)
    measured_rows = {result.name for result in results}
    missing = [f"`{row.name}`" for row in all_rows() if row.name not in measured_rows]
    if missing:
        text += f"\n## Not measured here\n\n{', '.join(missing)}: left out of this page's run.\n"
    return text + ELSEWHERE


def picture(result: Result) -> str:
    """The file of a sweep's picture."""
    return f"performance-{result.name}.png"


def _lines(result: Result) -> list[str]:
    return [
        "| " + " | ".join((code(result.name) if number == 0 else "", *_cells(finding), WORDS[finding.met])) + " |"
        for number, finding in enumerate(result.findings)
    ]


def _cells(finding: Finding) -> list[str]:
    return [words(cell) for cell in cells(finding)]


def _details(result: Result) -> str:
    """What was measured in a row: times, table, note, and the profile of a miss."""
    text = f"\n### {code(result.name)}\n\n{_sentence(result.what)}."
    if result.times:
        times = "; ".join(f"{words(name)} {duration(seconds)}" for name, seconds in result.times.items())
        text += f" Medians of {result.rounds} rounds: {times}"
        text += f"; floor {duration(result.floor['seconds'])}." if result.floor is not None else "."
    text += "\n"
    if result.table:
        text += "\n" + markdown([[words(cell) for cell in row] for row in result.table]) + "\n"
    if result.note:
        text += f"\n{result.note}\n"
    if result.profile:
        parts = ", ".join(f"{code(name)} {share:.0%}" for name, share in result.profile)
        text += f"\nWhere the time of a run goes: {parts}.\n"
    return text


def _sweep(result: Result) -> str:
    assert result.series is not None
    points = sorted({point for line in result.series.values() for point, _ in line})
    rows = [[AXES.get(result.option, result.option), *(f"{point:,}" for point in points)]]
    for name, line in result.series.items():
        at = dict(line)
        rows.append([words(name), *(duration(at[point]) if point in at else "" for point in points)])
    text = f"\n### {code(result.name)}\n\n{_sentence(result.what)}.\n\n"
    text += f"![{words(result.what)}](images/{picture(result)})\n\n{markdown(rows)}\n"
    if result.out_of_reach:
        text += f"\nOut of this machine's reach: {words(result.out_of_reach)}.\n"
    return text + (f"\n{result.note}\n" if result.note else "")


def words(text: str) -> str:
    """Text that stays text in Markdown and in the page that is made of it: no tag, no link, no end of a cell."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(visible(text), quote=False))


def code(text: str) -> str:
    """A name between backticks, which it cannot leave, nor its cell."""
    return f"`{visible(text).replace('`', chr(39)).replace('|', '/')}`"


def _sentence(text: str) -> str:
    return words(text[:1].upper() + text[1:])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose head is the first row."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
