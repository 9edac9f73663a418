"""Running a row: contestants in turns, and what is made of their times."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import median, quantiles
from typing import Any

from .machine import Others
from .row import Contestant, Count, Finding, Floor, Race, Row, Sweep
from .workers import OutOfReach, Workers

TURN = 0.06
"""Seconds that a contestant works at a stretch, at least one run; the first run of a turn is not counted where there
are more, since it wakes the threads."""

LONGEST_TURN = 12
"""Runs in a turn, at most."""

MOST = 10.0
"""Seconds that the rounds of one race may take; there are fewer rounds where it would be more, but at least three."""

LONGEST = 150.0
"""Seconds that three rounds may take; where it would be more there are two, or one."""

DISTURBED = 0.15
"""Cores that other processes keep busy, above which a round is taken again; at most as often as there are rounds, and
not where rounds are long."""

Tell = Callable[[str], None]
"""Called with what is being done."""


def nobody(what: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Result:
    """What a row gave. times: median seconds by contestant; profile: shares of the subject's time by operation."""

    name: str
    what: str
    kind: str
    findings: list[Finding] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    rounds: int = 0
    floor: dict[str, float] | None = None
    profile: list[tuple[str, float]] | None = None
    table: list[list[str]] | None = None
    series: dict[str, list[tuple[int, float]]] | None = None
    option: str = ""
    note: str = ""
    out_of_reach: str = ""
    """What of the row would have taken this machine too long."""

    @property
    def met(self) -> bool:
        """Whether every finding keeps its bound."""
        return all(finding.met is not False for finding in self.findings)


def run(row: Row, workers: Workers, quick: bool = False, tell: Tell = nobody, limit: float | None = None) -> Result:
    """Measure one row. Raises WorkerError, and OutOfReach where it would take more than `limit` seconds."""
    workers.until = None if limit is None else time.monotonic() + limit
    try:
        if isinstance(row, Race):
            return _race(row, workers, quick, tell)
        return _sweep(row, workers, tell) if isinstance(row, Sweep) else _count(row, workers)
    finally:
        workers.until = None
        workers.drop()


def alternate(
    contestants: Iterable[Contestant], rounds: int, workers: Workers, tell: Tell = nobody
) -> list[list[float]]:
    """The median time of every contestant's turn, by round: [rounds][contestants]. The order turns from round to round.

    Equal contestants are made once.
    """
    listed = list(contestants)
    seconds, ask = _entered(listed, workers, tell)
    others = Others(workers.processes)
    counts = [max(1, min(LONGEST_TURN, math.ceil(TURN / max(one, 1e-6)))) for one in seconds]
    found: list[list[float]] = []
    spent, disturbed = 0.0, 0
    while len(found) < rounds and not _enough(len(found), spent, workers.left):
        tell(f"round {len(found) + 1} of {rounds} at most")
        taken = [0.0] * len(listed)
        others.reset()
        for step in range(len(listed)):
            place = (step + len(found) + disturbed) % len(listed)
            times = ask(place, counts[place])
            spent += sum(times)
            taken[place] = median(times[1:] or times)
        if others.cores() > DISTURBED and disturbed < rounds and spent < LONGEST / 2:
            disturbed += 1
        else:
            found.append(taken)
    return found


def _enough(rounds: int, spent: float, left: float) -> bool:
    """Whether one round more would take too long, or longer than there is time left."""
    if rounds == 0:
        return False
    following = spent / rounds
    return (rounds >= 3 and spent + following > MOST) or spent + following > LONGEST or following > left


def ratio(subject: list[float], rival: list[float]) -> tuple[float, float, float]:
    """Median and quartiles of rival / subject, round by round."""
    values = [theirs / own for own, theirs in zip(subject, rival, strict=True)]
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return middle, low, high


def floor_seconds(floor: Floor, rates: dict[str, float]) -> float:
    """The shortest time in which this machine can read the bytes and do the operations, which may overlap."""
    return max(floor.read / rates["bandwidth"], floor.operations / rates["float32"])


def probe(workers: Workers, products: Sequence[str] = ("float32",)) -> dict[str, float]:
    """The machine's rates now, those of products in some dtypes."""
    return workers.ask("torch", "call", make="lyra.speed.machine:probe", options={"products": list(products)})


def as_data(result: Result) -> dict[str, Any]:
    """A result as plain data; each finding says whether it is met."""
    data = asdict(result)
    for one, finding in zip(data["findings"], result.findings, strict=True):
        one["met"] = finding.met
    return data


def from_data(data: dict[str, Any]) -> Result:
    """The result that `as_data` wrote."""
    findings = [Finding(**{key: value for key, value in one.items() if key != "met"}) for one in data["findings"]]
    return Result(**{**data, "findings": findings})


def ratios(row: Race, found: list[list[float]]) -> list[Finding]:
    """The subject against every rival, from seconds by round and contestant, the subject first."""
    own, *others = (list(column) for column in zip(*found, strict=True))
    findings = []
    for rival, times in zip(row.rivals, others, strict=True):
        value, low, high = (one * rival.own_per / rival.per for one in ratio(own, times))
        what = f"{rival.contestant.name} / {row.subject.name}"
        findings.append(Finding(what, value, "×", at_least=rival.at_least, low=low, high=high))
    return findings


def _race(row: Race, workers: Workers, quick: bool, tell: Tell) -> Result:
    contestants = [row.subject, *(rival.contestant for rival in row.rivals)]
    found = alternate(contestants, 5 if quick else row.rounds, workers, tell)
    findings, columns = ratios(row, found), zip(*found, strict=True)
    medians = {one.name: median(column) for one, column in zip(contestants, columns, strict=True)}
    floor, limit = None, workers.until
    workers.until = None  # what is measured is kept
    if row.floor is not None:
        rates = probe(workers)
        seconds = floor_seconds(row.floor, rates)
        floor = {"seconds": seconds, "bytes": row.floor.read, "operations": row.floor.operations, **rates}
        what = f"{row.subject.name} / floor"
        findings.append(Finding(what, medians[row.subject.name] / seconds, "×", at_most=row.floor.at_most))
    result = Result(row.name, row.what, "race", findings, medians, len(found), floor, note=row.note)
    if not result.met:
        framework, workers.until = row.subject.framework, limit
        with suppress(OutOfReach):
            result = replace(result, profile=workers.ask(framework, "profile", number=0, profiled=framework))
    return result


def _sweep(row: Sweep, workers: Workers, tell: Tell) -> Result:
    series: dict[str, list[tuple[int, float]]] = {line.contestant.name: [] for line in row.lines}
    beyond = ""
    for point in row.points:
        lines = [line.contestant for line in row.lines if point <= line.end]
        at_point = [replace(one, options={**one.options, row.option: point}) for one in lines]
        try:
            found = alternate(at_point, row.rounds, workers, partial(_tell_at, tell, f"{row.option} {point:,}"))
        except OutOfReach:
            if point == row.points[0]:
                raise
            beyond = f"{row.option} from {point:,}"
            break
        for one, times in zip(lines, zip(*found, strict=True), strict=True):
            series[one.name].append((point, median(times)))
        workers.drop()
    if row.floor is not None:
        workers.until = None  # what is measured is kept
        rates = probe(workers)
        measured = sorted({point for line in series.values() for point, _ in line})
        series["floor"] = [(point, floor_seconds(row.floor(point), rates)) for point in measured]
    return Result(
        row.name,
        row.what,
        "sweep",
        rounds=row.rounds,
        series=series,
        option=row.option,
        note=row.note,
        out_of_reach=beyond,
    )


def _tell_at(tell: Tell, where: str, what: str) -> None:
    tell(f"{where}, {what}")


def _count(row: Count, workers: Workers) -> Result:
    given = workers.ask(row.framework, "call", make=row.make, options=dict(row.options))
    findings = [Finding(**one) for one in given["findings"]]
    return Result(row.name, row.what, "count", findings, table=given["table"], note=row.note)


def _entered(
    contestants: list[Contestant], workers: Workers, tell: Tell
) -> tuple[list[float], Callable[[int, int], list[float]]]:
    """Make the contestants: about how many seconds each takes, and what times the one at a place so many times."""
    seconds: list[float] = []
    for number, one in enumerate(contestants):
        if one in contestants[:number]:
            seconds.append(seconds[contestants.index(one)])
        else:
            options = dict(one.options)
            tell(f"{one.name} is made ready")
            seconds.append(workers.ask(one.framework, "make", number=number, make=one.make, options=options))

    def ask(place: int, count: int) -> list[float]:
        one = contestants[place]
        return workers.ask(one.framework, "time", number=contestants.index(one), count=count)

    return seconds, ask
