"""Which heads of which layers attend to a context, and whether the context is the model's own."""

from __future__ import annotations

from collections.abc import Mapping

from .context import StaticContext
from .errors import ContextError
from .fingerprint import Fingerprint
from .inputs import StaticLayer
from .model import ModelSpec
from .split import HeadSplit

Split = HeadSplit | Mapping[int, HeadSplit]
"""One split for all layers, or one for each."""


def splits_by_layer(spec: ModelSpec, context: StaticContext, split: Split | None) -> dict[int, HeadSplit]:
    """The split of every layer of `context`, bound to `spec`.

    None means the heads that read what the context holds, or the last half of them where it holds all. Raises SpecError
    for a split that does not fit.
    """
    if split is None:
        split = {layer: _of_held(spec, heads) for layer, heads in context.kv_heads.items()}
    elif isinstance(split, HeadSplit):
        split = dict.fromkeys(context.layers, split)
    return {item.layer: item.split for item in spec.with_split(split).splits}


def static_layers(context: StaticContext, splits: Mapping[int, HeadSplit]) -> dict[int, StaticLayer]:
    """What the layers with Lyra heads get of a context. Raises ContextError where it lacks a layer or a head."""
    return {layer: context.static_layer(layer, one.lyra_kv_heads) for layer, one in splits.items() if one.lyra_q_heads}


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
