"""PyTorch's one pipeline: who calls it, what it keeps, and what a module shows of it."""

from __future__ import annotations

import ast
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from small_layers import CUT_LAYER
from torch_gemma import GLOBAL, context_for, some_ids

import lyra.backends.torch_impl
from lyra.backends.torch_impl.cache import empty_cache
from lyra.backends.torch_impl.layer import Call, Layer, layer_of, numbers_of, run_layer, shape_of
from lyra.spec import HeadSplit, StaticSpec

pytestmark = pytest.mark.usefixtures("one_thread")


def callers(name: str) -> list[str]:
    """The modules of the backend that call a function of this name from without its own, once for each call."""
    found = []
    for file in sorted(Path(lyra.backends.torch_impl.__path__[0]).rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
        found += [file.name for func in calls if ast.unparse(func) == name and name not in own]
    return found


def test_attention_is_called_in_one_place_for_live_keys_and_one_for_the_context() -> None:
    assert callers("partial_attention") == ["layer.py", "static.py"]
    assert callers("static_attention") == ["layer.py"]
    assert callers("attend_to") == []  # a module that attends by itself would be a second pipeline


def test_who_runs_a_layer_and_a_block() -> None:
    expected = ["attention_backend.py", "context_attention.py", "gradients.py", "grouped.py", "sequential.py"]
    assert callers("run_layer") == expected
    assert callers("run_block") == ["injected.py", "sequential_backend.py"]


@pytest.mark.parametrize("traced", [False, True])
def test_nothing_of_a_stage_is_kept_but_in_a_trace(traced: bool) -> None:
    """When heads are projected, the normed queries, which RoPE made others of, are gone: a long prefill has no room."""
    spec = CUT_LAYER
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in spec.weight_shapes().items()}
    layer = layer_of(weights, numbers_of(spec), shape_of(spec))
    normed: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def q_norm(q: torch.Tensor) -> torch.Tensor:
        assert layer.parts.q_norm is not None
        made = layer.parts.q_norm(q)
        normed.append(weakref.ref(made))
        return made

    def o_proj(heads: torch.Tensor) -> torch.Tensor:
        alive.append(normed[0]() is not None)
        return layer.parts.o_proj(heads)

    watched = Layer(layer.parts._replace(q_norm=q_norm, o_proj=o_proj), layer.numbers, layer.shape)
    x = torch.randn(1, 5, spec.hidden_size, generator=generator)
    cache = empty_cache(1, spec.num_key_value_heads, spec.head_dim)
    call = Call(torch.arange(5)[None], torch.ones(1, 5, dtype=torch.bool), None, cache)
    run_layer(x, watched, call, {} if traced else None)
    assert alive == [traced]


@pytest.mark.parametrize("attached", [False, True])
def test_a_module_shows_its_stages(torch_engine: Any, attached: bool) -> None:
    """On Hugging Face's path as on Lyra's, by the names of the spec, and without a trace it gives the same."""
    layer, injector = GLOBAL[0], torch_engine.injector
    split = HeadSplit.half(torch_engine.spec)
    static = context_for(torch_engine, {layer: split}) if attached else {}
    injector.place(static, {layer: split}, StaticSpec())
    try:
        module = injector.enabled[layer]
        expected = torch_engine.logits(some_ids(2, 7))
        module.trace = {}
        assert (torch_engine.logits(some_ids(2, 7)) == expected).all()
        assert tuple(module.trace) == module.spec.trace_names()
        heads, keys = module.spec.num_attention_heads, module.spec.num_key_value_heads
        shapes = {name: tuple(value.shape[:3]) for name, value in module.trace.items() if value.ndim == 4}
        assert shapes == {
            name: (2, 7, heads if name in {"q_proj", "q_norm", "q_rope", "heads"} else keys) for name in shapes
        }
        with torch.inference_mode():
            projected = module.o_proj(module.trace["heads"].flatten(2))
        torch.testing.assert_close(projected, module.trace["output"])
    finally:
        injector.disable()
