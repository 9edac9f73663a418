"""Running a row: contestants in turns, and what is made of their times."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from statistics import median, quantiles

from .machine import Others
from .results import Result
from .row import Contestant, Count, Counted, Finding, Floor, Race, Row, Sweep
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
    contestants: Sequence[Contestant], rounds: int, workers: Workers, tell: Tell = nobody
) -> list[list[float]]:
    """For every contestant the median time of its turn in every round. The order turns from round to round.

    Equal contestants are made once.
    """
    counts = []
    for contestant in contestants:
        tell(f"{contestant.name} is made ready")
        seconds = workers.ask(contestant.framework, "make", contestant)
        counts.append(max(1, min(LONGEST_TURN, math.ceil(TURN / max(seconds, 1e-6)))))
    others = Others(workers.processes)
    kept: list[list[float]] = []
    spent, disturbed = 0.0, 0
    while len(kept) < rounds and not _enough(len(kept), spent, workers.left):
        tell(f"round {len(kept) + 1} of {rounds} at most")
        turns = [0.0] * len(contestants)
        others.reset()
        for step in range(len(contestants)):
            place = (step + len(kept) + disturbed) % len(contestants)
            times = workers.ask(contestants[place].framework, "time", contestants[place], counts[place])
            spent += sum(times)
            turns[place] = median(times[1:] or times)
        if others.cores() > DISTURBED and disturbed < rounds and spent < LONGEST / 2:
            disturbed += 1
        else:
            kept.append(turns)
    return [list(times) for times in zip(*kept, strict=True)]


def _enough(rounds: int, spent: float, left: float) -> bool:
    """Whether one round more would take too long, or longer than there is time left."""
    if rounds == 0:
        return False
    following = spent / rounds
    return (rounds >= 3 and spent + following > MOST) or spent + following > LONGEST or following > left


def ratio(subject: Sequence[float], rival: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles of rival / subject, round by round."""
    values = [theirs / ours for ours, theirs in zip(subject, rival, strict=True)]
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return middle, low, high


def floor_seconds(floor: Floor, rates: dict[str, float]) -> float:
    """The shortest time in which this machine can read the bytes and do the operations, which may overlap."""
    return max(floor.read / rates["bandwidth"], floor.operations / rates["float32"])


def probe(workers: Workers, products: Sequence[str] = ("float32",)) -> dict[str, float]:
    """The machine's rates now, those of products in some dtypes."""
    rates: dict[str, float] = workers.ask("torch", "call", "lyra.speed.machine:probe", {"products": products})
    return rates


def ratios(row: Race, times: Sequence[Sequence[float]]) -> list[Finding]:
    """The subject against every rival, from seconds by contestant and round, the subject first."""
    findings = []
    for rival, theirs in zip(row.rivals, times[1:], strict=True):
        value, low, high = (number * rival.own_per / rival.per for number in ratio(times[0], theirs))
        what = f"{rival.contestant.name} / {row.subject.name}"
        findings.append(Finding(what, value, "×", at_least=rival.at_least, low=low, high=high))
    return findings


def _race(row: Race, workers: Workers, quick: bool, tell: Tell) -> Result:
    contestants = [row.subject, *(rival.contestant for rival in row.rivals)]
    times = alternate(contestants, 5 if quick else row.rounds, workers, tell)
    findings, floor = ratios(row, times), None
    medians = {contestant.name: median(own) for contestant, own in zip(contestants, times, strict=True)}
    limit, workers.until = workers.until, None  # what is measured is kept
    if row.floor is not None:
        rates = probe(workers)
        seconds = floor_seconds(row.floor, rates)
        floor = {"seconds": seconds, "bytes": row.floor.read, "operations": row.floor.operations, **rates}
        what = f"{row.subject.name} / floor"
        findings.append(Finding(what, medians[row.subject.name] / seconds, "×", at_most=row.floor.at_most))
    result = Result(row.name, row.what, "race", findings, medians, len(times[0]), floor, note=row.note)
    if not result.met:
        workers.until = limit
        with suppress(OutOfReach):
            result = replace(result, profile=workers.ask(row.subject.framework, "profile", row.subject))
    return result


def _sweep(row: Sweep, workers: Workers, tell: Tell) -> Result:
    series: dict[str, list[tuple[int, float]]] = {line.contestant.name: [] for line in row.lines}
    reached, beyond = list[int](), ""
    for point in row.points:
        lines = [line.contestant for line in row.lines if point <= line.end]
        at_point = [replace(line, options={**line.options, row.option: point}) for line in lines]
        try:
            times = alternate(at_point, row.rounds, workers, partial(_tell_at, tell, f"{row.option} {point:,}"))
        except OutOfReach:
            if not reached:
                raise
            beyond = f"{row.option} from {point:,}"
            break
        for line, seconds in zip(lines, times, strict=True):
            series[line.name].append((point, median(seconds)))
        reached.append(point)
        workers.drop()
    if row.floor is not None:
        workers.until = None  # what is measured is kept
        rates = probe(workers)
        series["floor"] = [(point, floor_seconds(row.floor(point), rates)) for point in reached]
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
    counted: Counted = workers.ask(row.framework, "call", row.make, dict(row.options))
    return Result(row.name, row.what, "count", counted.findings, table=counted.table, note=row.note)
