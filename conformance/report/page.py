"""The report as one HTML page: no script, no external resource, light and dark, fit to print."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from html import escape as plain
from importlib.resources import files

from lyra.conformance.case import Case
from lyra.conformance.record import Status
from lyra.conformance.tolerance import MODEL
from lyra.spec.attention import AttentionSpec
from lyra.spec.clauses import statements
from lyra.terminal import paragraphs

from .charts import head_map, histogram_chart, small_histogram
from .data import (
    STATUSES,
    DistancePart,
    FailurePart,
    PropertyPart,
    Report,
    ShardsPart,
    TallyPart,
    Verdict,
    alike,
    how_much,
    part_of,
    shortfall,
    vacuous,
)

SIGN: dict[Status, str] = {"passed": "✓", "failed": "✗", "errored": "!", "vacuous": "○", "unsupported": "–"}
COLOUR: dict[Verdict, Status] = {
    "conforms": "passed",
    "passed in this shard": "passed",
    "does not conform": "failed",
    "cut short": "unsupported",
    "nothing compared": "unsupported",
}
ORACLE = "output"
NOTHING = TallyPart(status="unsupported", cases=0, why_unsupported="was not asked")


def escape(text: str) -> str:
    """A text from outside as HTML has it: no markup, no control character, none that turns the direction of writing."""
    return plain(paragraphs(text))


def html(report: Report) -> str:
    """The whole page."""
    title = ", ".join(f"{backend.name} {backend.verdict}" for backend in report.backends)
    sections = [
        _head(report),
        _matrix(report),
        _failures(report),
        _spec(report),
        _distances(report),
        _properties(report),
        _run(report),
        _end(report),
    ]
    style = (files("lyra.conformance.report") / "page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}: Lyra conformance</title>\n<style>\n{style}</style>\n"
        "</head>\n<body>\n"
        '<p class="truncated">This file ends before its end: it was cut off while it was written or copied.</p>\n'
        + "\n".join(filter(None, sections))
        + "\n</body>\n</html>\n"
    )


def said(counts: dict[Status, int]) -> str:
    """The counts that are not 0, each with its sign, number and word, in its colour."""
    shown = [
        f'<span class="{status}">{SIGN[status]} {counts[status]:,} {status}</span>'
        for status in STATUSES
        if counts[status]
    ]
    return f'<span class="counts">{" ".join(shown) or "nothing"}</span>'


def _head(report: Report) -> str:
    parts = [
        "<h1>Lyra conformance report</h1>",
        f'<p class="dim">Against Hugging Face Gemma-3, the float64 oracle and each other: {report.cases:,} compared '
        f"cases, profile {how_much(report)}, seed {report.seed}</p>",
    ]
    for backend in report.backends:
        parts.append(
            f'<div class="verdict {COLOUR[backend.verdict]}"><strong>{escape(backend.name)}: {backend.verdict}</strong>'
            f"{said(backend.counts)}</div>"
        )
        if empty := vacuous(report, backend.name):
            parts.append(f'<div class="verdict vacuous"><strong>{escape(backend.name)}</strong> {escape(empty)}</div>')
    if lacking := shortfall(report):
        parts.append(
            f'<div class="verdict unsupported"><strong>The run was cut short</strong><span>{escape(lacking)}; of the '
            f"rest this page says nothing.</span></div>"
        )
    if part := part_of(report):
        parts.append(
            f'<div class="verdict unsupported"><strong>Of {part}</strong><span>A part of the suite: the others are '
            f"needed for a verdict (<code>lyra merge</code>).</span></div>"
        )
    return "\n".join(parts)


def _matrix(report: Report) -> str:
    head = "".join(f'<th scope="col">{escape(backend.name)}</th>' for backend in report.backends)
    rows = []
    for clause in report.clauses:
        cells = "".join(
            f'<td class="{clause.status[backend.name]}">{said(clause.counts[backend.name])}'
            f'<span class="cases">{_cases(clause.cases[backend.name])}</span></td>'
            for backend in report.backends
        )
        rows.append(
            f'<tr><th scope="row">{escape(clause.name)}</th><td class="says">{escape(clause.title)}</td>{cells}</tr>'
        )
    return (
        "<h2>Clause by clause</h2>\n<p class='dim'>A count is of properties; one that cites several clauses counts in "
        "each. Unsupported: the backend lacks a capability that the property needs. Vacuous: what the property is "
        "about never came up in its cases, so that nothing has passed.</p>\n"
        f'<div class="scroll"><table><thead><tr><th scope="col">clause</th><th scope="col">says</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cases(count: int) -> str:
    return f"{count:,} cases" if count else ""


def _failures(report: Report) -> str:
    if not report.failures:
        return ""
    return "<h2>Failures and errors</h2>\n" + "\n".join(_failure(*part) for part in alike(report.failures))


def _failure(failure: FailurePart, others: list[str]) -> str:
    first = failure.statements[0]
    says = statements()[first].text if first in statements() else "unknown to this SPEC.md"
    rows = [("statements", ", ".join(failure.statements)), ("case", failure.picture)]
    if failure.kind == "failed":
        rows.insert(1, ("first diverging stage", failure.stage or "none by itself, or the backend gives no trace"))
    if others:
        rows.append((f"the same in {len(others)} more", ", ".join(others)))
    command = f"<pre>{escape(failure.command)}</pre>" if failure.command else ""
    return (
        f'<div class="card {failure.kind}"><h3><span class="{failure.kind}">{SIGN[failure.kind]} {failure.kind}</span> '
        f"{escape(failure.backend)}: <code>{escape(failure.property)}</code></h3>"
        f'<p class="dim">{escape(first)}: {_prose(says)}</p>'
        f"<pre>{escape(failure.message)}</pre>{_list(rows)}{_case_map(failure)}{command}</div>"
    )


def _case_map(failure: FailurePart) -> str:
    """Which heads of the failing case go to Lyra."""
    if not isinstance(failure.case, dict):
        return ""
    return _drawing(Case.from_json(json.dumps(failure.case)).spec)


def _prose(text: str) -> str:
    """A statement of SPEC.md: what stands between backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _spec(report: Report) -> str:
    if report.spec is None:
        return ""
    spec = AttentionSpec.from_dict(report.spec)
    lyra = f"Lyra heads {list(spec.lyra_q_heads)}" if spec.split is not None else "any split of its heads"
    sizes = (
        f"{spec.num_attention_heads} query heads, {spec.num_key_value_heads} KV heads of {spec.head_dim}, hidden size "
        f"{spec.hidden_size}, scale {spec.scale:.6g}; {lyra}; live {spec.static.live}, positions "
        f"{spec.static.positions}"
    )
    return f"<h2>The spec that the suite was held to</h2>\n<p>{escape(sizes)}</p>\n{_drawing(spec)}"


def _drawing(spec: AttentionSpec) -> str:
    """The head map of a spec that has a split, and what its marks mean."""
    if spec.split is None or not spec.lyra_q_heads:
        return ""
    both = "; a KV head with a frame serves both" if spec.split.cut_kv_heads else ""
    return f'{head_map(spec)}<p class="dim">Query heads below the KV head they read: L Lyra, v vanilla{both}.</p>'


def _distances(report: Report) -> str:
    parts = [
        "<h2>How far from the oracle</h2>",
        f"<p class='dim'>σ is the standard deviation that rounding gives the oracle's value; a backend passes "
        f"where |Δ| ≤ {report.tolerance:g}·σ at every element, two backends agree within {report.tolerance:g}·√2·σ. "
        f"Whole models have no σ: there the unit is {MODEL:g} of the largest value, and the limit 1.</p>",
    ]
    for found in report.distances:
        if found.compared == ORACLE and "↔" not in found.backend:
            largest = found.percentiles.get("100", float("nan"))
            caption = f"{found.backend}: {found.count:,} outputs against the oracle, the largest |Δ|/σ {largest:.3g}"
            chart = histogram_chart(found.histogram, report.histogram_edges, found.limit, caption)
            parts.append(f"<h3>{escape(caption)}</h3>\n{chart}")
    rows = [
        _distance_row(part, report) for part in sorted(report.distances, key=lambda part: (part.backend, part.compared))
    ]
    columns = ("backend", "compared", "comparisons", "median", "99%", "largest", "distribution, limit dashed")
    head = "".join(f'<th scope="col"{_align(2 <= i < 6)}>{name}</th>' for i, name in enumerate(columns))
    parts.append(
        f"<details><summary>Every kind of comparison ({len(rows)})</summary>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        "</details>"
    )
    return "\n".join(parts)


def _distance_row(found: DistancePart, report: Report) -> str:
    numbers = [f"{found.count:,}", *(f"{found.percentiles[p]:.3g}" if found.percentiles else "–" for p in PERCENT)]
    if found.not_finite:
        numbers[-1] += f" and {found.not_finite:,} not finite"
    cells = "".join(f'<td class="number">{number}</td>' for number in numbers)
    label = f"{found.backend}, {found.compared}"
    chart = small_histogram(found.histogram, report.histogram_edges, found.limit, label)
    return (
        f'<tr><th scope="row">{escape(found.backend)}</th><td>{escape(found.compared)}</td>{cells}<td>{chart}</td></tr>'
    )


PERCENT = ("50", "99", "100")


def _align(number: bool) -> str:
    return ' class="number"' if number else ""


def _properties(report: Report) -> str:
    head = "".join(f'<th scope="col">{escape(backend.name)}</th>' for backend in report.backends)
    rows = []
    for prop in report.properties:
        cells = ""
        for backend in report.backends:
            tally = prop.backends.get(backend.name, NOTHING)
            why = escape(tally.why_unsupported or "") or _cases(tally.cases)
            if tally.status == "vacuous":
                why += f"<br>never met: {escape('; '.join(tally.unmet))}"
            cells += (
                f'<td class="{tally.status}">{SIGN[tally.status]} {tally.status} <span class="cases">{why}</span></td>'
            )
        rows.append(
            f'<tr><th scope="row"><code>{escape(prop.name)}</code></th><td>{escape(prop.summary)}<br>'
            f'<span class="dim">{escape(", ".join(prop.statements))}{_premises(prop)}</span></td>{cells}</tr>'
        )
    return (
        f"<h2>Properties</h2>\n<details><summary>All {len(rows)} properties</summary><div class='scroll'><table><thead>"
        f'<tr><th scope="col">property</th><th scope="col">says, and holds</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _premises(prop: PropertyPart) -> str:
    """What the property is about: its cases have to meet it."""
    return f"; premise: {escape('; '.join(prop.premises))}" if prop.premises else ""


def _run(report: Report) -> str:
    rates = f"{report.cases_per_second:,.0f} cases, {report.calls_per_second:,.0f} calls"
    rows = [
        ("profile", how_much(report)),
        ("seed", str(report.seed)),
        *([("time for a case", _case_limit(report))] if report.case_limit is not None else []),
        *([("shards", _shards(report.shards))] if report.shards else []),
        ("started", report.started),
        ("duration", f"{report.seconds:,.1f} s, {rates} a second within properties"),
        ("machine", f"{report.machine['platform']}, {report.machine['processor']}"),
        ("versions", ", ".join(f"{name} {number}" for name, number in report.versions.items())),
        *((f"{backend.name} ran on", backend.hardware) for backend in report.backends if backend.hardware),
        *(
            (f"{backend.name} can", ", ".join(backend.capabilities) or "nothing beyond the plain layer")
            for backend in report.backends
        ),
    ]
    return f"<h2>The run</h2>\n{_list(rows)}"


def _case_limit(report: Report) -> str:
    after = "another process goes on" if report.isolated else "the run ends"
    return f"at most {report.case_limit:g} s; where a case ends its process, {after}"


def _shards(shards: ShardsPart) -> str:
    return f"{', '.join(map(str, shards.present))} of {shards.count}{', merged' if shards.merged else ''}"


def _end(report: Report) -> str:
    """The page is whole only with this: the style sheet says so where it is missing."""
    return f'<footer id="end">End of the report: {report.finished} of {report.planned} properties ran.</footer>'


def _list(rows: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in rows) + "</dl>"
