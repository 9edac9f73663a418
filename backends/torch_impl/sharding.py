"""A static context spread over processes: each holds some of its slots, and all of them together one softmax.

Every process of a group runs the same model on the same live tokens. It attends to its own slots, and the Partials are
merged over the group by max and sum, as two halves of a context are within one process (clause STATIC-4).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .partial import Partial, merge


def merge_over(part: Partial, group: dist.ProcessGroup) -> Partial:
    """The Partial over the keys of all processes of the group, the same in each: one max, then one sum.

    Gradients flow back into the `out` and `sum` of every process, which must all go on alike from here. Clause GRAD.
    """
    top = part.maximum.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(top, dist.ReduceOp.MAX, group)
    nothing = Partial(torch.zeros_like(part.out), top, torch.zeros_like(part.total))
    own = merge(part, nothing)  # relative to the largest score of all
    total = _SumOver.apply(torch.cat((own.out, own.total), dim=-1), group)
    return Partial(total[..., :-1], top, total[..., -1:])


def shared_by(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """x, the same in every process, where each goes on with keys of its own: its gradient is the sum over them all."""
    return _GradientSumOver.apply(x, group)


class _SumOver(torch.autograd.Function):
    """The sum over a group. Every process goes on alike from it, so the gradient comes back as it is."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class _GradientSumOver(torch.autograd.Function):
    """The same values; each process has a part of the gradient, and all get the sum."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None
