"""What heads look at: both backends' weights over a context and live tokens, held to the oracle and to each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BACKENDS
from safetensors import safe_open

import lyra
from lyra.backends.protocol import AttentionsEngine
from lyra.spec import AttentionSpec, ContextLayer, HeadSplit, InputError, ModelSpec, StaticContext, StaticSpec
from lyra.spec.inputs import StaticLayer
from lyra.spec.reference import Stream, at, by_head, context_end, project, static_keys, visible_live
from lyra.spec.uncertain import K, Uncertain, exact, rms_norm, scores, softmax_average

pytestmark = pytest.mark.usefixtures("one_thread")

CUT, ALL, SLOTS = HeadSplit((1, 2, 3), share_kv=True), HeadSplit((0, 1, 2, 3)), 9


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest, global_folder: Path) -> Any:
    """A tiny model whose first layer is global."""
    return lyra.load(global_folder, backend=request.param)


def some_context(model: Any, rows: int, hidden: bool) -> StaticContext:
    """A context of random keys and values, of which some slots are hidden."""
    random, spec = np.random.default_rng(3), model.spec
    shape = (2, rows, spec.num_key_value_heads, SLOTS, spec.attention.head_dim)
    heads, mask = tuple(range(spec.num_key_value_heads)), np.ones((rows, SLOTS), bool)
    if hidden:
        mask[:, 2] = mask[0, 5] = mask[-1, :2] = False
    return StaticContext(
        layers={0: ContextLayer(heads, *random.normal(size=shape).astype(np.float32))},
        mask=mask,
        positions=np.arange(SLOTS)[None].repeat(rows, axis=0) * 2,
        fingerprint=model.fingerprint([0]),
    )


def first_input(folder: Path, ids: np.ndarray, eps: float) -> Uncertain:
    """What the first layer's attention reads of ids [B,T]: embeddings times 8, exactly, and normed; [B,T,E]."""
    with safe_open(folder / "model.safetensors", "numpy") as file:
        embedding = file.get_tensor("model.embed_tokens.weight").astype(np.float32)
        weight = file.get_tensor("model.layers.0.input_layernorm.weight").astype(np.float32)
    return rms_norm(exact(embedding[ids] * np.sqrt(embedding.shape[1])), weight, eps)


def expected(
    spec: AttentionSpec,
    weights: dict[str, np.ndarray],
    x: Uncertain,
    positions: np.ndarray,
    mask: np.ndarray,
    static: StaticLayer | None,
) -> Uncertain:
    """The oracle's weights [B,Hq,T,S+T]: what its heads give where every value is a direction of its own."""
    assert spec.qk_norm is not None
    q, k = (
        rms_norm(project(spec, weights, kind, x), weights[f"{kind}_norm.weight"], spec.qk_norm.eps) for kind in "qk"
    )
    own = positions + context_end(spec, static)[:, None]
    vanilla = Stream(at(spec, q, positions), at(spec, k, positions), None)
    lyra = Stream(at(spec, q, own), at(spec, k, own), static_keys(spec, static))
    (batch, tokens), slots = positions.shape, 0 if static is None else static.mask.shape[1]
    found = Uncertain(*np.zeros((2, batch, spec.num_attention_heads, tokens, slots + tokens)))
    seen = visible_live(spec, positions, mask)
    for head in range(spec.num_attention_heads):
        reads = head in spec.lyra_q_heads
        stream, live = (lyra, seen[spec.static.live]) if reads else (vanilla, seen["causal"])
        context, first = (static, 0) if reads else (None, slots)
        query, key, _, visible = by_head(spec, np.array([head]), stream, k, live, context)
        one = softmax_average(scores(query, key, spec.scale, spec.softcap, visible), exact(np.eye(key.value.shape[2])))
        found.value[:, head, :, first:], found.variance[:, head, :, first:] = one.value[:, 0], one.variance[:, 0]
    real = mask[:, None, :, None]
    return Uncertain(np.where(real, found.value, 0), np.where(real, found.variance, 0))


CASES = {
    "one context, hidden slots, padding": {"hidden": True, "padded": True},
    "a context for each row, at its place": {"rows": 2, "hidden": True, "positions": "overlay", "split": ALL},
    "their own token": {"live": "self"},
    "no live token": {"live": "none", "split": HeadSplit((2, 3)), "padded": True},
    "no context": {"attached": False, "padded": True},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_weights_are_the_oracles(model: Any, global_folder: Path, case: dict[str, Any]) -> None:
    ids, mask = np.random.default_rng(0).integers(4, 270, (2, 7)), np.ones((2, 7), bool)
    if case.get("padded"):
        mask[1, :3] = False
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    spec, static, split = model.spec.layer(0).replace(split=None), None, case.get("split", CUT)
    if case.get("attached", True):
        context = some_context(model, case.get("rows", 1), case.get("hidden", False))
        sees = StaticSpec(live=case.get("live", "causal"), positions=case.get("positions", "continue"))
        spec = spec.replace(split=split, static=sees)
        static = context.static_layer(0, spec.lyra_kv_heads)
        model.attach(context, split, live=sees.live, positions=sees.positions)
    try:
        found = model.attentions(ids, mask, layers=[0])[0]
    finally:
        model.detach()
    x = first_input(global_folder, ids, model.spec.rms_norm_eps)
    true = expected(spec, model.engine.attention_weights(0), x, positions, mask, static)
    assert (found.dtype, found.shape) == (np.float32, true.value.shape)
    assert (np.abs(found - true.value) <= K * true.sigma).all()
    np.testing.assert_array_equal(found == 0, true.value == 0)
    assert (true.value > 0.2).any()


def test_every_layer_of_a_text_longer_than_a_compiled_call(tiny_folder: Path) -> None:
    ids = np.random.default_rng(0).integers(4, 270, 520)
    found = []
    for backend in BACKENDS:
        model = lyra.load(tiny_folder, backend=backend)
        assert isinstance(model.engine, AttentionsEngine)
        model.attach(model.capture(ids[:5]), CUT)
        found.append(model.attentions(ids, layers=range(4)))
        assert [weights.shape for weights in found[-1].values()] == [(4, 520, 520), (4, 520, 525)] * 2
    distance = np.subtract.outer(np.arange(520), np.arange(520))
    for layer, (one, two) in enumerate(zip(*(weights.values() for weights in found), strict=True)):
        np.testing.assert_allclose(one, two, rtol=0, atol=2e-5)
        np.testing.assert_allclose(one.sum(axis=-1), 1, rtol=0, atol=1e-5)
        assert layer % 2 or (one[:, distance >= 8] == 0).all()  # the window
        assert layer % 2 == 0 or (one[0, :, :5] == 0).all()  # the vanilla head


def test_which_layers_are_shown_and_that_looking_changes_nothing(tiny_folder: Path) -> None:
    ids, model = [2, 5, 7], lyra.load(tiny_folder)
    context, plain = model.capture([2, 8, 9, 4]), model.logits(ids)
    assert {layer: one.shape for layer, one in model.attentions(ids).items()} == {1: (4, 3, 3), 3: (4, 3, 3)}
    np.testing.assert_array_equal(model.logits(ids), plain)
    model.attach(context, {3: CUT})
    attached = model.logits(ids)
    assert {layer: one.shape for layer, one in model.attentions(ids).items()} == {3: (4, 3, 7)}
    assert {layer: one.shape for layer, one in model.attentions(ids, layers=[1, 3]).items()} == {
        1: (4, 3, 3),
        3: (4, 3, 7),
    }
    assert model.attentions("and the")[3].shape[2] == 4 + len(model.text.encode("and the"))
    np.testing.assert_array_equal(model.logits(ids), attached)
    model.attach(replace(context, mask=np.zeros_like(context.mask)), CUT)
    assert model.attentions(ids)[1].shape == (4, 3, 7)
    assert not model.attentions(ids)[1][..., :4].any()


def test_refusals(model: Any) -> None:
    with pytest.raises(InputError, match=r"attentions: there are no layers \[7\]; the model has 2"):
        model.attentions([2, 3], layers=[7])
    blocks = lyra.Model(model.engine, mode="sequential")
    blocks.attach(some_context(model, 1, False))
    with pytest.raises(lyra.ModelError, match="take mode='parallel'"):
        blocks.attentions([2, 3])
    blocks.detach()
    with pytest.raises(lyra.ModelError, match="a WithoutAttentions does not show"):
        lyra.Model(WithoutAttentions(model.spec)).attentions([2, 3])


class WithoutAttentions:
    """An engine that shows nothing."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
