"""`lyra gqa` as a person runs it, and a text to train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from lyra.cli import application
from lyra.studies.corpus import default_text


def data_of(line: str, folder: Path) -> tuple[Any, str]:
    """What a line writes as JSON into the folder, and what it prints."""
    written = folder / "written.json"
    done = CliRunner().invoke(application(), ["gqa", *line.split(), "--json", str(written)])
    assert done.exit_code == 0, done.output
    return json.loads(written.read_text()), done.stdout


def write_text(folder: Path, characters: int) -> Path:
    """The beginning of Python's language reference as a file."""
    path = folder / "text.txt"
    path.write_text(default_text()[:characters], encoding="utf-8")
    return path
