"""Scores of documents under many choices of heads, each measured once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from lyra.backends.protocol import BlendedEngine, BlendedText, GatedEngine, blended_text
from lyra.errors import ModelError
from lyra.model import Model
from lyra.spec.attaching import static_layers
from lyra.spec.fingerprint import hash_weights
from lyra.spec.split import HeadSplit

from .documents import Document, Kind
from .memory import Memory

AT_ONCE = 16
"""How many candidates one pass of the model takes at most."""

Advance = Callable[[str, int], None]
"""Told what was measured, and how many of the candidates that a document is measured under it was."""


class Measure:
    """Mean NLL of documents under blends of heads, and its gradient; what `memory` has is not measured again."""

    def __init__(self, model: Model, documents: Sequence[Document], memory: Memory, advance: Advance) -> None:
        self._model, self._memory, self._advance = model, memory, advance
        self.documents = tuple(documents)
        self._texts: dict[str, list[BlendedText]] = {}

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What is scored, in the order of the documents."""
        return tuple(dict.fromkeys(passage.kind for document in self.documents for passage in document.passages))

    def nll(self, what: str, candidates: Sequence[np.ndarray]) -> dict[Kind, np.ndarray]:
        """Mean NLL by kind of passage, a document's passages first, [C], for each of C candidates, blends [L,Hq]."""
        found: dict[Kind, list[np.ndarray]] = {kind: [] for kind in self.kinds}
        for document in self.documents:
            self._measure(what, document, candidates)
            for kind in found:
                rows = [
                    [self._memory[_name(document, at, blends)][0] for blends in candidates]
                    for at, passage in enumerate(document.passages)
                    if passage.kind == kind
                ]
                found[kind] += [np.mean(rows, axis=0)] if rows else []
        return {kind: np.mean(rows, axis=0) for kind, rows in found.items()}

    def at(self, what: str, candidates: Sequence[np.ndarray]) -> list[dict[Kind, float]]:
        """The same candidate by candidate."""
        found = self.nll(what, candidates)
        return [{kind: float(values[at]) for kind, values in found.items()} for at in range(len(candidates))]

    def gradient(self, what: str, blends: np.ndarray) -> dict[Kind, np.ndarray]:
        """The gradient of the mean NLL by kind with respect to blends [L,Hq]."""
        found: dict[Kind, list[np.ndarray]] = {kind: [] for kind in self.kinds}
        for document in self.documents:
            rows: dict[Kind, list[np.ndarray]] = {}
            for at, passage in enumerate(document.passages):
                name = f"{_name(document, at, blends)}/gradient"
                if name not in self._memory:
                    _, slope = self._blended(document)[at].gradient(blends)
                    self._memory.add({name: slope.ravel().tolist()})
                rows.setdefault(passage.kind, []).append(np.reshape(self._memory[name], blends.shape))
            for kind, slopes in rows.items():
                found[kind].append(np.mean(slopes, axis=0))
            self._advance(f"{what}, {document.name}", 1)
        return {kind: np.mean(rows, axis=0) for kind, rows in found.items()}

    def _measure(self, what: str, document: Document, candidates: Sequence[np.ndarray]) -> None:
        for start in range(0, len(candidates), AT_ONCE):
            some = candidates[start : start + AT_ONCE]
            for at in range(len(document.passages)):
                new = {name: blends for blends in some if (name := _name(document, at, blends)) not in self._memory}
                if new:
                    values = self._blended(document)[at].nll(np.stack(list(new.values())))
                    self._memory.add({name: [float(value)] for name, value in zip(new, values, strict=True)})
            self._advance(f"{what}, {document.name}", len(some))

    def _blended(self, document: Document) -> list[BlendedText]:
        """The passages of a document behind its context, which is captured when it is first needed."""
        if document.digest not in self._texts:
            engine, spec = self._model.engine, self._model.engine.spec
            context = self._model.capture(np.array(document.context))
            static = static_layers(context, dict.fromkeys(context.layers, HeadSplit.all(spec)))
            self._texts[document.digest] = [
                blended_text(engine, np.array([passage.ids]), passage.scored, static) for passage in document.passages
            ]
        return self._texts[document.digest]


def subject_of(model: Model, documents: Iterable[Document]) -> str:
    """What measured values belong to: a hash of the model's attention, the backend, and the documents."""
    engine = model.engine
    digest = hashlib.sha256(f"{type(engine).__name__} {engine.spec.to_json()}".encode())
    for layer in range(engine.spec.num_hidden_layers):
        weights = engine.attention_weights(layer)
        digest.update(hash_weights(weights).encode())
        digest.update(weights["q_proj.weight"].tobytes() + weights["o_proj.weight"].tobytes())
    for document in documents:
        digest.update(document.digest.encode())
    return digest.hexdigest()


def check_model(model: Model) -> None:
    """Refuse a model whose heads cannot be measured, or that has a context attached. Raises ModelError."""
    if not isinstance(model.engine, BlendedEngine | GatedEngine):
        raise ModelError(
            f"a {type(model.engine).__name__} scores no text under blends of heads (capability 'blends'); load the "
            f"model with backend='torch' or 'jax'"
        )
    if model.context is not None:
        raise ModelError("choose_split: a context is attached; heads are chosen for the plain model, so detach first")


def _name(document: Document, passage: int, blends: np.ndarray) -> str:
    """What a value is remembered by: blends that are all 0 or 1 as digits, others as a hash."""
    flat = blends.ravel()
    whole = np.isin(flat, (0.0, 1.0)).all()
    under = "".join(f"{blend:.0f}" for blend in flat) if whole else hashlib.sha256(flat.tobytes()).hexdigest()[:16]
    return f"{document.digest}/{passage}/{under}"
