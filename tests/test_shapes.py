"""The axes in the signatures of the numeric core are checked, call by call, while these tests run; and nowhere else."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import CORE, is_checked
from jaxtyping import TypeCheckError

from lyra.spec import array_types
from lyra.spec.uncertain import Uncertain, exact, linear, rotate, scores


def functions(module: str) -> dict[str, ast.FunctionDef]:
    """The functions of a module, by name."""
    tree = ast.parse(Path(str(importlib.import_module(module).__file__)).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("module", CORE)
def test_every_function_of_the_core_is_checked(module: str) -> None:
    loaded = importlib.import_module(module)
    assert [name for name in functions(module) if not is_checked(getattr(loaded, name))] == []


@pytest.mark.parametrize("module", CORE)
def test_every_annotation_of_the_core_is_understood(module: str) -> None:
    """One that names what is not there, or an axis twice, would be taken for `Any` and hold nobody to anything."""
    names = vars(importlib.import_module(module))
    for function in functions(module).values():
        arguments = [*function.args.args, *function.args.kwonlyargs]
        for annotation in (*(argument.annotation for argument in arguments), function.returns):
            assert annotation is not None, function.name
            if set(array_types.__all__) & {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}:
                eval(ast.unparse(annotation), dict(names))


@pytest.mark.parametrize("module", CORE)
def test_no_array_of_the_core_is_without_its_axes(module: str) -> None:
    """Arrays in a mapping, such as weights by name, have axes of their own."""
    for function in functions(module).values():
        bare = {"Array", "Tensor", "ndarray", "Uncertain"}
        for argument in (*function.args.args, *function.args.kwonlyargs):
            found = ast.unparse(argument.annotation).removesuffix(" | None").rpartition(".")[2]
            assert found not in bare, f"{module}.{function.name}: {argument.arg} does not say its axes"


def test_a_call_with_axes_that_do_not_fit_is_refused() -> None:
    x, weight = exact(np.ones((2, 3, 8))), np.ones((5, 8))
    assert linear(x, weight, None).shape == (2, 3, 5)
    for wrong in (weight.T, weight[None]):
        with pytest.raises(TypeCheckError, match="weight"):
            linear(x, wrong, None)
    with pytest.raises(TypeCheckError, match="bias"):
        linear(x, weight, np.ones(8))
    with pytest.raises(TypeCheckError, match="angle"):
        rotate(x, np.ones((2, 3, 8)))
    q, k = exact(np.ones((2, 4, 3, 8))), exact(np.ones((2, 4, 5, 8)))
    assert scores(q, k, 1.0, None, np.ones((2, 1, 3, 5), dtype=bool)).shape == (2, 4, 3, 5)
    with pytest.raises(TypeCheckError, match="visible"):
        scores(q, k, 1.0, None, np.ones((2, 1, 5, 3), dtype=bool))
    with pytest.raises(TypeCheckError, match="visible"):
        scores(q, k, 1.0, None, np.ones((2, 1, 3, 5)))
    with pytest.raises(TypeCheckError, match="q"):
        scores(Uncertain(q.value.astype(int), q.variance), k, 1.0, None, np.ones((2, 1, 3, 5), dtype=bool))


def test_a_result_with_other_axes_than_promised_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("lyra.spec.uncertain")
    monkeypatch.setattr(module, "_rows_times", lambda x, weight: x @ weight.T[..., :1])
    with pytest.raises(TypeCheckError, match=r"return value of lyra\.spec\.uncertain\.linear"):
        linear(exact(np.ones((2, 3, 8))), np.ones((5, 8)), None)


@pytest.mark.usefixtures("unchecked")
def test_checks_are_taken_off_where_they_are_in_the_way() -> None:
    assert not is_checked(linear)
    assert not is_checked(importlib.import_module("lyra.spec.reference").linear)


def test_nobody_else_needs_or_loads_what_checks() -> None:
    """A user has none of it, and an annotation costs nothing."""
    code = (
        "import sys, lyra.spec.gradients, lyra.spec.reference_sequential as module\n"
        "assert not {'jaxtyping', 'beartype'} & set(sys.modules)\n"
        "assert not hasattr(module.join, '__wrapped__')"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
