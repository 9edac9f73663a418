"""Uptraining: trained MHA models are given fewer KV heads in several ways and trained on (Ainslie et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from .conversion import METHODS
from .corpus import Corpus
from .language_model import LMSpec
from .parallel import train_all
from .training import Recipe, Start, Task, Trained


@dataclass(frozen=True)
class Plan:
    """MHA models of `spec` after `recipe`, one a seed; what they are converted to; how long they are trained on."""

    backend: str
    spec: LMSpec
    recipe: Recipe
    seeds: int
    kv_heads: Sequence[int]
    steps: int
    learning_rate: float = 1e-3

    @property
    def further(self) -> Recipe:
        """The recipe of uptraining: it goes on with batches that come after those of the training."""
        return self.recipe.replace(
            steps=self.steps, first=self.recipe.steps, learning_rate=self.learning_rate, warmup=self.steps // 10
        )

    def originals(self) -> list[Task]:
        """The MHA models."""
        return [Task(self.backend, self.spec, self.recipe, seed) for seed in range(self.seeds)]

    def tasks(self) -> list[Task]:
        """Every model that is made of them; "whole", MHA as it was, is trained on for as long, to compare with."""
        starts: list[tuple[int, Start]] = [(self.spec.num_kv_heads, "whole")]
        starts += [(heads, method) for heads in self.kv_heads for method in METHODS]
        return [
            Task(self.backend, self.spec.replace(num_kv_heads=heads), self.further, origin.seed, start, origin)
            for origin in self.originals()
            for heads, start in starts
        ]


@dataclass(frozen=True)
class Uptrained:
    """A model after uptraining, and what its MHA model's held-out loss was."""

    original: float
    trained: Trained


def uptrain(
    plan: Plan,
    corpus: Corpus,
    folder: Path,
    processes: int,
    moved: Callable[[str, int, int], None] = lambda *_: None,
) -> list[Uptrained]:
    """Train the MHA models, convert them and train on, or read what is trained already."""
    originals, tasks = plan.originals(), plan.tasks()
    before = sum(task.recipe.steps for task in originals)
    total = before + sum(task.recipe.steps for task in tasks)
    whole = train_all(originals, corpus, folder, processes, lambda what, done, _: moved(what, done, total))
    losses = {one.task: one.curve.last for one in whole}
    found = train_all(tasks, corpus, folder, processes, lambda what, done, _: moved(what, before + done, total))
    return [Uptrained(losses[one.task.origin], one) for one in found if one.task.origin is not None]


def summary(runs: Sequence[Uptrained]) -> list[dict[str, Any]]:
    """A row for each number of KV heads and start: held-out loss in nats, means over the seeds.

    original is that of the MHA models; at_start that right after the conversion; at_end that after uptraining; held_out
    all that was seen, [(steps, loss)]. pooled_wins counts the seeds at which "mean" of as many KV heads starts lower.
    """
    rows = []
    for heads, start in dict.fromkeys((run.trained.task.spec.num_kv_heads, run.trained.task.start) for run in runs):
        own = _of(runs, heads, start)
        seen = [[loss for _, loss in run.trained.curve.held_out] for run in own]
        pooled = [run.trained.curve.held_out[0][1] for run in _of(runs, heads, "mean")]
        rows.append(
            {
                "kind": own[0].trained.task.spec.kind,
                "kv_heads": heads,
                "start": start,
                "seeds": len(own),
                "original": fmean(run.original for run in own),
                "at_start": fmean(losses[0] for losses in seen),
                "at_end": fmean(losses[-1] for losses in seen),
                "pooled_wins": sum(mean < losses[0] for mean, losses in zip(pooled, seen, strict=False)),
                "held_out": [
                    (step, fmean(losses[place] for losses in seen))
                    for place, (step, _) in enumerate(own[0].trained.curve.held_out)
                ],
            }
        )
    return rows


def _of(runs: Sequence[Uptrained], heads: int, start: Start) -> list[Uptrained]:
    return [run for run in runs if (run.trained.task.spec.num_kv_heads, run.trained.task.start) == (heads, start)]
