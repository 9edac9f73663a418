"""What both backends refuse at the door of a layer's live cache, in the same words."""

from __future__ import annotations

import pytest
from small_layers import layer

from lyra.backends.protocol import get_backend
from lyra.conformance.case import Case
from lyra.spec import InputError

PROBLEM = Case(layer(), calls=(3,), batch=2).problem()


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_cache_is_asked_for_what_it_holds(backend: str) -> None:
    pytest.importorskip(backend)
    made = get_backend(backend).attention(PROBLEM.spec, PROBLEM.weights)
    cache = made(PROBLEM.x, positions=PROBLEM.positions).cache
    with pytest.raises(InputError, match="length is 4; the cache holds 3 tokens, so give 0 to 3"):
        made.crop(cache, 4)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"rows are \[0, 2\]; the cache has rows 0 to 1"):
        made.reorder(cache, [0, 2])  # type: ignore[attr-defined]


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_another_ones_cache_is_refused(backend: str) -> None:
    pytest.importorskip(backend)
    made = get_backend(backend).attention(PROBLEM.spec, PROBLEM.weights)
    with pytest.raises(InputError, match="cache is a dict"):
        made(PROBLEM.x, positions=PROBLEM.positions, cache={})
    with pytest.raises(InputError, match="cache is a dict"):
        made.reorder({}, [0])  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="cache is a dict"):
        made.crop({}, 0)  # type: ignore[attr-defined]
