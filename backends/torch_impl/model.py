"""A whole model in PyTorch: Hugging Face's, with the attention of its global layers swapped while attached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from lyra.backends.checkpoint import open_checkpoint
from lyra.backends.protocol import CapturedLayer, Sampling
from lyra.backends.sampling import check_sampling
from lyra.spec.arguments import check_capture, check_choice, check_generation, check_layers
from lyra.spec.attention import StaticSpec
from lyra.spec.errors import InputError
from lyra.spec.inputs import StaticLayer
from lyra.spec.model import ModelSpec
from lyra.spec.sequential import SequentialSpec
from lyra.spec.split import HeadSplit

from . import families
from .attentions import unpack
from .blends import BlendedText
from .capture import capture
from .device import device_named
from .finite import finite_rows, locate
from .generate import generate
from .injector import Injector, spec_now
from .loading import load_module
from .logits import logits, rows_at_once
from .tokens import Packed, Tokens, check_tokens, pack_left, token_positions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TorchEngine:
    """A model in PyTorch. Implements `lyra.backends.protocol.Engine`; `module` is Hugging Face's, with its head."""

    def __init__(self, module: PreTrainedModel, spec: ModelSpec) -> None:
        self.module = module
        self._spec = spec
        self.injector = Injector(module)

    @classmethod
    def load(cls, folder: str, *, dtype: str = "float32", device: str | None = None) -> TorchEngine:
        """The model of a folder with config.json and *.safetensors, on `device` (the CPU if None).

        Of a multimodal model the text model is taken. Raises InputError for an unknown dtype or device, and
        CheckpointError for a folder whose config or weights are not those of a model of a known family.
        """
        kind, place = DTYPES[check_choice("dtype", dtype, DTYPES)], device_named(device)
        checkpoint = open_checkpoint(Path(folder))
        module: Any = load_module(checkpoint, kind)
        return cls(module.to(place).eval(), checkpoint.spec)

    @property
    def spec(self) -> ModelSpec:
        """What the model does, with the vocabulary and the layers that it has now."""
        self._spec = spec_now(self._spec, self.module.model)
        return self._spec

    @torch.inference_mode()
    def logits(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """float32 [B,T,V] for ids [B,T]; the logits at padding are finite and mean nothing.

        Raises InputError, and NotFiniteError for NaN or infinity.
        """
        tokens = self._tokens(ids, mask)
        packed = pack_left(tokens)
        found = self.module(**self._inputs(packed)).logits.float()
        if packed.source is not None:
            found = found.take_along_dim(packed.source[:, :, None], dim=1)
        fine = finite_rows(found)
        if not bool((fine if tokens.mask is None else fine | (tokens.mask == 0)).all()):
            raise locate(self.module.model, *tokens)
        return found.cpu().numpy()

    @torch.inference_mode()
    def log_probs(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """float32 [B,T-1]: log-probability of ids[:, 1:], each given all before it.

        What is before a token is the last real one, whatever padding stands between. Raises InputError, and
        NotFiniteError for NaN or infinity.
        """
        tokens = self._tokens(ids, mask)
        packed = pack_left(tokens)
        hidden = self.module.model(**self._inputs(packed)).last_hidden_state
        if packed.source is None:
            hidden = hidden[:, :-1]
        else:
            hidden = hidden.take_along_dim((packed.source[:, 1:, None] - 1).clamp_min(0), dim=1)
        hidden, targets = hidden.flatten(0, 1), tokens.ids[:, 1:].reshape(-1, 1)
        rows, softcap = rows_at_once(self.spec.vocab_size), self.module.config.final_logit_softcapping
        found = [
            torch.log_softmax(logits(self.module.lm_head, part, softcap), dim=-1).gather(1, target)
            for part, target in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
        result = torch.cat(found).view(len(tokens.ids), -1)
        fine = torch.isfinite(result)
        if not bool((fine if tokens.mask is None else fine | (tokens.mask[:, 1:] == 0)).all()):
            raise locate(self.module.model, *tokens)
        return result.cpu().numpy()

    @torch.inference_mode()
    def generate(
        self,
        ids: np.ndarray,
        mask: np.ndarray | None = None,
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int] = (),
        on_token: Callable[[np.ndarray], None] | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> np.ndarray:
        """The continuation of ids [B,T], int [B,N]: the most likely one, or one drawn as `sampling` says.

        Padding must be on the left. Raises InputError, and NotFiniteError for NaN or infinity.
        """
        tokens = self._tokens(ids, mask)
        if tokens.mask is not None and not tokens.mask[:, -1].all():
            raise InputError("generate: a row ends in padding; put the padding on the left")
        asked = check_generation(tokens.ids.shape[1], max_new_tokens, stop_ids, seed, on_token)
        packed = pack_left(tokens)
        return generate(
            self.module,
            packed.ids,
            packed.mask,
            asked.max_new_tokens,
            asked.stop_ids,
            on_token,
            check_sampling(sampling),
            asked.seed,
        )

    @torch.inference_mode()
    def capture(
        self,
        ids: np.ndarray,
        layers: Sequence[int],
        *,
        chunk_size: int = 512,
        on_chunk: Callable[[int], None] | None = None,
    ) -> dict[int, CapturedLayer]:
        """K and V of `layers` for ids [1,S], k normed and unrotated. Clause CAPTURE.

        Raises InputError, and NotFiniteError for NaN or infinity.
        """
        if self.injector.enabled or self.injector.injected:
            raise InputError(
                "capture: a context is attached, and contexts are captured by the plain model; detach first"
            )
        tokens = self._tokens(ids, None)
        chosen, size = check_capture(len(tokens.ids), layers, self.spec.num_hidden_layers, chunk_size, on_chunk)
        return capture(self.module.model, tokens.ids, chosen, size, on_chunk)

    @torch.inference_mode()
    def attentions(
        self, ids: np.ndarray, mask: np.ndarray | None = None, *, layers: Sequence[int]
    ) -> dict[int, np.ndarray]:
        """By layer the softmax weights of its heads, float32 [B,Hq,T,S+T], context first. Raises InputError."""
        tokens = self._tokens(ids, mask)
        layers = check_layers("attentions", layers, self.spec.num_hidden_layers)
        packed, found = pack_left(tokens), dict[int, np.ndarray]()
        kind = families.of(self.spec).attention

        def watch(layer: int) -> Callable[..., None]:
            def look(module: Any, _: object, call: dict[str, Any]) -> None:
                if not isinstance(module, kind):
                    module = kind.around(module, self.spec.layer(layer))
                weights = module.look(**call)
                slots = weights.shape[3] - weights.shape[2]
                found[layer] = unpack(weights, packed, tokens, slots).cpu().numpy()

            return look

        attentions = {layer: self.module.model.layers[layer].self_attn for layer in layers}
        hooks = [
            module.register_forward_pre_hook(watch(layer), with_kwargs=True) for layer, module in attentions.items()
        ]
        try:
            self.module.model(**self._inputs(packed))
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def attach(self, static: Mapping[int, StaticLayer], splits: Mapping[int, HeadSplit], mode: StaticSpec) -> None:
        """Give global layers their static K/V and head split; keys are rotated here, once. Replaces what was attached.

        A layer on which this has no effect (no Lyra heads, or an empty context in live mode "causal") keeps Hugging
        Face's own module (clause IDENTITY). Raises InputError, SpecError; then nothing has changed.
        """
        self.injector.place(static, splits, mode, lazy=True)
        self.injector.withdraw()

    def inject(self, static: Mapping[int, StaticLayer], blocks: Mapping[int, SequentialSpec]) -> None:
        """Put a block behind the self-attention of each layer of `blocks`, with its context (clause SEQUENTIAL).

        The blocks use the layers' own weights. Replaces what was attached. Raises InputError; then nothing has changed.
        """
        self.injector.place_blocks(static, blocks)
        self.injector.disable()

    def set_gates(self, gates: Mapping[int, float]) -> None:
        """Change the gates of injected blocks, by layer. Raises InputError for a layer without one."""
        self.injector.set_gates(gates)

    def detach(self) -> None:
        """Put Hugging Face's own modules back: bit for bit the model that was loaded."""
        self.injector.withdraw()
        self.injector.disable()

    def blended(self, ids: np.ndarray, scored: int, static: Mapping[int, StaticLayer]) -> BlendedText:
        """Ids [1,T], whose last `scored` are scored, behind a context, under blends of heads. Raises InputError."""
        if self.injector.enabled or self.injector.injected:
            raise InputError("blended: a context is attached; blends take the plain model, so detach first")
        return BlendedText(self.module, self.spec, self._tokens(ids, None).ids, scored, static)

    gated = blended

    def attention_weights(self, layer: int) -> dict[str, np.ndarray]:
        """Float32 copies of a layer's attention weights, in Hugging Face names and layout. Raises SpecError."""
        return self.injector.attention_weights(layer)

    def _tokens(self, ids: np.ndarray, mask: np.ndarray | None) -> Tokens:
        tokens = check_tokens(ids, mask, self.spec.vocab_size, self.module.device)
        contexts = (layer.static for layer in self.injector.enabled.values())
        rows = {len(static.keys) for static in contexts if static is not None} - {1}
        if rows - {len(tokens.ids)}:
            raise InputError(f"ids has {len(tokens.ids)} rows; the attached context has {max(rows)}, one for each row")
        return tokens

    @staticmethod
    def _inputs(packed: Packed) -> dict[str, object]:
        positions = None if packed.mask is None else token_positions(packed.mask)
        return {
            "input_ids": packed.ids,
            "attention_mask": packed.mask,
            "position_ids": positions,
            "use_cache": False,
        }
