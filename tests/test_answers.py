"""Answers that cannot be compared: each is told in one sentence, with the stage, what came and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from backends_for_tests import NullBackend, NullEngine, Wrapped
from judging import judged

from lyra.backends.protocol import Gradients, Result
from lyra.conformance.answers import Malformed, check_array, check_result, sizes_of
from lyra.conformance.case import Case, Context
from lyra.conformance.gradients import check_gradients
from lyra.conformance.record import Failure
from lyra.spec.attention import AttentionSpec
from lyra.spec.sequential import SequentialSpec
from lyra.spec.split import HeadSplit

pytestmark = pytest.mark.usefixtures("empty_folder")

SPEC = AttentionSpec(
    hidden_size=12, num_attention_heads=6, num_key_value_heads=2, head_dim=8, scale=0.5,
    split=HeadSplit(lyra_q_heads=(0, 1, 2)),
)  # fmt: skip
ROWS, TOKENS, PAST = 1, 4, 3

Change = Callable[[dict[str, Any]], Any]


def turned(value: np.ndarray) -> np.ndarray:
    """[B,T,H,D] as [B,H,T,D], as most frameworks have it."""
    return np.ascontiguousarray(np.swapaxes(value, 1, 2))


def changed(**by_name: Callable[[np.ndarray], Any]) -> Change:
    """Some stages of a trace changed."""
    return lambda trace: {name: by_name.get(name, lambda value: value)(value) for name, value in trace.items()}


def a_trace(spec: AttentionSpec | SequentialSpec) -> dict[str, Any]:
    layer = spec.attention if isinstance(spec, SequentialSpec) else spec
    heads = dict.fromkeys("qh", layer.num_attention_heads) | dict.fromkeys("kv", layer.num_key_value_heads)
    shapes = {
        name: (ROWS, TOKENS, heads[name[0]], layer.head_dim) if name[0] in heads else (ROWS, TOKENS, layer.hidden_size)
        for name in spec.trace_names()
    }
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


TRACES: dict[str, tuple[Change, str | None, str]] = {
    "heads first": (
        changed(q_norm=turned),
        "q_norm",
        "stage q_norm has shape (1, 6, 4, 8), expected [B,T,Hq,D] = (1, 4, 6, 8): heads and tokens are exchanged",
    ),
    "all of them": (
        changed(**dict.fromkeys(("q_proj", "k_proj", "v_proj", "heads"), turned)),
        "q_proj",
        "stage q_proj has shape (1, 6, 4, 8), expected [B,T,Hq,D] = (1, 4, 6, 8): heads and tokens are exchanged",
    ),
    "heads not apart": (
        changed(heads=lambda value: value.reshape(1, 4, 48)),
        "heads",
        "stage heads has shape (1, 4, 48), expected [B,T,Hq,D] = (1, 4, 6, 8): the heads are not apart",
    ),
    "repeated keys": (
        changed(k_rope=lambda value: value.repeat(3, axis=2)),
        "k_rope",
        "stage k_rope has shape (1, 4, 6, 8), expected [B,T,Hkv,D] = (1, 4, 2, 8): there is one for each query head, "
        "not for each KV head",
    ),
    "with the cache": (
        changed(v_proj=lambda value: np.zeros((1, 7, 2, 8), np.float32)),
        "v_proj",
        "stage v_proj has shape (1, 7, 2, 8), expected [B,T,Hkv,D] = (1, 4, 2, 8): it holds the 3 tokens of earlier "
        "calls too",
    ),
    "without rows": (
        changed(output=lambda value: value[0]),
        "output",
        "stage output has shape (4, 12), expected [B,T,E] = (1, 4, 12): the axis of rows is missing",
    ),
    "another width": (
        changed(q_proj=lambda value: value[..., :6]),
        "q_proj",
        "stage q_proj has shape (1, 4, 6, 6), expected [B,T,Hq,D] = (1, 4, 6, 8)",
    ),
    "float64": (
        changed(q_rope=lambda value: value.astype(np.float64)),
        "q_rope",
        "stage q_rope has dtype float64, expected float32 [B,T,Hq,D] = (1, 4, 6, 8)",
    ),
    "a list": (
        changed(k_norm=lambda value: value.tolist()),
        "k_norm",
        "stage k_norm is a list, expected a NumPy array float32 [B,T,Hkv,D] = (1, 4, 2, 8)",
    ),
    "a missing stage": (
        lambda trace: {name: value for name, value in trace.items() if name != "k_norm"},
        "k_norm",
        "the trace lacks stage k_norm; the stages of this layer are q_proj, k_proj, v_proj, q_norm, k_norm, q_rope, "
        "k_rope, heads, output",
    ),
    "an unknown stage": (
        lambda trace: trace | {"scores": trace["heads"]},
        "scores",
        "the trace has scores, which this layer does not have; the stages of this layer are q_proj, k_proj, v_proj, "
        "q_norm, k_norm, q_rope, k_rope, heads, output",
    ),
    "another name": (
        lambda trace: {("attended" if name == "heads" else name): value for name, value in trace.items()},
        "heads",
        "the trace lacks stage heads and has attended, which is none; the stages of this layer are q_proj, k_proj, "
        "v_proj, q_norm, k_norm, q_rope, k_rope, heads, output",
    ),
    "another order": (
        lambda trace: dict(sorted(trace.items(), key=lambda item: item[0][0] == "q")),
        "k_proj",
        "the trace has its stages in the order k_proj, v_proj, k_norm, k_rope, heads, output, q_proj, q_norm, q_rope; "
        "the stages of this layer are q_proj, k_proj, v_proj, q_norm, k_norm, q_rope, k_rope, heads, output, in this "
        "order",
    ),
    "no dict": (
        lambda trace: list(trace.values()),
        None,
        "the trace is a list, expected a dict of arrays by the names of their stages",
    ),
}


@pytest.mark.parametrize("name", TRACES)
def test_a_trace_that_cannot_be_compared_is_told_in_one_sentence(name: str) -> None:
    change, stage, sentence = TRACES[name]
    trace = a_trace(SPEC)
    result = Result(trace["output"], None, change(trace))
    with pytest.raises(Malformed) as refused:
        check_result(result, SPEC, ROWS, TOKENS, PAST, traced=True)
    assert (refused.value.stage, str(refused.value)) == (stage, sentence)
    check_result(result, SPEC, ROWS, TOKENS, PAST, traced=False)


@pytest.mark.parametrize("spec", [SPEC, SPEC.replace(qk_norm=None, rope=None), SequentialSpec(attention=SPEC)])
def test_a_right_trace_is_taken(spec: AttentionSpec | SequentialSpec) -> None:
    trace = a_trace(spec)
    taken = check_result((trace["output"], "a cache", trace), spec, ROWS, TOKENS, 0, traced=True)
    assert taken[1:] == ("a cache", trace)


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        (
            np.zeros((4, 1, 12), np.float32),
            "has shape (4, 1, 12), expected [B,T,E] = (1, 4, 12): tokens and rows are e",
        ),
        (np.zeros((1, 4, 12)), "has dtype float64, expected float32 [B,T,E] = (1, 4, 12)"),
        (np.array(None), "has shape (), expected [B,T,E] = (1, 4, 12)"),
        (None, "is a NoneType, expected a NumPy array float32 [B,T,E] = (1, 4, 12)"),
    ],
)
def test_an_output_that_cannot_be_compared(output: Any, sentence: str) -> None:
    with pytest.raises(Malformed) as refused:
        check_result(Result(output, None, {}), SPEC, ROWS, TOKENS, 0, traced=False)
    assert str(refused.value).startswith(f"the output {sentence}")
    assert refused.value.stage is None


@pytest.mark.parametrize(("result", "kind"), [({}, "dict"), (None, "NoneType"), ((1, 2), "tuple of 2")])
def test_a_call_that_gives_no_result(result: Any, kind: str) -> None:
    with pytest.raises(Malformed, match=f"the call gave a {kind}, expected Result"):
        check_result(result, SPEC, ROWS, TOKENS, 0, traced=False)


def test_gradients_that_cannot_be_compared() -> None:
    problem = Case(SPEC, calls=(TOKENS,), context=Context(5)).problem()
    assert problem.static is not None
    good = Gradients(problem.x, problem.weights, problem.static.k, problem.static.v)
    assert set(check_gradients(good, problem)) == {"x", *problem.weights, "static_k", "static_v"}
    transposed = {**problem.weights, "o_proj.weight": problem.weights["o_proj.weight"].T}
    for found, sentence in [
        (
            good._replace(weights=transposed),
            "o_proj.weight has shape (48, 12), expected [out,in] = (12, 48): what goes",
        ),
        (good._replace(x=problem.x[0]), "the gradient of x has shape (4, 12), expected [B,T,E] = (1, 4, 12): the axis"),
        (good._replace(static_k=turned(good.static_k)), "static_k has shape (1, 5, 1, 8), expected [Bc,Hs,S,D] = (1, "),
        (good._replace(static_v=None), "expected of ['k_norm.weight'"),
        (good._replace(weights=None), "vjp gave a Gradients, expected Gradients(x, weights"),
        (problem.x, "vjp gave a ndarray"),
    ]:
        with pytest.raises(Malformed) as refused:
            check_gradients(found, problem)
        assert sentence in str(refused.value)


def test_which_axes_were_exchanged_is_said_for_the_likeliest_pair_first() -> None:
    sizes = sizes_of(SPEC.replace(num_attention_heads=4, num_key_value_heads=4, split=None), 6, 6)
    with pytest.raises(Malformed, match=r"= \(6, 6, 4, 8\): heads and tokens are exchanged"):
        check_array("it", np.zeros((6, 4, 6, 8), np.float32), ("B", "T", "Hq", "D"), sizes)


# in a run of the suite


class HeadsFirst(Wrapped):
    """Traces as [B,H,T,D]; from the second call of a sequence on, where `late`."""

    name = "heads-first"
    late = False

    def change(self, result: Result) -> Result:
        """Its stages by head."""
        late = self.late and result.output.shape[1] != 1
        return (
            result
            if late
            else result._replace(trace={k: turned(v) if v.ndim == 4 else v for k, v in result.trace.items()})
        )


class LateHeadsFirst(HeadsFirst):
    """The same in calls of a single token only."""

    name = "late"
    late = True


def failures(backend: Any, only: str) -> dict[str, Failure]:
    outcome = judged(backend, only=only, shrink=False)
    return {name: failure for (name, _), failure in outcome.record.failures.items()}


@pytest.mark.parametrize("backend", [HeadsFirst(), LateHeadsFirst()], ids=lambda backend: backend.name)
def test_the_suite_names_stage_and_shapes(backend: HeadsFirst) -> None:
    found = failures(backend, "every_stage_equals or absent_stages or stages_of_the_rotation")
    assert len(found) == 3
    for failure in found.values():
        assert failure.kind == "failed"
        assert failure.stage in {"q_proj", "k_proj"}
        assert failure.message.startswith(f"stage {failure.stage} has shape (")
        assert "expected [B,T,H" in failure.message
        assert ": heads and tokens are exchanged" in failure.message
        assert ("in the call behind the first" in failure.message) == backend.late


class OffAndHeadsFirst(HeadsFirst):
    """Wrong in its output too, so that the stage is looked for."""

    name = "off"

    def change(self, result: Result) -> Result:
        """A larger output, and stages by head."""
        return super().change(result._replace(output=1.01 * result.output))


def test_a_wrong_output_with_a_misshapen_trace_says_both() -> None:
    (failure,) = failures(OffAndHeadsFirst(), "layer_equals_oracle").values()
    assert "|Δ|/σ" in failure.message
    assert "; stage q_proj has shape (" in failure.message
    assert failure.stage == "q_proj"


class ByList(Wrapped):
    """Gives its output as a list."""

    name = "list"

    def change(self, result: Result) -> Result:
        """No array."""
        return result._replace(output=result.output.tolist())  # type: ignore[arg-type]


def test_what_is_no_array_is_a_failure_and_no_error_of_numpys() -> None:
    (failure,) = failures(ByList(), "layer_equals_oracle").values()
    assert (failure.kind, failure.stage) == ("failed", None)
    assert failure.message.startswith("the output is a list, expected a NumPy array float32 [B,T,E] = (")


class NarrowEngine(NullEngine):
    """Logits of half the vocabulary."""

    def logits(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """[B,T,V/2]."""
        return super().logits(ids, mask)[..., ::2]


class NarrowModels(NullBackend):
    """Loads models of half a vocabulary."""

    name = "narrow"

    def load(self, folder: str, **rest: Any) -> NarrowEngine:
        """Such a model."""
        whole = super().load(folder)
        return NarrowEngine(whole.spec, whole.make)


def test_a_model_of_another_shape() -> None:
    (failure,) = failures(NarrowModels(), "model_without_context_is_hugging").values()
    assert failure.kind == "failed"
    assert failure.message.startswith("logits: got shape (2, 29, ")
