"""What the JAX backend's attention layer costs to compile; what it computes is in test_attention_backends.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import numpy as np
import pytest

jax = pytest.importorskip("jax")

from test_attention_backends import SPLITS, make_case, make_spec, make_static, make_weights  # noqa: E402

from lyra.backends.jax_impl import JaxBackend  # noqa: E402
from lyra.spec import HeadSplit, QKNormSpec, RopeSpec, StaticSpec  # noqa: E402


@pytest.fixture
def compilations(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], int]]:
    """How many times the layer call was compiled since the test began, as JAX itself logs it.

    A test that uses this takes shapes that no other test has.
    """
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        yield lambda: sum("Finished XLA compilation of jit(call_layer)" in line for line in caplog.messages)


def test_numbers_and_heads_of_a_spec_do_not_compile_again(compilations: Callable[[], int]) -> None:
    """One structure and one set of shapes is one compiled function, whatever the numbers and the heads are."""
    splits = [HeadSplit((2, 3)), HeadSplit((0, 1)), HeadSplit((0,), share_kv=True), HeadSplit((3,), share_kv=True)]
    for i, split in enumerate(splits * 3):
        spec = make_spec(
            split=split,
            scale=0.1 + i,
            softcap=1.0 + i,
            bias=True,
            qk_norm=QKNormSpec(eps=10.0 ** -(i + 1)),
            rope=RopeSpec(theta=10.0 + i, factor=1.0 + i),
            static=StaticSpec(positions="overlay" if i % 2 else "continue"),
        )
        case = make_case(spec, tokens=19, seed=i)
        layer = JaxBackend().attention(spec, make_weights(spec, seed=i))
        layer(case.x, positions=case.positions + i, mask=case.mask, static=case.static)
    assert compilations() == 1


def test_close_lengths_share_one_function(compilations: Callable[[], int]) -> None:
    """5 to 8 tokens, 3 to 16 static slots, with and without a window and a live mode of its own: one function."""
    for tokens, live, slots in ((5, "causal", 3), (6, "self", 16), (7, "none", 9), (8, "causal", 4)):
        spec = make_spec(hidden_size=13, split=SPLITS["last"], static=StaticSpec(live=live))
        case = make_case(spec, tokens=tokens)
        static = make_static(spec, 1, slots, holes=False)
        layer = JaxBackend().attention(spec, make_weights(spec))
        assert layer(case.x, positions=case.positions, static=static).output.shape[1] == tokens
    assert compilations() == 1


def test_decoding_compiles_once_per_doubling(compilations: Callable[[], int]) -> None:
    spec = make_spec(hidden_size=11, sliding_window=4)
    layer = JaxBackend().attention(spec, make_weights(spec))
    cache = None
    for t in range(40):
        cache = layer(np.ones((1, 1, 11), np.float32), positions=np.array([[t]]), cache=cache).cache
    assert compilations() == 3, "one each for 16, 32 and 64 slots"
