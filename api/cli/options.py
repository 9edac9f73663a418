"""Options and arguments that several commands share, and what they stand for."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lyra.errors import ModelError
from lyra.model import Mode
from lyra.spec.attention import Live, Positions
from lyra.spec.errors import SpecError
from lyra.spec.split import HasHeads, HeadSplit

if TYPE_CHECKING:
    from lyra.model import Model

ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A folder, a .gguf file, gemma-3-270m or a hub id; else LYRA_MODEL or the extra gemma-270m.",
    ),
]
BackendName = Annotated[
    str, typer.Option("--backend", "-b", help="torch, jax, another installed one, or module:Class.")
]
Dtype = Annotated[str, typer.Option(help="What the model computes in: float32, or what else the backend knows.")]
JsonPath = Annotated[
    Path | None, typer.Option("--json", metavar="PATH", help="Write the table as JSON; - prints it instead.")
]
LyraKV = Annotated[int | None, typer.Option("--lyra-kv", metavar="N", help="The last N KV heads go to Lyra.")]
LyraQ = Annotated[
    str | None, typer.Option("--lyra-q", metavar="HEADS", help="These query heads go to Lyra: 2,3 or 8-15.")
]
SplitFile = Annotated[
    str | None,
    typer.Option("--split", metavar="FILE", help="The splits of a file that `lyra choose` wrote, or of a preset."),
]
ShareKV = Annotated[bool, typer.Option("--share-kv", help="Let a split cut a GQA group: its KV head serves both.")]
ContextPath = Annotated[Path | None, typer.Option("--context", "-c", help="A context to attach: what capture wrote.")]
LiveMode = Annotated[
    Live | None, typer.Option(help="What Lyra heads see of the live tokens; else causal, in sequential mode none.")
]
ModeName = Annotated[
    Mode, typer.Option(help="Who reads the context: heads of the model's own attention, or blocks behind it.")
]
GateOption = Annotated[
    float | None, typer.Option(metavar="G", help="How far blocks are open, in sequential mode; else 0.25.")
]
PositionMode = Annotated[Positions, typer.Option(help="Whether live tokens follow the context or lie over it.")]
Override = Annotated[bool, typer.Option("--override", help="Attach a context of another model all the same.")]


def numbers(text: str) -> tuple[int, ...]:
    """The numbers of a list such as 0,1,8-15. Raises SpecError."""
    found: list[int] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise SpecError(f"{part!r} is no number and no range; write a list such as 0,1,8-15")
        found.extend(range(int(first), int(last if dash else first) + 1))
    return tuple(found)


def chosen_split(
    spec: HasHeads, lyra_kv: int | None, lyra_q: str | None, share_kv: bool, file: str | None = None
) -> HeadSplit | str | None:
    """The split that --lyra-kv or --lyra-q asks for, or the file of --split; None where none is given.

    Raises SpecError.
    """
    if sum(one is not None for one in (lyra_kv, lyra_q, file)) > 1:
        raise SpecError("--lyra-kv, --lyra-q and --split are ways to say one thing; give one of them")
    if file is not None:
        return file
    if lyra_kv is not None:
        return HeadSplit.last_kv(spec, lyra_kv)
    if lyra_q is None:
        return None
    try:
        return HeadSplit(lyra_q_heads=numbers(lyra_q), share_kv=share_kv).bind(spec)
    except SpecError as error:
        raise SpecError(str(error).replace("Set share_kv=True", "Give --share-kv")) from None


def read_text(source: str) -> str:
    """The text of a file, or of standard input for "-". Raises ModelError where it is no text."""
    try:
        return sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{source} is no UTF-8 text ({error})") from None


def load_model(name: str | None, backend: str, dtype: str, mode: Mode = "parallel") -> Model:
    """The model of the shared options, with a line on standard error while it loads."""
    from rich.console import Console

    from lyra.checkpoint import resolve
    from lyra.loading import load

    folder = resolve(name)  # first, because a conversion or a download shows progress of its own
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers would draw over the line below
    with Console(stderr=True).status(f"Loading {folder.name}"):
        return load(folder, backend=backend, dtype=dtype, mode=mode)
