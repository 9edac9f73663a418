"""What the two processes of tests/test_torch_parallel.py do on the CPU; each writes down what it got."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import multiprocessing

from lyra.backends.torch_impl.heads import lyra_heads
from lyra.backends.torch_impl.layer import Call, run
from lyra.backends.torch_impl.sharding import shard
from lyra.backends.torch_impl.static import place_static
from lyra.conformance.case import Case, Context
from lyra.spec import AttentionSpec, HeadSplit, StaticSpec

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


def cotangent_of(case: Case) -> np.ndarray:
    shape = (case.batch, case.tokens, case.spec.hidden_size)
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def sharded_layer(case: Case) -> dict[str, np.ndarray]:
    """The output of a layer whose context is sharded over all ranks, and the gradients that reach this rank."""
    problem = case.problem()
    spec, static = problem.spec, problem.static
    assert static is not None
    lyra = lyra_heads(spec.split, spec.num_attention_heads, spec.num_key_value_heads)
    leaves = {"x": problem.x, **problem.weights, "static_k": static.k, "static_v": static.v}
    learnt = {name: torch.tensor(value).requires_grad_() for name, value in leaves.items()}
    mask, positions = torch.tensor(problem.mask), torch.tensor(problem.positions)
    shown = torch.tensor(static.mask)[:, None, :, None]
    kv = (torch.where(shown, learnt[name], 0.0) for name in ("static_k", "static_v"))
    whole = place_static(spec, static, *kv)
    assert whole is not None
    x = torch.where(mask[:, :, None], learnt["x"], 0.0)
    output, _, _ = run(spec, learnt, lyra, Call(x, positions, mask, shard(whole, dist.group.WORLD), None))
    cotangent = torch.tensor(cotangent_of(case)) * mask[:, :, None]
    found = torch.autograd.grad(output, list(learnt.values()), cotangent, materialize_grads=True)
    return {"output": output.detach().numpy(), **dict(zip(learnt, (part.numpy() for part in found), strict=True))}


def work(rank: int, folder: str) -> None:
    """Everything that one rank does; its arrays go to FOLDER/RANK.npz under "check/name"."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    torch.set_num_threads(1)
    meeting = (Path(folder) / "meeting").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    found: dict[str, dict[str, np.ndarray]] = {name: sharded_layer(case) for name, case in CASES.items()}
    flat: dict[str, Any] = {f"{check}/{name}": value for check, part in found.items() for name, value in part.items()}
    np.savez(Path(folder) / f"{rank}.npz", **flat)
    dist.destroy_process_group()


def run_ranks(folder: Path) -> list[dict[str, dict[str, np.ndarray]]]:
    """Run all ranks; what each of them wrote down, by check and name."""
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
