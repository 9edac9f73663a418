"""The rows of one key or value projection, cut into the two streams and put together again, bit for bit.

A stream's rows are views of the whole projection's storage wherever its KV heads stand side by side, so that cutting
copies nothing; rows of scattered heads have to be copied.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

import torch
from torch import nn

from lyra.spec.attention import AttentionSpec
from lyra.spec.errors import InputError

NAMES = ("k_proj", "v_proj")
"""The projections that are cut."""


class Streams(NamedTuple):
    """KV heads by stream, ascending: Lyra's are those that a context stores, shared ones too, vanilla's the rest."""

    vanilla: tuple[int, ...]
    lyra: tuple[int, ...]

    @property
    def order(self) -> torch.Tensor | None:
        """Where head 0, 1, … stands, int [Hkv], when Lyra's heads follow vanilla's; None where that is their order."""
        together = torch.tensor([*self.vanilla, *self.lyra], device="cpu")
        found = together.argsort()
        return None if torch.equal(found, together.sort().values) else found


def streams(spec: AttentionSpec) -> Streams:
    """The KV heads of both streams of a layer. Clauses SPLIT-3, SPLIT-5."""
    lyra = spec.lyra_kv_heads
    return Streams(tuple(head for head in range(spec.num_key_value_heads) if head not in lyra), lyra)


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a projection is nothing but a linear layer with its rows in place, so that they can be cut.

    One that is wrapped (LoRA), quantised, offloaded, parametrised, hooked or split over devices is not.
    """
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__
    )


def cut(whole: nn.Linear, heads: tuple[int, ...], head_dim: int) -> nn.Linear:
    """The linear layer of some heads' rows of `whole` [Hkv·D,E], heads ascending; it trains what `whole` trains."""
    with torch.device("meta"):
        part = nn.Linear(whole.in_features, 1, bias=whole.bias is not None)
    part.out_features = len(heads) * head_dim
    for name, value in whole.named_parameters():
        rows = value.detach().unflatten(0, (-1, head_dim))
        side_by_side = not heads or heads == tuple(range(heads[0], heads[-1] + 1))
        chosen = rows[heads[0] : heads[-1] + 1] if heads and side_by_side else rows[list(heads)]
        setattr(part, name, nn.Parameter(chosen.flatten(0, 1), requires_grad=value.requires_grad))
    return part.train(whole.training)


def join(
    vanilla: torch.Tensor, lyra: torch.Tensor, order: torch.Tensor | None, head_dim: int, dim: int
) -> torch.Tensor:
    """What `cut` separated: axis `dim` of both, head after head, back in the original order (`Streams.order`)."""
    together = torch.cat((vanilla, lyra), dim=dim)
    if order is None:
        return together
    return together.unflatten(dim, (-1, head_dim)).index_select(dim, order).flatten(dim, dim + 1)


def restore(whole: nn.Linear, parts: tuple[nn.Module, nn.Module], order: torch.Tensor | None, head_dim: int) -> None:
    """Give `whole` the rows that its parts have now. Nothing happens where they are still views of its storage.

    Raises InputError for a part that is no plain linear layer any more, such as one wrapped for LoRA.
    """
    for part in parts:
        if not is_plain(part):
            raise InputError(
                f"a key or value projection has become a {type(part).__module__}.{type(part).__qualname__}, which "
                f"cannot be put back; merge or unload the adapter first (PEFT: merge_and_unload() or unload())"
            )
    with torch.no_grad():
        for name, value in whole.named_parameters():
            rows = parts[0].get_parameter(name), parts[1].get_parameter(name)
            if all(_inside(value, part) for part in rows):
                continue
            joined = join(*rows, order, head_dim, dim=0)
            if (joined.dtype, joined.device) == (value.dtype, value.device):
                value.data.copy_(joined)
            else:
                value.data = joined


def joined_state(state: dict[str, Any], prefix: str, order: torch.Tensor | None, head_dim: int) -> None:
    """Rename, in a state dict, the cut projections to the whole ones of Hugging Face's layout, in place.

    Adapters' entries, and the projections that they wrap, stay as they are.
    """
    for name in NAMES:
        for kind in ("weight", "bias"):
            parts = [f"{prefix}{stream}_{name}.{kind}" for stream in Streams._fields]
            if all(part in state for part in parts):
                vanilla, lyra = (state.pop(part) for part in parts)
                state[f"{prefix}{name}.{kind}"] = join(vanilla, lyra, order, head_dim, dim=0)


def cut_state(state: dict[str, Any], prefix: str, heads: Streams, head_dim: int) -> None:
    """The inverse of `joined_state`, in place."""
    for name in NAMES:
        for kind in ("weight", "bias"):
            whole = state.pop(f"{prefix}{name}.{kind}", None)
            if whole is None:
                continue
            rows = whole.unflatten(0, (-1, head_dim))
            for stream, chosen in zip(Streams._fields, heads, strict=True):
                state[f"{prefix}{stream}_{name}.{kind}"] = rows[list(chosen)].flatten(0, 1)


def _inside(whole: torch.Tensor, part: torch.Tensor) -> bool:
    """Whether `part` is (a view of) the memory of `whole`."""
    same = whole.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()
    return part.numel() == 0 or (same and whole.dtype == part.dtype)
