"""Gradients through a whole JAX model, to parameters and to static keys and values, against Hugging Face's autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flax import nnx  # noqa: E402
from tiny_gemma import CUT, GLOBAL, assert_close, left_padding, make_model, random_ids  # noqa: E402
from transformers.models.gemma3.modeling_gemma3 import apply_rotary_pos_emb  # noqa: E402

from lyra.backends.jax_impl import JaxBackend, tuning  # noqa: E402
from lyra.backends.jax_impl.forward import split_module  # noqa: E402
from lyra.backends.jax_impl.model import JaxEngine  # noqa: E402
from lyra.spec import HeadSplit, InputError, StaticSpec  # noqa: E402
from lyra.spec.inputs import StaticLayer  # noqa: E402

SLOTS, LIVE = 7, 9


def random_context(layers: tuple[int, ...], kv_heads: int, rows: int = 1) -> dict[int, StaticLayer]:
    """Random keys and values for some layers; every slot is visible."""
    rng = np.random.default_rng(3)
    shape, places = (rows, kv_heads, SLOTS, 16), np.tile(np.arange(SLOTS), (rows, 1))
    return {
        layer: StaticLayer(*rng.normal(size=(2, *shape)).astype(np.float32), np.ones_like(places, bool), places)
        for layer in layers
    }


def hf_gradients(model: Any, ids: np.ndarray, context: dict[int, StaticLayer]) -> tuple[float, Any]:
    """The loss of ids behind the context as an ordinary prefix, by layer the gradients of its k and v; the weights keep
    theirs."""
    leaves = {
        layer: [torch.tensor(part, requires_grad=True) for part in (given.k, given.v)]
        for layer, given in context.items()
    }
    places = torch.arange(SLOTS)[None]
    cos, sin = model.model.rotary_emb(torch.zeros(1, SLOTS, 32), places, "full_attention")
    cache = transformers.DynamicCache(config=model.config)
    for layer, (k, v) in leaves.items():
        cache.update(apply_rotary_pos_emb(k, k, cos, sin)[1], v, layer)
    live = torch.tensor(ids)
    logits = model(live, past_key_values=cache, position_ids=SLOTS + torch.arange(LIVE)[None]).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), live[:, 1:].flatten())
    model.zero_grad()
    loss.backward()
    return loss.item(), {layer: [leaf.grad.numpy() for leaf in pair] for layer, pair in leaves.items()}


def test_gradients_are_hugging_faces(tmp_path: Path) -> None:
    """With every layer global and every head Lyra's, a context is an ordinary prefix, and autograd of the plain model
    reaches its keys and values."""
    model = make_model(layer_types=["full_attention"] * 2, num_hidden_layers=2)
    model.save_pretrained(tmp_path)
    engine, ids, layers = JaxBackend().load(str(tmp_path)), random_ids(1, LIVE), (0, 1)
    given = random_context(layers, 2)
    expected_loss, expected = hf_gradients(model, ids, given)
    context, settings = tuning.tunable(engine.spec, given, dict.fromkeys(layers, HeadSplit((0, 1, 2, 3))))
    graph, mask = split_module(engine.module), np.ones(ids.shape, bool)
    gradients = jax.jit(jax.value_and_grad(tuning.mean_nll, argnums=(1, 4)), static_argnums=0)
    loss, (of_state, of_context) = gradients(graph.structure, graph.state, ids, mask, context, settings)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for layer in layers:
        assert_close(np.asarray(of_context[layer].k), expected[layer][0])
        assert_close(np.asarray(of_context[layer].v), expected[layer][1])
    state = nnx.to_flat_state(jax.tree.unflatten(graph.structure.tree, of_state))
    found = {".".join(map(str, path)): np.asarray(leaf) for path, leaf in state}
    for name, parameter in model.named_parameters():
        assert_close(found[name.removeprefix("model.")], parameter.grad.numpy())


def test_a_tuned_context_is_better_when_it_is_attached(jax_engine: JaxEngine) -> None:
    """Three steps along the gradient; the loss is the engine's own, and hidden slots and padding play no part."""
    ids, padding, given = random_ids(2, LIVE), left_padding(2, LIVE), random_context(GLOBAL, 2)
    for static in given.values():
        static.mask[:, 2] = False
        static.k[:, :, 2], static.v[:, :, 2] = 1e30, -1e30
    splits, mode = dict.fromkeys(GLOBAL, CUT), StaticSpec(live="self")
    context, settings = tuning.tunable(jax_engine.spec, given, splits, mode)

    def engines(context: tuning.Context) -> float:
        static = {
            layer: given[layer]._replace(k=np.asarray(one.k), v=np.asarray(one.v)) for layer, one in context.items()
        }
        jax_engine.attach(static, splits, mode)
        counted = padding[:, :-1]
        return float(-jax_engine.log_probs(ids, padding)[counted].mean())

    losses = []
    for _ in range(4):
        loss, gradient = tuning.loss_and_gradient(split_module(jax_engine.module), ids, padding, context, settings)
        assert float(loss) == pytest.approx(engines(context), rel=1e-5)
        losses.append(float(loss))
        assert all((np.asarray(part)[:, :, 2] == 0).all() for one in gradient.values() for part in one)
        context = jax.tree.map(lambda value, slope: value - 0.5 * slope, context, gradient)
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[-1] > 0.01


def test_contexts_can_be_mapped_over(jax_engine: JaxEngine) -> None:
    ids, graph = random_ids(1, LIVE), split_module(jax_engine.module)
    first, settings = tuning.tunable(jax_engine.spec, random_context(GLOBAL, 2), dict.fromkeys(GLOBAL, CUT))
    both = jax.tree.map(lambda part: jax.numpy.stack([part, -part]), first)
    second = jax.tree.map(lambda part: -part, first)

    def loss(context: tuning.Context) -> jax.Array:
        return tuning.mean_nll(graph.structure, graph.state, ids, np.ones(ids.shape, bool), context, settings)

    mapped = jax.jit(jax.vmap(loss))(both)
    alone = [float(tuning.loss_and_gradient(graph, ids, None, one, settings)[0]) for one in (first, second)]
    assert np.asarray(mapped) == pytest.approx(alone, rel=1e-5)
    assert abs(alone[0] - alone[1]) > 1e-3


def test_nothing_to_tune_is_refused(jax_engine: JaxEngine) -> None:
    given = random_context((1,), 2)
    empty = {1: StaticLayer(*(part[:, :, :0] for part in given[1][:2]), *(part[:, :0] for part in given[1][2:]))}
    with pytest.raises(InputError, match="layer 1 has no static slots or no Lyra heads"):
        tuning.tunable(jax_engine.spec, empty, {1: CUT})
