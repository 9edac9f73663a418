"""torch.compile of the decode step, as Hugging Face's generation does it with a static cache: one graph, no breaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_gemma import CUT, make_model, random_ids
from transformers import CompileConfig

from lyra import Model
from lyra.backends.torch_impl.injector import GemmaInjector
from lyra.backends.torch_impl.model import TorchEngine
from lyra.spec import StaticContext

pytestmark = pytest.mark.usefixtures("one_thread", "unchecked")

PROMPT = torch.tensor(random_ids(2, 11))


@pytest.fixture(scope="module")
def model() -> Any:
    """One sliding layer and one global one."""
    kinds = ["sliding_attention", "full_attention"]
    return make_model(eos_token_id=None, num_hidden_layers=2, layer_types=kinds)


@pytest.fixture(scope="module")
def context(model: Any) -> StaticContext:
    """One row for each prompt, of different lengths."""
    front = Model(TorchEngine(model, GemmaInjector(model).spec))
    return StaticContext.stack([front.capture(random_ids(1, length, seed=length)[0]) for length in (21, 14)])


def generate(model: Any, count: int, **options: Any) -> torch.Tensor:
    return model.generate(PROMPT, max_new_tokens=count, do_sample=False, **options)


def graphs(model: Any, count: int) -> int:
    """How many graphs a generation of `count` tokens is compiled to; it gives what it gives uncompiled.

    A break of the graph is an error.
    """
    seen: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        seen.append(graph)
        return graph

    settings = CompileConfig(fullgraph=True, backend=backend, mode=None)
    settings._compile_all_devices = True  # transformers compiles for accelerators only, unless it is told to
    torch._dynamo.reset()
    made = generate(model, count, cache_implementation="static", compile_config=settings)
    del model._compiled_call
    assert torch.equal(made, generate(model, count))
    return len(seen)


@pytest.fixture(scope="module")
def of_the_plain_model(model: Any) -> int:
    """How many graphs the plain model's generation takes."""
    return graphs(model, 5)


@pytest.mark.parametrize("given", ["no context", "a context for each row"])
def test_the_step_is_compiled_as_often_as_the_plain_models(
    model: Any, context: StaticContext, of_the_plain_model: int, given: str
) -> None:
    with GemmaInjector(model).enable(None if given == "no context" else context, CUT):
        assert 0 < graphs(model, 5) == of_the_plain_model
        if given != "no context":
            assert graphs(model, 12) == of_the_plain_model
