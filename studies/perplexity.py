"""What sharing KV heads costs in quality: the same model trained with each number of KV heads, over several seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from statistics import fmean, stdev
from typing import Any

import numpy as np

from .groups import groups
from .language_model import LMSpec
from .training import Curve, Recipe, Task, Trained

EDGE = 10
"""Steps at either end of a curve whose mean loss says whether it fell."""

BOUND = 10.0
"""A gradient's norm above this, ten times what it is clipped to by default, is a run that is not stable."""


def sweep(spec: LMSpec, recipe: Recipe, kv_heads: Sequence[int], seeds: int, backends: Sequence[str]) -> list[Task]:
    """A task for every backend, seed and number of KV heads, so that an interrupted sweep has whole seeds."""
    return [
        Task(backend, spec.replace(num_kv_heads=heads), recipe, seed)
        for backend, seed, heads in product(backends, range(seeds), kv_heads)
    ]


def stability(curve: Curve) -> dict[str, Any]:
    """Whether a run was stable: every loss and norm finite, the loss fallen, no gradient's norm above BOUND."""
    first, last = fmean(curve.loss[:EDGE]), fmean(curve.loss[-EDGE:])
    finite = all(map(math.isfinite, [*curve.loss, *curve.gradient_norm]))
    largest = max(curve.gradient_norm)
    return {
        "first_loss": first,
        "last_loss": last,
        "largest_gradient_norm": largest,
        "stable": finite and last < first and largest <= BOUND,
    }


def summary(runs: Sequence[Trained], tokens: int) -> list[dict[str, Any]]:
    """A row for each backend and number of KV heads, in the order of `runs`.

    perplexity is the mean over the seeds and deviation their standard deviation; loss_change is how much more the
    held-out cross-entropy is than that of the first number of KV heads at the same seed, in nats, a mean with its
    standard error. cache_bytes counts one row of so many tokens in float32.
    """
    kinds = groups(runs, lambda run: (run.task.backend, run.task.spec.num_kv_heads))
    rows = []
    for (backend, heads), seeds in kinds.items():
        base = kinds[backend, runs[0].task.spec.num_kv_heads]
        spec, checks = seeds[0].task.spec, [stability(run.curve) for run in seeds]
        found = [run.curve.perplexity for run in seeds]
        changes = [run.curve.last - first.curve.last for run, first in zip(seeds, base, strict=True)]
        deviation = error = None
        if len(seeds) > 1:
            deviation, error = stdev(found), stdev(changes) / math.sqrt(len(changes))
        rows.append(
            {
                "backend": backend,
                "kind": spec.kind,
                "kv_heads": heads,
                "parameters": spec.parameters(),
                "cache_bytes": spec.cache_bytes(tokens),
                "seeds": len(seeds),
                "perplexity": fmean(found),
                "deviation": deviation,
                "loss_change": fmean(changes),
                "loss_change_error": error,
                "first_loss": fmean(check["first_loss"] for check in checks),
                "last_loss": fmean(check["last_loss"] for check in checks),
                "largest_gradient_norm": max(check["largest_gradient_norm"] for check in checks),
                "stable": all(check["stable"] for check in checks),
            }
        )
    return rows


def distance(runs: Sequence[Trained]) -> dict[str, float] | None:
    """How far curves are from those of the first backend at most, at equal seed and KV heads, in nats; None for one.

    loss is over every training step, held_out over every evaluation.
    """
    models = groups(runs, lambda run: (run.task.spec, run.task.seed)).values()
    pairs = [(model[0].curve, other.curve) for model in models for other in model[1:]]
    if not pairs:
        return None
    return {
        name: max(float(np.abs(np.subtract(getattr(a, name), getattr(b, name))).max()) for a, b in pairs)
        for name in ("loss", "held_out")
    }


def as_data(run: Trained) -> dict[str, Any]:
    """A run as plain data: what was trained, its whole curve, and whether it was stable."""
    task, curve = run.task, run.curve
    trained = {"backend": task.backend, "kv_heads": task.spec.num_kv_heads, "seed": task.seed}
    return trained | {"perplexity": curve.perplexity} | stability(curve) | asdict(curve)
