"""What the two processes of tests/test_torch_parallel.py do on the CPU; each writes down what it got."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tiny_gemma import random_ids
from torch import multiprocessing
from transformers import Gemma3ForCausalLM
from transformers.distributed import DistributedConfig

from lyra.backends.torch_impl import projections
from lyra.backends.torch_impl.cache import empty_cache
from lyra.backends.torch_impl.injector import GemmaInjector
from lyra.backends.torch_impl.layer import Call, layer_of, numbers_of, run_layer, shape_of
from lyra.backends.torch_impl.static import place_static, rotate_static, shard
from lyra.backends.torch_impl.tensor_parallel import whole
from lyra.conformance.case import Case, Context
from lyra.spec import AttentionSpec, HeadSplit, InputError, StaticSpec

RANKS = 2
LAYER = AttentionSpec(
    hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=8, scale=0.4, softcap=9.0,
    split=HeadSplit(lyra_q_heads=(1, 2, 3), share_kv=True),
)  # fmt: skip
CASES = {
    "one context for all rows": Case(LAYER, calls=(5,), batch=2, context=Context(tokens=9, hidden=(2,))),
    "a context a row": Case(
        LAYER.replace(static=StaticSpec(live="none")), calls=(3,), batch=2, padding=(0, 1),
        context=Context(tokens=7, batch=2, hidden=(0, 4), gaps=True), flavour="peaked",
    ),
    "fewer slots than processes": Case(LAYER, calls=(4,), context=Context(tokens=1)),
}  # fmt: skip

HEADS = {"vocab_size": 98, "num_attention_heads": 8, "num_key_value_heads": 4}
"""transformers 5.20 gathers logits only of a vocabulary that divides by the number of ranks."""
SPLITS = {
    "last half": HeadSplit((4, 5, 6, 7)),
    "cut": HeadSplit((1, 2, 6), share_kv=True),
    "all": HeadSplit(tuple(range(8))),
}
"""The Lyra heads of the first are all on the last rank."""
MODES = {"last half": ("causal", "continue"), "cut": ("self", "continue"), "all": ("none", "overlay")}
PROMPT, NEW = random_ids(2, 9), 5
LEARNT = ("q_proj", "k_proj", "v_proj", "o_proj", "k_norm")


def cotangent_of(case: Case) -> np.ndarray:
    shape = (case.batch, case.tokens, case.spec.hidden_size)
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def sharded_layer(case: Case) -> dict[str, np.ndarray]:
    """The output of a layer whose context is sharded over all ranks, and the gradients that reach this rank."""
    problem = case.problem()
    spec, static = problem.spec, problem.static
    assert static is not None
    leaves = {"x": problem.x, **problem.weights, "static_k": static.k, "static_v": static.v}
    learnt = {name: torch.tensor(value).requires_grad_() for name, value in leaves.items()}
    mask, positions = torch.tensor(problem.mask), torch.tensor(problem.positions)
    shown = torch.tensor(static.mask)[:, None, :, None]
    k, v = (torch.where(shown, learnt[name], 0.0) for name in ("static_k", "static_v"))
    placed, numbers = place_static(spec, static), numbers_of(spec)
    assert placed is not None
    mine = shard(rotate_static(placed._replace(k=k, v=v), numbers.frequencies), dist.group.WORLD)
    call = Call(positions, mask, mine, empty_cache(case.batch, spec.num_key_value_heads, spec.head_dim))
    output, _ = run_layer(learnt["x"], layer_of(learnt, numbers, shape_of(spec)), call)
    cotangent = torch.tensor(cotangent_of(case)) * mask[:, :, None]
    found = torch.autograd.grad(output, list(learnt.values()), cotangent, materialize_grads=True)
    return {"output": output.detach().numpy(), **dict(zip(learnt, (part.numpy() for part in found), strict=True))}


def answers(model: Gemma3ForCausalLM) -> dict[str, np.ndarray]:
    """Logits of the prompts, and what is generated after them."""
    ids = torch.tensor(PROMPT)
    with torch.inference_mode():
        made = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        return {"logits": model(ids).logits.numpy(), "made": made.numpy()}


def weight_gradients(model: Gemma3ForCausalLM) -> dict[str, np.ndarray]:
    """Gradients of the language model's loss over the prompts, for weights of a global layer and one before it."""
    ids = torch.tensor(PROMPT)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    attention = model.model.layers[1].self_attn
    found = {name: gradient_of(attention, name) for name in LEARNT}
    found["layers.0.mlp"] = gradient_of(model.model.layers[0].mlp, "down_proj")
    model.zero_grad()
    return {name: whole(value).numpy() for name, value in found.items()}


def gradient_of(module: Any, name: str) -> torch.Tensor:
    """The gradient of a projection or norm; of one that is cut into two streams, put together."""
    if hasattr(module, name):
        return getattr(module, name).weight.grad
    parts = (getattr(module, f"{stream}_{name}").weight.grad for stream in ("vanilla", "lyra"))
    return projections.join(*parts, module.kv_order, module.head_dim, dim=0)


def attached(model: Gemma3ForCausalLM, context: str, name: str, **options: Any) -> GemmaInjector:
    """The model with the context and the split of that name, in the mode that goes with it."""
    live, positions = MODES[name]
    return GemmaInjector(model).enable(context, SPLITS[name], live=live, positions=positions, **options)


def tensor_parallel(folder: str) -> dict[str, dict[str, np.ndarray]]:
    """A model whose heads are dealt out to the ranks by transformers: without a context, with one, without again."""
    model = Gemma3ForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=RANKS)).eval()
    context = f"{folder}/context.safetensors"
    found = {"heads, plain": answers(model)}
    for name in SPLITS:
        with attached(model, context, name):
            found[f"heads, {name}"] = answers(model) | weight_gradients(model)
    found["heads, plain again"] = answers(model)
    refused: dict[str, Callable[[], object]] = {
        "slots too": lambda: attached(model, context, "all", group=dist.group.WORLD),
        "trainable": lambda: attached(model, context, "all", trainable=True),
        "capture": lambda: GemmaInjector(model).capture(PROMPT[:1]),
        "attach": lambda: GemmaInjector(model).attach(context),
    }
    found["heads, refused"] = {what: np.array(refusal(call)) for what, call in refused.items()}
    return found


def refusal(call: Callable[[], object]) -> str:
    """The message of the InputError that a call ends in."""
    try:
        call()
    except InputError as error:
        return str(error)
    return "not refused"


def sharded_model(folder: str) -> dict[str, dict[str, np.ndarray]]:
    """A whole model on every rank, with some of the context's slots each."""
    model = Gemma3ForCausalLM.from_pretrained(folder).eval()
    found = {}
    for name in SPLITS:
        with attached(model, f"{folder}/context.safetensors", name, group=dist.group.WORLD) as injector:
            held = next(iter(injector.enabled.values())).lyra_kv_cache
            assert held is not None
            found[f"slots, {name}"] = answers(model) | weight_gradients(model) | {"held": np.array(held[0].shape)}
    return found


def work(rank: int, folder: str) -> None:
    """Everything that one rank does; its arrays go to FOLDER/RANK.npz under "check/name"."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    torch.set_num_threads(1)
    meeting = (Path(folder) / "meeting").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    found: dict[str, dict[str, np.ndarray]] = {name: sharded_layer(case) for name, case in CASES.items()}
    found |= tensor_parallel(folder) | sharded_model(folder)
    flat: dict[str, Any] = {f"{check}/{name}": value for check, part in found.items() for name, value in part.items()}
    np.savez(Path(folder) / f"{rank}.npz", **flat)
    dist.destroy_process_group()


def run_ranks(folder: Path) -> list[dict[str, dict[str, np.ndarray]]]:
    """Run all ranks on a folder with a checkpoint and a context; what each of them wrote down, by check and name."""
    multiprocessing.start_processes(work, (str(folder),), nprocs=RANKS, start_method="spawn")
    ranks = []
    for rank in range(RANKS):
        checks: dict[str, dict[str, np.ndarray]] = {}
        with np.load(folder / f"{rank}.npz") as file:
            for key in file.files:
                check, name = key.split("/")
                checks.setdefault(check, {})[name] = file[key]
        ranks.append(checks)
    return ranks
