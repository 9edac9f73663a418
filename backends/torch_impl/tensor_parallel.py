"""Tensor parallelism: transformers gives every process a stretch of a layer's heads, and Lyra's heads go with them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from lyra.spec.attention import AttentionSpec
from lyra.spec.errors import InputError
from lyra.spec.inputs import StaticLayer, check_static
from lyra.spec.split import HeadSplit

from .rope import inverse_frequencies
from .static import StaticKV, place_static, prepare_static, shard


class Share(NamedTuple):
    """This process's heads of a layer: stretch `rank` of as many equal ones as there are `processes`, global ranks."""

    rank: int = 0
    processes: tuple[int, ...] = (0,)

    @property
    def ranks(self) -> int:
        """How many processes share the heads."""
        return len(self.processes)

    def own_layer(self, spec: AttentionSpec) -> AttentionSpec:
        """The layer of these heads only, numbered from 0, with what the split says of them.

        Raises InputError where the KV heads cannot be dealt out evenly.
        """
        if self.ranks == 1:
            return spec
        if spec.num_key_value_heads % self.ranks:
            raise InputError(
                f"tensor parallel over {self.ranks} ranks: {spec.num_key_value_heads} KV heads cannot be dealt out "
                f"evenly; choose a tp_size that divides them"
            )
        queries, kv_heads = spec.num_attention_heads // self.ranks, spec.num_key_value_heads // self.ranks
        first = queries * self.rank
        own = tuple(head - first for head in spec.lyra_q_heads if first <= head < first + queries)
        split = HeadSplit(lyra_q_heads=own, share_kv=spec.split is not None and spec.split.share_kv)
        return spec.replace(num_attention_heads=queries, num_key_value_heads=kv_heads, split=split)

    def own_static(self, spec: AttentionSpec, static: StaticLayer) -> StaticLayer:
        """The keys and values that these heads read of `static`, which is that of the whole layer `spec`."""
        if self.ranks == 1:
            return static
        count = spec.num_key_value_heads // self.ranks
        mine = [place for place, head in enumerate(spec.lyra_kv_heads) if head // count == self.rank]
        return static._replace(k=static.k[:, mine], v=static.v[:, mine])

    def check_group(self, group: dist.ProcessGroup) -> None:
        """Refuse a group for sharding a context in which processes have different heads. Raises InputError."""
        common = sorted(set(self.processes) & set(dist.get_process_group_ranks(group)))
        if len(common) > 1:
            raise InputError(
                f"ranks {common} have different heads (tensor parallel) and cannot have slots of one context too; "
                f"shard it over a group of ranks that have the same heads"
            )


def share_of(attention: nn.Module) -> Share:
    """Which of its layer's heads an attention module computes here. Raises InputError for a plan that is not by heads.

    transformers cuts the rows of q_proj, k_proj and v_proj along the mesh dimension "tp" (its plan "colwise").
    """
    names = [name for name in ("q_proj", "k_proj", "v_proj") if hasattr(attention, name)]
    shares = {name: _share_of_rows(getattr(attention, name).weight) for name in names}
    if len(set(shares.values())) > 1:
        ranks = {name: share.ranks for name, share in shares.items()}
        raise InputError(
            f"the tensor parallel plan cuts the projections into different numbers of parts, {ranks}; give q_proj, "
            f"k_proj and v_proj the same plan, by default colwise"
        )
    return shares["q_proj"]


def whole(weight: torch.Tensor) -> torch.Tensor:
    """A weight in one piece, wherever its parts are. All processes that hold parts must call it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _share_of_rows(weight: torch.Tensor) -> Share:
    if not isinstance(weight, DTensor):
        return Share()
    names = weight.device_mesh.mesh_dim_names or ()
    if "tp" not in names or weight.placements[names.index("tp")] != Shard(0):
        return Share()
    processes = dist.get_process_group_ranks(weight.device_mesh.get_group("tp"))
    return Share(weight.device_mesh.get_local_rank("tp"), tuple(processes))


def prepare_own(
    asked: AttentionSpec,
    static: StaticLayer,
    share: Share,
    group: dist.ProcessGroup | None,
    trainable: bool,
) -> StaticKV | None:
    """What this process needs of a layer's context: its heads' part, and its slots where a group shares them.

    Keys are placed; trainable ones stay as they are stored. None where nothing is visible. Raises InputError.
    """
    own = share.own_static(asked, check_static(asked, static, len(static.k)))
    spec = share.own_layer(asked)
    placed = place_static(spec, own)
    if placed is None:
        return None
    prepared = prepare_static(placed, None if trainable else inverse_frequencies(spec))
    if group is None:
        return prepared
    share.check_group(group)
    return shard(prepared, group)
