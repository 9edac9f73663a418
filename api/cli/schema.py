"""`lyra schema`: the JSON Schema of what Lyra reads and writes."""

from __future__ import annotations

from enum import StrEnum
from importlib.resources import files
from typing import Annotated

import typer


class Described(StrEnum):
    """What there is a schema of."""

    spec = "spec"
    report = "report"


FOLDERS = {Described.spec: "lyra.spec", Described.report: "lyra.conformance.report"}


def schema(
    of: Annotated[Described, typer.Argument(help="Specs in TOML and JSON files, or what `conform --json` writes.")],
) -> None:
    """Print the JSON Schema of spec files or of reports."""
    typer.echo((files(FOLDERS[of]) / "schema.json").read_text(encoding="utf-8"), nl=False)
