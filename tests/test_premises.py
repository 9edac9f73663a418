"""Premises: what a property is about has to come up in its cases, and where it does not, that is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from backends_for_tests import Wrapped
from small_layers import CUT_LAYER
from typer.testing import CliRunner

from lyra.cli import application
from lyra.conformance import premises
from lyra.conformance.case import Case, Context
from lyra.conformance.case_sizes import make_sizes
from lyra.conformance.faults.catalogue import catalogue
from lyra.conformance.faults.generators import Tamed, tame_all, tame_everywhere
from lyra.conformance.faults.kill import kill
from lyra.conformance.judge import Judge
from lyra.conformance.premises import Premise
from lyra.conformance.property_index import all_properties
from lyra.conformance.record import Record
from lyra.conformance.recorded_inputs import RecordedInput
from lyra.conformance.runner import run
from lyra.conformance.scored import scored
from lyra.conformance.session import Session
from lyra.conformance.subject import expected
from lyra.spec.attention import StaticSpec

pytestmark = pytest.mark.usefixtures("empty_folder")

CASE = Case(CUT_LAYER, calls=(1, 3), batch=2, context=Context(5, batch=2, hidden=(1, 2)), padding=(1, 0), seed=5)
LIBRARY = {name: one for name, one in vars(premises).items() if isinstance(one, Premise)}


def meets(premise: Premise, case: Case) -> bool:
    return premise.met_by(RecordedInput(case.problem(), case.calls))


MET = {
    "BOTH_STREAMS", "CAUSAL", "CHUNK_BEHIND", "CONTEXT", "CONTINUE", "CUT_GROUP", "HIDDEN", "LENGTHS", "LYRA_HEADS",
    "ONE_SOFTMAX", "PADDING", "ROTATED", "ROWS", "SEVERAL_CALLS", "SEVERAL_GROUPS", "SEVERAL_KV_HEADS",
    "SEVERAL_SLOTS", "SEVERAL_TOKENS", "SHARED_KV_HEAD", "TEXT_LENGTHS", "TILED_GROUPS", "GARBAGE",
}  # fmt: skip
"""What CASE meets, of the premises that stand in the library."""


def test_a_premise_is_found_where_it_is_and_nowhere_else() -> None:
    assert {name for name, one in LIBRARY.items() if meets(one, CASE)} == MET


@pytest.mark.parametrize("name", sorted(MET))
def test_a_tame_case_does_not_meet_it(name: str) -> None:
    premise = LIBRARY[name]
    assert premise.tame is not None
    assert not meets(premise, premise.tame(CASE))
    assert not meets(premise, premise.tame(premise.tame(CASE)))


def test_scores_are_those_that_the_oracle_makes_its_heads_of() -> None:
    """Vanilla and Lyra heads, static keys in front, hidden ones told apart: the softmax over them gives the heads."""
    for live in ("causal", "self", "none"):
        problem = CASE.replace(poison=1.0).respec(static=StaticSpec(live=live)).problem()
        stages, static = expected(problem), problem.static
        assert static is not None
        vanilla, lyra = scored(problem)
        for part, heads in ((vanilla, [0]), (lyra, [1, 2, 3])):
            for place, head in enumerate(heads):
                values = stages["v_proj"].value[:, :, head // 2]
                if part is lyra:
                    values = np.concatenate([static.v[:, CUT_LAYER.lyra_kv_heads.index(head // 2)], values], axis=1)
                with np.errstate(invalid="ignore"):
                    weights = np.exp(np.where(part.seen, part.score, -np.inf)[:, place] - part.top[:, place, :, None])
                    heads_are = np.nan_to_num(weights / weights.sum(axis=-1, keepdims=True)) @ values
                wanted = stages["heads"].value[:, :, head]
                assert np.allclose(heads_are[problem.mask], wanted[problem.mask], atol=1e-9), (live, head)


class OneCall(Wrapped):
    """Right, but without a cache: it is asked in one call whatever the case says."""

    name = "one-call"
    capabilities = Wrapped.capabilities - {"cache"}


def test_a_premise_is_met_by_what_each_backend_is_asked() -> None:
    """A backend without a cache is asked in one call: what several calls show, it has not shown."""
    record = Record()
    several = premises.SEVERAL_CALLS
    prop = record.register("live::cut", ("LIVE-4",), "Calls.", [several.name])
    judge = Judge([Wrapped(), OneCall()], record, prop, premises=[several])  # type: ignore[list-item]
    judge.oracle(CASE)
    assert prop.tally("wrapped").met == {several.name: 1}
    assert prop.tally("one-call").met == {several.name: 0}
    assert (prop.tally("wrapped").status, prop.tally("one-call").status) == ("passed", "vacuous")


def test_what_a_property_does_with_its_case_counts() -> None:
    """The premise is looked for in what is asked, not in what was drawn."""
    record = Record()
    prop = record.register("scale::x", ("SCALE-2",), "A softcap.", [premises.SOFTCAP.name])
    judge = Judge([Wrapped()], record, prop, premises=[premises.SOFTCAP])  # type: ignore[list-item]
    judge.oracle(CASE)
    assert prop.tally("wrapped").met == {premises.SOFTCAP.name: 0}
    judge.oracle(CASE.respec(softcap=0.01))
    assert prop.tally("wrapped").met == {premises.SOFTCAP.name: 1}


def test_every_property_says_what_it_is_about_in_its_own_words() -> None:
    found = all_properties()
    assert all(declaration.premises for declaration in found.values())
    names: dict[str, Premise] = {}
    for declaration in found.values():
        for premise in declaration.premises:
            known = names.setdefault(premise.name, premise)
            same_place = known.holds is None or premise.holds is None or known.tame == premise.tame
            assert same_place, f"two premises are called {premise.name!r}"


def test_a_replayed_case_is_judged_whatever_it_meets(tmp_path: Path) -> None:
    """A case without padding is a case of a property about padding, where somebody wants to see just that one."""
    name = "masked::padding_positions_stay_finite"
    case = json.loads(CASE.replace(calls=(1,), padding=()).to_json())
    path = tmp_path / "case.json"
    path.write_text(json.dumps({"property": name, "case": case}))
    record = Record()
    outcome = run(Session([Wrapped()], record=record, sizes=make_sizes(2, 0)), replay=str(path))  # type: ignore[list-item]
    assert outcome.exit_code == 0, outcome.log
    assert (record.properties[name].tally("wrapped").status, record.ok) == ("passed", True)


def test_tame_generators_are_noticed() -> None:
    """Every property with each of its premises kept from coming up: vacuous, and for that reason."""
    found = tame_everywhere(("torch", "jax"))
    assert {one.property.partition("::")[0] for one in found if one.backend == "jax"} == {"mesh"}
    wanted = sum(len(prop.premises) for prop in all_properties().values() if prop.profile == "smoke")
    assert len({(one.property.partition("[")[0], one.premise) for one in found}) == len(found) == wanted
    assert [one for one in found if one.status != "vacuous"] == []


def test_a_generator_that_only_seems_tame_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A premise that is met all the same has not been missed, so that nothing was shown: exit code 1."""
    wild = premises.SEVERAL_TOKENS  # the very object, which properties may have been made with already
    monkeypatch.setitem(vars(wild), "tame", lambda case: case)
    (found,) = tame_all("torch", only="norm_forgets_the_size")
    assert found == Tamed("norm::norm_forgets_the_size", wild.name, "torch", "passed")
    monkeypatch.setattr("lyra.conformance.faults.generators.tame_all", lambda *_: [found])
    monkeypatch.setattr("lyra.conformance.faults.workers.kill_all", lambda *_: iter(()))
    monkeypatch.setattr("lyra.conformance.faults.catalogue.select", lambda _: [])
    done = CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1"}).invoke(application(), ["faults", "--backend", "torch"])
    assert done.exit_code == 1, done.output
    assert "passed norm::norm_forgets_the_size, without any case of: a token that sees others" in done.stdout
    assert "generators made tame: 0 of 1 properties and premises vacuous" in done.stdout


HUGE = ("scores-above-2000-overflow", "mask-written-as-minus-10000", "mask-added-as-minus-20000")


@pytest.mark.parametrize("fault", HUGE)
def test_huge_scores_are_huge(fault: str) -> None:
    """What overflows, what is clipped and what hides keys by a number of the size of scores: all noticed by these."""
    verdict = kill(catalogue()[fault], "torch", only="huge_scores")
    assert (verdict.status, verdict.property) == ("killed", "scale::huge_scores_stay_finite")
