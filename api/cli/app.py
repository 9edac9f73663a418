"""The application: one group of commands that turns known errors into one line and exit code 2."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

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


class Group(TyperGroup):
    """A group of commands that reports known errors on standard error."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a known error becomes one red line and exit code 2."""
        try:
            return super().invoke(ctx)
        except KNOWN_ERRORS as error:
            line = "; ".join(str(error).splitlines()) or type(error).__name__
            Console(stderr=True).print(Text(f"error: {line}", style="red"), soft_wrap=True)
            raise typer.Exit(USAGE) from None


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Attention heads that read a static context: one spec, several backends.",
)


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
