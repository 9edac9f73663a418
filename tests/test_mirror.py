"""The two backends mirror each other: what PyTorch has for the model, JAX has too, or docs/jax.md says why not.

What both have takes the same things in the same order."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import lyra.backends

ROOT, FOLDERS = Path(__file__).parents[1], ("torch_impl", "jax_impl")


BEYOND = {
    "add": "XLA has no strides: which layout values are in is said",
    "axis": "the same: where head_dim stands",
    "chunk": "compiled code serves few widths, to which tokens are padded",
    "device": "PyTorch's tensors are made where a module is, and move with it",
    "dtype": "PyTorch rounds a context as it takes it in, a tile at a time",
    "everyone": "PyTorch skips work that compiled code does anyway",
    "first": "compiled code knows its cache to be empty by its structure",
    "group": "PyTorch's contexts are spread over processes, which each have a part",
    "numbers": "a spec does not exist in compiled code",
    "positions": "PyTorch shows cosines and sines of a context's own positions",
    "shape": "a spec does not exist in compiled code",
    "sharding": "JAX's arrays are spread over a mesh by what the call says",
}
"""What one framework has beyond the other, behind what both have, and why."""

OTHERWISE = {
    "cache.py LiveCache": "PyTorch's has the size of what it holds, and room behind it; JAX's a capacity and a length",
    "capture.py capture": "a model is Hugging Face's module here, a graph of JAX's own there",
    "families/family.py Family": "Hugging Face's classes here, functions that a decoder is built from there",
    "finite.py finite_layers": "as in capture.py",
    "finite.py locate": "as in capture.py",
    "generate.py generate": "as in capture.py",
    "sampling.py draw": "a generator has a state, a key is folded with the step",
    "sequential.py block_of": "a spec does not exist in compiled code",
    "sharding.py merge_over": "a group of processes, an axis of a mesh",
    "tuning.py tuned_context": "what is tuned stands in modules here, in a tree of parameters there",
}
"""Twins that take other things, and why."""


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


def signatures(file: Path) -> dict[str, list[str]]:
    """What the public functions of a module take, in order, and the fields of its NamedTuples."""
    found = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            arguments = node.args
            found[node.name] = [
                argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
            ]
        elif isinstance(node, ast.ClassDef) and "NamedTuple" in map(ast.unparse, node.bases):
            found[node.name] = [ast.unparse(field.target) for field in node.body if isinstance(field, ast.AnnAssign)]
    return found


def twins() -> dict[str, tuple[list[str], list[str]]]:
    """What both folders have by one name in a file of one name: its arguments or fields, in PyTorch and in JAX."""
    found = {}
    for path in lyra.backends.__path__:
        here, there = (Path(path, folder) for folder in FOLDERS)
        for file in sorted(here.rglob("*.py")):
            name = file.relative_to(here)
            ours = signatures(there / name) if (there / name).exists() else {}
            found |= {
                f"{name.as_posix()} {key}": (own, ours[key]) for key, own in signatures(file).items() if key in ours
            }
    return found


def beyond(one: list[str], other: list[str]) -> list[str] | None:
    """What stands in the longer list behind all of the shorter one; None where they differ before."""
    shorter, longer = sorted((one, other), key=len)
    return longer[len(shorter) :] if longer[: len(shorter)] == shorter else None


def test_twins_take_the_same_in_the_same_order() -> None:
    used = set()
    for name, pair in twins().items():
        more = beyond(*pair)
        if name in OTHERWISE:
            assert more is None or not BEYOND.keys() >= set(more), f"{name} is excused and need not be"
            used.add(name)
            continue
        assert more is not None, f"{name}: {pair}"
        assert set(more) <= BEYOND.keys(), f"{name}: {more}"
        used.update(more)
    assert used == {*BEYOND, *OTHERWISE}, "something is excused that is not there"


def test_another_order_and_an_argument_between_are_seen() -> None:
    assert beyond(["q", "k"], ["k", "q"]) is None
    assert beyond(["q", "live", "k"], ["q", "k"]) is None
    assert beyond(["q"], ["q", "device"]) == beyond(["q", "device"], ["q"]) == ["device"]
