"""The real Gemma-3 270M in JAX against PyTorch: logits of a text fed at once, in chunks of 7 and token by token against
those of Hugging Face and of the PyTorch backend, greedy tokens with and without a context. Exit code 0 if all agree.

python bench/jax_parity.py --tokens 600 --tokens 2000 --new 256
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pydoc_data.topics import topics
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.table import Table
from transformers import AutoModelForCausalLM

import lyra
from lyra.backends.jax_impl import forward
from lyra.backends.jax_impl.tokens import CHUNK, Tokens, pack_left
from lyra.checkpoint import resolve
from lyra.cli.app import run_script
from lyra.cli.files import check_files
from lyra.cli.options import JsonPath
from lyra.cli.output import show
from lyra.progress import steps
from lyra.terminal import new_table

TEXT, PROMPTS = "types", ("formatstrings", "debugger", "attribute-access")
CONTEXT, PROMPT = 256, 24
WAYS = {"at once": CHUNK, "chunks of 7": 7, "token by token": 1}
TOLERANCE = 2e-5
"""Of the largest logit; rounding makes up to 8e-6 of it in 2,000 tokens."""
ROWS = 128
"""Positions whose logits are held at a time: 128 MB of them."""


@dataclass(frozen=True)
class Fed:
    """How far the logits of a text fed one way are from Hugging Face's and the PyTorch backend's, over the largest."""

    tokens: int
    way: str
    hugging_face: float
    torch: float
    same_argmax: int
    seconds: float


@dataclass(frozen=True)
class Generated:
    """Greedy tokens of a prompt that both backends agree on, and the gap of the two top logits where they part."""

    prompt: str
    context: bool
    agree: int
    asked: int
    gap: float | None


def hidden_by_chunks(model: lyra.Model, ids: np.ndarray, chunk: int) -> np.ndarray:
    """The decoder's output [T,E] for ids [T], fed `chunk` tokens at a time through the live cache."""
    packed = pack_left(Tokens(ids[None].astype(np.int32), np.ones((1, len(ids)), bool)), chunk)
    graph = forward.split_module(model.module)
    parts = [np.asarray(hidden[0]) for hidden, _ in forward.prefill_all(graph, packed, {}, chunk=chunk)]
    return np.concatenate(parts)[packed.source[0]]


def compare(model: lyra.Model, hidden: np.ndarray, references: list[np.ndarray]) -> tuple[list[float], int]:
    """The largest difference from each reference [T,V] over its largest logit, and how many argmaxes are the last's."""
    graph, largest, same = forward.split_module(model.module), [0.0] * len(references), 0
    for start in range(0, len(hidden), ROWS):
        part = np.zeros((ROWS, hidden.shape[1]), np.float32)
        rows = slice(start, min(start + ROWS, len(hidden)))
        part[: rows.stop - start] = hidden[rows]
        ours = np.asarray(forward.logits(graph, part))[: rows.stop - start]
        for index, reference in enumerate(references):
            largest[index] = max(largest[index], float(np.abs(ours - reference[rows]).max()))
        same += int((ours.argmax(-1) == references[-1][rows].argmax(-1)).sum())
    return [value / float(np.abs(reference).max()) for value, reference in zip(largest, references, strict=True)], same


def feed(models: dict[str, lyra.Model], plain: Any, ids: np.ndarray) -> Iterator[Fed]:
    """The text fed in every way."""
    with torch.inference_mode():
        theirs = plain(torch.from_numpy(ids)[None]).logits[0].numpy()
    references = [theirs, models["torch"].logits(ids)]
    for way, chunk in WAYS.items():
        started = time.perf_counter()
        hidden = hidden_by_chunks(models["jax"], ids, chunk)
        seconds = time.perf_counter() - started
        (far, near), same = compare(models["jax"], hidden, references)
        yield Fed(len(ids), way, far, near, same, round(seconds, 1))


def generate(models: dict[str, lyra.Model], new: int) -> Iterator[Generated]:
    """Three prompts in one left-padded batch, first without and then with a context of the PyTorch backend."""
    text = models["torch"].text
    assert text is not None
    context = models["torch"].capture(text.encode(topics[TEXT])[:CONTEXT])
    prompts = [text.encode(topics[name])[: PROMPT + 5 * row] for row, name in enumerate(PROMPTS)]
    ids, mask = text.left_padded(prompts)
    for attached in (False, True):
        made = {}
        for name, model in models.items():
            if attached:
                model.attach(context, split=lyra.HeadSplit.last_q(model.spec, 3))
            made[name] = model.engine.generate(ids, mask, max_new_tokens=new)
        for row, prompt in enumerate(prompts):
            ours, theirs = made["jax"][row], made["torch"][row]
            agree = new if (ours == theirs).all() else int((ours != theirs).argmax())
            gap = None if agree == new else top_gap(models["torch"], [*prompt, *theirs[:agree]])
            yield Generated(PROMPTS[row], attached, agree, new, gap)
    for model in models.values():
        model.detach()


def top_gap(model: lyra.Model, ids: list[int]) -> float:
    """The difference of the two top logits after ids, over the largest one."""
    last = np.sort(model.logits(ids)[-1])
    return float((last[-1] - last[-2]) / np.abs(last).max())


def table(title: str, rows: list[Any]) -> Table:
    """Dataclasses as a table."""
    made = new_table(title, padding=(0, 0, 0, 1))
    for name in asdict(rows[0]):
        made.add_column(name.replace("_", " "))
    for row in rows:
        made.add_row(
            *(
                f"{value:.2e}" if isinstance(value, float) and value < 1 else str(value)
                for value in asdict(row).values()
            )
        )
    return made


def main(
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Lengths of the text, one or several.")] = None,
    new: Annotated[int, typer.Option(min=1, help="Greedy tokens for each prompt.")] = 256,
    json_path: JsonPath = None,
) -> None:
    """Hold the real 270M in JAX to the PyTorch backend and to Hugging Face."""
    check_files(json_path=json_path)
    folder = resolve("gemma-3-270m")
    models = {name: lyra.load(folder, backend=name) for name in ("torch", "jax")}
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = models["torch"].text
    assert text is not None
    ids, fed, generated = np.array(text.encode(topics[TEXT])), [], []
    lengths = tokens or [600, 2000]
    with steps("Feeding") as move:
        for length in lengths:
            for sample in feed(models, plain, ids[:length]):
                fed.append(sample)
                move(f"{length} tokens {sample.way}", len(fed), len(lengths) * len(WAYS))
    with steps("Generating") as move:
        for made in generate(models, new):
            generated.append(made)
            move(made.prompt, len(generated), 2 * len(PROMPTS))
    largest = max(max(sample.hugging_face, sample.torch) for sample in fed)
    parted = [made.gap for made in generated if made.gap is not None]
    ok = largest <= TOLERANCE and all(gap <= TOLERANCE for gap in parted)
    data = {
        "tolerance": TOLERANCE,
        "ok": ok,
        "fed": [asdict(sample) for sample in fed],
        "generated": [asdict(sample) for sample in generated],
    }
    verdict = (
        f"largest difference {largest:.1e} of the largest logit, allowed {TOLERANCE}: {'agree' if ok else 'DISAGREE'}"
    )
    show(
        data,
        json_path,
        table("Logits of gemma-3-270m in JAX", fed),
        table("Greedy tokens in JAX and PyTorch", generated),
        verdict,
    )
    raise typer.Exit(0 if ok else 1)


if __name__ == "__main__":
    run_script(main)
