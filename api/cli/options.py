"""Options and arguments that several commands share, and what they stand for."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lyra.errors import ModelError
from lyra.model import Mode
from lyra.spec.attention import Live, Positions
from lyra.spec.errors import InputError, SpecError
from lyra.spec.split import HasHeads, HeadSplit

if TYPE_CHECKING:
    from lyra.model import Model

MOST_TOKENS = 1_000_000
"""More than any of these models reads or writes at once: where options that count tokens end."""

MOST_THREADS = 4096

PART = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")
"""A number or a range of a list."""


def finite(value: float | None) -> float | None:
    """A number that is one. Raises typer.BadParameter for NaN and infinity, which compare with no limit."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value


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
    float | None,
    typer.Option(metavar="G", callback=finite, help="How far blocks are open, in sequential mode; else 0.25."),
]
PositionMode = Annotated[
    Positions | None, typer.Option(help="Whether live tokens follow the context or lie over it; else continue.")
]
Override = Annotated[bool, typer.Option("--override", help="Attach a context of another model all the same.")]


def ranges(text: str) -> list[range]:
    """The numbers and ranges of a list such as 0,1,8-15, not yet counted out. Raises SpecError."""
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        read = PART.fullmatch(part)
        if read is None:
            raise SpecError(f"{part!r} is no number and no range; write a list such as 0,1,8-15")
        first, last = int(read[1]), int(read[2] or read[1])
        if last < first:
            raise SpecError(f"{part!r} is a range that ends before it begins; write {last}-{first}")
        found.append(range(first, last + 1))
    return found


def counted_out(found: Iterable[range], below: int, of: str) -> tuple[int, ...]:
    """Every number of some ranges, all of which are to be less than `below`. Raises SpecError."""
    found = list(found)
    beyond = [
        f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
        for numbers in found
        if numbers[-1] >= below
    ]
    if beyond:
        raise SpecError(f"there are no {of} {', '.join(beyond)}; expected 0 to {below - 1}")
    return tuple(number for numbers in found for number in numbers)


def numbers(text: str, below: int, of: str = "numbers") -> tuple[int, ...]:
    """The numbers of a list such as 0,1,8-15, all of them less than `below`. Raises SpecError."""
    return counted_out(ranges(text), below, of)


def chosen_split(
    spec: HasHeads, lyra_kv: int | None, lyra_q: str | None, share_kv: bool, file: str | None = None
) -> HeadSplit | str | None:
    """The split that --lyra-kv or --lyra-q asks for, or the file of --split; None where none is given.

    Raises SpecError.
    """
    check_split_options(lyra_kv, lyra_q, share_kv, file)
    if file is not None:
        return file
    if lyra_kv is not None:
        return HeadSplit.last_kv(spec, lyra_kv)
    if lyra_q is None:
        return None
    heads = numbers(lyra_q, spec.num_attention_heads, "query heads")
    try:
        return HeadSplit(lyra_q_heads=heads, share_kv=share_kv).bind(spec)
    except SpecError as error:
        raise SpecError(str(error).replace("Set share_kv=True", "Give --share-kv")) from None


def check_split_options(lyra_kv: int | None, lyra_q: str | None, share_kv: bool, file: str | None) -> None:
    """Refuse options that contradict each other or have no effect, before a model is there. Raises SpecError."""
    if sum(way is not None for way in (lyra_kv, lyra_q, file)) > 1:
        raise SpecError("--lyra-kv, --lyra-q and --split are ways to say one thing; give one of them")
    if share_kv and lyra_q is None:
        raise SpecError("--share-kv would have no effect: it lets the heads of --lyra-q cut a group; leave it out")
    if lyra_q is not None:
        ranges(lyra_q)


def check_attaching(context: Path | None, mode: Mode, gate: float | None, asks_for: Mapping[str, object]) -> None:
    """Refuse options that say how a context is attached, by name, where there is none. Raises InputError."""
    if context is None:
        given = {**asks_for, "gate": gate, "mode": None if mode == "parallel" else mode}
        idle = [f"--{name}" for name, value in given.items() if value is not None and value is not False]
        if idle:
            raise InputError(
                f"{' and '.join(idle)} would have no effect: no context is attached; give one with --context"
            )
    if gate is not None and mode == "parallel":
        raise InputError("--gate would have no effect: it is that of blocks; give --mode sequential, or leave it out")


def model_source(name: str | None) -> str | None:
    """What --model stands for: a name, or that of LYRA_MODEL."""
    return os.environ.get("LYRA_MODEL") if name is None else name


def text_source(source: str) -> str | None:
    """The file of a text that is no standard input."""
    return None if source == "-" else source


def read_text(source: str) -> str:
    """The text of a file, or of standard input for "-". Raises ModelError where it is no text."""
    try:
        data = typer.get_binary_stream("stdin").read() if source == "-" else Path(source).read_bytes()
        return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8").read()  # with \n for every end of a line
    except UnicodeDecodeError as error:
        name = "standard input" if source == "-" else repr(source)
        raise ModelError(f"{name} is no UTF-8 text ({error})") from None


def load_model(name: str | None, backend: str, dtype: str, mode: Mode = "parallel") -> Model:
    """The model of the shared options, with a line on standard error while it loads."""
    from lyra.checkpoint import resolve
    from lyra.loading import load
    from lyra.progress import steps

    folder = resolve(name)  # first, because a conversion or a download shows progress of its own
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers would draw over the line below
    with steps(f"Loading {folder.name}"):
        return load(folder, backend=backend, dtype=dtype, mode=mode)
