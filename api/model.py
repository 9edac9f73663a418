"""Model: a language model with or without a static context, whatever framework runs it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, overload

import numpy as np
from tokenizers import Tokenizer

from lyra.backends.protocol import Engine, SequentialEngine
from lyra.spec.arguments import (
    check_callable,
    check_chunk_size,
    check_flag,
    check_ids,
    check_new_tokens,
    check_path,
    shown,
)
from lyra.spec.attaching import (
    Gate,
    SplitSource,
    block_contexts,
    blocks_by_layer,
    check_origin,
    chosen_heads,
    chosen_layers,
    gates_by_layer,
    heads_read,
    read_split,
    splits_by_layer,
    static_layers,
)
from lyra.spec.attention import Live, Positions, StaticSpec
from lyra.spec.bos import warn_of_repeated_bos
from lyra.spec.context import ContextLayer, StaticContext
from lyra.spec.errors import InputError, NotFiniteError
from lyra.spec.fingerprint import Fingerprint, hash_weights
from lyra.spec.model import ModelSpec
from lyra.spec.sequential import SequentialSpec
from lyra.spec.split import HeadSplit

from .attentions import looked_at
from .errors import ModelError
from .generation_request import GenerationRequest
from .scoring import Score
from .streaming import iterate
from .text import Text, TextStream

Ids = Sequence[int] | np.ndarray
Mode = Literal["parallel", "sequential"]
MODES: tuple[Mode, ...] = get_args(Mode)

GATE = 0.25
"""How far `attach` opens the gates of blocks whose weights nobody has tuned; wide open they do more harm than good."""


class Model:
    """A model that may have a context attached. Made by `lyra.load`; engine and text come from a backend and a folder.

    `split` is the split that `attach` takes where it is given none. `mode` says who reads a context: heads of the
    model's own attention ("parallel"), or blocks behind it ("sequential"), which an engine must be able to hold.
    `blocks` are those that it has now, by layer.
    """

    def __init__(
        self, engine: Engine, text: Text | None = None, *, split: SplitSource | None = None, mode: Mode = "parallel"
    ) -> None:
        if mode == "sequential" and not isinstance(engine, SequentialEngine):
            raise ModelError(f"a {type(engine).__name__} holds no injected blocks; take mode='parallel'")
        self.engine = engine
        self.text = text
        self.mode = mode
        self.context: StaticContext | None = None
        self.blocks: dict[int, SequentialSpec] = {}
        self._splits: dict[int, HeadSplit] = {}
        self._static = StaticSpec()
        self._split = read_split(engine.spec, split)
        if self._split is not None:
            engine.spec.with_split(self._split)

    def __repr__(self) -> str:
        attached = f", with {self.context!r}" if self.context else ""
        attached += f" in {len(self.blocks)} blocks" if self.blocks else ""
        return f"Model({type(self.engine).__name__} of {self.engine.spec.name!r}{attached})"

    @property
    def spec(self) -> ModelSpec:
        """What the model does, with the split of every layer while a context is attached."""
        return self.engine.spec.with_split(self._splits, self._static) if self._splits else self.engine.spec

    @property
    def module(self) -> Any:
        """The framework's own object."""
        return self.engine.module

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ModelError where the model came without one."""
        return self._texts().tokenizer

    def logits(self, text: str | Ids, mask: np.ndarray | None = None) -> np.ndarray:
        """float32 [T,V] for a text (BOS in front) or ids [T]; [B,T,V] for ids [B,T], whose mask is False at padding.

        Raises InputError, and NotFiniteError for a model that gives NaN or infinity.
        """
        ids = self._ids(text)
        found = self.engine.logits(self._rows(ids), mask)
        return found if ids.ndim == 2 else found[0]

    def score(self, text: str | Ids) -> Score:
        """How likely a text or ids [T] are, each token given all before it and the context.

        Raises InputError, and NotFiniteError for a model that gives NaN or infinity.
        """
        log_probs = self.engine.log_probs(self._rows(self._ids(text, axes=(1,), least=2)))[0]
        if not np.isfinite(log_probs).all():
            token = int(np.isfinite(log_probs).argmin())
            raise NotFiniteError(f"score: the backend gives NaN or infinity for the probability of token {token + 1}")
        return Score(-log_probs)

    def attentions(
        self, text: str | Ids, mask: np.ndarray | None = None, *, layers: Iterable[int] | None = None
    ) -> dict[int, np.ndarray]:
        """What the heads look at, by layer: float32 [Hq,T,S+T] for a text (BOS in front) or ids [T]; [B,Hq,T,S+T] for
        ids [B,T], whose mask is False at padding.

        Row t has the softmax weights of token t: first over the S tokens of the context, which are 0 for a head that
        does not read it, then over the live tokens. S is 0 in a layer whose heads read no context. `layers` are by
        default those whose heads read one, or the global ones. A slow path, for looking: all weights are formed at
        once. Raises InputError for a layer that is not there, ModelError for an engine that shows none and in
        sequential mode, where blocks read the context.
        """
        ids = self._ids(text)
        found = looked_at(self.engine, self._rows(ids), mask, layers, self.context, self._splits, self.blocks)
        return found if ids.ndim == 2 else {layer: weights[0] for layer, weights in found.items()}

    @overload
    def generate(
        self,
        prompt: str,
        max_new_tokens: int = ...,
        *,
        on_text: Callable[[str], None] | None = ...,
        temperature: float = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        seed: int | None = ...,
    ) -> str: ...
    @overload
    def generate(
        self,
        prompt: list[str],
        max_new_tokens: int = ...,
        *,
        on_text: Callable[[str], None] | None = ...,
        temperature: float = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        seed: int | None = ...,
    ) -> list[str]: ...
    def generate(
        self,
        prompt: str | list[str],
        max_new_tokens: int = 64,
        *,
        on_text: Callable[[str], None] | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> str | list[str]:
        """The continuation of a prompt, or of each of several, without the prompt; ends at EOS.

        Temperature 0 takes the most likely token at each step; above 0 tokens are drawn, from what `top_k` and `top_p`
        leave, as `lyra.backends.protocol.Sampling` says. The same call with the same `seed` gives the same text in one
        backend; without a seed each call draws anew. With `max_new_tokens` 0 nothing is generated. `on_text` gets the
        text of a single prompt piece by piece.

        Raises InputError for a value of another type or out of range, ModelError for a model without a tokenizer,
        NotFiniteError for one that gives NaN or infinity.
        """
        check_callable("on_text", on_text)
        request = GenerationRequest.of(prompt, max_new_tokens, temperature, top_k, top_p, seed)
        found = self._generate(request, on_text)
        return found[0] if request.alone else found

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[str]:
        """The pieces of `generate(prompt, …)` as they come; closing the iterator ends the generation.

        Raises what `generate` raises, for its arguments at once.
        """
        request = GenerationRequest.of(prompt, max_new_tokens, temperature, top_k, top_p, seed)
        if not request.alone:
            raise InputError(f"prompt is {shown(prompt)}; expected one text (str), which is what can be streamed")
        self._texts()
        return iterate(lambda emit: self._generate(request, emit))

    def capture(
        self,
        text: str | Ids,
        *,
        layers: Iterable[int] | None = None,
        kv_heads: Iterable[int] | Mapping[int, Iterable[int]] | None = None,
        split: SplitSource | None = None,
        chunk_size: int = 512,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> StaticContext:
        """The static context of a text (BOS in front) or of ids [S] taken as they are (clause CAPTURE).

        `layers` are global layers, all of them by default; `kv_heads` those to keep, by layer if a mapping. Or `split`
        says both: the layers that have Lyra heads, and the KV heads that these read. `on_progress` gets (tokens done,
        tokens in all). Raises InputError while a context is attached, SpecError for a split that does not fit,
        NotFiniteError for a model that gives NaN or infinity.
        """
        if split is not None:
            if layers is not None or kv_heads is not None:
                raise InputError("capture: a split says which layers and KV heads are kept; leave out layers, kv_heads")
            kv_heads = heads_read(self.engine.spec, split)
        wanted = chosen_heads(self.engine.spec, layers, kv_heads)
        check_callable("on_progress", on_progress)
        size, ids, chosen = check_chunk_size(chunk_size), self._ids(text, axes=(1,)), list(wanted)
        found = self.engine.capture(
            ids[None],
            chosen,
            chunk_size=size,
            on_chunk=None if on_progress is None else lambda done: on_progress(done, len(ids)),
        )
        heads = tuple(range(self.engine.spec.num_key_value_heads))
        context = StaticContext(
            layers={layer: ContextLayer(heads, found[layer].k, found[layer].v) for layer in chosen},
            mask=np.ones((1, len(ids)), dtype=bool),
            positions=np.arange(len(ids))[None],
            tokens=ids[None],
            fingerprint=self.fingerprint(chosen),
        )
        return context if kv_heads is None else context.take(wanted)

    def attach(
        self,
        context: StaticContext | str | os.PathLike[str],
        split: SplitSource | None = None,
        *,
        live: Live | None = None,
        positions: Positions = "continue",
        gate: Gate | None = None,
        residual: bool | None = None,
        override: bool = False,
    ) -> None:
        """Let the Lyra heads of the context's layers attend to it. Replaces what was attached.

        `context` is a StaticContext or its file. `split` is one HeadSplit, or one for each layer, or the TOML file or
        preset of a model that has them, such as `lyra choose` writes; by default the split given to `load`, else the
        heads that read what the context holds, or in parallel mode the last half of them where it holds all. `live` is
        by default "causal", and in sequential mode "none".

        In sequential mode only: the heads are those of blocks, which get a `gate`, one number or one for each layer,
        by default 0.25, and keep the `residual` stream or replace it (clause SEQUENTIAL).

        Raises ContextError for a context of another model, unless `override`, and for one without the layers or heads
        of the split; SpecError for a split or gates that do not fit; ModelError for a gate in parallel mode. A refusal
        changes nothing.
        """
        if self.mode == "parallel" and (gate, residual) != (None, None):
            raise ModelError("attach: gate and residual are those of blocks; load the model with mode='sequential'")
        check_flag("override", override)
        if residual is not None:
            check_flag("residual", residual)
        if not isinstance(context, StaticContext):
            context = StaticContext.load(check_path("context", context, "a StaticContext or the path of its file"))
        if not override:
            self._check_fingerprint(context)
        split = split if split is not None else self._split
        if isinstance(self.engine, SequentialEngine) and self.mode == "sequential":
            sees = StaticSpec(live="none" if live is None else live, positions=positions)
            gate, residual = GATE if gate is None else gate, residual is not False
            blocks = blocks_by_layer(self.engine.spec, context.kv_heads, split, sees, gate, residual)
            self.engine.inject(block_contexts(context, blocks), blocks)
            self.context, self.blocks = context, blocks
            return
        splits = splits_by_layer(self.engine.spec, context, split)
        sees = StaticSpec(live="causal" if live is None else live, positions=positions)
        self.engine.attach(static_layers(context, splits), splits, sees)
        self.context, self._splits, self._static = context, splits, sees

    @property
    def gate(self) -> Gate:
        """The gate of the blocks: one number, or one by layer where they differ. Set it to one or the other.

        Raises ModelError where no block is there; setting raises SpecError for gates of other layers.
        """
        gates = {layer: block.gate for layer, block in self.blocks.items()}
        if not gates:
            raise ModelError("gate: no block is there; load the model with mode='sequential' and attach a context")
        return gates if len(set(gates.values())) > 1 else next(iter(gates.values()))

    @gate.setter
    def gate(self, gate: Gate) -> None:
        gates = gates_by_layer(gate, self.blocks)
        if not isinstance(self.engine, SequentialEngine) or not gates:
            raise ModelError("gate: no block is there; load the model with mode='sequential' and attach a context")
        blocks = {layer: block.replace(gate=gates[layer]) for layer, block in self.blocks.items()}
        self.engine.set_gates(gates)
        self.blocks = blocks

    def detach(self) -> None:
        """Back to the plain model."""
        self.engine.detach()
        self.context, self.blocks, self._splits, self._static = None, {}, {}, StaticSpec()

    def fingerprint(self, layers: Iterable[int] | None = None) -> Fingerprint:
        """What contexts of this model carry, for some global layers or for all (clause FINGERPRINT)."""
        hashes = {
            layer: hash_weights(self.engine.attention_weights(layer))
            for layer in chosen_layers(self.engine.spec, layers)
        }
        known = (self.text.fingerprint, self.text.bos) if self.text else (None, None)
        return Fingerprint.of(self.engine.spec, hashes, *known)

    def _texts(self) -> Text:
        if self.text is None:
            raise ModelError(f"the model {self.engine.spec.name!r} came without a tokenizer.json; give it token ids")
        return self.text

    def _generate(self, request: GenerationRequest, on_text: Callable[[str], None] | None) -> list[str]:
        """The continuation of each prompt. Raises what `generate` raises."""
        texts, prompts = self._texts(), request.prompts
        if not prompts:
            return []
        if on_text is not None and len(prompts) > 1:
            raise ModelError(f"generate: on_text serves one prompt, got {len(prompts)}; generate them one by one")
        ids, mask = texts.left_padded([texts.encode(prompt) for prompt in prompts])
        stream = TextStream(texts)

        def on_token(tokens: np.ndarray) -> None:
            piece = stream.step(int(tokens[0]))
            if piece and on_text is not None:
                on_text(piece)

        made = self.engine.generate(
            self._rows(ids),
            mask,
            max_new_tokens=check_new_tokens(request.max_new_tokens, ids.shape[1]),
            stop_ids=texts.stops,
            on_token=None if on_text is None else on_token,
            sampling=request.sampling,
            seed=request.seed,
        )
        found = [texts.decode(row) for row in made]
        if on_text is not None and (rest := stream.rest(found[0])):
            on_text(rest)
        return found

    def _ids(self, text: str | Ids, *, axes: tuple[int, ...] = (1, 2), least: int = 1) -> np.ndarray:
        """The ids of a text, or ids as they are, checked: int64 [T], or [B,T] where `axes` allow it."""
        given = self._texts().encode(text) if isinstance(text, str) else text
        ids = check_ids(given, self.engine.spec.vocab_size, axes=axes, least=least, what="a text or whole numbers")
        if self.text is not None:
            warn_of_repeated_bos(np.atleast_2d(ids), self.text.bos)
        return ids

    def _rows(self, ids: np.ndarray) -> np.ndarray:
        rows = np.atleast_2d(ids)
        if self.context is not None and self.context.batch not in {1, len(rows)}:
            raise InputError(f"the attached context has {self.context.batch} rows and the call {len(rows)}")
        return rows

    def _check_fingerprint(self, context: StaticContext) -> None:
        own = self.fingerprint(layer for layer in context.layers if layer in self.engine.spec.global_layers)
        check_origin(context, own)
