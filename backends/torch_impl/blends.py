"""One text behind one context, scored under blends of heads: many head splits in one pass, and gradients to the blends.

A blend b mixes a head's output with the context and its output without it, b·with + (1 − b)·without, as in DuoAttention
(Xiao et al. 2024, whose word for it is gate): 1 is a Lyra head, 0 a vanilla one, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lyra.spec.arguments import check_scored
from lyra.spec.attention import AttentionSpec
from lyra.spec.blends import SharedRows, check_blends, share_rows
from lyra.spec.inputs import StaticLayer, check_static
from lyra.spec.model import ModelSpec
from lyra.spec.split import HeadSplit

from .context_attention import ContextAttention
from .families import of
from .finite import locate
from .logits import logits, rows_at_once
from .rope import inverse_frequencies
from .static import place_static, prepare_static


class BlendedText:
    """Ids [1,T] behind a context, all heads of whose layers have a blend. Implements the protocol's `BlendedText`.

    What comes before the first of these layers is computed once, here; the model is left as it was after every call.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: ModelSpec,
        ids: torch.Tensor,
        scored: int,
        static: Mapping[int, StaticLayer],
    ) -> None:
        """The last `scored` tokens are scored. Raises InputError for ids, a number or a context that do not fit."""
        scored = check_scored(tuple(ids.shape), scored, len(static))
        self._model, self._ids, self._targets = model, ids, ids[0, -scored:]
        self._layers = sorted(static)
        self._softcap = spec.final_softcap
        self._shape = (len(self._layers), spec.num_attention_heads)
        every = spec.attention.replace(split=HeadSplit.all(spec))
        text: PreTrainedModel = model.model
        kind, layers = of(spec).attention, text.layers
        self._blended = {layer: _blended(kind, layers[layer].self_attn, every, static[layer]) for layer in self._layers}
        with torch.inference_mode(), _in_place(text, {self._layers[0]: (stop := _Stop())}, after=self._layers[0]):
            text(input_ids=ids, use_cache=False)
        assert stop.seen is not None
        self._start = stop.seen

    def nll(self, blends: np.ndarray) -> np.ndarray:
        """Mean NLL in nats of the scored tokens, float64 [C], under blends [C,L,Hq].

        Raises InputError, and NotFiniteError for NaN or infinity.
        """
        rows = share_rows(check_blends(blends, self._shape))
        with torch.inference_mode():
            hidden = self._hidden(rows, [torch.from_numpy(layer.blends) for layer in rows.layers])
            found = [self._nll(row, grad=False) for row in hidden]
        return self._finite(np.array([float(nll) for nll in found]))[rows.ends]

    def gradient(self, blends: np.ndarray) -> tuple[float, np.ndarray]:
        """The same under blends [L,Hq], and its gradient with respect to them, float64 [L,Hq].

        Raises what `nll` raises.
        """
        rows = share_rows(check_blends(blends, self._shape)[None])
        leaves = [torch.from_numpy(layer.blends).requires_grad_() for layer in rows.layers]
        with torch.enable_grad():
            nll = self._nll(self._hidden(rows, leaves)[0], grad=True)
        found = torch.autograd.grad(nll, leaves)
        return float(self._finite(np.array(float(nll.detach())))), self._finite(torch.cat(found).double().numpy())

    def _finite(self, values: np.ndarray) -> np.ndarray:
        """The values. Raises NotFiniteError where one of them is NaN or infinite."""
        if not np.isfinite(values).all():
            raise locate(self._model.model, self._ids, otherwise="the scores behind the context")
        return values

    def _hidden(self, rows: SharedRows, blends: list[torch.Tensor]) -> torch.Tensor:
        """What the model's head reads at the places before the scored tokens, [N,scored,E]."""
        text: PreTrainedModel = self._model.model
        branches: dict[int, nn.Module] = {}
        for layer, row, blend in zip(self._layers, rows.layers, blends, strict=True):
            attention = self._blended[layer]
            attention.blend = blend.to(self._start.device)
            branches[layer] = _Branch(text.layers[layer], attention, torch.from_numpy(row.parents))
        with _in_place(text, branches, before=self._layers[0]):
            hidden = text(inputs_embeds=self._start.clone(), use_cache=False).last_hidden_state
        return hidden[:, -1 - len(self._targets) : -1]

    def _nll(self, hidden: torch.Tensor, grad: bool) -> torch.Tensor:
        """Mean NLL of the targets after hidden [scored,E], float32; in pieces, whose logits are never kept."""
        step = rows_at_once(self._model.config.vocab_size)
        pieces = zip(hidden.split(step), self._targets.split(step), strict=True)
        if grad:
            sums = [checkpoint(self._sum_nll, *piece, use_reentrant=False) for piece in pieces]
        else:
            sums = [self._sum_nll(*piece) for piece in pieces]
        return torch.stack(sums).sum() / len(self._targets)

    def _sum_nll(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        scores = logits(self._model.lm_head, hidden, self._softcap)
        return nn.functional.cross_entropy(scores, targets, reduction="sum")


class _Branch(nn.Module):
    """A decoder layer with blended attention, whose rows come from those of the layer before."""

    def __init__(self, layer: nn.Module, attention: nn.Module, parents: torch.Tensor) -> None:
        super().__init__()
        self.layer, self.attention, self.parents = layer, attention, parents

    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """hidden_states [N,T,E] of the layer before -> those of this one's rows."""
        rows = hidden_states.index_select(0, self.parents.to(hidden_states.device))
        original, self.layer.self_attn = self.layer.self_attn, self.attention
        try:
            return self.layer(rows, **kwargs)
        finally:
            self.layer.self_attn = original


class _Pass(nn.Module):
    """Stands where a layer is left out."""

    def forward(self, hidden_states: torch.Tensor, **_: object) -> torch.Tensor:
        """hidden_states as they come."""
        return hidden_states


class _Stop(_Pass):
    """Keeps what reaches it."""

    seen: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, **_: object) -> torch.Tensor:
        """hidden_states as they come, and kept."""
        self.seen = hidden_states
        return hidden_states


def _blended(
    kind: type[ContextAttention], original: nn.Module, every: AttentionSpec, static: StaticLayer
) -> ContextAttention:
    attention = kind.around(original, every)
    placed = place_static(every, check_static(every, static, 1))
    attention.attend_to(None if placed is None else prepare_static(placed, inverse_frequencies(every)), every.static)
    return attention


@contextmanager
def _in_place(
    text: PreTrainedModel, modules: Mapping[int, nn.Module], before: int = 0, after: int | None = None
) -> Iterator[None]:
    """The model with other modules in the place of some layers, and none before or after two of them."""
    kept = list(text.layers)
    last = len(kept) if after is None else after
    try:
        for index in range(len(kept)):
            if index in modules:
                text.layers[index] = modules[index]
            elif index < before or index > last:
                text.layers[index] = _Pass()
        yield
    finally:
        for index, layer in enumerate(kept):
            text.layers[index] = layer
