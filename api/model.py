"""Model: a language model with or without a static context, whatever framework runs it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, overload

import numpy as np
from tokenizers import Tokenizer

from lyra.backends.protocol import Engine, Sampling, SequentialEngine
from lyra.spec.attaching import (
    Gate,
    SplitSource,
    block_contexts,
    blocks_by_layer,
    check_origin,
    chosen_layers,
    gates_by_layer,
    heads_read,
    read_split,
    splits_by_layer,
    static_layers,
)
from lyra.spec.attention import Live, Positions, StaticSpec
from lyra.spec.context import ContextLayer, StaticContext
from lyra.spec.errors import InputError
from lyra.spec.fingerprint import Fingerprint, hash_weights
from lyra.spec.model import ModelSpec
from lyra.spec.sequential import SequentialSpec
from lyra.spec.split import HeadSplit

from .attentions import looked_at
from .errors import ModelError
from .streaming import iterate
from .text import Text, TextStream

Ids = Sequence[int] | np.ndarray
Mode = Literal["parallel", "sequential"]
MODES: tuple[Mode, ...] = get_args(Mode)

GATE = 0.25
"""How far `attach` opens the gates of blocks whose weights nobody has tuned; wide open they do more harm than good."""


@dataclass(frozen=True, eq=False)
class Score:
    """How likely a text is: nll [T-1] float32, the negative log-likelihood in nats of each token but the first."""

    nll: np.ndarray

    def __repr__(self) -> str:
        return f"Score({self.num_tokens} tokens, mean_nll {self.mean_nll:.4f}, perplexity {self.perplexity:.4g})"

    @property
    def num_tokens(self) -> int:
        """How many tokens were scored."""
        return len(self.nll)

    @property
    def total(self) -> float:
        """The sum over the tokens, in nats."""
        return float(self.nll.sum(dtype=np.float64))

    @property
    def mean_nll(self) -> float:
        """The mean over the tokens, in nats."""
        return self.total / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean."""
        return float(np.exp(self.mean_nll))


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

        Raises InputError.
        """
        ids = self._ids(text)
        found = self.engine.logits(self._rows(ids), mask)
        return found if ids.ndim == 2 else found[0]

    def score(self, text: str | Ids) -> Score:
        """How likely a text or ids [T] are, each token given all before it and the context. Raises InputError."""
        ids = self._ids(text)
        if ids.ndim != 1 or len(ids) < 2:
            raise InputError(f"score: ids have shape {ids.shape}; expected one sequence of at least 2 tokens")
        return Score(-self.engine.log_probs(self._rows(ids))[0])

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
        return found if ids.ndim == 2 else {layer: one[0] for layer, one in found.items()}

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
        backend; without a seed each call draws anew. `on_text` gets the text of a single prompt piece by piece. Raises
        InputError for a value out of range, ModelError for a model without a tokenizer.
        """
        sampling = _sampling(temperature, top_k, top_p, seed)
        texts = self._texts()
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            return []
        if on_text is not None and len(prompts) > 1:
            raise ModelError(f"generate: on_text serves one prompt, got {len(prompts)}; generate them one by one")
        ids, mask = texts.left_padded([texts.encode(one) for one in prompts])
        stream = TextStream(texts)

        def on_token(tokens: np.ndarray) -> None:
            piece = stream.step(int(tokens[0]))
            if piece and on_text is not None:
                on_text(piece)

        made = self.engine.generate(
            self._rows(ids),
            mask,
            max_new_tokens=max_new_tokens,
            stop_ids=texts.stops,
            on_token=None if on_text is None else on_token,
            sampling=sampling,
            seed=secrets.randbits(32) if seed is None else seed,
        )
        found = [texts.decode(row) for row in made]
        if on_text is not None and (rest := stream.rest(found[0])):
            on_text(rest)
        return found[0] if isinstance(prompt, str) else found

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
        """The pieces of `generate(prompt, …)` as they come; closing the iterator ends the generation."""
        draw: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        return iterate(lambda emit: self.generate(prompt, max_new_tokens, on_text=emit, **draw))

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
        tokens in all). Raises InputError while a context is attached, SpecError for a split that does not fit.
        """
        if split is not None:
            if layers is not None or kv_heads is not None:
                raise InputError("capture: a split says which layers and KV heads are kept; leave out layers, kv_heads")
            kv_heads = heads_read(self.engine.spec, split)
        ids = self._ids(text)
        if ids.ndim != 1 or len(ids) == 0:
            raise InputError(f"capture: ids have shape {ids.shape}; expected one sequence of at least 1 token")
        chosen = chosen_layers(
            self.engine.spec, layers if layers is not None else kv_heads if isinstance(kv_heads, Mapping) else None
        )
        found = self.engine.capture(
            ids[None],
            chosen,
            chunk_size=chunk_size,
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
        return context if kv_heads is None else context.take(kv_heads)

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
        if not isinstance(context, StaticContext):
            context = StaticContext.load(context)
        if not override:
            self._check_fingerprint(context)
        split = split if split is not None else self._split
        if isinstance(self.engine, SequentialEngine) and self.mode == "sequential":
            sees = StaticSpec(live=live or "none", positions=positions)
            gate, residual = GATE if gate is None else gate, residual is not False
            blocks = blocks_by_layer(self.engine.spec, context.kv_heads, split, sees, gate, residual)
            self.engine.inject(block_contexts(context, blocks), blocks)
            self.context, self.blocks = context, blocks
            return
        splits = splits_by_layer(self.engine.spec, context, split)
        sees = StaticSpec(live=live or "causal", positions=positions)
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

    def _ids(self, text: str | Ids) -> np.ndarray:
        ids = np.asarray(self._texts().encode(text) if isinstance(text, str) else text)
        if ids.ndim not in {1, 2} or not np.issubdtype(ids.dtype, np.integer):
            raise InputError(
                f"ids have shape {ids.shape} and dtype {ids.dtype}; expected a text or integers [T] or [B,T]"
            )
        return ids.astype(np.int64)

    def _rows(self, ids: np.ndarray) -> np.ndarray:
        rows = np.atleast_2d(ids)
        if self.context is not None and self.context.batch not in {1, len(rows)}:
            raise InputError(f"the attached context has {self.context.batch} rows and the call {len(rows)}")
        return rows

    def _check_fingerprint(self, context: StaticContext) -> None:
        own = self.fingerprint(layer for layer in context.layers if layer in self.engine.spec.global_layers)
        check_origin(context, own)


def _sampling(temperature: float, top_k: int | None, top_p: float | None, seed: int | None) -> Sampling | None:
    """What the options of `generate` ask for; None for the most likely token. Raises InputError."""
    if seed is not None and not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}; expected 0 to {2**32 - 1}")
    if temperature != 0:
        return Sampling(temperature, top_k, 1.0 if top_p is None else top_p)
    given = {"top_k": top_k, "top_p": top_p, "seed": seed}
    idle = [name for name, value in given.items() if value is not None]
    if idle:
        raise InputError(
            f"temperature is 0, which takes the most likely token, so {' and '.join(idle)} would have no effect; "
            f"give a temperature above 0, such as 1"
        )
    return None
