"""The JAX contestants of `lyra bench`: they run, they attend as their spec says, and a profile names what they do."""

from __future__ import annotations

import jax
import numpy as np

from lyra.speed.contestants import layer_jax
from lyra.speed.profiles import SHOWN, shares


def test_the_layer_attends_as_its_spec_says() -> None:
    """Decode and prefill; a context in each row, all the same one, gives what the shared one gives."""
    spec = layer_jax.half_to_lyra()
    attend = layer_jax.compiled(spec)
    keys, static = layer_jax.live_keys(spec, 2, 16), layer_jax.context(spec, 1, 64)
    query = np.ones((2, 1, spec.num_attention_heads, spec.head_dim), np.float32)
    positions, mask = np.full((2, 1), 15, np.int32), np.ones((2, 1), bool)
    shared = attend(query, keys, static, positions, mask)
    repeated = attend(query, keys, jax.tree.map(lambda part: part.repeat(2, axis=0), static), positions, mask)
    np.testing.assert_allclose(shared, repeated, atol=1e-5)
    vanilla = [head for head in range(spec.num_attention_heads) if head not in spec.lyra_q_heads]
    alone = attend(query, keys, static._replace(values=static.values + 1), positions, mask)
    np.testing.assert_array_equal(np.asarray(shared)[:, :, vanilla], np.asarray(alone)[:, :, vanilla])
    assert np.abs(np.asarray(alone - shared)[:, :, list(spec.lyra_q_heads)]).min() > 0.1


def test_a_profile_names_the_operations() -> None:
    square = np.ones((512, 512), np.float32)
    multiply = jax.jit(lambda x: jax.numpy.sin(x @ x))
    jax.block_until_ready(multiply(square))
    found = shares("jax", lambda: jax.block_until_ready(multiply(square)))
    assert 1 < len(found) <= SHOWN
    assert sum(share for _, share in found) <= 1.001
    assert found == sorted(found, key=lambda row: -row[1])
