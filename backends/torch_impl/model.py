"""A whole Gemma-3 in PyTorch: Hugging Face's model, with the attention of its global layers swapped while attached."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Gemma3ForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention

from lyra.backends.protocol import CapturedLayer
from lyra.spec.attention import AttentionSpec, StaticSpec
from lyra.spec.errors import InputError
from lyra.spec.inputs import StaticLayer, check_static
from lyra.spec.model import ModelSpec
from lyra.spec.split import HeadSplit

from .capture import capture
from .gemma3 import ATTENTION_KINDS, LyraGemma3Attention
from .generate import generate
from .loading import load_module
from .static import prepare_static
from .tokens import Tokens, check_tokens, token_positions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOGITS_AT_ONCE = 1 << 25
"""Log-probabilities are taken in pieces of about this many logits (128 MB in float32)."""


class TorchEngine:
    """A Gemma-3 in PyTorch. Implements `lyra.backends.protocol.Engine`; `module` is the Gemma3ForCausalLM itself."""

    def __init__(self, module: Gemma3ForCausalLM, spec: ModelSpec) -> None:
        kind = module.config._attn_implementation
        if kind not in ATTENTION_KINDS:
            raise InputError(f"attn_implementation is {kind!r}; expected one of {', '.join(ATTENTION_KINDS)}")
        if spec.attention.softcap is not None:
            raise InputError(
                f"attn_logit_softcapping is {spec.attention.softcap}; Hugging Face's Gemma-3 ignores it, so this model "
                f"would not follow its own spec"
            )
        self.module = module
        self.spec = spec
        self._originals: dict[int, Gemma3Attention] = {}

    @classmethod
    def load(cls, folder: str, *, dtype: str = "float32", device: str | None = None) -> TorchEngine:
        """The model of a folder with config.json and *.safetensors, on `device` (the CPU if None).

        Of a multimodal Gemma-3 the text model is taken. Raises SpecError for another architecture, InputError for
        an unknown dtype or a checkpoint in which weights are missing.
        """
        if dtype not in DTYPES:
            raise InputError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
        spec = ModelSpec.from_hf_config(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))
        module: Any = load_module(folder, DTYPES[dtype])
        return cls(module.to(device or "cpu").eval(), spec)

    @torch.inference_mode()
    def logits(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """float32 [B,T,V] for ids [B,T]; the logits at padding are finite and mean nothing. Raises InputError."""
        return self.module(**self._inputs(self._tokens(ids, mask))).logits.float().cpu().numpy()

    @torch.inference_mode()
    def log_probs(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """float32 [B,T-1]: log-probability of ids[:, 1:], each given all before it. Raises InputError."""
        tokens = self._tokens(ids, mask)
        hidden = self.module.model(**self._inputs(tokens)).last_hidden_state[:, :-1].flatten(0, 1)
        targets = tokens.ids[:, 1:].reshape(-1, 1)
        rows = max(1, LOGITS_AT_ONCE // self.spec.vocab_size)
        found = [
            torch.log_softmax(self._head(part), dim=-1).gather(1, target)
            for part, target in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
        return torch.cat(found).view(len(tokens.ids), -1).cpu().numpy()

    @torch.inference_mode()
    def generate(
        self,
        ids: np.ndarray,
        mask: np.ndarray | None = None,
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int] = (),
        on_token: Callable[[np.ndarray], None] | None = None,
    ) -> np.ndarray:
        """Greedy continuation of ids [B,T], int [B,N]. Padding must be on the left. Raises InputError."""
        tokens = self._tokens(ids, mask)
        if tokens.mask is not None and not tokens.mask[:, -1].all():
            raise InputError("generate: a row ends in padding; put the padding on the left")
        if max_new_tokens < 0:
            raise InputError(f"generate: max_new_tokens is {max_new_tokens}; expected 0 or more")
        return generate(self.module, tokens.ids, tokens.mask, max_new_tokens, stop_ids, on_token)

    @torch.inference_mode()
    def capture(
        self,
        ids: np.ndarray,
        layers: Sequence[int],
        *,
        chunk_size: int = 512,
        on_chunk: Callable[[int], None] | None = None,
    ) -> dict[int, CapturedLayer]:
        """K and V of `layers` for ids [1,S], k normed and unrotated. Raises InputError. Clause CAPTURE."""
        if self._originals:
            raise InputError(
                "capture: a context is attached, and contexts are captured by the plain model; detach first"
            )
        tokens = self._tokens(ids, None)
        if len(tokens.ids) != 1:
            raise InputError(f"capture: ids has {len(tokens.ids)} rows; a context is captured from one")
        if chunk_size < 1:
            raise InputError(f"capture: chunk_size is {chunk_size}; expected 1 or more")
        outside = [layer for layer in layers if not 0 <= layer < self.spec.num_hidden_layers]
        if outside:
            raise InputError(f"capture: there are no layers {outside}; the model has {self.spec.num_hidden_layers}")
        return capture(self.module, tokens.ids, layers, chunk_size, on_chunk)

    def attach(self, static: Mapping[int, StaticLayer], splits: Mapping[int, HeadSplit], mode: StaticSpec) -> None:
        """Give global layers their static K/V and head split; keys are rotated here, once. Replaces what was attached.

        A layer on which this has no effect (no Lyra heads, or an empty context in live mode "causal") keeps Hugging
        Face's own module (clause IDENTITY). Raises InputError, SpecError; then nothing has changed.
        """
        wrong = sorted(set(splits) - set(self.spec.global_layers))
        if wrong:
            raise InputError(
                f"attach: layers {wrong} are not global; the global layers are {list(self.spec.global_layers)}"
            )
        idle = sorted(layer for layer in static if layer not in splits or not splits[layer].lyra_q_heads)
        if idle:
            raise InputError(f"attach: layers {idle} have a context and no Lyra heads; give them a split")
        specs = {
            layer: self.spec.attention.replace(split=split, static=mode)
            for layer, split in splits.items()
            if split.lyra_q_heads
        }
        modules = {layer: self._swapped_in(layer, spec, static.get(layer)) for layer, spec in specs.items()}
        self.detach()
        for layer, module in modules.items():
            if module is not None:
                decoder_layer = self.module.model.layers[layer]
                self._originals[layer] = decoder_layer.self_attn
                decoder_layer.self_attn = module

    def detach(self) -> None:
        """Put Hugging Face's own modules back: bit for bit the model that was loaded."""
        for layer, original in self._originals.items():
            self.module.model.layers[layer].self_attn = original
        self._originals = {}

    def attention_weights(self, layer: int) -> dict[str, np.ndarray]:
        """Float32 copies of a layer's attention weights, in Hugging Face names and layout. Raises SpecError."""
        names = self.spec.layer(layer).weight_shapes()
        attention = self.module.model.layers[layer].self_attn
        return {
            name: attention.get_parameter(name).detach().to("cpu", torch.float32, copy=True).numpy() for name in names
        }

    def _swapped_in(self, layer: int, spec: AttentionSpec, static: StaticLayer | None) -> LyraGemma3Attention | None:
        original = self._originals.get(layer, self.module.model.layers[layer].self_attn)
        prepared = None if static is None else prepare_static(spec, check_static(spec, static, len(static.k)))
        if prepared is None and spec.static.live == "causal":
            return None
        return LyraGemma3Attention(original, spec, prepared)

    def _tokens(self, ids: np.ndarray, mask: np.ndarray | None) -> Tokens:
        return check_tokens(ids, mask, self.spec.vocab_size, self.module.device)

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.module.lm_head(hidden).float()
        cap = self.spec.final_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @staticmethod
    def _inputs(tokens: Tokens) -> dict[str, object]:
        positions = None if tokens.mask is None else token_positions(tokens.mask)
        return {
            "input_ids": tokens.ids,
            "attention_mask": tokens.mask,
            "position_ids": positions,
            "use_cache": False,
        }
