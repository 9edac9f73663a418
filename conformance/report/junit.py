"""The report as JUnit XML, which CI systems read: one test case a property, whichever processes it ran in."""

from __future__ import annotations

from collections.abc import Mapping
from xml.etree import ElementTree as Xml

from lyra.terminal import paragraphs

from .data import FailurePart, PropertyPart, Report, TallyPart


def junit(report: Report, seconds: Mapping[str, float]) -> bytes:
    """The XML. `seconds` are those of properties, by name."""
    kinds = [_kind(prop) for prop in report.properties]
    suite = Xml.Element(
        "testsuite",
        name="lyra conformance",
        tests=str(len(kinds)),
        failures=str(kinds.count("failed")),
        errors=str(kinds.count("errored")),
        skipped=str(kinds.count("skipped")),
        time=f"{report.seconds:.3f}",
        timestamp=report.started,
    )
    for prop, kind in zip(report.properties, kinds, strict=True):
        module, _, name = prop.name.partition("::")
        case = Xml.SubElement(
            suite, "testcase", classname=_text(module), name=_text(name), time=f"{seconds.get(prop.name, 0.0):.3f}"
        )
        for failure in report.failures:
            if failure.property == prop.name:
                _failure(case, failure)
        if kind == "skipped":
            why = "; ".join(f"{name} {_why(tally)}" for name, tally in prop.backends.items())
            Xml.SubElement(case, "skipped", message=_text(why or "no backend was asked"))
    whole = Xml.Element("testsuites")
    whole.append(suite)
    return Xml.tostring(whole, encoding="utf-8", xml_declaration=True)


def _kind(prop: PropertyPart) -> str:
    """What became of a property: of what several backends did the gravest counts."""
    found = {tally.status for tally in prop.backends.values()}
    return next((status for status in ("errored", "failed", "passed") if status in found), "skipped")


def _why(tally: TallyPart) -> str:
    """Why nothing has passed or failed."""
    return tally.why_unsupported or " ".join([tally.status, *tally.unmet])


def _failure(case: Xml.Element, failure: FailurePart) -> None:
    kind = "failure" if failure.kind == "failed" else "error"
    message = f"{', '.join(failure.statements)} {failure.kind} on backend {failure.backend!r}: {failure.message}"
    shown = Xml.SubElement(case, kind, message=_text(message))
    lines = [failure.message, f"case: {failure.picture}"]
    lines += [f"first diverging stage: {failure.stage}"] if failure.stage else []
    lines += [failure.command] if failure.command else []
    shown.text = _text("\n".join(lines))


def _text(text: str) -> str:
    """What XML allows: it has no control characters, and neither have those who read it."""
    return "".join("\ufffd" if paragraph in "\ufffe\uffff" else paragraph for paragraph in paragraphs(text))
