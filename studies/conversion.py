"""A checkpoint with fewer KV heads: MHA to GQA or MQA, by pooling heads (Ainslie et al. 2023, "GQA", section 2.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np

from lyra.spec.errors import InputError

Method = Literal["mean", "first", "random"]
METHODS: tuple[Method, ...] = get_args(Method)
PARTS = ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias")


def share_kv_heads(
    weights: Mapping[str, np.ndarray], head_dim: int, num_kv_heads: int, method: Method = "mean", seed: int = 0
) -> dict[str, np.ndarray]:
    """The same weights with `num_kv_heads` KV heads in every attention layer.

    weights carry Hugging Face's names; k_proj and v_proj, [H·head_dim,E], and their biases are replaced, all others are
    passed on as they are. Neighbouring heads form a group, as query heads read them. Of each group "mean" keeps the
    mean, "first" the first head, "random" normal values with the standard deviation of the whole projection. Raises
    InputError for heads that do not divide, or where nothing is found to convert.
    """
    if method not in METHODS:
        raise InputError(f"method is {method!r}; expected one of {', '.join(METHODS)}")
    names = [name for name in weights if name.endswith(PARTS)]
    if not names:
        raise InputError(f"no weight is called …k_proj or …v_proj; found {', '.join(list(weights)[:3]) or 'none'}")
    rng, shared = np.random.default_rng(seed), dict(weights)
    for name in names:
        value = weights[name]
        heads, rest = divmod(len(value), head_dim)
        if rest or num_kv_heads < 1 or heads % num_kv_heads:
            raise InputError(
                f"{name} has {len(value)} rows, {len(value) / head_dim:g} heads of {head_dim}; expected whole heads "
                f"whose number is a multiple of num_kv_heads={num_kv_heads}"
            )
        groups = value.reshape(num_kv_heads, heads // num_kv_heads, head_dim, *value.shape[1:])
        if method == "mean":
            made = groups.mean(axis=1, dtype=np.float64)
        else:
            made = groups[:, 0] if method == "first" else rng.standard_normal(groups[:, 0].shape) * value.std()
        shared[name] = made.reshape(-1, *value.shape[1:]).astype(value.dtype)
    return shared
