"""The application: commands that turn known errors into one line and exit code 2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from lyra.backends.protocol import BackendNotFound
from lyra.errors import CheckpointError, ModelError
from lyra.spec.errors import ContextError, InputError, SpecError

KNOWN_ERRORS = (
    BackendNotFound,
    CheckpointError,
    ContextError,
    InputError,
    ModelError,
    SpecError,
    ImportError,
    NotImplementedError,
    OSError,
)
"""What a user can put right: shown as one line. Anything else is a defect of Lyra and keeps its traceback."""

USAGE = 2


@contextmanager
def errors_in_a_line() -> Iterator[None]:
    """A known error becomes one red line on standard error and exit code 2."""
    try:
        yield
    except KNOWN_ERRORS as error:
        line = "; ".join(str(error).splitlines()) or type(error).__name__
        Console(stderr=True).print(Text(f"error: {line}", style="red"), soft_wrap=True)
        raise typer.Exit(USAGE) from None


class Group(TyperGroup):
    """A group of commands that reports known errors."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with errors_in_a_line():
            return super().invoke(ctx)


class Command(TyperCommand):
    """A command by itself that does the same."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with errors_in_a_line():
            return super().invoke(ctx)


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
