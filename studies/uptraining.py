"""Uptraining: trained MHA models are given fewer KV heads in several ways and trained on (Ainslie et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from statistics import fmean
from typing import Any

import numpy as np

from .conversion import METHODS
from .groups import groups
from .training import Start, Task, Trained


def conversions(
    originals: Sequence[Task], kv_heads: Sequence[int], steps: int, learning_rate: float = 1e-3
) -> list[Task]:
    """Every model that is made of trained MHA models and trained on for so many steps; "whole", MHA as it was, too, to
    compare with. The batches come after those of the training.
    """
    tasks = []
    for origin in originals:
        trained = origin.recipe
        further = trained.replace(steps=steps, first=trained.steps, learning_rate=learning_rate, warmup=steps // 10)
        starts: list[tuple[int, Start]] = [(origin.spec.num_kv_heads, "whole"), *product(kv_heads, METHODS)]
        tasks += [
            Task(origin.backend, origin.spec.replace(num_kv_heads=heads), further, origin.seed, start, origin)
            for heads, start in starts
        ]
    return tasks


def summary(runs: Sequence[Trained]) -> list[dict[str, Any]]:
    """A row for each number of KV heads and start: held-out loss in nats, means over the seeds. `runs` are those of the
    MHA models and of their conversions.

    original is that of the MHA models; at_start that right after the conversion; at_end that after
    uptraining; held_out all that was seen, [(steps, loss)]. pooled_wins counts the seeds at which "mean" of as many KV
    heads starts lower.
    """
    originals: dict[Task | None, float] = {run.task: run.curve.last for run in runs if run.task.origin is None}
    converted = (run for run in runs if run.task.origin is not None)
    kinds = groups(converted, lambda run: (run.task.spec.num_kv_heads, run.task.start))
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
