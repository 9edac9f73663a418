"""lyra score: how likely a text is, without and with a context."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from lyra.scoring import Score
from lyra.terminal import new_table

from .files import check_files
from .options import (
    BackendName,
    ContextPath,
    Dtype,
    GateOption,
    JsonPath,
    LiveMode,
    LyraKV,
    LyraQ,
    ModelName,
    ModeName,
    Override,
    PositionMode,
    ShareKV,
    SplitFile,
    check_attaching,
    check_split_options,
    chosen_split,
    load_model,
    model_source,
    read_text,
    text_source,
)
from .output import show


def score(
    text: Annotated[str, typer.Argument(help="A UTF-8 text file, or - for standard input.")],
    context: ContextPath = None,
    model: ModelName = None,
    backend: BackendName = "torch",
    lyra_kv: LyraKV = None,
    lyra_q: LyraQ = None,
    share_kv: ShareKV = False,
    split: SplitFile = None,
    live: LiveMode = None,
    positions: PositionMode = None,
    mode: ModeName = "parallel",
    gate: GateOption = None,
    override: Override = False,
    dtype: Dtype = "float32",
    json_path: JsonPath = None,
) -> None:
    """Show the likelihood of a text's tokens; with a context, both without and with it."""
    from lyra.progress import steps

    check_files(json_path=json_path, inputs=(text_source(text), context, model_source(model), split))
    check_split_options(lyra_kv, lyra_q, share_kv, split)
    asks_for = {"lyra-kv": lyra_kv, "lyra-q": lyra_q, "split": split, "live": live, "positions": positions}
    check_attaching(context, mode, gate, asks_for | {"override": override})
    words = read_text(text)
    loaded = load_model(model, backend, dtype, mode)
    chosen = chosen_split(loaded.spec, lyra_kv, lyra_q, share_kv, split)
    rounds = 1 if context is None else 2
    found: dict[str, Score] = {}
    with steps("Scoring") as move:
        move("without context", 0, rounds)
        found["without context"] = loaded.score(words)
        if context is not None:
            move("with context", 1, rounds)
            loaded.attach(context, chosen, live=live, positions=positions or "continue", gate=gate, override=override)
            found["with context"] = loaded.score(words)
    data = {
        name: {
            "tokens": score.num_tokens,
            "total_nll": score.total,
            "mean_nll": score.mean_nll,
            "perplexity": score.perplexity,
        }
        for name, score in found.items()
    }
    show({"text": text} | data, json_path, _table(found))


def _table(found: dict[str, Score]) -> Table:
    table = new_table()
    for name in ("", "tokens", "mean NLL (nats)", "perplexity"):
        table.add_column(name, justify="right")
    for name, score in found.items():
        table.add_row(name, f"{score.num_tokens:,}", f"{score.mean_nll:.4f}", f"{score.perplexity:,.3f}")
    return table
