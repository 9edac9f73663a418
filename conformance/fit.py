"""Sizes of cases that backends of a fixed structure can be asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lyra.backends.protocol import Backend, FixedBackend
from lyra.backends.raised import interrupted
from lyra.spec.attention import AttentionSpec, QKNormSpec, RopeSpec

from .case_sizes import CaseSizes

USUAL: tuple[Callable[[CaseSizes], dict[str, Any]], ...] = (
    lambda sizes: {},
    lambda sizes: {"hidden_size": -(-sizes.hidden_size // sizes.heads[0]) * sizes.heads[0]},
    lambda sizes: {"softcap": False},
    lambda sizes: {"bias": False},
    lambda sizes: {"qk_norm": True},
    lambda sizes: {"rope": True},
)
"""What sizes that fit no backend get in place of their own, one after the other: a width that the heads divide, and the
structure of Gemma-3.
"""


def fitting(pool: tuple[CaseSizes, ...], backends: Sequence[Backend]) -> tuple[CaseSizes, ...]:
    """The pool for these backends. Where all of them have a fixed structure, sizes that fit none are made more usual.

    Then cases of every property that fits a backend come up.
    """
    fixed = [backend for backend in backends if isinstance(backend, FixedBackend)]
    if not fixed or len(fixed) < len(backends):
        return pool
    return tuple(dict.fromkeys(next(_fitted(sizes, fixed), sizes) for sizes in pool))


def _fitted(sizes: CaseSizes, backends: Sequence[FixedBackend]) -> Iterator[CaseSizes]:
    """The sizes, and the more usual ones, that fit some backend."""
    for changes in USUAL:
        sizes = sizes.replace(**changes(sizes))
        if any(_fits(backend, sizes) for backend in backends):
            yield sizes


def _fits(backend: FixedBackend, sizes: CaseSizes) -> bool:
    try:
        return backend.fits(_plain(sizes)) is None
    except BaseException as error:  # the backend's own, which the judge tells of when it asks for a layer
        if interrupted(error):
            raise
        return True


def _plain(sizes: CaseSizes) -> AttentionSpec:
    """A layer of these sizes and this structure."""
    return AttentionSpec(
        hidden_size=sizes.hidden_size,
        num_attention_heads=sizes.heads[0],
        num_key_value_heads=sizes.heads[1],
        head_dim=sizes.head_dim,
        scale=sizes.head_dim**-0.5,
        softcap=2.0 if sizes.softcap else None,
        bias=sizes.bias,
        qk_norm=QKNormSpec() if sizes.qk_norm else None,
        rope=RopeSpec() if sizes.rope else None,
    )
