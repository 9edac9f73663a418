"""Which heads of the real Gemma-3 270M a context is worth most to: chosen on three documents and pass keys, and held to
seven others. Exit code 0 if two heads keep 97% of all heads' recall gain and 85% of their continuation gain, and six
gain more than all, else 1. `--presets DIR` writes the splits that the package ships.

python bench/choose_heads.py --method gradient --json heads.json --plot heads.png
"""

from __future__ import annotations

import platform
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

import lyra
from lyra.choosing import ChosenSplit, judge
from lyra.choosing.documents import HELD_OUT, Kind
from lyra.choosing.figures import choice_figure
from lyra.choosing.ranking import Method
from lyra.cli.app import run_script
from lyra.cli.choose import curve_table, heat_map
from lyra.cli.files import check_files
from lyra.cli.options import BackendName, JsonPath, load_model
from lyra.cli.output import show
from lyra.progress import steps
from lyra.quantities import size
from lyra.studies.cache import context_size
from lyra.studies.figures import save
from lyra.terminal import new_table

MODEL = "gemma-3-270m"
COUNTS = (2, 6)
"""How many heads the shipped splits have."""

KEPT: dict[Kind, float] = {"recall": 0.97, "continuation": 0.85}
"""The share of all heads' gain that two heads keep at least."""


def rows(model: lyra.Model, chosen: dict[int, ChosenSplit]) -> dict[str, lyra.ModelSpec]:
    """The splits that are compared, by name."""
    spec = model.spec
    splits = {
        "none": {},
        "the last two of each layer": dict.fromkeys(spec.global_layers, lyra.HeadSplit.last_q(spec, 2)),
        **{f"{count} chosen": dict(one) for count, one in chosen.items()},
        "all": dict.fromkeys(spec.global_layers, lyra.HeadSplit.all(spec)),
    }
    return {name: spec.with_split(split) for name, split in splits.items()}


def compare(model: lyra.Model, chosen: dict[int, ChosenSplit]) -> list[dict[str, Any]]:
    """What each of them is worth on held-out documents, and the bytes of its contexts."""
    named = rows(model, chosen)
    with steps("Comparing") as move:
        nll = judge(model, {name: _splits(spec) for name, spec in named.items()}, on_progress=move)
    return [
        {
            "name": name,
            "heads": sum(len(spec.layer(layer).lyra_q_heads) for layer in spec.global_layers),
            "nll": nll[name],
            "bytes_per_1000_tokens": context_size(spec, 1000, "float32"),
        }
        for name, spec in named.items()
    ]


def verdict(found: list[dict[str, Any]]) -> dict[str, bool]:
    """What must be true of the chosen heads, and whether it is."""
    nll = {row["name"]: row["nll"] for row in found}

    def gain(name: str, kind: Kind) -> float:
        return nll["none"][kind] - nll[name][kind]

    kept = {
        f"two heads keep {least:.0%} of the {kind} gain": gain("2 chosen", kind) >= least * gain("all", kind)
        for kind, least in KEPT.items()
    }
    return kept | {f"six heads beat all on {kind}": gain("6 chosen", kind) > gain("all", kind) for kind in KEPT}


def table(found: list[dict[str, Any]]) -> Table:
    """The comparison for people."""
    made = new_table(f"{MODEL}: held-out documents, mean NLL per token (nats)")
    made.add_column("heads to Lyra", style="bold")
    for column in ("heads", "next 128 tokens", "the same text again", "pass keys", "context / 1k tokens"):
        made.add_column(column, justify="right")
    for row in found:
        values = (f"{row['nll'][kind]:.3f}" for kind in ("continuation", "recall", "passkey"))
        made.add_row(row["name"], str(row["heads"]), *values, size(row["bytes_per_1000_tokens"]))
    return made


def write_preset(folder: Path, chosen: ChosenSplit, heads: int) -> None:
    """The preset of a number of heads, named after it."""
    name = f"{MODEL}-lyra-{heads}q"
    chosen.spec.with_split(chosen).replace(name=name).to_toml(folder / f"{name}.toml")


def main(
    method: Annotated[Method, typer.Option(help="How the heads are ranked.")] = "gradient",
    backend: BackendName = "torch",
    model: Annotated[str, typer.Option(help="The 270M, from wherever lyra.load takes a model.")] = MODEL,
    presets: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the presets of 2 and 6 heads.")] = None,
    progress: Annotated[Path | None, typer.Option(metavar="DIR", help="Go on with an interrupted run.")] = None,
    plot: Annotated[list[Path] | None, typer.Option(metavar="PATH", help="Draw it: .png or .svg files.")] = None,
    json_path: JsonPath = None,
) -> None:
    """Choose heads of the 270M and hold them to what they must keep on documents that they were not chosen on."""
    if any(len(topics.get(name, "")) < 1000 for name in HELD_OUT):
        typer.echo(f"Python {platform.python_version()} has other documents than 3.11; use Python 3.11", err=True)
        raise typer.Exit(2)
    check_files(*(plot or ()), json_path=json_path, inputs=(model,), folders=(presets, progress))
    loaded = load_model(model, backend, "float32")
    started = time.perf_counter()
    with steps("Choosing heads") as move:
        best = lyra.choose_split(loaded, heads=COUNTS[0], method=method, progress=progress, on_progress=move)
    seconds = time.perf_counter() - started
    chosen = {count: best.with_heads(count) for count in COUNTS}
    found = compare(loaded, chosen)
    for path in plot or ():
        save(choice_figure(best.report), path)
    if presets is not None:
        for count, one in chosen.items():
            write_preset(presets, one, count)
    held = verdict(found)
    data = {"backend": backend, "seconds": round(seconds, 1), "rows": found, "verdict": held} | best.report.to_dict()
    lines = [f"{'yes' if true else 'NO '} {what}" for what, true in held.items()]
    said = Text("\n".join([*lines, f"{method} on {backend}: chosen and judged in {seconds:.0f} s"]))
    show(data, json_path, curve_table(best.report), heat_map(best.report), table(found), said)
    raise typer.Exit(0 if all(held.values()) else 1)


def _splits(spec: lyra.ModelSpec) -> dict[int, lyra.HeadSplit]:
    return {item.layer: item.split for item in spec.splits}


if __name__ == "__main__":
    run_script(main)
