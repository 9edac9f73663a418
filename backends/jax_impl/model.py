"""A whole Gemma-3 in JAX, behind the protocol: token ids in, NumPy out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from lyra.backends.checkpoint import open_checkpoint
from lyra.backends.protocol import CapturedLayer, Sampling
from lyra.backends.sampling import check_sampling
from lyra.spec.arguments import check_capture, check_choice, check_generation, check_layers, shown
from lyra.spec.attaching import check_gates_of, specs_by_layer
from lyra.spec.attention import AttentionSpec, StaticSpec
from lyra.spec.errors import InputError
from lyra.spec.inputs import StaticLayer, check_static
from lyra.spec.model import ModelSpec
from lyra.spec.sequential import SequentialSpec
from lyra.spec.split import HeadSplit

from . import forward
from .attentions import look, unpack
from .blends import BlendedText
from .capture import capture
from .decoder import Decoder
from .device import device_named
from .dtype import DTYPES
from .finite import locate
from .forward import Graph, split_module
from .generate import generate
from .heads import lyra_heads
from .injected import Injected, check_blocks, make_block, with_gate
from .logits import filled, pieces
from .modules import Attached
from .params import load_model
from .rope import inverse_frequencies
from .saving import save_model
from .shapes import pad_context
from .sharding import CONTEXT
from .static import StaticKV, place_static, prepare_static
from .tokens import Tokens, check_tokens, pack_left
from .visibility import live_rule


class JaxEngine:
    """A Gemma-3 in JAX. Implements `lyra.backends.protocol.Engine`; `module` is the nnx module.

    Changes made to the module's parameters show in the next call.
    """

    def __init__(self, module: Decoder, source: Path) -> None:
        """`source` is the folder that the module comes from."""
        self.module, self.source = module, source
        self._attached: dict[int, Attached | Injected] = {}
        self._slots: dict[int, int] = {}  # of the context in each layer whose heads read one, before padding

    @property
    def spec(self) -> ModelSpec:
        """What the model does, with the vocabulary that it has now."""
        spec, size = self.module.spec, self.module.embed_tokens.weight.shape[0]
        return spec if spec.vocab_size == size else spec.replace(vocab_size=size)

    @classmethod
    def load(
        cls, folder: str, *, dtype: str = "float32", device: str | None = None, mesh: Mesh | None = None
    ) -> JaxEngine:
        """The model of a folder with config.json and *.safetensors, on `device` ("cpu", "gpu" ...; JAX's default).

        A `mesh` with the axes "heads", "context" or both spreads KV heads and static slots over its devices. Of a
        multimodal Gemma-3 the text model is taken. Raises InputError for an unknown dtype or device and for a mesh that
        does not fit, and CheckpointError for a folder whose config or weights are not those of a Gemma-3.
        """
        if mesh is not None and not isinstance(mesh, Mesh):
            raise InputError(f"mesh is {shown(mesh)}; expected a jax.sharding.Mesh")
        if mesh is not None and device is not None:
            raise InputError(f"device is {device!r} and there is a mesh, which names its own devices; give one of them")
        kind, place = DTYPES[check_choice("dtype", dtype, DTYPES)], device_named(device)
        return cls(load_model(open_checkpoint(Path(folder)), kind, place, mesh), Path(folder))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """The model with its parameters as they are now, in Hugging Face's layout, which every backend loads.

        An attached context is not part of it. Raises InputError for a folder that is there and not empty.
        """
        save_model(self.module, self.source, Path(folder))

    def logits(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """float32 [B,T,V] for ids [B,T]; the logits at padding are finite and mean nothing.

        Raises InputError, and NotFiniteError for NaN or infinity.
        """
        tokens, graph = self._tokens(ids, mask), split_module(self.module)
        hidden = self._hidden(graph, tokens).reshape(tokens.ids.size, self.spec.hidden_size)
        result = np.empty((len(hidden), self.spec.vocab_size), np.float32)
        for rows in pieces(len(hidden), self.spec.vocab_size):
            result[rows] = forward.logits(graph, filled(hidden[rows]))[: len(result[rows])]
            if not (np.isfinite(result[rows]).all(axis=-1) | ~tokens.mask.ravel()[rows]).all():
                raise locate(graph, tokens, self._attached)
        return result.reshape(*tokens.ids.shape, -1)

    def log_probs(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """float32 [B,T-1]: log-probability of ids[:, 1:], each given all before it.

        What is before a token is the last real one, whatever padding stands between. Raises InputError, and
        NotFiniteError for NaN or infinity.
        """
        tokens, graph = self._tokens(ids, mask), split_module(self.module)
        batch, length = tokens.ids.shape
        hidden = self._hidden(graph, tokens, before=1)[:, 1:].reshape(batch * (length - 1), self.spec.hidden_size)
        targets = tokens.ids[:, 1:].ravel()
        result = np.empty(len(targets), np.float32)
        for rows in pieces(len(targets), self.spec.vocab_size):
            scores = forward.log_probs(graph, filled(hidden[rows]), filled(targets[rows]))
            result[rows] = scores[: len(result[rows])]
        found = result.reshape(batch, length - 1)
        if not (np.isfinite(found) | ~tokens.mask[:, 1:]).all():
            raise locate(graph, tokens, self._attached)
        return found

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
        if not tokens.mask[:, -1].all():
            raise InputError("generate: a row ends in padding; put the padding on the left")
        asked = check_generation(tokens.ids.shape[1], max_new_tokens, stop_ids, seed, on_token)
        return generate(
            split_module(self.module),
            tokens,
            self._attached,
            asked.max_new_tokens,
            asked.stop_ids,
            on_token,
            check_sampling(sampling),
            asked.seed,
        )

    def capture(
        self,
        ids: np.ndarray,
        layers: Sequence[int],
        *,
        chunk_size: int = 512,
        on_chunk: Callable[[int], None] | None = None,
    ) -> dict[int, CapturedLayer]:
        """K and V of `layers` for ids [1,S], all KV heads, k normed, unrotated. Clause CAPTURE.

        Raises InputError, and NotFiniteError for NaN or infinity.
        """
        if self._attached:
            raise InputError("capture: a context is attached; a context is captured by the unmodified model, so detach")
        tokens = self._tokens(ids, None)
        chosen, size = check_capture(len(tokens.ids), layers, self.spec.num_hidden_layers, chunk_size, on_chunk)
        return capture(split_module(self.module), tokens.ids, chosen, size, on_chunk)

    def attentions(
        self, ids: np.ndarray, mask: np.ndarray | None = None, *, layers: Sequence[int]
    ) -> dict[int, np.ndarray]:
        """By layer the softmax weights of its heads, float32 [B,Hq,T,S+T], context first. Raises InputError."""
        tokens = self._tokens(ids, mask)
        layers = check_layers("attentions", layers, self.spec.num_hidden_layers)
        packed = pack_left(tokens)
        found = look(split_module(self.module), packed, self._attached, layers)
        return {layer: unpack(weights, packed, tokens, self._slots.get(layer, 0)) for layer, weights in found.items()}

    def attach(self, static: Mapping[int, StaticLayer], splits: Mapping[int, HeadSplit], mode: StaticSpec) -> None:
        """Give global layers their static K/V and head split; keys are rotated here, once. Replaces what was attached.

        A layer on which this has no effect (no Lyra heads, or an empty context in live mode "causal") stays an ordinary
        one (clause IDENTITY). Raises InputError, SpecError; then nothing has changed.
        """
        specs = specs_by_layer(self.spec, static, splits, mode)
        attached = {layer: self._prepared(spec, static.get(layer)) for layer, spec in specs.items()}
        self._attached = {layer: placed for layer, placed in attached.items() if placed is not None}
        read = {
            layer: placed.static
            for layer, placed in attached.items()
            if placed is not None and placed.static is not None
        }
        self._slots = {layer: static[layer].mask.shape[1] for layer in read}

    def inject(self, static: Mapping[int, StaticLayer], blocks: Mapping[int, SequentialSpec]) -> None:
        """Put a block behind the self-attention of each layer of `blocks`, with its context (clause SEQUENTIAL).

        The blocks use the layers' own weights. Replaces what was attached. Raises InputError; then nothing has changed.
        """
        check_blocks(self.spec, static, blocks)
        made = {
            layer: make_block(block, self._static(block.attention, static.get(layer)))
            for layer, block in blocks.items()
        }
        self._attached, self._slots = dict(jax.device_put(made)), {}

    def set_gates(self, gates: Mapping[int, float]) -> None:
        """Change the gates of injected blocks, by layer. Raises InputError for a layer without one."""
        blocks = {layer: block for layer, block in self._attached.items() if isinstance(block, Injected)}
        checked = check_gates_of(gates, blocks)
        self._attached |= {layer: with_gate(blocks[layer], gate) for layer, gate in checked.items()}

    def detach(self) -> None:
        """Back to the unmodified model, bit for bit."""
        self._attached, self._slots = {}, {}

    def blended(self, ids: np.ndarray, scored: int, static: Mapping[int, StaticLayer]) -> BlendedText:
        """Ids [1,T], whose last `scored` are scored, behind a context, under blends of heads. Raises InputError."""
        if self._attached:
            raise InputError("blended: a context is attached; blends take the plain model, so detach first")
        return BlendedText(split_module(self.module), self._tokens(ids, None), scored, static)

    gated = blended

    def attention_weights(self, layer: int) -> dict[str, np.ndarray]:
        """Float32 copies of a layer's attention weights, in Hugging Face names and layout. Raises SpecError."""
        self.spec.layer(layer)
        weights = self.module.layers[layer].self_attn.weights()
        return {name: np.array(value, np.float32) for name, value in weights.items()}

    def _prepared(self, spec: AttentionSpec, static: StaticLayer | None) -> Attached | None:
        kv = self._static(spec, static)
        rule = live_rule(spec)
        if kv is None and rule is None:
            return None
        return Attached(*jax.device_put((kv, rule, lyra_heads(spec) if kv is not None else None)))

    def _static(self, spec: AttentionSpec, static: StaticLayer | None) -> StaticKV | None:
        """A context on the devices, rotated; None for an empty one."""
        if static is None:
            return None
        sharding, dtype = self.module.sharding, split_module(self.module).dtype
        placed = place_static(spec, check_static(spec, static, len(static.k)), dtype)
        if placed is None:
            return None
        return prepare_static(pad_context(placed, sharding.size(CONTEXT)), inverse_frequencies(spec), sharding=sharding)

    def _tokens(self, ids: np.ndarray, mask: np.ndarray | None) -> Tokens:
        tokens = check_tokens(ids, mask, self.spec.vocab_size)
        rows = {len(placed.static.values) for placed in self._attached.values() if placed.static is not None} - {1}
        if rows - {len(tokens.ids)}:
            raise InputError(f"ids has {len(tokens.ids)} rows; the attached context has {max(rows)}, one for each row")
        return tokens

    def _hidden(self, graph: Graph, tokens: Tokens, before: int = 0) -> np.ndarray:
        """The decoder's output so many tokens before every one, in the caller's order: [B,T,E]."""
        packed = pack_left(tokens)
        parts = [np.asarray(hidden) for hidden, _ in forward.prefill_all(graph, packed, self._attached)]
        whole = np.concatenate(parts, axis=1)
        return np.take_along_axis(whole, np.maximum(packed.source - before, 0)[:, :, None], axis=1)
