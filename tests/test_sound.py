"""Reports from outside: what contradicts itself is refused with the field that does, and nothing in it is markup."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from lyra.cli import application
from lyra.conformance.case import Case
from lyra.conformance.record import Failure
from lyra.conformance.report.data import Report, report_data
from lyra.conformance.report.junit import junit
from lyra.conformance.report.markdown import markdown
from lyra.conformance.report.merge import merged
from lyra.conformance.report.page import html
from lyra.conformance.report.sound import read_report, sound
from lyra.conformance.report.table import print_report
from lyra.conformance.report.verdict import exit_code
from lyra.conformance.session import Card, Session
from lyra.conformance.shard import Shard
from lyra.spec.errors import InputError
from lyra.spec.model import ModelSpec

SCOPE = ModelSpec.preset("gemma-3-12b-lyra-8q4kv").attention
PROPERTIES = (("order::one", "ORDER-1"), ("static::two", "STATIC-1"), ("live::three", "LIVE-4"))
HOSTILE = "<script>alert(1)</script> [/nope] \x1b[2J | `a` **b** ```\n### head\u202e"


def made(shard: Shard | None = None, *, failing: bool = False, name: str = "right", only: int | None = None) -> Report:
    """The report of a run of some properties on one backend."""
    session = Session(spec=SCOPE, shard=shard, judged=(Card(name, ("static",), "CPU"),))
    record, chosen = session.record, PROPERTIES if only is None else PROPERTIES[only : only + 1]
    for prop, statement in chosen:
        tally = record.register(prop, (statement, "TOLERANCE-1"), f"What {prop} says.").tally(name)
        tally.mark("passed")
        tally.cases = 10
    if failing:
        cited = ("STATIC-1", "TOLERANCE-1")
        record.fail(Failure("static::two", name, cited, "failed", HOSTILE, HOSTILE, Case(SCOPE).to_json(), HOSTILE))
    for ratio in (0.5, 0.7, 2.0, float("inf")):
        record.observe(name, "output", ratio)
    record.cases, record.calls, record.seconds = 30, 60, 1.0
    record.planned = record.finished = len(chosen)
    return report_data(session, 1.0)


def lyra(*arguments: object) -> Result:
    return CliRunner().invoke(
        application(), [str(argument) for argument in arguments], env={"COLUMNS": "160", "NO_COLOR": "1"}
    )


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("shard", [None, Shard(2, 5)])
def test_what_a_run_writes_is_sound(shard: Shard | None, failing: bool, tmp_path: Path) -> None:
    report = made(shard, failing=failing)
    assert sound(report) == report
    assert exit_code(report) == failing
    path = tmp_path / "report.json"
    path.write_text(report.model_dump_json())
    assert read_report(path) == report
    older = report.model_dump()
    for part in older["backends"]:
        del part["counts"]["vacuous"]
    for part in older["clauses"]:
        del part["counts"]["right"]["vacuous"]
    path.write_text(json.dumps(older))
    assert read_report(path) == report


def at(fields: Any, *path: Any) -> Any:
    for name in path:
        fields = fields[name]
    return fields


def put(value: Any, *path: Any) -> Callable[[Any], None]:
    """A report with another value at a place."""
    return lambda fields: at(fields, *path[:-1]).__setitem__(path[-1], value)


def twice(*path: Any) -> Callable[[Any], None]:
    """A report with the first entry of a list twice."""
    return lambda fields: at(fields, *path).append(copy.deepcopy(at(fields, *path)[0]))


def unfailed(fields: Any) -> None:
    fields["failures"].clear()
    fields["ok"] = True


CONTRADICTIONS: dict[str, tuple[Callable[[Any], None], str]] = {
    "shard 5 of 2": (put({"count": 2, "present": [5], "merged": False}, "shards"), "shards.present: 5 of 2"),
    "shard 0": (put([0], "shards", "present"), "shards.present: 0 of 5"),
    "a shard twice": (put([2, 2], "shards", "present"), "shards.present"),
    "two shards of one run": (put([2, 3], "shards", "present"), "though nothing was merged"),
    "no shard": (put([], "shards", "present"), "shards.present"),
    "count 0": (put(0, "shards", "count"), "shards.count: 0"),
    "count without end": (put(10**12, "shards", "count"), "shards.count"),
    "no properties": (put([], "properties"), "properties: 0, where 3 of 3 were finished"),
    "one left out": (lambda fields: fields["properties"].pop(), "properties: 2, where 3 of 3 were finished"),
    "a property twice": (twice("properties"), "properties: 'live::three' stands there 2 times"),
    "a backend twice": (twice("backends"), "backends: 'right' stands there 2 times"),
    "a failure twice": (twice("failures"), "failures: 'static::two on right' stands there 2 times"),
    "a distance twice": (twice("distances"), "distances"),
    "no backend": (put([], "backends"), "backends: there is none"),
    "ok": (put(True, "ok"), "ok: True, where the rest of the report says False"),
    "failure left out": (unfailed, "failed on 'right', and no failure tells why"),
    "verdict": (put("conforms", "backends", 0, "verdict"), "backends.right.verdict: 'conforms', where the properties"),
    "counts": (put(9, "backends", 0, "counts", "passed"), "backends.right.counts"),
    "clauses": (put("passed", "clauses", 1, "status", "right"), "clauses.STATIC"),
    "no clauses": (put([], "clauses"), "clauses: 0, where"),
    "complete": (put(False, "complete"), "complete: False, where 3 of 3 properties ran"),
    "finished": (put(4, "finished"), "finished: 4 properties of 3 planned"),
    "planned": (put(-1, "planned"), "planned: -1 is less than 0"),
    "cases": (put(1000, "cases"), "calls: 60 calls are fewer than the 1000 cases"),
    "passed without a case": (
        put(0, "properties", 0, "backends", "right", "cases"),
        "properties.live::three: passed with 0 cases",
    ),
    "statement": (put(["<script>"], "properties", 0, "statements"), "'<script>' are no statements of this SPEC.md"),
    "statement of a failure": (put(["ORDER-99"], "failures", 0, "statements"), "failures.static::two.statements"),
    "no statement": (put([], "failures", 0, "statements"), "failures.static::two.statements: none"),
    "failure of nothing": (put("order::none", "failures", 0, "property"), "the property is not there"),
    "another backend": (put("left", "failures", 0, "backend"), "the property is not there on 'left'"),
    "case": (put({"calls": [1]}, "failures", 0, "case"), "failures.static::two.case: no case of this version"),
    "histogram": (put([1], "distances", 0, "histogram"), "does not hold 4 comparisons"),
    "values": (put({"x": 3}, "distances", 0, "values"), "are not counts of numbers"),
    "values do not add up": (put({"0.5": 9}, "distances", 0, "values"), "are not 4 comparisons"),
    "percentiles": (put({}, "distances", 0, "percentiles"), "percentiles"),
    "limit": (put(80.0, "distances", 0, "limit"), "limit: 80.0; expected 8"),
    "whose distance": (put("left", "distances", 0, "backend"), "backend 'left' is none of the report's"),
    "edges": (put([], "histogram_edges"), "histogram_edges"),
    "time": (put("yesterday", "started"), "started: 'yesterday' is no time"),
    "machine": (put({}, "machine"), "machine: it lacks 'platform'"),
    "spec": (put({"hidden_size": "wide"}, "spec"), "spec: AttentionSpec"),
}


@pytest.mark.parametrize(("change", "words"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_report_that_contradicts_itself_is_refused(change: Callable[[Any], None], words: str, tmp_path: Path) -> None:
    fields = json.loads(made(Shard(2, 5), failing=True).model_dump_json())
    change(fields)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(fields))
    done = lyra("merge", path)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert words in line
    assert str(path) in line


@pytest.mark.parametrize("data", [b"\xff\xfe", b"[" * 100_000, b"", b"[]", b'{"ok": true, "ok": false}', b'{"ok": 1}'])
def test_what_is_no_report_is_refused_in_a_line(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(data)
    done = lyra("merge", path)
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert str(path) in line


def test_shards_that_judged_the_same_property_are_not_of_one_run() -> None:
    one, other = made(Shard(1, 2), only=0), made(Shard(2, 2), only=1)
    assert merged({"a": one, "b": other}).ok
    with pytest.raises(InputError, match="both judged 'order::one'"):
        merged({"a": one, "b": made(Shard(2, 2), only=0)})


class Tags(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def hostile() -> Report:
    """A report whose every free text is what nobody wants to see rendered; its statements too, as none that is read."""
    fields = made(failing=True, name="NAME").model_dump_json()
    text = json.dumps(HOSTILE)[1:-1]
    for word in ("NAME", "What order::one says.", "static::two", "CPU", "numpy"):
        fields = fields.replace(word, text)
    parsed = json.loads(fields)
    parsed["machine"] = {"platform": HOSTILE, "processor": HOSTILE, "byteorder": HOSTILE}
    parsed["failures"][0] |= {"picture": HOSTILE, "command": HOSTILE, "statements": [HOSTILE]}
    parsed["properties"][0]["statements"].append(HOSTILE)
    parsed["clauses"][0] |= {"name": HOSTILE, "title": HOSTILE}
    parsed["versions"][HOSTILE] = HOSTILE
    return Report.model_validate(parsed)


def test_nothing_from_outside_is_markup(hostile: Report) -> None:
    page = html(hostile)
    read = Tags(page)
    assert "script" not in read.tags
    assert read.text.count("<script>alert(1)</script>") > 12
    summary = markdown(hostile)
    code, outside = "", ""
    for place, part in enumerate(summary.split("```")):
        if place % 2:
            code += part
        else:
            outside += part
    assert summary.count("```") == 2  # the message does not end its block
    assert "### head" in code
    assert "<script" not in outside.replace("\\<", "")
    assert "\n### head" not in outside
    for console in (Console(width=150, record=True, file=open("/dev/null", "w")), None):  # noqa: SIM115
        if console is not None:
            print_report(console, hostile)
            assert "[/nope]" in console.export_text()
    xml = junit(hostile, {}).decode()
    assert "<script>" not in xml
    for text in (page, summary, xml):
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "\\x1b[2J" in text
