"""The two backends mirror each other: what PyTorch has for the model, JAX has too, or docs/jax.md says why not."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import lyra.backends

ROOT, FOLDERS = Path(__file__).parents[1], ("torch_impl", "jax_impl")


def public(file: Path) -> set[str]:
    """The public functions and classes of a module."""
    kinds = ast.FunctionDef | ast.ClassDef
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return {node.name for node in body if isinstance(node, kinds) and not node.name.startswith("_")}


def test_every_public_function_has_its_twin_or_a_reason() -> None:
    theirs, ours = (sorted(Path(path, folder).glob("*.py")) for path in lyra.backends.__path__ for folder in FOLDERS)
    twins = set().union(*map(public, ours))
    page = (ROOT / "docs" / "jax.md").read_text(encoding="utf-8").partition("## What differs")[2]
    excused = {name for row in re.findall(r"^\|(.*?)\|", page, re.MULTILINE) for name in re.findall(r"`([\w.]+)`", row)}
    missing = {file.name: public(file) - twins - excused for file in theirs if file.name not in excused}
    assert {name: lacking for name, lacking in missing.items() if lacking} == {}
    known = {file.name for file in theirs}.union(*map(public, theirs), {"torch_impl"})
    assert excused <= known, "docs/jax.md excuses what is not there"
