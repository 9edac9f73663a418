"""The application: commands that turn known errors into one line and exit code 2."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Annotated, Any

import typer
from rich.text import Text
from safetensors import SafetensorError
from typer.core import TyperCommand, TyperGroup

from lyra.backends.protocol import BackendNotFound
from lyra.errors import CheckpointError, ModelError
from lyra.spec.errors import ContextError, InputError, NotFiniteError, SpecError, TextWarning, UncheckedContextWarning
from lyra.terminal import console, prepare_terminal, visible

KNOWN_ERRORS = (
    BackendNotFound,
    CheckpointError,
    ContextError,
    InputError,
    ModelError,
    NotFiniteError,
    SpecError,
    ImportError,
    MemoryError,
    NotImplementedError,
    OSError,
    SafetensorError,
)
"""What a user can put right: shown as one line. Anything else is a defect of Lyra and keeps its traceback."""

NOTICES = (TextWarning, UncheckedContextWarning)
"""Warnings that are for whoever gave the command: shown as one line each."""

USAGE = 2

PIPE_CLOSED = 141
"""The exit code where nobody reads the output any more, as `| head` does: that of commands which SIGPIPE ends."""


@contextmanager
def errors_in_a_line() -> Iterator[None]:
    """A known error becomes one red line on standard error and exit code 2, a notice a yellow one; behind a
    closed pipe there is silence.
    """
    try:
        with warnings.catch_warnings():
            for kind in NOTICES:
                warnings.simplefilter("always", kind)
            warnings.showwarning = partial(_show_warning, warnings.showwarning)
            yield
        _flush()  # here, where a full disk can still be told
    except BrokenPipeError:
        _drop_output()
        raise typer.Exit(PIPE_CLOSED) from None
    except KNOWN_ERRORS as error:
        try:
            _flush()
        except OSError:
            _drop_output()
        console(stderr=True).print(Text(f"error: {one_line(error)}", style="red"), soft_wrap=True)
        raise typer.Exit(USAGE) from None


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    said = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if isinstance(error, MemoryError):
        said = f"there is not enough memory{f' ({said})' if said else ''}; ask for less at once"
    return visible(said or type(error).__name__)


def _flush() -> None:
    if sys.stdout is not None:  # it is None where it was closed from the start
        sys.stdout.flush()


def _drop_output() -> None:
    """What is still to be written to standard output goes nowhere, or it would fail once more when Python ends."""
    with suppress(OSError, ValueError):  # a stream of a test has no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_warning(others: Callable[..., None], message: Warning | str, kind: type[Warning], *where: Any) -> None:
    """One of the NOTICES as a line of its own; `others` shows the rest."""
    if issubclass(kind, NOTICES):
        console(stderr=True).print(Text(f"warning: {visible(str(message))}", style="yellow"), soft_wrap=True)
    else:
        others(message, kind, *where)


class Group(TyperGroup):
    """A group of commands that reports known errors."""

    def main(self, *args: Any, **options: Any) -> Any:
        """The entry point."""
        prepare_terminal()
        return super().main(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with errors_in_a_line():
            return super().invoke(ctx)


class Command(TyperCommand):
    """A command that does the same by itself, and takes no option twice unless it is one for several values."""

    def main(self, *args: Any, **options: Any) -> Any:
        """The entry point."""
        prepare_terminal()
        return super().main(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with errors_in_a_line():
            return super().invoke(ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments. Raises typer.BadParameter for an option whose first value would have no effect."""
        given = self.make_parser(ctx).parse_args(args=list(args))[-1]
        for parameter in given:
            if (
                parameter.param_type_name == "option"
                and not getattr(parameter, "multiple", False)
                and given.count(parameter) > 1
            ):
                raise typer.BadParameter(
                    "it is given twice; give it once", ctx=ctx, param_hint=" / ".join(map(repr, parameter.opts))
                )
        return super().parse_args(ctx, args)


SETTINGS: dict[str, Any] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    help="Attention heads that read a static context: one spec, several backends.",
    **SETTINGS,
)


def run_script(command: Callable[..., Any]) -> None:
    """Run a script of one command, which meets its user as Lyra's own commands do."""
    alone = typer.Typer(**SETTINGS)
    alone.command(cls=Command)(command)
    alone()


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"lyra {version('lyra')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
