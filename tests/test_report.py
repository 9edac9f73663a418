"""The reports of a run: one set of numbers as data, page, Markdown and table."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from rich.console import Console

from lyra.conformance.case import Case, Context
from lyra.conformance.record import Failure, Record
from lyra.conformance.record_transfer import merge_record, serialize_record
from lyra.conformance.report.charts import head_map, histogram_chart
from lyra.conformance.report.data import EDGES, Report, histogram, limit, report_data
from lyra.conformance.report.markdown import SHOWN, append_summary, markdown
from lyra.conformance.report.page import html
from lyra.conformance.report.table import print_report
from lyra.conformance.session import Session
from lyra.conformance.tolerance import K_PAIR, K
from lyra.spec.attention import AttentionSpec
from lyra.spec.clauses import statements
from lyra.spec.model import ModelSpec
from lyra.spec.split import HeadSplit

LAYER = ModelSpec.preset("gemma-3-12b-lyra-8q4kv").attention
CASE = Case(LAYER, context=Context(3))
HOSTILE = 'got <b>"1"</b> & more'


class Named:
    """A backend's name and capabilities: all that a report asks of it."""

    def __init__(self, name: str, *capabilities: str) -> None:
        self.name = name
        self.capabilities = frozenset(capabilities)

    def attention(self, *_: object) -> None:
        """Not called."""


@pytest.fixture
def session() -> Session:
    """A run of three properties on two backends with a pass, a failure, an error and a lacking capability."""
    made = Session(backends=[Named("right", "static"), Named("wrong")], seed=7, spec=LAYER)  # type: ignore[list-item]
    record = made.record
    for name, cited in (("order::one", "ORDER-1"), ("static::two", "STATIC-1"), ("live::three", "LIVE-4")):
        prop = record.register(name, (cited, "TOLERANCE-1"), f"What {name} says.")
        prop.tally("right").mark("passed")
        prop.tally("right").cases = 1000
        prop.tally("wrong").cases = 2
    record.properties["static::two"].tally("wrong").why_unsupported = "lacks static"
    record.properties["static::two"].tally("wrong").cases = 0
    message = f"|Δ|/σ = 12 at output[0]: {HOSTILE}"
    record.fail(
        Failure("order::one", "wrong", ("ORDER-1",), "failed", message, "q_rope", CASE.to_json(), "cases/one.json")
    )
    record.fail(Failure("live::three", "wrong", ("LIVE-4",), "errored", "RuntimeError: no", None, "two calls"))
    for ratio in (0.5, 0.7, 2.0, float("inf")):
        record.observe("right", "output", ratio)
    record.observe("right", "Hugging Face's", 9.0)
    record.cases, record.calls, record.seconds, record.planned, record.finished = 1002, 3004, 4.0, 3, 3
    return made


def test_the_numbers(session: Session) -> None:
    report = report_data(session, 5.0)
    assert not report.ok
    assert [backend.verdict for backend in report.backends] == ["conforms", "does not conform"]
    assert report.backends[0].counts == {"passed": 3, "failed": 0, "errored": 0, "vacuous": 0, "unsupported": 0}
    assert report.backends[1].counts == {"passed": 0, "failed": 1, "errored": 1, "vacuous": 0, "unsupported": 1}
    assert report.cases_per_second == 250.5
    assert [clause.name for clause in report.clauses] == ["ORDER", "STATIC", "LIVE", "TOLERANCE"]
    last = report.clauses[-1]
    assert last.properties == 3
    assert last.status == {"right": "passed", "wrong": "errored"}
    assert last.counts["wrong"] == {"passed": 0, "failed": 1, "errored": 1, "vacuous": 0, "unsupported": 1}
    assert last.cases == {"right": 3000, "wrong": 4}
    errored, failed = report.failures
    assert isinstance(failed.case, dict)
    assert Case.from_json(json.dumps(failed.case)) == CASE
    assert failed.picture == CASE.describe()
    assert failed.command == "lyra conform --backend wrong --replay cases/one.json"
    assert (errored.case, errored.command) == ("two calls", None)


def test_the_replay_command_says_the_backend_as_it_was_asked_for(session: Session) -> None:
    session.requested_as = {"wrong": "my.package:Wrong"}
    command = report_data(session, 1.0).failures[-1].command
    assert command == "lyra conform --backend my.package:Wrong --replay cases/one.json"


class Placed(Named):
    """A backend that says what it computes on."""

    hardware = "Abacus <2>"


class Lost(Named):
    """A backend that fails to."""

    @property
    def hardware(self) -> str:
        raise RuntimeError("no device")


def test_a_backend_that_says_what_it_computes_on_is_quoted(session: Session) -> None:
    assert {one.hardware for one in report_data(session, 1.0).backends} == {None}
    assert " ran on" not in html(report_data(session, 1.0))
    session.backends = [Placed("right"), Lost("wrong")]  # type: ignore[list-item]
    report = report_data(session, 1.0)
    assert [backend.hardware for backend in report.backends] == ["Abacus <2>", None]
    assert "<dt>right ran on</dt><dd>Abacus &lt;2&gt;</dd>" in html(report)
    assert "wrong ran on" not in html(report)


def test_verdicts(session: Session) -> None:
    session.record.planned = 9
    assert [one.verdict for one in report_data(session, 1.0).backends] == ["cut short", "does not conform"]
    empty = Session(backends=[Named("idle")])  # type: ignore[list-item]
    assert [backend.verdict for backend in report_data(empty, 1.0).backends] == ["nothing compared"]
    assert not empty.record.ok


def test_one_idle_backend_is_no_pass() -> None:
    record = Record()
    prop = record.register("order::one", ("ORDER-1",), "Says.")
    prop.tally("right").mark("passed")
    assert record.ok
    prop.tally("idle").why_unsupported = "lacks static"
    assert not record.ok


@pytest.fixture
def vacuous(session: Session) -> Session:
    """The same run with a property more, of two premises: one backend met both, the other one of them."""
    made = session.record.register("scale::huge", ("SCALE-3",), "Huge scores.", ["a score above 10,000", "<padding>"])
    for name, met in (("right", (3, 0)), ("wrong", (3, 2))):
        made.tally(name).mark("passed")
        made.tally(name).met.update(zip(made.premises, met, strict=True))
    return session


def test_what_never_met_its_premise_has_not_passed(vacuous: Session) -> None:
    report = report_data(vacuous, 1.0)
    right, wrong = report.backends
    assert (right.verdict, right.counts["passed"], right.counts["vacuous"]) == ("conforms", 3, 1)
    assert (wrong.counts["passed"], wrong.counts["vacuous"]) == (1, 0)
    (tallies,) = (one.backends for one in report.properties if one.name == "scale::huge")
    assert tallies["right"].premises == {"a score above 10,000": 3, "<padding>": 0}
    assert (tallies["right"].status, tallies["wrong"].status) == ("vacuous", "passed")
    assert next(clause.status for clause in report.clauses if clause.name == "SCALE") == {
        "right": "vacuous",
        "wrong": "passed",
    }
    told = "Vacuous, since this never came up: scale::huge (<padding>)"
    page = Reader(html(report)).text
    for text in (markdown(report).replace("\\", ""), page, shown(report)):
        assert told in text
        assert "1 vacuous" in text
    assert "○ vacuous never met: <padding>" in page
    assert "premise: a score above 10,000; <padding>" in page


def test_a_failure_weighs_more_than_an_unmet_premise(vacuous: Session) -> None:
    vacuous.record.fail(Failure("scale::huge", "right", ("SCALE-3",), "failed", "off", None, None))
    assert vacuous.record.properties["scale::huge"].tally("right").status == "failed"


def test_nothing_was_compared_where_every_premise_was_missed(vacuous: Session) -> None:
    record = vacuous.record
    record.failures.clear()
    record.properties = {"scale::huge": record.properties["scale::huge"]}
    assert [backend.verdict for backend in report_data(vacuous, 1.0).backends] == ["nothing compared", "conforms"]
    assert not record.ok


def test_a_worker_hands_over_what_was_met(vacuous: Session) -> None:
    before = report_data(vacuous, 1.0).properties
    seen = serialize_record(vacuous)
    vacuous.record = Record()
    merge_record(vacuous, seen)
    assert report_data(vacuous, 1.0).properties == before


def shown(report: Report) -> str:
    console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_report(console, report)
    return console.export_text()


def test_a_report_says_how_many_examples_a_run_was_asked_for(session: Session) -> None:
    assert report_data(session, 5.0).examples is None
    session.profile = dataclasses.replace(session.profile, examples=5)
    report = report_data(session, 5.0)
    assert report.examples == 5
    assert f"profile {session.profile.name} with 5 examples" in shown(report)


def test_the_report_keeps_its_schema(session: Session) -> None:
    report = report_data(session, 5.0)
    text = report.model_dump_json()
    assert Report.model_validate_json(text) == report
    schema = Report.model_json_schema()
    assert set(json.loads(text)) == set(schema["properties"])
    newer = {"isolated", "case_limit", "examples"}  # older reports lack them
    assert set(schema["properties"]) - set(schema["required"]) == newer
    for change in ({"ok": "perhaps"}, {"surprise": 1}, {"profile": "huge"}, {"format": 2}):
        with pytest.raises(ValidationError):
            Report.model_validate(json.loads(text) | change)
    with pytest.raises(ValidationError):
        Report.model_validate({key: value for key, value in json.loads(text).items() if key != "seed"})


def test_distances(session: Session) -> None:
    other, output = report_data(session, 1.0).distances
    assert (output.count, output.not_finite, output.limit) == (4, 1, K)
    assert output.values == {"0.5": 1, "0.7": 1, "2": 1}
    assert output.percentiles["50"] == 0.7
    assert output.percentiles["100"] == 2.0
    assert other.limit == K_PAIR
    assert limit("right ↔ wrong", "output") == K_PAIR
    assert limit("right", "k_rope alone") == limit("right", "gradients") == K
    assert limit("right ↔ wrong", "gradients") == K_PAIR
    assert limit("right", "logits, whole model") == 1


def test_histogram_bins() -> None:
    counts = histogram(np.array([0.0, EDGES[0], K, np.nextafter(K, 0), 1e9, np.inf, np.nan]))
    assert len(counts) == len(EDGES) + 1
    assert sum(counts) == 7
    assert (counts[0], counts[1], counts[-1]) == (1, 1, 3)
    assert counts[EDGES.index(K) + 1] == 1
    assert counts[EDGES.index(K)] == 1


class Reader(HTMLParser):
    """Checks that tags nest, and keeps what a reader would see or load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href", "data"}]
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_the_page(session: Session) -> None:
    page = html(report_data(session, 5.0))
    read = Reader(page)
    assert read.links == []
    assert not {"script", "link", "img", "iframe", "b"} & set(read.tags)
    assert "url(" not in page
    assert "@import" not in page
    for shown in (
        "right: conforms ✓ 3 passed",
        "wrong: does not conform ✗ 1 failed ! 1 errored – 1 unsupported",
        "1,002 compared cases",
        "5.0 s, 250 cases, 751 calls a second within properties",
        HOSTILE,
        "first diverging stage q_rope",
        CASE.describe(),
        "Query heads below the KV head they read: L Lyra, v vanilla.",
        "lyra conform --backend wrong --replay cases/one.json",
        "RuntimeError: no",
        "lacks static",
        "16 query heads, 8 KV heads of 256",
        "4 outputs against the oracle",
        "limit 8",
        "seed 7",
        "numpy " + np.__version__,
        "duration 5.0 s",
        statements()["LIVE-4"].text,
        "End of the report: 3 of 3 properties ran.",
    ):
        assert shown in read.text, shown
    assert "cut short" not in read.text
    assert read.tags.count("svg") == 2 + 1 + 2  # head maps of spec and case, one large histogram, two small ones


def test_a_page_of_a_run_cut_short_says_so(session: Session) -> None:
    session.record.planned, session.record.finished = 9, 3
    text = Reader(html(report_data(session, 1.0))).text
    assert "The run was cut short 3 of 9 properties ran; of the rest this page says nothing." in text
    assert text.endswith("End of the report: 3 of 9 properties ran.")


def test_a_page_without_its_end_shows_that(session: Session) -> None:
    page = html(report_data(session, 1.0))
    assert "body:has(#end) .truncated { display: none; }" in page
    assert page.count('id="end"') == 1
    assert page.index('class="truncated"') < page.index("<h1>")
    assert page.rstrip().endswith("</footer>\n</body>\n</html>")


def test_a_page_without_failures_and_spec(session: Session) -> None:
    session.record.failures.clear()
    session.spec = None
    text = Reader(html(report_data(session, 1.0))).text
    assert "Failures and errors" not in text
    assert "The spec" not in text


def test_charts() -> None:
    chart = histogram_chart(histogram(np.array([K / 16, K * 1.1])), EDGES, K, "two")
    assert chart.count('class="within"') == chart.count('class="beyond"') == 1
    assert 'aria-label="two"' in chart
    picture = head_map(LAYER)
    assert picture.count('<rect class="lyra"') == picture.count('<rect class="vanilla"') == 8
    assert picture.count('<rect class="kv"') == 8
    cut = LAYER.replace(split=HeadSplit((1, 2, 3), share_kv=True))
    assert head_map(cut).count('<rect class="kv both"') == 1
    wide = AttentionSpec(hidden_size=8, num_attention_heads=64, num_key_value_heads=1, head_dim=4, scale=1.0)
    assert head_map(wide).count('<rect class="vanilla"') == 64


def test_the_markdown(session: Session) -> None:
    report = report_data(session, 5.0)
    text = markdown(report)
    assert "- **right: conforms.** 3 passed, 0 failed, 0 errored, 0 vacuous, 0 unsupported" in text
    assert "| ORDER | the stages of a layer | ✓ 1 passed | ✗ 1 failed |" in text
    assert "lyra conform --backend wrong --replay cases/one.json" in text
    widths = {line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("| ")}
    assert len(widths) == 1
    many = report.model_copy(update={"failures": report.failures * SHOWN})
    assert f"{SHOWN} more failures stand in the report." in markdown(many)


def test_the_job_summary_is_appended_where_there_is_one(session: Session, tmp_path: Path) -> None:
    report = report_data(session, 5.0)
    path = tmp_path / "summary.md"
    path.write_text("before\n")
    append_summary(report, {"GITHUB_STEP_SUMMARY": str(path)})
    append_summary(report, {})
    assert path.read_text() == "before\n" + markdown(report) + "\n"


def test_the_table_shows_the_same_numbers(session: Session) -> None:
    report = report_data(session, 5.0)
    text = shown(report)
    for clause in report.clauses:
        row = next(line for line in text.splitlines() if line.startswith(f"│ {clause.name} "))
        assert f"passed {clause.cases['right']:,}" in re.sub(" +", " ", row)
    assert "right: conforms. 3 passed, 0 failed, 0 errored, 0 vacuous, 0 unsupported" in text
    assert "wrong: does not conform. 0 passed, 1 failed, 1 errored, 0 vacuous, 1 unsupported" in text
