"""The seam for families in JAX: one that is described here in twenty lines computes what transformers' model does."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("flax")
torch = pytest.importorskip("torch")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from lyra.backends.jax_impl import families as jax_families  # noqa: E402
from lyra.backends.jax_impl.decoder import Decoder, empty_model_cache  # noqa: E402
from lyra.backends.jax_impl.modules import RMSNorm  # noqa: E402
from lyra.backends.jax_impl.params import module_path  # noqa: E402
from lyra.spec import InputError, ModelSpec, families  # noqa: E402
from lyra.spec.families import LayerNorms  # noqa: E402
from lyra.spec.families.gemma3 import GEMMA3  # noqa: E402

NAME = "plain"
SIZES = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
SPEC = {
    "name": NAME, "family": NAME, "vocab_size": 31, "intermediate_size": 24, "pattern": ("global", "global"),
    "attention": {**SIZES, "scale": 0.5, "qk_norm": None, "rope": {"theta": 1e4}},
    "rms_norm_eps": 1e-5, "hidden_activation": "silu", "tie_word_embeddings": False,
}  # fmt: skip


class PlainNorm(RMSNorm):
    """RMSNorm whose weight is w, not 1 + w."""

    def __call__(self, x: jax.Array) -> jax.Array:
        rms = jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x / rms * self.weight[...]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
    """A model of a family with two norms a layer, SiLU and no embedding scale, which spec and backend learn of."""
    family = dataclasses.replace(
        GEMMA3, name=NAME, norms=LayerNorms("input_layernorm", None, "post_attention_layernorm", None),
        activation="silu", embedding_scale=lambda _: 1.0, gguf=None,
    )  # fmt: skip
    monkeypatch.setattr(families, "FAMILIES", {**families.FAMILIES, NAME: family})
    module = ModuleType(f"{jax_families.__name__}.{NAME}")
    vars(module)["FAMILY"] = jax_families.Family(NAME, {"silu": jax.nn.silu}, PlainNorm)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return ModelSpec.from_dict(SPEC)


def test_another_family_is_its_description_and_its_activation_and_norm(plain: ModelSpec) -> None:
    config = LlamaConfig(
        **SIZES, vocab_size=31, intermediate_size=24, num_hidden_layers=2, rms_norm_eps=1e-5, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(config).eval()
    model = Decoder(plain, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    given = {module_path(name): value.detach().numpy() for name, value in theirs.state_dict().items()}
    flat = {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
    assert flat.keys() == given.keys()
    nnx.update(model, nnx.from_flat_state([(path, leaf.replace(given[name])) for name, (path, leaf) in flat.items()]))
    ids = np.random.default_rng(0).integers(0, 31, (2, 7))
    cache = empty_model_cache(plain, 2, 7, np.dtype(np.float32))
    made = model(ids.astype(np.int32), np.ones(ids.shape, bool), cache, {}, first=True)
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(model.logits(made.hidden), wanted, rtol=2e-5, atol=2e-5)


def test_a_family_that_the_backend_lacks_is_refused(plain: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, f"{jax_families.__name__}.{NAME}")
    with pytest.raises(InputError, match=f"the JAX backend does not run models of the family {NAME!r}"):
        Decoder(plain, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match=r"hidden_activation is 'relu'; this model has 'gelu_pytorch_tanh' only"):
        Decoder(ModelSpec.preset("gemma-3-270m").replace(hidden_activation="relu"), rngs=nnx.Rngs(0))
