"""lyra choose: which heads a context is worth most to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from lyra.checkpoint import cache_folder
from lyra.choosing import Point, Report, choose_split
from lyra.choosing.figures import choice_figure, shade
from lyra.choosing.objective import Objective
from lyra.choosing.ranking import Method
from lyra.quantities import size
from lyra.spec.errors import InputError
from lyra.studies.figures import FORMATS, save
from lyra.terminal import new_table

from .files import check_files
from .options import MOST_TOKENS, BackendName, Dtype, JsonPath, load_model, model_source, read_text
from .output import head_list, show

Paths = list[Path] | None
SUFFIXES = (".txt", ".md", ".rst")
"""What is read of a folder of texts."""


def choose(
    model: Annotated[
        str | None,
        typer.Argument(help="A folder, a .gguf file, gemma-3-270m or a hub id; else LYRA_MODEL or the extra."),
    ] = None,
    heads: Annotated[int, typer.Option(metavar="N", min=1, help="How many query heads go to Lyra, in all.")] = 2,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="N heads in every global layer instead.")] = False,
    texts: Annotated[
        Paths,
        typer.Option(metavar="DIR|FILE", help="Texts to choose on; may be repeated. Else some that come with Python."),
    ] = None,
    held_out: Annotated[
        Paths, typer.Option(metavar="DIR|FILE", help="Texts to judge the choice on; else every third text.")
    ] = None,
    objective: Annotated[Objective, typer.Option(help="What the heads are for.")] = "both",
    method: Annotated[Method, typer.Option(help="A few gradients, or every choice measured.")] = "gradient",
    kv_aligned: Annotated[
        bool, typer.Option("--kv-aligned", help="Whole GQA groups only: no KV head serves both streams.")
    ] = False,
    context_tokens: Annotated[
        int, typer.Option(metavar="N", min=2, max=MOST_TOKENS, help="How much of a text is the context.")
    ] = 512,
    live_tokens: Annotated[
        int, typer.Option(metavar="N", min=2, max=MOST_TOKENS, help="How many tokens are scored behind it.")
    ] = 128,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.toml", help="Write the splits, for --split and lyra.load."),
    ] = None,
    progress: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep what is measured here until the end; else in the cache."),
    ] = None,
    plot: Annotated[
        Paths, typer.Option(metavar="PATH", help="Draw curve and heads: a .png or .svg file; may be repeated.")
    ] = None,
    backend: BackendName = "torch",
    dtype: Dtype = "float32",
    json_path: JsonPath = None,
) -> None:
    """Choose the heads that read contexts: by gradients or by trying them, on texts, and judge them on others.

    Interrupted, it goes on where it was when it is started again.
    """
    from lyra.progress import steps

    sides = [None if paths is None else text_files(paths) for paths in (texts, held_out)]
    read = [file for side in sides for file in side or ()]
    kept = progress or cache_folder() / "choosing"
    check_files(output, *(plot or ()), json_path=json_path, inputs=(model_source(model), *read), folders=(kept,))
    wrong = [str(path) for path in plot or () if path.suffix not in FORMATS]
    if wrong or (output is not None and output.suffix != ".toml"):
        raise InputError(
            f"cannot write {wrong or str(output)}: pictures end in {' or '.join(FORMATS)}, splits in .toml"
        )
    given, apart = (None if side is None else {str(file): read_text(str(file)) for file in side} for side in sides)
    loaded = load_model(model, backend, dtype)
    with steps("Choosing heads") as move:
        chosen = choose_split(
            loaded,
            given,
            heads=heads,
            per_layer=per_layer,
            objective=objective,
            method=method,
            kv_aligned=kv_aligned,
            held_out=apart,
            context_tokens=context_tokens,
            live_tokens=live_tokens,
            progress=kept,
            on_progress=move,
        )
    report = chosen.report
    for path in plot or ():
        save(choice_figure(report), path)
    if output is not None:
        chosen.save(output)
    show(report.to_dict(), json_path, curve_table(report), heat_map(report), _notes(report))


def text_files(paths: Sequence[Path]) -> list[Path]:
    """The files that are named, and those of folders that end in .txt, .md or .rst. Raises InputError."""
    files: list[Path] = []
    for path in paths:
        found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]
        if not found:
            raise InputError(f"the folder {str(path)!r} has no file that ends in {', '.join(SUFFIXES)}")
        files += found
    twice = sorted({str(file) for file in files if files.count(file) > 1})
    if twice:
        raise InputError(f"the text {twice[0]!r} is named twice; name each once")
    return files


def curve_table(report: Report) -> Table:
    """What every number of heads is worth on held-out documents, and what it costs."""
    title = f"{report.choice.model}: what heads are worth on {len(report.documents['held_out'])} held-out documents"
    table = new_table(title, caption=_caption(report), caption_justify="left")
    table.add_column("heads", justify="right", style="bold")
    table.add_column("next one")
    for kind in report.kinds:
        table.add_column(f"{kind}\nNLL, gain", justify="right")
    table.add_column("context /\n1k tokens", justify="right")
    before: Point | None = None
    for index, point in enumerate(report.curve):
        cells = [f"{point.held_out[kind]:.3f} {share(report, point, kind)}" for kind in report.kinds]
        style = "bold green" if index == report.chosen else None
        table.add_row(f"{point.heads}", _added(point, before), *cells, size(point.bytes_per_1000_tokens), style=style)
        before = point
    return table


def share(report: Report, point: Point, kind: str) -> str:
    """The share of all heads' gain on held-out documents, for people."""
    value = report.share(point, "held_out", kind)  # type: ignore[arg-type]
    return f"{value:>5.0%}" if value == value else "    -"


def heat_map(report: Report) -> Text:
    """What each head gains alone on the choosing documents, layer by layer; the chosen ones in brackets."""
    gains, chosen = report.alone["score"], report.point.splits
    top = max(float(abs(gains).max()), 1e-9)
    text = Text("\nGain of each head alone, in % of all heads' gain; [chosen]\n", style="bold")
    text.append("layer    " + "".join(f"{head:^9}" for head in range(gains.shape[1])) + "\n", style="bold")
    for layer, row in zip(report.choice.layers, gains, strict=True):
        text.append(f"{layer:>5}    ")
        for head, gain in enumerate(row):
            marked = layer in chosen and head in chosen[layer].lyra_q_heads
            cell = f"{shade(gain / top)}{gain:+.0%}"
            text.append(f"[{cell}]".center(9) if marked else cell.center(9), style="bold green" if marked else "")
        text.append("\n")
    return text


def _added(point: Point, before: Point | None) -> str:
    """The heads that a point has and the one before it has not, as layer.head."""
    old = {(layer, head) for layer, split in before.splits.items() for head in split.lyra_q_heads} if before else set()
    new = [
        (layer, head)
        for layer, split in point.splits.items()
        for head in split.lyra_q_heads
        if (layer, head) not in old
    ]
    return ", ".join(f"{layer}.{head}" for layer, head in new) or "none"


def _caption(report: Report) -> str:
    choice = report.choice
    return (
        f"Mean NLL in nats behind a context of {choice.context_tokens} tokens, and the gain in % of all heads' gain. "
        f"Heads are layer.head, in the order of the method '{choice.method}' for {choice.objective}."
    )


def _notes(report: Report) -> Text:
    lines = [f"layer {layer}: heads {head_list(split.lyra_q_heads)}" for layer, split in report.point.splits.items()]
    return Text(f"Chosen on {', '.join(report.documents['choosing'])}: {'; '.join(lines)}.\n")
