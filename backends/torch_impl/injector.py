"""Injecting: a loaded model's attention is swapped for Lyra's, or gets blocks behind it, and is given back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from lyra.backends.protocol import CapturedLayer
from lyra.spec import families as spec_families
from lyra.spec.arguments import check_capture, check_flag, check_path
from lyra.spec.attaching import (
    SplitSource,
    check_origin,
    chosen_layers,
    read_split,
    specs_by_layer,
    splits_by_layer,
    static_layers,
)
from lyra.spec.attention import Live, Positions, StaticSpec
from lyra.spec.context import ContextLayer, StaticContext
from lyra.spec.errors import InputError
from lyra.spec.fingerprint import Fingerprint, hash_weights
from lyra.spec.inputs import StaticLayer
from lyra.spec.model import ModelSpec
from lyra.spec.split import HeadSplit

from . import families
from .attention_kinds import check_kind
from .block_injector import BlockInjector
from .capture import capture
from .external import from_cache
from .live_rope import check_rope
from .offload import at_hand, device_of
from .tensor_parallel import prepare_own, share_of, whole
from .tokens import check_tokens
from .tuning import tuned_context


class Injector(BlockInjector):
    """Gives the global layers of a model a head split and a static context, and takes them away again.

    `enable` and `disable` do it in parallel, within the layers' own attention; `inject` and `withdraw` in sequence,
    with a block behind it (clause SEQUENTIAL).

    `model` is any PyTorch module with one decoder of a known family in it: Gemma3ForCausalLM, say, or
    Gemma3ForConditionalGeneration, Gemma3Model, Gemma3TextModel itself, a wrapper of one of them. All that there is to
    know stands in the model, so several injectors of one model do not contradict each other.

        with GemmaInjector(model).enable("book.safetensors"):
            model.generate(...)

    Raises InputError for a model that is no such thing, whose attention implementation is not "sdpa" or "eager", or
    whose config has a softcap of scores where Hugging Face's model of the family ignores it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.text = families.text_model(model)
        self.family = families.of_text(self.text)
        name = Path(self.text.config.name_or_path)
        self._spec = ModelSpec.from_hf_config(self.text.config.to_dict(), name.name if name.is_dir() else str(name))
        check_kind(self.text.config._attn_implementation)
        known = spec_families.of(self._spec)
        if self._spec.attention.softcap is not None and not known.softcap:
            raise InputError(
                f"attn_logit_softcapping is {self._spec.attention.softcap}; Hugging Face's {known.title} ignores it, "
                f"so this model would not follow its own spec"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.withdraw()
        self.disable()

    @property
    def spec(self) -> ModelSpec:
        """What the model does, with the vocabulary and the layers that it has now."""
        self._spec = spec_now(self._spec, self.text)
        return self._spec

    @property
    def enabled(self) -> dict[int, Any]:
        """The layers that have Lyra's attention now; empty where the model is Hugging Face's."""
        found = enumerate(layer.self_attn for layer in self.text.layers)
        return {number: module for number, module in found if isinstance(module, self.family.attention)}

    def enable(
        self,
        context: StaticContext | str | os.PathLike[str] | None = None,
        split: SplitSource | None = None,
        *,
        live: Live = "causal",
        positions: Positions = "continue",
        override: bool = False,
        group: ProcessGroup | None = None,
        trainable: bool = False,
    ) -> Self:
        """Put the family's attention with Lyra heads into the layers of `context`; what was enabled before is replaced.

        `context` is a StaticContext or its file; without one all global layers get the split and nothing else, so that
        the model gives what it gave and the Lyra heads' projections can be tuned. `split` is one HeadSplit or one for
        each layer, or the file or preset of a model that has them; by default the heads that read what the context
        holds, or the last half of them. A layer that has the same split already keeps its module, and with it whatever
        was tuned or wrapped there.

        In a model that transformers has spread over processes by tensor parallelism every process calls this with the
        same arguments. `group` spreads the context's slots over the processes of a group, all of which run the same
        model on the same tokens: see `sharding`.

        With `trainable` the context's visible keys and values become parameters of the model, in float32; the keys are
        tuned as a context stores them, unrotated. `context()` gives them back. No state dict holds them.

        The key and value projections that are tuned meanwhile are the model's own rows: `disable` leaves them tuned.
        To get the former ones back, tune an adapter (LoRA) instead, or save them first.

        Raises ContextError for a context of another model, unless `override`, and for one without the layers or heads
        of the split; SpecError for a split that does not fit; InputError where an adapter stands in the way of a new
        split. A refusal changes nothing.
        """
        mode = StaticSpec(live=live, positions=positions)
        check_flag("override", override)
        check_flag("trainable", trainable)
        if context is None:
            chosen = HeadSplit.half(self.spec) if split is None else read_split(self.spec, split)
            by_layer = chosen if isinstance(chosen, Mapping) else dict.fromkeys(self.spec.global_layers, chosen)
            self.place({}, by_layer, mode)
            return self
        if not isinstance(context, StaticContext):
            context = StaticContext.load(check_path("context", context, "a StaticContext or the path of its file"))
        if not override:
            check_origin(context, self.fingerprint(set(context.layers) & set(self.spec.global_layers)))
        by_layer = splits_by_layer(self.spec, context, split)
        self.place(static_layers(context, by_layer), by_layer, mode, group=group, trainable=trainable)
        for module in self.enabled.values():
            module.given = context
        return self

    def context(self) -> StaticContext:
        """The context that is enabled, with the keys and values that it has now.

        Where those are `trainable` it is no longer the context of a text, and holds no tokens. Raises InputError where
        none is enabled, ContextError where tuning has led to NaN or infinity.
        """
        modules = self.enabled
        given = next((module.given for module in modules.values()), None)
        if given is None:
            raise InputError("the model has no context enabled; call enable(context) first")
        return tuned_context(given, modules)

    def disable(self) -> None:
        """Put Hugging Face's own modules back: the very same ones, with the same weights, bit for bit.

        Projections that were tuned while enabled stay tuned. Raises InputError where one has been wrapped, as for LoRA
        (merge or unload the adapter first); then nothing has changed.
        """
        for number, original in {number: module.to_original() for number, module in self.enabled.items()}.items():
            self.text.layers[number].self_attn = original

    def place(
        self,
        static: Mapping[int, StaticLayer],
        splits: Mapping[int, HeadSplit],
        mode: StaticSpec,
        *,
        lazy: bool = False,
        group: ProcessGroup | None = None,
        trainable: bool = False,
    ) -> None:
        """`enable` with the static K/V and the split of each layer; keys are rotated here, once.

        A layer without Lyra heads keeps Hugging Face's module; with `lazy` so does one on which this would have no
        effect, having no visible context and live mode "causal" (clause IDENTITY). Raises InputError, SpecError; then
        nothing has changed.
        """
        if static:
            check_rope(self.text, self.spec)
        asked = specs_by_layer(self.spec, static, splits, mode)
        shares = {layer: share_of(self.text.layers[layer].self_attn) for layer in asked}
        own = {layer: shares[layer].own_layer(spec) for layer, spec in asked.items()}
        specs = {layer: spec for layer, spec in own.items() if spec.lyra_q_heads}
        if trainable and (group is not None or any(share.ranks > 1 for share in shares.values())):
            raise InputError("trainable: a context is tuned in one piece; leave out the group, and tensor parallelism")
        prepared = {
            layer: prepare_own(asked[layer], static[layer], shares[layer], group, trainable)
            if layer in static
            else None
            for layer in specs
        }
        if lazy and mode.sees.earlier and mode.sees.own:
            specs = {layer: spec for layer, spec in specs.items() if prepared[layer] is not None}
        before = self.enabled
        kept = {layer for layer, spec in specs.items() if layer in before and before[layer].spec.split == spec.split}
        originals = {layer: module.to_original() for layer, module in before.items() if layer not in kept}
        for layer, original in originals.items():
            self.text.layers[layer].self_attn = original
        for layer, spec in specs.items():
            if layer not in kept:
                decoder_layer = self.text.layers[layer]
                decoder_layer.self_attn = self.family.attention.around(decoder_layer.self_attn, spec)
            mask = static[layer].mask if layer in static else None
            self.text.layers[layer].self_attn.attend_to(prepared[layer], mode, trainable=trainable, mask=mask)

    def capture(
        self,
        ids: np.ndarray,
        *,
        layers: Iterable[int] | None = None,
        chunk_size: int = 512,
        on_chunk: Callable[[int], None] | None = None,
    ) -> StaticContext:
        """The context of a text, ids [1,S], BOS included: all KV heads of `layers`, by default the global ones.

        `on_chunk` is called with the number of tokens done. Raises InputError while something is enabled or injected:
        contexts are captured by the unmodified model (clause CAPTURE).
        """
        chosen = chosen_layers(self.spec, layers)
        tokens = check_tokens(ids, None, self.spec.vocab_size, device_of(self.text.embed_tokens))
        _, size = check_capture(len(tokens.ids), chosen, self.spec.num_hidden_layers, chunk_size, on_chunk)
        if self.enabled or self.injected:
            raise InputError(
                "capture: Lyra is in the model, and contexts are captured by the plain one; take it out first"
            )
        self._check_in_one_piece("capture: a context", chosen)
        with torch.inference_mode():
            found = capture(self.text, tokens.ids, chosen, size, on_chunk)
        positions = np.arange(tokens.ids.shape[1])[None]
        return self._context(found, np.ones(positions.shape, dtype=bool), positions, tokens.ids.cpu().numpy())

    def context_of(
        self, cache: Cache, *, layers: Iterable[int] | None = None, mask: np.ndarray | None = None
    ) -> StaticContext:
        """The context that a transformers Cache holds, which this model has filled; one row for each of its rows.

        mask [B,S] bool is that of the tokens in the cache, False at padding. Keys, which a cache holds rotated, are
        turned back (clause STORED). Raises InputError for a cache that is not whole, with the reason.
        """
        check_rope(self.text, self.spec)
        chosen = chosen_layers(self.spec, layers)
        self._check_in_one_piece("context_of: a context", chosen)
        return self._context(*from_cache(self.text, self.spec, cache, chosen, mask), None)

    def fingerprint(self, layers: Iterable[int]) -> Fingerprint:
        """What a context of some global layers of this model carries, but for the tokenizer (clause FINGERPRINT)."""
        return Fingerprint.of(self.spec, {layer: hash_weights(self.attention_weights(layer)) for layer in layers})

    def attention_weights(self, layer: int) -> dict[str, np.ndarray]:
        """Float32 copies of a layer's attention weights, in Hugging Face names and layout. Raises SpecError."""
        names = self.spec.layer(layer).weight_shapes()
        attention = self.text.layers[layer].self_attn
        found = attention.weights if isinstance(attention, self.family.attention) else attention.get_parameter
        with at_hand(attention):
            return {name: whole(found(name)).detach().to("cpu", torch.float32, copy=True).numpy() for name in names}

    def _context(
        self, found: Mapping[int, CapturedLayer], mask: np.ndarray, positions: np.ndarray, tokens: np.ndarray | None
    ) -> StaticContext:
        heads = tuple(range(self.spec.num_key_value_heads))
        layers = {layer: ContextLayer(heads, pair.k, pair.v) for layer, pair in found.items()}
        return StaticContext(layers, mask, positions, self.fingerprint(layers), tokens)


def spec_now(spec: ModelSpec, text: PreTrainedModel) -> ModelSpec:
    """The spec of a model whose embeddings have been resized since, or whose last layers have been cut off."""
    pattern = spec.pattern[: len(text.layers[: text.config.num_hidden_layers])]
    now = {"vocab_size": text.embed_tokens.get_parameter("weight").shape[0], "pattern": pattern}
    return spec if (spec.vocab_size, spec.pattern) == tuple(now.values()) else spec.replace(**now)


GemmaInjector = Injector
"""The same by the name that users of Gemma-3 know it by."""
