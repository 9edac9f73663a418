"""The frame of `lyra bench`: turns, ratios, bounds, the page. What it measures is no business of a test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lyra.cli import application
from lyra.spec.errors import InputError
from lyra.speed import measure
from lyra.speed.contestants.memory_torch import prefill
from lyra.speed.contestants.paths_torch import reached
from lyra.speed.machine import NARROW, rate_of_products
from lyra.speed.measure import alternate, floor_seconds, ratio, ratios, run
from lyra.speed.page import page
from lyra.speed.results import RESULTS, Result
from lyra.speed.row import Contestant, Count, Counted, Finding, Floor, Line, Race, Rival, Sweep
from lyra.speed.rows import all_rows, chosen_rows
from lyra.speed.show import machine_line
from lyra.speed.workers import OutOfReach, WorkerError, Workers, named

MACHINE = {
    "processor": "a processor",
    "threads": 1,
    "versions": {"torch": "2"},
    "rates": {"bandwidth": 1e9, "float32": 1e9, "bfloat16": 1e9},
}


def layer(**options: int) -> Contestant:
    return Contestant("Lyra", "torch", "lyra.speed.contestants.layer_torch:lyra", {"live": 4, **options})


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(threads=1) as started:
        yield started


def test_a_race_gives_a_ratio_for_every_rival_and_one_for_the_floor(workers: Workers) -> None:
    race = Race(
        "r", "what", layer(static=8), (Rival(layer(static=4096), at_least=1e9),), Floor(1, at_most=1e9), rounds=3
    )
    result = run(race, workers)
    slower, floor = result.findings
    assert (result.rounds, slower.met, floor.met) == (3, False, True)
    assert slower.value > 1
    assert slower.low <= slower.value <= slower.high
    assert result.profile
    assert sum(share for _, share in result.profile) <= 1.001
    kept = json.loads(json.dumps({"machine": MACHINE, "results": [result.as_data()]}))
    assert RESULTS.validate_python(kept)["results"] == [result]


def test_costs_are_compared_by_unit_of_work() -> None:
    race = Race("r", "", layer(), (Rival(layer()), Rival(layer(), per=2, own_per=8)))
    plain, weighed = ratios(race, [[2.0, 2.0, 2.0], [4.0, 6.0, 4.0], [4.0, 6.0, 4.0]])
    assert (plain.value, weighed.value) == (2.0, 8.0)


def test_equal_contestants_are_made_once_and_all_take_turns(workers: Workers) -> None:
    found = alternate([layer(static=8), layer(static=16), layer(static=8)], 3, workers)
    assert len(found) == 3
    assert all(len(times) == 3 and min(times) > 0 for times in found)
    workers.drop()


def test_a_sweep_has_every_line_at_its_points_and_the_floor(workers: Workers) -> None:
    lines = (Line(layer()), Line(Contestant("short", "torch", layer().make, {"live": 4}), end=8))
    result = run(Sweep("s", "what", "static", (8, 16), lines, lambda static: Floor(static)), workers)
    assert {name: [point for point, _ in line] for name, line in (result.series or {}).items()} == {
        "Lyra": [8, 16], "short": [8], "floor": [8, 16],
    }  # fmt: skip


def test_a_count_brings_its_findings_and_table(workers: Workers) -> None:
    result = run(Count("c", "what", "torch", f"{__name__}:counted", {"value": 3.0}), workers)
    assert [finding.met for finding in result.findings] == [False, True]
    assert result.table == [["head"], ["cell"]]


def test_a_worker_that_fails_says_where(workers: Workers) -> None:
    with pytest.raises(WorkerError, match="no_such_option"):
        alternate([layer(no_such_option=1)], 1, workers)


def test_what_takes_too_long_is_given_up_and_the_next_row_goes_on(workers: Workers) -> None:
    race = Race("r", "what", layer(static=8), (), rounds=3)
    with pytest.raises(OutOfReach):
        run(race, workers, limit=1e-6)
    assert run(race, workers, limit=600).rounds == 3


def test_a_sweep_keeps_the_points_that_were_in_reach(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure.alternate

    def slow(contestants: list[Contestant], *others: object) -> list[list[float]]:
        if contestants[0].options["static"] == 16:
            raise OutOfReach
        return whole(contestants, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(measure, "alternate", slow)
    sweep = Sweep("s", "what", "static", (8, 16, 32), (Line(layer()),), lambda static: Floor(static))
    result = run(sweep, workers)
    assert [point for point, _ in (result.series or {})["Lyra"]] == [8]
    assert [point for point, _ in (result.series or {})["floor"]] == [8]
    assert result.out_of_reach == "static from 16"
    assert "Out of this machine's reach: static from 16." in page(MACHINE, [result])


def test_a_row_says_what_it_is_at(workers: Workers) -> None:
    said: list[str] = []
    run(Race("r", "what", layer(static=8), (), rounds=2), workers, tell=said.append)
    assert list(dict.fromkeys(said)) == ["Lyra is made ready", "round 1 of 2 at most", "round 2 of 2 at most"]


@pytest.mark.parametrize(
    ("rounds", "spent", "left", "enough"),
    [
        (0, 0.0, 0.0, False),
        (1, 9.0, 100.0, False),
        (3, 9.0, 100.0, True),
        (1, 80.0, 1000.0, True),
        (1, 9.0, 8.0, True),
    ],
)
def test_rounds_are_fewer_where_they_are_long(rounds: int, spent: float, left: float, enough: bool) -> None:
    assert measure._enough(rounds, spent, left) is enough


def test_products_are_smaller_where_they_are_slow() -> None:
    rate, width = rate_of_products("bfloat16", time_limit=0)
    assert (rate > 0, width) == (True, NARROW)
    rates = {"bandwidth": 1e9, "float32": 2e11, "bfloat16": 9e8, "bfloat16 width": 128.0}
    assert "200 GFLOP/s in float32, 0.9 in bfloat16 (of width 128;" in machine_line(MACHINE | {"rates": rates})


def test_the_page_takes_names_for_text() -> None:
    result = Result("a|`row", "<script> [x](y)", "race", [Finding("a|b\n*c*", 1.0, "×")], {"<b>": 1.0}, 1)
    text = page(MACHINE | {"processor": "<img src=x>"}, [result])
    assert not {"<script>", "<b>", "<img", "[x](y)"} & set(text.replace(" ", "\n").split())
    assert r"| `a/'row` | a\|b\\n\*c\* | 1.00× |" in text


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    assert ratio([1.0, 2.0, 1.0], [2.0, 6.0, 100.0]) == (3.0, 2.5, 51.5)
    assert ratio([2.0], [3.0]) == (1.5, 1.5, 1.5)


def test_the_floor_is_the_longer_of_reading_and_multiplying() -> None:
    rates = {"bandwidth": 10.0, "float32": 100.0}
    assert floor_seconds(Floor(read=20, operations=100), rates) == 2.0
    assert floor_seconds(Floor(read=20, operations=500), rates) == 5.0


def test_a_bound_is_kept_or_missed_on_its_own_side() -> None:
    assert Finding("", 2.0, "×", at_least=2.0).met
    assert Finding("", 1.9, "×", at_least=2.0).met is False
    assert Finding("", 1.9, "×", at_most=2.0).met
    assert Finding("", 2.1, "×", at_most=2.0).met is False
    assert Finding("", 2.1, "×").met is None


def test_a_margin_widens_a_bound_on_its_own_side() -> None:
    assert Finding("", 1.0, "×", at_least=2.0).within(2.0)
    assert not Finding("", 0.9, "×", at_least=2.0).within(2.0)
    assert Finding("", 4.0, "×", at_most=2.0).within(2.0)
    assert not Finding("", 4.1, "×", at_most=2.0).within(2.0)
    assert Finding("", 0.0, "×").within(1.0)


def test_the_page_shows_what_was_missed_and_where_its_time_went() -> None:
    findings = [Finding("HF / Lyra", 2.0, "×", at_least=3.5, low=1.9, high=2.1)]
    missed = Result("row", "a step", "race", findings, {"Lyra": 0.00254}, 9, profile=[("aten::bmm", 0.75)], note="Why.")
    text = page(MACHINE, [missed])
    assert "| `row` | HF / Lyra | 2.00× | 1.90 to 2.10 | ≥ 3.50× | **missed** |" in text
    assert "A step. Medians of 9 rounds: Lyra 2.54 ms." in text
    assert "Where the time of a run goes: `aten::bmm` 75%." in text
    assert "Why." in text


def test_every_row_has_a_name_of_its_own_and_contestants_that_are_there() -> None:
    rows = all_rows()
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        if isinstance(row, Race):
            made = [row.subject.make, *(rival.contestant.make for rival in row.rivals)]
        else:
            made = [row.make] if isinstance(row, Count) else [line.contestant.make for line in row.lines]
        assert all(callable(named(one)) for one in made), row.name


def test_generated_cases_reach_every_fast_path() -> None:
    assert {finding.what: finding.value for finding in reached(60).findings if not finding.met} == {}


def test_a_prefill_takes_no_more_memory_against_a_longer_context() -> None:
    found = prefill(tokens=[128], static=[4096, 8192], at_most=1.25)
    assert [finding.met for finding in found.findings] == [True]


def test_rows_are_chosen_by_how_their_names_begin() -> None:
    assert {row.name.partition("-")[0] for row in chosen_rows(["decode"], quick=False)} == {"decode"}
    assert all(row.quick for row in chosen_rows(None, quick=True))
    with pytest.raises(InputError, match="no row begins with 'nothing'"):
        chosen_rows(["nothing"], quick=False)


def test_the_command_writes_the_page_of_an_earlier_run(tmp_path: Path) -> None:
    series = {"Lyra": [(8, 1e-3), (16, 2e-3)], "floor": [(8, 5e-4), (16, 1e-3)]}
    results = [
        Result("decode-cold", "a step", "race", [Finding("HF / Lyra", 4.0, "×", at_least=3.5)], {"Lyra": 1.0}, 9),
        Result("cost-static", "steps", "sweep", series=series, option="static"),
    ]
    words = ["bench", "--page", str(tmp_path / "page.md")]
    for number, result in enumerate(results):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps({"machine": MACHINE, "results": [result.as_data()]}))
        words += ["--from", str(path)]
    found = CliRunner().invoke(application(), words)
    assert found.exit_code == 0, found.output
    assert "met" in found.output
    assert "| Lyra | 1 ms | 2 ms |" in (tmp_path / "page.md").read_text()
    assert (tmp_path / "images" / "performance-cost-static.png").stat().st_size > 1000


def test_the_command_fails_beyond_the_margin_only(tmp_path: Path) -> None:
    result = Result("frame", "a step", "race", [Finding("HF / Lyra", 1.5, "×", at_least=3.5)], {"Lyra": 1.0}, 9)
    (tmp_path / "bench.json").write_text(json.dumps({"machine": MACHINE, "results": [result.as_data()]}))
    for margin, code in (("2", 1), ("3", 0)):
        words = ["bench", "--from", str(tmp_path / "bench.json"), "--margin", margin]
        found = CliRunner().invoke(application(), words)
        assert found.exit_code == code
        assert ("more than 2 times off the target: HF / Lyra" in found.output) == bool(code)


def test_the_command_refuses_another_file(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("[]")
    found = CliRunner().invoke(application(), ["bench", "--from", str(tmp_path / "other.json")])
    assert found.exit_code == 2
    assert "holds no results" in found.output


def counted(value: float) -> Counted:
    """What a Count's function gives."""
    from lyra.speed.row import Counted

    return Counted(
        [Finding("a", value, "nats", at_most=2.0), Finding("b", value, "nats", at_least=2.0)], [["head"], ["cell"]]
    )
