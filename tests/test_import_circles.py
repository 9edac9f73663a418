"""No module of a package imports itself in a circle, imports within functions counted."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGES = (
    "lyra.spec",
    "lyra.conformance",
    "lyra.backends",
    "lyra.choosing",
    "lyra.studies",
    "lyra.speed",
    "lyra.cli",
)
API = "lyra"
"""The front door's own modules; the packages above are others'."""


def files(package: str) -> dict[str, Path]:
    """The modules of a package and of those within it, by name, where none of them has a place of its own above."""
    found = {}
    for place in importlib.import_module(package).__path__:
        for file in Path(place).rglob("*.py"):
            parts = file.relative_to(place).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            if package != API or not name.startswith("lyra.cli"):
                found[name] = file
    return found


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import that may run: not those that only a type checker follows."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports(ast.Module(node.orelse, []))
        else:
            yield from imports(node)


def imported(name: str, source: str, is_package: bool, known: set[str]) -> set[str]:
    """The modules of `known` that a module imports."""
    package = name if is_package else name.rpartition(".")[0]
    found: set[str] = set()
    for node in imports(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        level = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
        base = ".".join([*level, *([node.module] if node.module else [])])
        for alias in node.names:
            whole = f"{base}.{alias.name}"
            found.add(whole if whole in known else base)
    return found & known - {name}


def circle(modules: dict[str, Path]) -> list[str]:
    """The modules of a circle of imports; nothing where there is none."""
    graph = {
        name: imported(name, file.read_text(encoding="utf-8"), file.name == "__init__.py", set(modules))
        for name, file in modules.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_of_imports_in_a_package(package: str) -> None:
    assert circle(files(package)) == []


def test_nor_in_the_front_door() -> None:
    """`lyra` itself hands out what its modules hold, on demand; nothing of it may need it."""
    modules = files(API)
    assert {"lyra.model", "lyra.loading"} <= set(modules)
    assert circle({name: file for name, file in modules.items() if name != API}) == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("from . import b", "from . import a"),
        ("from .b import x", "def f():\n    from .a import y"),
        ("import t.b", "class C:\n    def f(self):\n        import t.a"),
        ("from t import b", "if True:\n    from t.a import y"),
        ("from .b import x", "if TYPE_CHECKING:\n    from .c import y\nelse:\n    from .a import y"),
    ],
)
def test_a_circle_is_seen(tmp_path: Path, first: str, second: str) -> None:
    files = {"t": "", "t.a": first, "t.b": second, "t.c": "from . import a"}
    modules = {}
    for name, source in files.items():
        modules[name] = tmp_path / ("__init__.py" if name == "t" else f"{name[2:]}.py")
        modules[name].write_text(source)
    assert {"t.a", "t.b"} <= set(circle(modules))


def test_what_only_a_type_checker_follows_is_no_circle(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("from .b import x")
    (tmp_path / "b.py").write_text("if TYPE_CHECKING:\n    from .a import y")
    assert circle({f"t.{name}": tmp_path / f"{name}.py" for name in "ab"}) == []
