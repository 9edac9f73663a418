"""Clauses STORED, COMPOSE and FINGERPRINT: what a context holds, in what type, how it moves and joins, whose it is."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest

from lyra.conformance.case import Case, Problem
from lyra.conformance.judge import Judge
from lyra.conformance.premises import CONTEXT, OVERLAY, SEVERAL_SLOTS, Premise
from lyra.conformance.properties.models import engine, oracle, small_folder, stretched_folder, tokens
from lyra.conformance.properties.test_rope import rotated
from lyra.conformance.registry import prop
from lyra.conformance.shaped import with_visible
from lyra.conformance.strategies import cases
from lyra.conformance.subject import Subject
from lyra.model import Model
from lyra.spec.attention import StaticSpec
from lyra.spec.context import ContextLayer, StaticContext
from lyra.spec.errors import ContextError
from lyra.spec.fingerprint import Fingerprint, hash_weights
from lyra.spec.inputs import StaticLayer
from lyra.spec.split import HeadSplit

LAYER = 0
BOS = 2

ROUNDED, DAMAGED = (
    Premise(
        name,
        tame=lambda case: (
            case if case.context is None else case.replace(context=case.context.replace(hidden=(999_999,)))
        ),
    )
    for name in ("a visible value that storing rounds", "damage to a visible value")
)


def context_of(problem: Problem) -> StaticContext:
    """The static layer of a problem as a whole context, with made-up tokens of which the first is BOS."""
    static = problem.static
    assert static is not None
    weights = {name: value for name, value in problem.weights.items() if name[0] in "kv"}
    attention = problem.spec.replace(split=None)
    mark = Fingerprint("a layer", attention, ((LAYER, hash_weights(weights)),), tokenizer="made up", bos=BOS)
    ids = np.broadcast_to(BOS + np.arange(static.mask.shape[1]), static.mask.shape)
    layer = ContextLayer(problem.spec.lyra_kv_heads, static.k, static.v)
    return StaticContext({LAYER: layer}, static.mask, static.positions, mark, ids)


def with_context(problem: Problem, context: StaticContext) -> Problem:
    """The problem with another context."""
    return problem.replace(static=context.static_layer(LAYER, problem.spec.lyra_kv_heads))


@prop(
    "STORED-2",
    "STORED-1",
    premise=CONTEXT,
    case=lambda scope: cases(scope, context=True, min_context=1, poison=(1e4,)).map(rotated),
    needs=("static",),
)
def test_a_context_survives_its_file(case: Case, judge: Judge) -> None:
    """A context written to a file and read back gives the same bits, and moving it away and back changes none."""
    problem = case.problem()
    context = context_of(problem)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "context.safetensors"
        context.save(path)
        again = StaticContext.load(path)
        moved = with_context(problem, again.moved(1000).moved(-1000))

        def check(subject: Subject) -> None:
            first = subject.run(problem)
            subject.expect_equal(problem, subject.run(moved).output, first.output, "the context before it was saved")
            subject.expect_oracle(problem, first)

        judge.each(case, check)


@prop(
    "STORED-3",
    premise=(OVERLAY, SEVERAL_SLOTS),
    case=lambda scope: cases(scope, context=True, min_context=2).map(rotated).map(with_visible(2)),
    needs=("static",),
    weight=0.5,
)
def test_the_file_holds_its_rotation(case: Case, judge: Judge) -> None:
    """Keys turned by the stored cosines and sines meet queries as the backend's own keys do: live="none", overlay."""
    case = case.respec(static=case.spec.static.replace(live="none", positions="overlay"))
    problem = case.problem()
    assert problem.static is not None
    rotation = context_of(problem).rotation()
    assert rotation is not None
    cos, sin = (part[:, None].astype(np.float64) for part in rotation)
    k = problem.static.k.astype(np.float64)
    half = k.shape[-1] // 2
    turned = k * cos + np.concatenate([-k[..., half:], k[..., :half]], axis=-1) * sin
    zero = np.zeros_like(problem.static.positions)
    at_rest = problem.replace(static=problem.static._replace(k=turned.astype(np.float32), positions=zero))

    def check(subject: Subject) -> None:
        subject.expect_close(
            problem, subject.run(at_rest).output, subject.run(problem).output, "keys that the backend turned itself"
        )

    judge.each(case, check)


def in_file(path: Path, part: str) -> np.ndarray:
    """What the file of a context stands for, "k" or "v" [Bc,Hs,S,D] float32, read without Lyra (STORED-4)."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    values = tensors[f"layers.{LAYER}.{part}"].float().numpy()
    if f"layers.{LAYER}.{part}.scales" not in tensors:
        return values
    scales, blocks = (tensors[f"layers.{LAYER}.{part}.{name}"].numpy() for name in ("scales", "blocks"))
    return values * np.stack([scale[:, block] for scale, block in zip(scales, blocks, strict=True)])


def half_step(values: np.ndarray, mask: np.ndarray, storage: str, part: str) -> np.ndarray:
    """How far a visible value may be from what it is stored as, with a little room for the scale's own rounding."""
    size = np.abs(np.where(mask[:, None, :, None], values, 0.0).astype(np.float64))
    if storage == "bfloat16":
        return size * 2.0**-8
    return size.max(axis=2 if part == "k" else 3, keepdims=True) / 127 * 0.50001


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
@prop(
    "STORED-4",
    "STORED-5",
    "STORED-2",
    premise=(CONTEXT, ROUNDED),
    case=lambda scope: cases(scope, context=True, min_context=1, poison=(1e4,)).map(rotated).map(with_visible(2)),
    needs=("static",),
    weight=0.5,
)
def test_a_context_in_fewer_bits(case: Case, judge: Judge, storage: str) -> None:
    """A context stored as bfloat16 or int8 is near the one it was made of, and is what its file says, bit for bit."""
    problem = case.problem()
    assert problem.static is not None
    given = problem.static
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "context.safetensors"
        context_of(problem).astype(storage).save(path)
        again = StaticContext.load(path)
        k, v = in_file(path, "k"), in_file(path, "v")
        for part, got, was in (("k", k, given.k), ("v", v, given.v)):
            off = np.where(given.mask[:, None, :, None], np.abs(got - was.astype(np.float64)), 0.0)
            assert (off <= half_step(was, given.mask, storage, part)).all(), f"{part} is further off than {storage} is"
        judge.meet(ROUNDED, bool(((k != given.k) & given.mask[:, None, :, None]).any()))
        stands_for = problem.replace(static=given._replace(k=k, v=v))
        moved = with_context(problem, again.moved(1000).moved(-1000))

        def check(subject: Subject) -> None:
            first = subject.run(stands_for)
            subject.expect_equal(problem, subject.run(moved).output, first.output, "the values that the file holds")
            subject.expect_oracle(stands_for, first)

        judge.each(case, check)


def damaged(file: bytes, seed: int) -> dict[str, bytes]:
    """A context's file with one bit of its values flipped, and with keys and values under each other's names."""
    start = 8 + struct.unpack("<Q", file[:8])[0]
    header = json.loads(file[8:start])
    k, v = f"layers.{LAYER}.k", f"layers.{LAYER}.v"
    begin, end = header[v]["data_offsets"]
    at = start + begin + 4 * seed % (end - begin)  # the last bits of a float32, so that it stays finite
    flipped = file[:at] + bytes([file[at] ^ (1 << seed % 7)]) + file[at + 1 :]
    found = {"a bit flipped": flipped}
    values, keys = (file[slice(*(start + place for place in header[name]["data_offsets"]))] for name in (v, k))
    if values != keys:  # they are the same where every slot is hidden: what is stored of them is 0
        text = json.dumps(header | {k: header[v], v: header[k]}).encode()
        found["keys for values"] = struct.pack("<Q", len(text)) + text + file[start:]
    return found


@pytest.mark.parametrize("storage", ["float32", "int8"])
@prop(
    "STORED-6",
    premise=(CONTEXT, DAMAGED),
    case=lambda scope: cases(scope, context=True, min_context=1).map(rotated).map(with_visible(1)),
    needs=("static",),
    weight=0.5,
)
def test_a_damaged_context_is_refused(case: Case, judge: Judge, storage: str) -> None:
    """A file with one bit flipped, or keys in the place of values, is refused by name; as it was saved it serves."""
    problem = case.problem()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "context.safetensors"
        context_of(problem).astype(storage).save(path)
        whole = path.read_bytes()
        served = with_context(problem, StaticContext.load(path))
        assert served.static is not None
        for what, file in damaged(whole, case.seed).items():
            other = path.with_name(what)  # a loaded context is mapped: written over in place, it would change
            other.write_bytes(file)
            with pytest.raises(ContextError, match="damaged") as refusal:
                StaticContext.load(other)
            assert str(other) in str(refusal.value), f"{what}: the file is not named"
            there = with_context(problem, StaticContext.load(other, verify=False)).static
            assert there is not None
            seen = served.static.mask[:, None, :, None]
            judge.meet(DAMAGED, bool(((there.v != served.static.v) & seen).any()))
        judge.each(case, lambda subject: subject.expect_oracle(served, subject.run(served)))


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
@prop(
    "STORED-5",
    "COMPOSE-1",
    premise=SEVERAL_SLOTS,
    case=lambda scope: cases(scope, context=True, min_context=2, hidden=False, far=False).map(rotated),
    needs=("static",),
    weight=0.5,
)
def test_composition_rounds_nothing(case: Case, judge: Judge, storage: str) -> None:
    """Two contexts, each stored in fewer bits, are composed without another rounding: the values follow each other."""
    problem = case.problem()
    whole = context_of(problem)
    static = problem.static
    assert static is not None
    cut = 1 + case.seed % (static.mask.shape[1] - 1)

    def part(slots: slice) -> StaticContext:
        layer = ContextLayer(problem.spec.lyra_kv_heads, static.k[:, :, slots], static.v[:, :, slots])
        made = StaticContext({LAYER: layer}, static.mask[:, slots], static.positions[:, slots], whole.fingerprint)
        return made.astype(storage)

    first, second = part(slice(cut)), part(slice(cut, None))
    composed = with_context(problem, first + second)
    assert composed.static is not None
    layers = [context.static_layer(LAYER, problem.spec.lyra_kv_heads) for context in (first, second)]
    k, v = (np.concatenate([layer[index] for layer in layers], axis=2) for index in (0, 1))
    joined = problem.replace(static=StaticLayer(k, v, composed.static.mask, composed.static.positions))

    def check(subject: Subject) -> None:
        first, other = subject.run(composed), subject.run(joined)
        subject.expect_equal(problem, first.output, other.output, "the values of both, one behind the other")
        subject.expect_oracle(joined, other)

    judge.each(case, check)


@prop(
    "COMPOSE-1",
    "COMPOSE-2",
    "STATIC-4",
    premise=SEVERAL_SLOTS,
    case=lambda scope: cases(scope, context=True, min_context=3, hidden=False, far=False).map(rotated),
    needs=("static",),
)
def test_composition_is_concatenation(case: Case, judge: Judge) -> None:
    """A context cut in two and composed is the whole one: positions follow on, a repeated BOS goes."""
    assert case.context is not None
    case = case.replace(context=case.context.replace(start=0, gaps=False))
    problem = case.problem()
    whole = context_of(problem)
    static = problem.static
    assert static is not None
    assert whole.tokens is not None
    cut = 1 + case.seed % (static.mask.shape[1] - 1)

    def part(slots: list[int], start: int) -> StaticContext:
        layer = ContextLayer(problem.spec.lyra_kv_heads, static.k[:, :, slots], static.v[:, :, slots])
        ids = np.array(whole.tokens)[:, slots]
        positions = np.broadcast_to(start + np.arange(len(slots)), (static.mask.shape[0], len(slots)))
        return StaticContext({LAYER: layer}, static.mask[:, slots], positions, whole.fingerprint, ids)

    slots = list(range(static.mask.shape[1]))
    repeated = 1 + case.seed % 2  # capturing gives one BOS and positions from 0; ids given by hand may have more
    second = part([0] * repeated + slots[cut:], start=0)
    composed = with_context(problem, part(slots[:cut], start=0) + second)

    def check(subject: Subject) -> None:
        subject.expect(problem, composed.static.k.shape == static.k.shape, "the repeated BOS was kept")  # type: ignore[union-attr]
        subject.expect_close(problem, subject.run(composed).output, subject.run(problem).output, "the whole context")

    judge.each(case, check)


@prop(
    "FINGERPRINT-1",
    "FINGERPRINT-2",
    premise=CONTEXT,
    case=lambda scope: cases(scope, context=True, min_context=1).map(rotated),
    needs=("static",),
    weight=0.5,
)
def test_a_context_knows_its_model(case: Case, judge: Judge) -> None:
    """Other k, v or k_norm weights, another eps or theta: the difference is named, and such contexts do not compose."""
    problem = case.problem()
    context = context_of(problem)
    assert not context.fingerprint.differences(context_of(problem).fingerprint)
    for name in ("k_proj.weight", "v_proj.weight"):
        other = problem.replace(weights=problem.weights | {name: problem.weights[name] * 1.5})
        with pytest.raises(ContextError, match="do not go together"):
            context.compose(context_of(other))
    assert problem.spec.rope is not None
    stranger = problem.respec(rope=problem.spec.rope.replace(theta=problem.spec.rope.theta * 2))
    assert any("rope" in difference for difference in context.fingerprint.differences(context_of(stranger).fingerprint))
    judge.each(case, lambda subject: subject.expect_oracle(problem, subject.run(problem)))


STRANGERS = {
    "weights": (lambda: small_folder(seed=1), "the k and v projections or k_norm of layers [2, 5] differ"),
    "rope": (stretched_folder, "rope (theta 1000000.0, factor 4.0) against (theta 1000000.0, factor 8.0)"),
}
"""Models that are not the small one: their folders, and the difference to it."""

STRANGER = Premise("a context of another model", names={"STRANGERS": dict.fromkeys(STRANGERS, (small_folder, ""))})


@pytest.mark.parametrize("stranger", STRANGERS)
@prop("FINGERPRINT-2", "FINGERPRINT-1", premise=STRANGER, needs=("model",), profile="ci")
def test_a_context_of_another_model_is_refused(judge: Judge, stranger: str) -> None:
    """A model refuses another one's context, says what differs and stays as it was; with override it takes it."""
    make_folder, difference = STRANGERS[stranger]
    folder, ids = make_folder(), tokens(11, seed=1)
    judge.meet(STRANGER, folder != small_folder())
    judged = oracle(small_folder())
    splits = dict.fromkeys(judged.spec.global_layers, HeadSplit.last_kv(judged.spec.attention, 1))

    def check(subject: Subject) -> None:
        model, other = Model(engine(subject, small_folder())), Model(engine(subject, folder))
        context = subject.attempt(lambda: other.capture(tokens(9)[0]))
        before = subject.attempt(lambda: model.logits(ids))
        subject.expect_model(before, judged.logits(ids), "logits", "Hugging Face's")
        refusal = refusal_of(model, context)
        subject.expect(None, difference in refusal, f"refused with {refusal!r}; expected that it says {difference!r}")
        subject.expect(None, bool((model.logits(ids) == before).all()), "a refused context changed the model")
        subject.attempt(lambda: model.attach(context, splits, override=True))
        got = subject.attempt(lambda: model.logits(ids))
        model.detach()
        static = {layer: context.static_layer(layer, split.lyra_kv_heads) for layer, split in splits.items()}
        wanted = judged.logits_with(ids, static, splits, StaticSpec())
        subject.expect_model(got, wanted, "logits with a stranger's context", "the oracle's model")

    judge.each(stranger, check)


def refusal_of(model: Model, context: StaticContext) -> str:
    """What a model says against a context; nothing where it takes it, which it then gives back."""
    try:
        model.attach(context)
    except ContextError as refusal:
        return str(refusal)
    model.detach()
    return ""
