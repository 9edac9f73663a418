"""Uptraining: trained MHA models are given fewer KV heads in several ways and trained on (Ainslie et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from .conversion import METHODS
from .corpus import Corpus
from .groups import groups
from .language_model import LMSpec
from .parallel import Moved, train_all
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


def uptrained(
    plan: Plan,
    corpus: Corpus,
    folder: Path,
    processes: int,
    moved: Moved = lambda *_: None,
) -> list[dict[str, Any]]:
    """Train the MHA models, convert them and train on, or read what is trained already: the rows of `summary`."""
    originals, tasks = plan.originals(), plan.tasks()
    runs = train_all([*originals, *tasks], corpus, folder, processes, moved)
    whole: dict[Task | None, float] = {run.task: run.curve.last for run in runs[: len(originals)]}
    return summary(runs[len(originals) :], whole)


def summary(runs: Sequence[Trained], originals: Mapping[Task | None, float]) -> list[dict[str, Any]]:
    """A row for each number of KV heads and start: held-out loss in nats, means over the seeds.

    original is that of the MHA models, `originals`; at_start that right after the conversion; at_end that after
    uptraining; held_out all that was seen, [(steps, loss)]. pooled_wins counts the seeds at which "mean" of as many KV
    heads starts lower.
    """
    kinds = groups(runs, lambda run: (run.task.spec.num_kv_heads, run.task.start))
    rows = []
    for (heads, start), seeds in kinds.items():
        steps = [step for step, _ in seeds[0].curve.held_out]
        losses = np.array([[loss for _, loss in run.curve.held_out] for run in seeds])
        pooled = [run.curve.held_out[0][1] for run in kinds.get((heads, "mean"), [])]
        means = [fmean(column) for column in losses.T]
        rows.append(
            {
                "kind": seeds[0].task.spec.kind,
                "kv_heads": heads,
                "start": start,
                "seeds": len(seeds),
                "original": fmean(originals[run.task.origin] for run in seeds),
                "at_start": means[0],
                "at_end": means[-1],
                "pooled_wins": sum(mean < loss for mean, loss in zip(pooled, losses[:, 0].tolist(), strict=False)),
                "held_out": list(zip(steps, means, strict=True)),
            }
        )
    return rows
