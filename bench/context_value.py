"""What a context is worth on the real Gemma-3 270M: mean negative log-likelihood without one, with one in front of the
text, and with one attached, in every mode. Exit code 0 if every figure is the published one within 0.02 nats, else 1.

python bench/context_value.py --backend torch --json value.json
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Annotated, Any, Literal

import numpy as np
import typer
from rich.table import Table
from rich.text import Text

import lyra
from lyra.choosing.documents import HELD_OUT
from lyra.cli.app import run_script
from lyra.cli.files import check_files
from lyra.cli.options import BackendName, JsonPath, load_model
from lyra.cli.output import show
from lyra.progress import steps
from lyra.spec.attention import Live
from lyra.terminal import new_table

CONTEXT, NEXT, AGAIN = 512, 256, 255
TOLERANCE = 0.02
COLUMNS = ("next", "again")
TEXT_DIGEST = "0c14df9d7fde08ab"


@dataclass(frozen=True)
class Attached:
    """A context attached to the last `heads` query heads of every global layer."""

    heads: int
    live: Live = "causal"
    positions: Literal["continue", "overlay"] = "continue"


@dataclass(frozen=True)
class Injected:
    """A context read by blocks behind the attention of every global layer (clause SEQUENTIAL)."""

    gate: float
    live: Live = "none"


@dataclass(frozen=True)
class Row:
    """One line of the table: how the context is given, and the published mean NLL of the next and the same text."""

    name: str
    given: Attached | Injected | Literal["absent", "prefix"]
    published: tuple[float, float]


ROWS = (
    Row("no context", "absent", (2.785, 3.116)),
    Row("ordinary prefix", "prefix", (2.162, 0.260)),
    Row("2 of 4, causal, continue", Attached(2), (2.630, 1.618)),
    Row("2 of 4, self, continue", Attached(2, live="self"), (2.718, 1.325)),
    Row("2 of 4, none, continue", Attached(2, live="none"), (2.724, 1.316)),
    Row("2 of 4, causal, overlay", Attached(2, positions="overlay"), (2.751, 2.630)),
    Row("1 of 4, causal, continue", Attached(1), (2.913, 3.396)),
    Row("3 of 4, causal, continue", Attached(3), (2.511, 0.308)),
    Row("4 of 4, causal, continue", Attached(4), (2.434, 0.202)),
    Row("blocks, gate 0.1", Injected(0.1), (2.758, 2.861)),
    Row("blocks, gate 0.25", Injected(0.25), (2.771, 2.574)),
    Row("blocks, gate 0.25, causal", Injected(0.25, live="causal"), (2.774, 2.700)),
    Row("blocks, gate 0.5", Injected(0.5), (3.068, 2.501)),
    Row("blocks, gate 1", Injected(1.0), (4.237, 3.441)),
)


@dataclass(frozen=True)
class Document:
    """Token ids of a document, BOS first."""

    ids: list[int]

    @property
    def context(self) -> list[int]:
        """The first 512 tokens."""
        return self.ids[:CONTEXT]

    def live(self, column: str) -> list[int]:
        """What is scored after the BOS: the next 256 tokens, or tokens 1 to 255 of the context again."""
        return self.ids[CONTEXT : CONTEXT + NEXT] if column == "next" else self.ids[1 : 1 + AGAIN]

    def alone(self, column: str) -> list[int]:
        """The live text as a sequence of its own: BOS in front."""
        return [self.ids[0], *self.live(column)]

    def behind_prefix(self, column: str) -> list[int]:
        """One sequence, the context in front; the repeated text keeps its BOS there, the next text has none."""
        return self.context + (self.live(column) if column == "next" else self.alone(column))


def mean_nll(model: lyra.Model, ids: list[int], scored: int) -> float:
    """Mean negative log-likelihood of the last `scored` tokens, in nats."""
    return float(model.score(ids).nll[-scored:].mean(dtype=np.float64))


def score_row(
    model: lyra.Model, given: Attached | Injected | str, document: Document, context: lyra.StaticContext
) -> list[float]:
    """One row of the table for one document: the next and the same text."""
    if isinstance(given, Injected):
        model = lyra.Model(model.engine, model.text, mode="sequential")
        model.attach(context, gate=given.gate, live=given.live)
    elif isinstance(given, Attached):
        split = lyra.HeadSplit.last_q(model.spec, given.heads)
        model.attach(context, split, live=given.live, positions=given.positions)
    sequence: Callable[[str], list[int]] = document.behind_prefix if given == "prefix" else document.alone
    found = [mean_nll(model, sequence(column), len(document.live(column))) for column in COLUMNS]
    model.detach()
    return found


def measure(model: lyra.Model, documents: dict[str, Document]) -> Iterator[tuple[str, np.ndarray]]:
    """Every document's name and its mean NLL by row and column, [rows, 2]; each context is captured once."""
    for name, document in documents.items():
        context = model.capture(document.context)
        yield name, np.array([score_row(model, row.given, document, context) for row in ROWS])


def read_documents(model: lyra.Model) -> dict[str, Document]:
    """The documents, tokenised."""
    assert model.text is not None
    return {name: Document(model.text.encode(topics[name])) for name in HELD_OUT}


def text_digest() -> str:
    """A hash of the documents: their text changes from one Python version to another."""
    return hashlib.sha256("".join(topics[name] for name in HELD_OUT).encode()).hexdigest()[:16]


def report(backend: str, values: np.ndarray, seconds: float) -> dict[str, Any]:
    """The outcome as plain data: `values` [documents, rows, 2]."""
    rows = []
    for row, measured in zip(ROWS, values.mean(axis=0), strict=True):
        cells = {
            column: {"measured": float(value), "published": wanted, "difference": float(value) - wanted}
            for column, value, wanted in zip(COLUMNS, measured, row.published, strict=True)
        }
        rows.append({"name": row.name} | cells)
    largest = max(abs(row[column]["difference"]) for row in rows for column in COLUMNS)
    return {
        "backend": backend,
        "documents": list(HELD_OUT),
        "tolerance": TOLERANCE,
        "largest_difference": largest,
        "ok": largest <= TOLERANCE,
        "seconds": round(seconds, 1),
        "rows": rows,
    }


def table(data: dict[str, Any]) -> Table:
    """The rows: published, measured and the difference, for both columns."""
    title = f"Mean NLL per token (nats) with a context of {CONTEXT} tokens, gemma-3-270m on {data['backend']}"
    made = new_table(title, padding=(0, 0, 0, 1))
    made.add_column("heads to Lyra", no_wrap=True)
    for column in ("next", "again"):
        for part in (f"{column}\npubl.", "\nmeasured", "\nΔ"):
            made.add_column(part, justify="right")
    for row in data["rows"]:
        cells: list[str | Text] = []
        for column in COLUMNS:
            cell = row[column]
            style = "green" if abs(cell["difference"]) <= TOLERANCE else "bold red"
            difference = Text(f"{cell['difference']:+.4f}", style)
            cells += [f"{cell['published']:.3f}", f"{cell['measured']:.4f}", difference]
        made.add_row(row["name"], *cells)
    return made


def main(
    backend: BackendName = "torch",
    model: Annotated[str, typer.Option(help="The 270M, from wherever lyra.load takes a model.")] = "gemma-3-270m",
    json_path: JsonPath = None,
) -> None:
    """Measure what a context is worth on the real 270M and hold it to the published figures."""
    if text_digest() != TEXT_DIGEST:
        typer.echo(f"Python {platform.python_version()} has other documents than 3.11; use Python 3.11", err=True)
        raise typer.Exit(2)
    check_files(json_path=json_path)
    loaded = load_model(model, backend, "float32")
    documents = read_documents(loaded)
    started, values = time.perf_counter(), []
    with steps("Scoring") as move:
        move("documents", 0, len(documents))
        for name, found in measure(loaded, documents):
            values.append(found)
            move(name, len(values), len(documents))
    data = report(backend, np.stack(values), time.perf_counter() - started)
    verdict = (
        f"largest difference {data['largest_difference']:.4f} nats, allowed {TOLERANCE}: "
        f"{'reproduced' if data['ok'] else 'NOT reproduced'} ({data['seconds']:.0f} s)"
    )
    show(data, json_path, table(data), verdict)
    raise typer.Exit(0 if data["ok"] else 1)


if __name__ == "__main__":
    run_script(main)
