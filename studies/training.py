"""Training a language model of the studies: recipe, schedule, curve, and checkpoints that an interrupt leaves usable.

What happens in a framework is in the TrainedModel of `torch_lm` and `jax_lm`. What must be the same in both is here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass as validated
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lyra.spec.base import SpecModel
from lyra.spec.errors import InputError
from lyra.spec.files import write_atomically

from .conversion import METHODS, Method, share_kv_heads
from .corpus import Corpus, batch, windows
from .language_model import LMSpec, initial_weights

FRAMEWORKS = ("torch", "jax")
ROWS = 32
"""Windows that are evaluated at once."""

MOMENTS = ("adam.mean.", "adam.square.")
"""Prefixes of AdamW's two moments, in a checkpoint of an unfinished run."""

HELD = ("", *MOMENTS)
"""Prefixes of everything that training goes on from: weights and moments."""

Arrays = Mapping[str, np.ndarray]

Start = Literal["initial", "whole"] | Method
"""Where a model's weights come from."""


class Recipe(SpecModel):
    """How a model is trained: AdamW on cross-entropy, gradients clipped to a norm, warm-up and a cosine to a tenth."""

    steps: int = Field(gt=0)
    rows: int = Field(default=16, gt=0)
    window: int = Field(default=128, gt=0)
    learning_rate: float = Field(default=4e-3, gt=0)
    warmup: int = Field(default=100, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    adam_eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float = Field(default=1.0, gt=0)
    evaluations: int = Field(default=4, gt=0)
    first: int = Field(default=0, ge=0)
    """Number of the first batch: that of the steps already done, where a run goes on from another."""

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rising = min(1.0, (step + 1) / (self.warmup + 1))
        falling = 0.1 + 0.45 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * rising * falling

    def evaluated(self, done: int) -> bool:
        """Whether the held-out text is read after so many steps: `evaluations` times, the last time at the end."""
        return done * self.evaluations // self.steps != (done - 1) * self.evaluations // self.steps


@validated
class Curve:
    """What was seen, one entry a step: mean cross-entropy in nats a token, norm of the gradient before it was clipped.

    held_out holds (steps done, mean cross-entropy of the held-out text), the first with none done.
    """

    loss: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)

    @property
    def last(self) -> float:
        """The last held-out cross-entropy, in nats a token."""
        return self.held_out[-1][1]

    @property
    def perplexity(self) -> float:
        """exp of the last held-out cross-entropy."""
        return math.exp(self.last)


@dataclass(frozen=True)
class Task:
    """One model to train: everything that its curve depends on, but for the text.

    It starts from `initial_weights`, or from the model of another task, `origin`, with its KV heads made fewer as
    `start` says; "whole" leaves them as they are.
    """

    backend: str
    spec: LMSpec
    recipe: Recipe
    seed: int
    start: Start = "initial"
    origin: Task | None = None

    def file(self, folder: Path, corpus: Corpus) -> Path:
        """Its checkpoint, whose name changes with whatever changes the curve."""
        origin = "" if self.origin is None else self.origin.file(folder, corpus).name
        told = (self.spec.to_json(), self.recipe.to_json(), corpus.digest, self.start, origin)
        key = hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]
        start = "" if self.start == "initial" else f"-{self.start}"
        return folder / f"{self.backend}-{self.spec.kind.lower()}{start}-seed{self.seed}-{key}.safetensors"

    def initial(self, folder: Path, corpus: Corpus) -> Arrays:
        """The weights it starts from. Raises FileNotFoundError where the model of `origin` is not trained yet."""
        if self.origin is None:
            return initial_weights(self.spec, self.seed)
        whole, _ = read_checkpoint(self.origin.file(folder, corpus))
        if self.start not in METHODS:
            return whole
        return share_kv_heads(whole, self.spec.attention.head_dim, self.spec.num_kv_heads, self.start, self.seed)


@dataclass(frozen=True)
class Trained:
    """A model after its training; its weights are in the task's checkpoint."""

    task: Task
    curve: Curve


def check_backend(name: str) -> None:
    """Raises InputError for a backend that the studies have no code for."""
    if name not in FRAMEWORKS:
        raise InputError(f"the studies know no backend {name!r}; expected {' or '.join(FRAMEWORKS)}")


def train(
    task: Task, corpus: Corpus, folder: Path, moved: Callable[[int], None] = lambda _: None, every: int = 25
) -> Trained:
    """Train a model, from where an interrupted run of the same task stopped if there is one; a finished one is read.

    The checkpoint is written each `every` steps and at the end, through a temporary name. `moved` is called with the
    steps done. Raises InputError, FileNotFoundError, and ImportError where the backend's framework is missing.
    """
    check_backend(task.backend)
    path, recipe = task.file(folder, corpus), task.recipe
    if path.exists():
        state, curve = read_checkpoint(path)
    else:
        state, curve = task.initial(folder, corpus), Curve()
        state = {**state, **{prefix + name: np.zeros_like(state[name]) for prefix in MOMENTS for name in state}}
    done = len(curve.loss)
    moved(done)
    if done < recipe.steps:
        folder.mkdir(parents=True, exist_ok=True)
        model = import_module(f"{__package__}.{task.backend}_lm").TrainedModel(task.spec, recipe, state, done)
        held_out = windows(corpus.held_out, recipe.window)
        if done == 0:
            curve.held_out.append((0, model.loss(held_out)))
    while done < recipe.steps:
        tokens = batch(corpus.train, task.seed, recipe.first + done, recipe.rows, recipe.window)
        loss, norm = model.step(tokens, recipe.rate(done))
        curve.loss.append(loss)
        curve.gradient_norm.append(norm)
        done += 1
        if recipe.evaluated(done):
            curve.held_out.append((done, model.loss(held_out)))
        if done % every == 0 or done == recipe.steps:
            state = model.state()
            if done == recipe.steps:
                state = {name: state[name] for name in task.spec.weight_shapes()}
            metadata = {"curve": json.dumps(asdict(curve)), "spec": task.spec.to_json()}
            write_atomically(path, save({name: np.ascontiguousarray(part) for name, part in state.items()}, metadata))
        moved(done)
    return Trained(task, curve)


def steps_done(task: Task, corpus: Corpus, folder: Path) -> int:
    """How many steps the task's checkpoint has behind it. Raises InputError."""
    path = task.file(folder, corpus)
    return len(read_checkpoint(path, whole=False)[1].loss) if path.exists() else 0


def read_checkpoint(path: Path, whole: bool = True) -> tuple[Arrays, Curve]:
    """Weights, with the moments of an unfinished run, and curve; or the curve alone.

    Raises InputError, FileNotFoundError.
    """
    try:
        with safe_open(path, "numpy") as file:
            opened: Any = file
            told = (opened.metadata() or {}).get("curve")
            arrays = {name: opened.get_tensor(name) for name in opened.keys() if whole}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path} is no .safetensors file ({error})") from None
    if told is None:
        raise InputError(f"{path} is no checkpoint of a study; remove it, or name another folder")
    return arrays, Curve(**json.loads(told))
