"""choose_split: from a model and texts to the heads that are worth a context."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from lyra.errors import ModelError
from lyra.model import Model
from lyra.spec.attaching import SplitSource, read_split
from lyra.spec.errors import InputError
from lyra.spec.model import ModelSpec
from lyra.studies.cache import context_size

from .choice import Choice, ChosenSplit, Point, Report
from .documents import Document, Kind, cut, set_apart
from .measure import Measure, check_model, subject_of
from .memory import Memory
from .objective import Objective, Score
from .passkey import passkey_document
from .ranking import METHODS, PASSES, Method, by_gradient, by_greedy, greedy_candidates
from .units import Unit, all_units, blends_of, blends_of_split, splits_of, units_wanted

Texts = Mapping[str, str] | Sequence[str]
Progress = Callable[[str, int, int], None]
"""Told (what is being done, steps done, steps in all)."""

FULL_CURVE = 16
"""Up to so many choices every number of heads is measured; beyond, some at growing distances."""

FULL_GREEDY = 24
"""So many steps forward selection takes at least, however few heads are asked for."""

TOKENS = 1000


def choose_split(
    model: Model,
    texts: Texts | None = None,
    *,
    heads: int,
    per_layer: bool = False,
    objective: Objective = "both",
    method: Method = "gradient",
    kv_aligned: bool = False,
    held_out: Texts | None = None,
    context_tokens: int = 512,
    live_tokens: int = 128,
    progress: str | os.PathLike[str] | None = None,
    on_progress: Progress | None = None,
) -> ChosenSplit:
    """The query heads to which a context is worth most, and a report of what each choice is worth.

    texts          texts to choose on, by name or in a list; by default entries of Python's language reference. Pass
                   keys in filler stand beside them
    heads          how many query heads, in all, or with `per_layer` in every global layer
    objective      "continuation" of the context's text, "recall" of it, "both", or "passkey"; all are reported
    method         "gradient": a few gradients with respect to blends of heads; "greedy": forward selection, each choice
                   measured
    kv_aligned     whole GQA groups only, so that no KV head serves both streams
    held_out       texts that the result is judged on; by default other entries of the language reference, or of given
                   texts every third
    context_tokens how much of each text is the context; the `live_tokens` after it, and its own first ones, are scored
    progress       a folder that keeps what is measured until the end, so that an interrupted call goes on where it was

    The result is a mapping from layers to splits, as `attach` takes it, and the same for the same model and texts.
    Raises InputError for what does not fit, ModelError for a model without a tokenizer or blends, or with a context.
    """
    check_model(model)
    for name, value, known in (("objective", objective, get_args(Objective)), ("method", method, METHODS)):
        if value not in known:
            raise InputError(f"{name} is {value!r}; expected one of {', '.join(known)}")
    spec = model.engine.spec
    wanted = units_wanted(spec, heads, per_layer, kv_aligned)
    task = _Task(spec, all_units(spec, kv_aligned), wanted, per_layer, method)
    choosing, apart = _documents(model, texts, held_out, context_tokens, live_tokens)
    kept = None if progress is None else Path(progress) / f"{subject_of(model, [*choosing, *apart])[:16]}.json"
    memory = Memory(kept)
    advance = _Advance(on_progress, task.work(len(choosing), len(apart)))
    inside, outside = (Measure(model, documents, memory, advance) for documents in (choosing, apart))
    choice = Choice(
        spec.name, spec.global_layers, heads, per_layer, objective, method, kv_aligned, context_tokens, live_tokens
    )
    report = _report(task, choice, inside, outside)
    memory.forget()
    return ChosenSplit(spec, report)


def judge(
    model: Model,
    splits: Mapping[str, SplitSource | None],
    texts: Texts | None = None,
    *,
    context_tokens: int = 512,
    live_tokens: int = 128,
    on_progress: Progress | None = None,
) -> dict[str, dict[Kind, float]]:
    """Mean NLL in nats by kind, on texts that heads were not chosen on, of splits by name; None is no Lyra head.

    `texts` are by default those that `choose_split` holds out, and the other arguments are its own. Raises what it
    raises, and SpecError for a split that does not fit.
    """
    check_model(model)
    spec = model.engine.spec
    documents = _documents(model, None, texts, context_tokens, live_tokens)[1]
    bound = {name: spec.with_split(read_split(spec, split)) for name, split in splits.items()}
    blends = [blends_of_split(split) for split in bound.values()]
    advance = _Advance(on_progress, len(blends) * len(documents))
    return dict(zip(bound, Measure(model, documents, Memory(), advance).at("splits", blends), strict=True))


def curve_counts(most: int, wanted: int) -> list[int]:
    """Which numbers of choices are measured: 0, what is wanted and `most` always, all of them up to FULL_CURVE."""
    counts = {0, wanted, most}
    count = 1
    while count < most:
        counts.add(count)
        count = count + 1 if count < FULL_CURVE else count * 5 // 4
    return sorted(counts)


@dataclass(frozen=True)
class _Task:
    """What is chosen from, and how; `wanted` is a number of units."""

    spec: ModelSpec
    units: tuple[Unit, ...]
    wanted: int
    per_layer: bool
    method: Method

    @property
    def step(self) -> int:
        """Units from one point of the curve to the next."""
        return len(self.spec.global_layers) if self.per_layer else 1

    @property
    def counts(self) -> list[int]:
        """Units at every point of the curve."""
        return [count * self.step for count in curve_counts(len(self.units) // self.step, self.wanted // self.step)]

    @property
    def greedy_steps(self) -> int:
        """Steps that forward selection takes."""
        return min(len(self.units), max(self.wanted, FULL_GREEDY))

    def work(self, choosing: int, apart: int) -> int:
        """Candidates that documents are measured under, in all."""
        greedy = self.method == "greedy"
        ranked = greedy_candidates(self.units, self.per_layer, self.greedy_steps) if greedy else PASSES
        return (2 + ranked + len(self.units) + len(self.counts)) * choosing + len(self.counts) * apart

    def rank(self, inside: Measure, score: Score) -> list[Unit]:
        """All units, the best first."""
        if self.method == "gradient":
            return by_gradient(
                self.spec, self.units, lambda what, blends: score.slope(inside.gradient(what, blends)), self.per_layer
            )
        return by_greedy(
            self.spec,
            self.units,
            lambda what, blends: score.of(inside.nll(what, blends)),
            self.per_layer,
            self.greedy_steps,
        )


def _report(task: _Task, choice: Choice, inside: Measure, outside: Measure) -> Report:
    """Rank the heads and measure what every number of them is worth, on both sides."""
    spec = task.spec
    none, every = inside.at("no heads and all", [blends_of(spec, []), blends_of(spec, task.units)])
    score = Score(choice.objective, none, every)
    order = task.rank(inside, score)
    alone = inside.nll("each head alone", [blends_of(spec, [unit]) for unit in task.units])
    gains = {"score": score.of(alone)} | {kind: none[kind] - nll for kind, nll in alone.items()}
    sets = [order[:count] for count in task.counts]
    blends = [blends_of(spec, chosen) for chosen in sets]
    points = zip(sets, inside.at("curve", blends), outside.at("held out", blends), strict=True)
    return Report(
        choice=choice,
        order=tuple((unit.layer, head) for unit in order for head in unit.heads),
        documents={
            "choosing": tuple(document.name for document in inside.documents),
            "held_out": tuple(document.name for document in outside.documents),
        },
        alone={name: _by_head(spec, task.units, values) for name, values in gains.items()},
        curve=tuple(_point(spec, chosen, score, *values) for chosen, *values in points),
        chosen=task.counts.index(task.wanted),
    )


def _point(
    spec: ModelSpec, chosen: Sequence[Unit], score: Score, inside: Mapping[Kind, float], outside: Mapping[Kind, float]
) -> Point:
    splits = splits_of(spec, chosen)
    size = context_size(spec.with_split(splits), TOKENS, "float32")
    return Point(sum(len(unit.heads) for unit in chosen), splits, size, float(score.of(inside)), inside, outside)


def _by_head(spec: ModelSpec, units: Sequence[Unit], values: np.ndarray) -> np.ndarray:
    """A value of each unit as one of each of its heads, [L,Hq]."""
    return np.sum([blends_of(spec, [unit]) * value for unit, value in zip(units, values, strict=True)], axis=0)


def _documents(
    model: Model, texts: Texts | None, held_out: Texts | None, context_tokens: int, live_tokens: int
) -> tuple[list[Document], list[Document]]:
    """The documents to choose on and those held out, pass keys of their own on both sides."""
    for name, value in (("context_tokens", context_tokens), ("live_tokens", live_tokens)):
        if value < 2:
            raise InputError(f"{name} is {value}; expected 2 or more")
    if model.text is None:
        raise ModelError("choose_split: the model came without a tokenizer.json, and texts have to be cut into tokens")
    encode = model.text.encode

    def side(seed: int, texts: Mapping[str, str]) -> list[Document]:
        cuts = [cut(name, encode(text), context_tokens, live_tokens) for name, text in texts.items()]
        return [*cuts, passkey_document(seed, encode, context_tokens)]

    choosing, apart = set_apart(texts, held_out)
    return side(0, choosing), side(1, apart)


class _Advance:
    """Counts what has been measured, for whoever wants to know."""

    def __init__(self, on_progress: Progress | None, work: int) -> None:
        self._on_progress, self._done, self._work = on_progress, 0, work

    def __call__(self, what: str, candidates: int) -> None:
        self._done += candidates
        if self._on_progress is not None:
            self._on_progress(what, self._done, self._work)
