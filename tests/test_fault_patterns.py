"""Edits by patterns of syntax: what they match, what they make of it; layout and locals' names don't matter."""

from __future__ import annotations

import ast
import builtins
import dis
import importlib
import io
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType

import pytest

from lyra.conformance.faults.catalogue import Fault, backend_package, catalogue, sources, with_fault
from lyra.conformance.faults.patterns import PatternError, canonical, check, definitions, edited

SOURCE = '''
class Layer:
    """Ünïcode · →"""
    def run(self, x, *, scale=1.0):
        for index in range(3):
            if index:
                self.see(index)  # noqa
            y = (x + index) * 2
        return self.output(y, x + 1, mask = "m",)

def run(): pass
'''


def body(find: str, replace: str, *given: str) -> list[str]:
    """The statements of Layer.run after an edit, without its header."""
    lines = edited(SOURCE, "Layer.run", find, replace, given).splitlines()
    return [line.removeprefix("        ") for line in lines[4:-3]]


def test_definitions_have_dotted_names() -> None:
    assert list(definitions(SOURCE)) == ["Layer", "Layer.run", "run"]
    assert definitions(SOURCE)["run"] == "def run():\n    pass"


@pytest.mark.parametrize(
    ("find", "replace", "line", "wanted"),
    [
        ("$X + 1", "$X - 1", -1, "return self.output(y, x - 1, mask='m')"),
        ("self.output($Y, $X, $$$R)", "$X * self.output($Y, $$$R)", -1, "return (x + 1) * self.output(y, mask='m')"),
        ("self.output($$$ALL)", "self.other(None, $$$ALL)", -1, "return self.other(None, y, x + 1, mask='m')"),
        ("$A * 2", "$A", -2, "    y = x + index"),
        ("($X + $I) * 2", "$X + $I", -2, "    y = x + index"),
        ("x + index", "x - index", -2, "    y = (x - index) * 2"),
        ("'m'", '"n"', -1, "return self.output(y, x + 1, mask='n')"),
        ("self.see($A)", "self.look($A)", 2, "        self.look(index)"),
        ("return $A", "if $A:\n    return 0\nreturn $A", -3, "if self.output(y, x + 1, mask='m'):"),
    ],
)  # fmt: skip
def test_what_a_pattern_matches_is_replaced(find: str, replace: str, line: int, wanted: str) -> None:
    assert body(find, replace)[line] == wanted


def test_statements_keep_their_depth() -> None:
    made = body("for $I in range($N): $$$BODY", "while True:\n    for $I in range($N):\n        $$$BODY\nbreak_off($I)")
    assert made == [
        "while True:",
        "    for index in range(3):",
        "        if index:",
        "            self.see(index)",
        "        y = (x + index) * 2",
        "break_off(index)",
        "return self.output(y, x + 1, mask='m')",
    ]


def test_given_patterns_bind_what_the_pattern_does_not_meet() -> None:
    assert body("self.see($I)", "self.see($I, $Y, $X)", "$Y = ($X + $I) * 2")[2] == "        self.see(index, y, x)"
    with pytest.raises(PatternError, match=r"'\$Y = \$A / 2' is dead"):
        body("self.see($I)", "self.see($Y)", "$Y = $A / 2")


def test_the_whole_module_is_a_place_too() -> None:
    assert edited("import a\nB = 1\n", "", "B = $A", "B = 2 * $A") == "import a\nB = 2 * 1"


@pytest.mark.parametrize(
    ("find", "replace", "why"),
    [
        ("self.nothing", "self", "is dead"),
        ("index", "i", "is ambiguous: it matches 4 times"),
        ("range(3)", "pass", "gives no Python"),
    ],
)
def test_a_pattern_that_does_not_match_once_is_refused(find: str, replace: str, why: str) -> None:
    with pytest.raises(PatternError, match=why):
        body(find, replace)


def test_what_is_no_pattern() -> None:
    for find, replace, why in [
        ("f(", "g", "no Python"),
        ("f; g", "g", "not one expression or statement"),
        ("f($A)", "$B", r"does not bind \$B"),
        ("f($_)", "$_", r"does not bind \$_"),
        ("f($$$)", "g($$$)", r"does not bind \$\$\$"),
    ]:
        with pytest.raises(PatternError, match=why):
            check(find, replace)
    check("f($A)", "$B", ["$B = $A"])
    assert canonical('f( $A,"b", )[ 0 ]') == "f($A, 'b')[0]"


# every fault of the catalogue, in code of another layout and with other locals


def laid_out_anew(source: str) -> str:
    """The same code with every part of a bracket on a line of its own, and a comment at each."""
    made = []
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        depth += (
            (token.string in ("(", "[", "{")) - (token.string in (")", "]", "}")) if token.type == tokenize.OP else 0
        )
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            made.append((token.type, token.string))
        if depth and token.string == "," and token.type == tokenize.OP:
            made += [(tokenize.COMMENT, "# here"), (tokenize.NL, "\n")]
    return tokenize.untokenize(made)


def assigned(node: ast.FunctionDef) -> set[str]:
    """The locals of a function and of those in it, parameters excepted."""
    inside = list(ast.walk(node))
    kept = {arg.arg for arg in inside if isinstance(arg, ast.arg)}
    kept |= {name for part in inside if isinstance(part, ast.Nonlocal | ast.Global) for name in part.names}
    return {part.id for part in inside if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)} - kept


class Renamed(ast.NodeTransformer):
    """The same code with other names for the locals of every function: for `known` ones, and, if so, for new ones."""

    def __init__(self, known: Mapping[str, set[str]], new: bool = False) -> None:
        self.known, self.new = known, new
        self.within: tuple[str, ...] = ()
        self.names: dict[str, str] = {}

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        """Methods have the name of their class before their own."""
        self.within = (*self.within, node.name)
        self.generic_visit(node)
        self.within = self.within[:-1]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Rename what a function and the functions in it assign."""
        self.within = (*self.within, node.name)
        before, known = self.names, self.known.get(".".join(self.within), set())
        new = {name for name in assigned(node) - known if self.new and not name.startswith("other_")} - set(before)
        self.names = before | {name: f"other_{name}" for name in known} | {name: f"new_{name}" for name in new}
        self.generic_visit(node)
        self.names = before
        self.within = self.within[:-1]
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """Another name for a local."""
        return ast.copy_location(ast.Name(self.names.get(node.id, node.id), node.ctx), node)


def locals_of(source: str) -> dict[str, set[str]]:
    """The locals of every function of a module, by its dotted name."""
    found = {}
    for name, text in definitions(source).items():
        node = ast.parse(text).body[0]
        if isinstance(node, ast.FunctionDef):
            found[name] = assigned(node)
    return found


def unknown_names(source: str) -> set[str]:
    """Names that a module's functions read and that are neither its own nor Python's."""
    tree = ast.parse(source)
    known = {*dir(builtins), "__annotations__", "__file__"}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            known.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            known |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    known |= {
        one.id for part in tree.body if not isinstance(part, ast.FunctionDef) for one in ast.walk(part)
        if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)
    }  # fmt: skip
    return {name for code in codes(compile(source, "module", "exec")) for name in read(code)} - known


def codes(code: CodeType) -> Iterator[CodeType]:
    """A code object and all in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def read(code: CodeType) -> Iterator[str]:
    """The global names that a code object reads."""
    return (
        str(instruction.argval)
        for instruction in dis.get_instructions(code)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    )


@pytest.mark.parametrize("backend", ["torch", "jax", "torch-module", "jax-module"])
def test_faults_do_not_depend_on_layout_and_names_of_locals(backend: str) -> None:
    before = sources(backend_package(backend))
    anew = {file: laid_out_anew(source) for file, source in before.items()}
    assert all(ast.dump(ast.parse(anew[file])) == ast.dump(ast.parse(source)) for file, source in before.items())
    known = {file: locals_of(source) for file, source in before.items()}
    renamed = {file: ast.unparse(Renamed(known[file]).visit(ast.parse(source))) for file, source in before.items()}
    assert sum(renamed[file] != source for file, source in before.items()) > len(before) / 2
    for fault in faults_of(backend):
        made = with_fault(fault, backend, before)
        changed = [file for file, source in made.items() if source != before[file]]
        moved = with_fault(fault, backend, anew)
        assert [moved[file] for file in changed] == [made[file] for file in changed], fault.id
        other = with_fault(fault, backend, renamed)
        for file in changed:
            wanted = Renamed(known[file], new=True).visit(ast.parse(made[file]))
            assert ast.unparse(Renamed({}, new=True).visit(ast.parse(other[file]))) == ast.unparse(wanted), fault.id
            assert not unknown_names(made[file]), fault.id


def faults_of(backend: str) -> list[Fault]:
    """The faults that a backend can have."""
    return [fault for fault in catalogue().values() if backend in fault.backends]


# why mutants survive


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_what_explains_a_survivor_stands_where_it_says(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every entry names one place of the code, and speaks of a change there only."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    survivors = importlib.import_module("survivors")
    assert survivors.explanations(backend)  # it raises FaultError for a place that is not there
    text = ast.unparse(ast.parse(sources(backend_package(backend))["partial.py"]))
    assert survivors.explained(backend, "partial.py", text.replace("SCORES_PER_TILE = 1 << 22", "SCORES_PER_TILE = 7"))
    assert not survivors.explained(backend, "partial.py", text.replace("softcap is not None", "softcap is None"))
    assert not survivors.explained(backend, "cache.py", text)
