"""Clause MESH: a model over several devices gives what it gives on one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lyra.conformance.judge import Judge
from lyra.conformance.premises import Premise
from lyra.conformance.properties.models import oracle, small_folder, static_of, tokens
from lyra.conformance.registry import prop
from lyra.conformance.spread import Answers, Job, over_devices
from lyra.conformance.subject import Subject
from lyra.conformance.tolerance import MODEL
from lyra.spec.attention import StaticSpec
from lyra.spec.split import HeadSplit

if TYPE_CHECKING:
    from lyra.conformance.oracles.hf_model import ModelOracle

AXES = {"heads": 2, "context": 2}
REFUSED = ({"heads": 4}, {"rows": 2})
"""The small model has two KV heads, and no mesh has an axis of rows."""

SLOTS, NEW = 60, 3
"""Of a context, about as many as a backend may pad it to, so that every device has some; and tokens to generate."""
PEAK = 6
"""A slot with so large keys that the devices' largest scores differ: what each has must be rescaled to be added."""

SEVERAL_DEVICES = Premise("several devices along every axis", names={"AXES": {"heads": 1, "context": 1}})


def the_job(judged: ModelOracle) -> Job:
    """What is asked: a context in both global layers, some of its slots hidden, heads of both groups being Lyra's."""
    layers = judged.spec.global_layers
    split = HeadSplit.from_q_heads(judged.spec.attention, (0, 2, 3), share_kv=True)
    captured = judged.capture(tokens(SLOTS), layers)
    static = {layer: static_of(captured, layer, split.lyra_kv_heads) for layer in layers}
    for context in static.values():
        context.mask[:, [2, SLOTS - 3]] = False
        context.k[:, :, PEAK] *= 8.0
    return Job(
        folder=small_folder(),
        axes=AXES,
        ids=tokens(11, seed=1, rows=2),
        new=NEW,
        captured=tokens(SLOTS),
        static=static,
        splits=dict.fromkeys(layers, split),
        refused=REFUSED,
    )


def answers(subject: Subject, job: Job) -> Answers:
    """What a backend answers, asked once a run: a process with several devices takes seconds to start."""
    found: Answers = subject.once("over devices", lambda: subject.attempt(lambda: over_devices(subject.backend, job)))
    return found


@prop("MESH-1", "STATIC-4", premise=SEVERAL_DEVICES, needs=("model", "mesh"))
def test_a_model_over_devices_equals_the_oracle(judge: Judge) -> None:
    """KV heads over one axis, slots of contexts over another: logits, greedy tokens, captured keys and values."""
    judged = oracle(small_folder())
    job = the_job(judged)
    judge.meet(SEVERAL_DEVICES, all(count > 1 for count in job.axes.values()))
    mode = StaticSpec()
    wanted = {"logits": judged.logits_with(job.ids, job.static, job.splits, mode)}
    for layer, kv in judged.capture(job.captured, tuple(job.static)).items():
        wanted |= {f"keys of layer {layer}": kv.k, f"values of layer {layer}": kv.v}

    def check(subject: Subject) -> None:
        got = answers(subject, job)
        for name, expected in wanted.items():
            subject.expect_model(got.get(name, np.zeros(0)), expected, f"{name}, over devices", "one device's")
        new = got["tokens"]
        subject.expect(None, new.shape == (len(job.ids), NEW), f"{new.shape} tokens, asked for {(len(job.ids), NEW)}")
        whole = np.concatenate([job.ids, new], axis=1)
        scores = judged.logits_with(whole, job.static, job.splits, mode)[:, -NEW - 1 : -1]
        chosen = np.take_along_axis(scores, new[:, :, None], axis=2)[:, :, 0]
        best = bool((chosen >= scores.max(axis=2) - MODEL * np.abs(scores).max()).all())
        subject.expect(None, best, "a generated token is not the most likely one")

    judge.each(f"{SLOTS} slots over {AXES}", check)


REFUSALS = Premise("a mesh that no model can be spread over", names={"REFUSED": ()})


@prop("MESH-2", premise=REFUSALS, needs=("model", "mesh"))
def test_a_mesh_that_does_not_fit_is_refused(judge: Judge) -> None:
    """More devices along `heads` than KV heads, and an axis that means nothing, are refused by name."""
    job = the_job(oracle(small_folder()))
    judge.meet(REFUSALS, bool(job.refused))

    def check(subject: Subject) -> None:
        found = answers(subject, job)
        for number, axes in enumerate(job.refused):
            said = str(found.get(f"refused {number}", ""))
            named = all(axis in said for axis in axes)
            subject.expect(
                None, named, f"a mesh {axes} must be refused, naming its axis; it said {said or 'nothing'!r}"
            )

    judge.each(f"meshes {REFUSED}", check)
