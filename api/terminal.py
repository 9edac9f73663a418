"""How anything gets to a terminal: one kind of console and table, in which what comes from outside is only text.

Names of files, metadata of contexts, messages of backends: no markup is read in them, and characters that would move
the cursor, colour the screen, turn the direction of writing or end the line are shown instead of sent.
"""

from __future__ import annotations

import codecs
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import Any, TextIO, TypeVar

from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

Row = TypeVar("Row")

CONTROLS = r"\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
"""Control characters, marks that turn the direction of writing, separators of lines, and halves of characters, which
stand for bytes of a name that are no UTF-8."""

ALL_CONTROLS = re.compile(f"[{CONTROLS}]")
INNER_CONTROLS = re.compile(rf"(?![\t\n])[{CONTROLS}]")
"""Those that have no place in text of several lines either."""

SIZES = ("COLUMNS", "LINES", "TERMINAL_WIDTH")
"""What rich and typer read from the environment, and take for whole numbers."""

MOST_COLUMNS = 1000

PLAIN = {
    "│": "|", "─": "-", "×": "x", "±": "+/-", "−": "-", "–": "-", "—": "-", "≥": ">=", "≤": "<=", "→": "->", "…": "...",
    "σ": "sigma", "Δ": "delta", "µ": "u", "█": "#", "▓": "#", "▒": "+", "░": ".", "·": ".", "’": "'",
}  # fmt: skip
"""What stands for our own characters where an encoding lacks them."""

ERRORS = "lyra-plain"
"""The name of what encodes the rest."""


def visible(text: object) -> str:
    """The text in one line, with every control character shown as Python writes it, such as \\x1b and \\n."""
    return ALL_CONTROLS.sub(_shown, str(text))


def paragraphs(text: object) -> str:
    """The same for text of several lines: ends of lines and tabs stay."""
    return INNER_CONTROLS.sub(_shown, str(text))


class SafeConsole(Console):
    """A rich console that takes text for text: no markup, no emoji by name, no control character from a string."""

    def __init__(self, **options: Any) -> None:
        """Takes rich's own options."""
        super().__init__(**{"markup": False, "emoji": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """A string as text, its control characters shown, so that columns are as wide as what they hold."""
        return super().render_str(paragraphs(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What is printed; here everything passes, whatever it was made as."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(paragraphs(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        """The reader of a pipe is gone: the command ends as such commands do, see `lyra.cli.app`."""
        raise BrokenPipeError


def console(*, stderr: bool = False, **options: Any) -> Console:
    """A console on standard output or standard error."""
    return SafeConsole(stderr=stderr, **options)


def new_table(title: object = None, **options: Any) -> Table:
    """A table with its title, which may have several lines, on the left. Cells that are strings are taken for text."""
    shown = None if title is None else paragraphs(title)
    return Table(title=shown, title_justify="left", **options)


def table_of(
    title: object,
    rows: Iterable[Row],
    columns: Mapping[str, Callable[[Row], str]],
    *,
    left: int = 1,
    group: Callable[[Row], object] | None = None,
    caption: str | None = None,
    **of_columns: Any,
) -> Table:
    """A table with a row for each of `rows`: of every column its head, and what it says of a row.

    The first `left` columns are on the left, the very first bold; numbers follow on the right. Where `group` gives
    something else than for the row before, a line is drawn. `of_columns` are rich's own options of every column.
    """
    table = new_table(title, caption=caption, caption_justify="left")
    for number, name in enumerate(columns):
        justify: JustifyMethod = "left" if number < left else "right"
        table.add_column(name, style=None if number else "bold", justify=justify, **of_columns)
    for _, members in groupby(rows, group or (lambda row: None)):
        for row in members:
            table.add_row(*(cell(row) for cell in columns.values()))
        table.add_section()
    return table


def tolerate(*streams: TextIO) -> None:
    """Let streams print every character: as itself, in plain letters or, where it has none, as Python writes it.

    Without this, a box or the name of a file ends a command where the encoding is ASCII.
    """
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ERRORS)


def prepare_terminal() -> None:
    """The same for standard output and standard error; and sizes in the environment that are none are forgotten."""
    tolerate(*(stream for stream in (sys.stdout, sys.stderr) if stream is not None))
    for name in SIZES:
        size = os.environ.get(name, "")
        if not (size.isascii() and size.isdigit() and 0 < int(size[:9]) <= MOST_COLUMNS):
            os.environ.pop(name, None)


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """What encoders call for characters that they do not have."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wanted = error.object[error.start : error.end]
    return "".join(PLAIN.get(character) or _escape(character) for character in wanted), error.end


def _shown(found: re.Match[str]) -> str:
    return _escape(found[0])


def _escape(character: str) -> str:
    return (
        character.encode("ascii", "backslashreplace").decode("ascii") if ord(character) > 127 else repr(character)[1:-1]
    )


codecs.register_error(ERRORS, _plain)
