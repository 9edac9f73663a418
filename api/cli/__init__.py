"""The command line. A module of this package that holds a function, or a typer.Typer, of its own name is a command."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer


def application() -> typer.Typer:
    """The application with every command of this package."""
    import typer

    from .app import Command, app

    commands = {item.callback for item in app.registered_commands}
    groups = [item.typer_instance for item in app.registered_groups]
    for found in pkgutil.iter_modules(__path__):
        command = getattr(importlib.import_module(f"{__name__}.{found.name}"), found.name, None)
        if command is None or command is app or command in commands or command in groups:
            continue
        if isinstance(command, typer.Typer):
            for registered in command.registered_commands:
                registered.cls = Command
            app.add_typer(command, name=found.name)
        else:
            app.command(cls=Command)(command)
    return app


def main() -> None:
    """The entry point of `lyra`."""
    application()()
