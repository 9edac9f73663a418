"""Which heads of which layers attend to a context, and whether the context is the model's own."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import overload

from . import families
from .arguments import check_indices, check_mapping, check_number, check_path, check_whole, shown
from .attention import AttentionSpec, StaticSpec
from .context import StaticContext
from .errors import ContextError, InputError, SpecError
from .fingerprint import Fingerprint
from .inputs import StaticLayer
from .model import ModelSpec, load_spec
from .sequential import SequentialSpec
from .split import HeadSplit

Split = HeadSplit | Mapping[int, HeadSplit]
"""One split for all layers, or one for each."""

SplitSource = Split | str | os.PathLike[str]
"""A split, or the TOML file or preset of a model that has one: what `lyra choose` writes."""

Gate = float | Mapping[int, float]
"""One gate for the blocks of all layers, or one for each."""


@overload
def read_split(spec: ModelSpec, source: SplitSource) -> Split: ...
@overload
def read_split(spec: ModelSpec, source: SplitSource | None) -> Split | None: ...
def read_split(spec: ModelSpec, source: SplitSource | None) -> Split | None:
    """A split as it is, or that of a file or a preset, which must have the global layers and heads of `spec`.

    Raises SpecError where there is no such file or preset, where it has no split, and where it is another model's;
    InputError for what is neither a split nor a name.
    """
    if isinstance(source, Mapping):
        for layer, split in source.items():
            check_whole("a layer of split", layer, 0)
            if not isinstance(split, HeadSplit):
                raise InputError(f"split of layer {layer} is {shown(split)}; expected a HeadSplit")
    elif source is not None and not isinstance(source, HeadSplit):
        check_path("split", source, "a HeadSplit, one for each layer, a file or a preset's name")
    if source is None or isinstance(source, HeadSplit | Mapping):
        return source
    found, name = load_spec(source), os.fspath(source)
    attention = found.attention if isinstance(found, ModelSpec) else found
    splits = {item.layer: item.split for item in found.splits} if isinstance(found, ModelSpec) else {}
    if not splits and attention.split is None:
        raise SpecError(f"{name} has no split; name a file that `lyra choose -o` wrote, or a preset with Lyra heads")
    heads = [(layer.num_attention_heads, layer.num_key_value_heads) for layer in (attention, spec)]
    if heads[0] != heads[1]:
        raise SpecError(f"{name} splits layers of {heads[0]} query and KV heads; {spec.name} has {heads[1]}")
    outside = [layer for layer in splits if layer not in spec.global_layers]
    if outside:
        raise SpecError(f"{name} splits layers {outside}; the global layers of {spec.name} are {spec.global_layers}")
    if splits or attention.split is None:
        return splits
    return attention.split


def heads_read(spec: ModelSpec, split: SplitSource) -> dict[int, tuple[int, ...]]:
    """The KV heads that a split's Lyra heads read, by layer: what a context has to hold (clause SPLIT-5).

    Raises SpecError for a split that does not fit, and for one without Lyra heads.
    """
    bound = spec.with_split(read_split(spec, split))
    heads = {layer: bound.layer(layer).lyra_kv_heads for layer in bound.global_layers}
    read = {layer: own for layer, own in heads.items() if own}
    if not read:
        raise SpecError("the split has no Lyra heads, so there is nothing that a context has to hold")
    return read


def splits_by_layer(spec: ModelSpec, context: StaticContext, split: SplitSource | None) -> dict[int, HeadSplit]:
    """The split of every layer of `context`, bound to `spec`.

    None means the heads that read what the context holds, or the last half of them where it holds all. Raises SpecError
    for a split that does not fit.
    """
    split = read_split(spec, split)
    if split is None:
        split = {layer: _of_held(spec, heads) for layer, heads in context.kv_heads.items()}
    elif isinstance(split, HeadSplit):
        split = dict.fromkeys(context.layers, split)
    return {item.layer: item.split for item in spec.with_split(split).splits}


def specs_by_layer(
    spec: ModelSpec, static: Collection[int], splits: Mapping[int, HeadSplit], mode: StaticSpec
) -> dict[int, AttentionSpec]:
    """The spec of every layer that has Lyra heads; `static` are the layers that have a context.

    Raises InputError for a split or a context on a layer that can have none.
    """
    static = check_indices("static", tuple(static) if isinstance(static, Mapping) else static)
    wrong = [layer for layer in check_mapping("splits", splits) if layer not in spec.global_layers]
    if wrong:
        raise InputError(
            f"attach: layers {shown(wrong)} are not global; the global layers are {list(spec.global_layers)}"
        )
    idle = sorted(layer for layer in static if layer not in splits or not splits[layer].lyra_q_heads)
    if idle:
        raise InputError(f"attach: layers {idle} have a context and no Lyra heads; give them a split")
    return {
        layer: spec.attention.replace(split=split, static=mode) for layer, split in splits.items() if split.lyra_q_heads
    }


def chosen_layers(spec: ModelSpec, layers: Iterable[int] | None) -> list[int]:
    """Global layers, ascending, each once; all of them for None. Raises InputError for others. Clause SLIDING."""
    known = spec.global_layers
    chosen = sorted(set(known if layers is None else check_indices("layers", layers)))
    wrong = [layer for layer in chosen if layer not in known]
    if wrong:
        raise InputError(f"layers {wrong} are not global; the global layers are {list(known)} (clause SLIDING)")
    return chosen


def chosen_heads(
    spec: ModelSpec, layers: Iterable[int] | None, kv_heads: Iterable[int] | Mapping[int, Iterable[int]] | None
) -> dict[int, tuple[int, ...]]:
    """The KV heads that a capture keeps, by global layer, ascending: all where nothing is said. Raises InputError."""
    by_layer = kv_heads if isinstance(kv_heads, Mapping) else None
    chosen = chosen_layers(spec, list(by_layer) if layers is None and by_layer is not None else layers)
    every = range(spec.num_key_value_heads)
    given = by_layer or dict.fromkeys(chosen, every if kv_heads is None else check_indices("kv_heads", kv_heads))
    outside = sorted(set(given) - set(chosen))
    if outside:
        raise InputError(f"kv_heads names layers {outside}; those that are captured are {chosen}")
    found = {layer: tuple(sorted(set(check_indices("kv_heads", given[layer])))) for layer in sorted(given)}
    wrong = sorted({head for heads in found.values() for head in heads if head not in every})
    if wrong:
        raise InputError(f"kv_heads are {wrong}; the layers have KV heads 0 to {every[-1]}")
    if not found or not all(found.values()):
        raise InputError("layers and kv_heads name nothing to keep; give at least one layer, and one KV head for each")
    return found


class StaticLayers(Mapping[int, StaticLayer]):
    """What layers get of a context, by layer, each made when it is asked for: a context that is stored in fewer bits
    is never in memory as float32 as a whole.
    """

    def __init__(self, context: StaticContext, kv_heads: Mapping[int, tuple[int, ...]]) -> None:
        """The KV heads of every layer. Raises ContextError where the context lacks a layer or a head."""
        for layer, heads in kv_heads.items():
            context.check_holds(layer, heads)
        self._context, self._kv_heads = context, kv_heads

    def __getitem__(self, layer: int) -> StaticLayer:
        return self._context.static_layer(layer, self._kv_heads[layer])

    def __iter__(self) -> Iterator[int]:
        return iter(self._kv_heads)

    def __len__(self) -> int:
        return len(self._kv_heads)


def static_layers(context: StaticContext, splits: Mapping[int, HeadSplit]) -> StaticLayers:
    """What the layers with Lyra heads get of a context. Raises ContextError where it lacks a layer or a head."""
    return StaticLayers(context, {layer: split.lyra_kv_heads for layer, split in splits.items() if split.lyra_q_heads})


def blocks_by_layer(
    spec: ModelSpec,
    kv_heads: Mapping[int, tuple[int, ...]],
    split: SplitSource | None,
    static: StaticSpec,
    gate: Gate,
    residual: bool,
) -> dict[int, SequentialSpec]:
    """The injected block of every layer of a context, whose KV heads by layer are `kv_heads` (clause SEQUENTIAL).

    `split` says which heads of a block read the context; None means those that read what it holds. A layer whose split
    names none gets no block. Raises SpecError for a split that does not fit, and for gates of other layers.
    """
    split = read_split(spec, split)
    if split is None:
        split = {layer: HeadSplit.from_kv_heads(spec, heads) for layer, heads in kv_heads.items()}
    elif isinstance(split, HeadSplit):
        split = dict.fromkeys(kv_heads, split)
    splits = {item.layer: item.split for item in spec.with_split(split).splits if item.split.lyra_q_heads}
    gates = gates_by_layer(gate, splits)
    return {
        layer: SequentialSpec(
            attention=spec.attention.replace(split=heads, static=static),
            residual=residual,
            gate=gates[layer],
            **families.of(spec).block_fields(spec),
        )
        for layer, heads in splits.items()
    }


def block_contexts(context: StaticContext, blocks: Mapping[int, SequentialSpec]) -> StaticLayers:
    """What each block gets of a context. Raises ContextError where it lacks a layer or a head."""
    return StaticLayers(context, {layer: block.attention.lyra_kv_heads for layer, block in blocks.items()})


def gates_by_layer(gate: Gate, layers: Iterable[int]) -> dict[int, float]:
    """The gate of each layer's block.

    Raises SpecError where `gate` names other layers than these, InputError where a gate is no finite number.
    """
    layers = list(layers)
    if not isinstance(gate, Mapping):
        return dict.fromkeys(layers, check_number("gate", gate))
    if set(gate) != set(layers):
        raise SpecError(f"gate names layers {shown(list(gate))}; the layers with a block are {sorted(layers)}")
    return {layer: check_number(f"gate of layer {layer}", gate[layer]) for layer in layers}


def check_gates_of(gates: Mapping[int, float], blocks: Iterable[int]) -> dict[int, float]:
    """New gates of some of the layers that have a block. Raises InputError."""
    known = sorted(blocks)
    wrong = [layer for layer in check_mapping("gates", gates) if layer not in known]
    if wrong:
        raise InputError(f"gate: layers {shown(wrong)} have no block; those with one are {known}")
    return {layer: check_number(f"gate of layer {layer}", gate) for layer, gate in gates.items()}


def check_origin(context: StaticContext, own: Fingerprint) -> None:
    """Refuse a context of another model, spelling out the difference. Raises ContextError. Clause FINGERPRINT-2."""
    found = context.fingerprint.differences(own)
    if found:
        raise ContextError(
            f"the context comes from {context.fingerprint.model!r} and does not fit {own.model!r}: "
            f"{'; '.join(found)}. Capture it again with this model, or attach it with override=True"
        )


def _of_held(spec: ModelSpec, held: tuple[int, ...]) -> HeadSplit:
    return HeadSplit.half(spec) if len(held) == spec.num_key_value_heads else HeadSplit.from_kv_heads(spec, held)
