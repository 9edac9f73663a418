"""An edit of source text by a pattern of syntax: where it goes is a definition's name, what it changes a small pattern.

Text is compared as `ast.unparse` writes it, source and pattern alike, so layout, comments, quotes, needless parentheses
and trailing commas do not matter. ast-grep matches: `$A` stands for any one node, `$$$A` for any number of arguments or
statements, the same name twice for the same text twice; both may stand in the replacement too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ast_grep_py import SgNode, SgRoot

VARIABLE = re.compile(r"\$\$\$([A-Z][A-Z0-9_]*)?|\$([A-Z_][A-Z0-9_]*)")
HOLDER = re.compile(r"__(any|all)_([A-Z0-9_]*)__")
LOOSE = (
    ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Lambda, ast.NamedExpr, ast.Await, ast.Yield
)  # fmt: skip
"""Expressions that need parentheses where they take the place of a name."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class PatternError(ValueError):
    """A pattern that is no Python, or that its definition does not have exactly once."""


def canonical(text: str) -> str:
    """A pattern or a replacement as `ast.unparse` writes it. Raises PatternError for what is no Python."""
    try:
        tree = ast.parse(VARIABLE.sub(_holder, text.strip("\n")))
    except SyntaxError as error:
        raise PatternError(f"{text!r} is no Python: {error.msg}") from None
    alone = tree.body[0] if len(tree.body) == 1 else tree
    written = ast.unparse(alone.value if isinstance(alone, ast.Expr) else tree)
    return HOLDER.sub(lambda held: ("$$$" if held[1] == "all" else "$") + held[2], written)


def _holder(variable: re.Match[str]) -> str:
    """The name that stands for a variable while Python reads the pattern."""
    many, single = variable.groups()
    return f"__any_{single}__" if single else f"__all_{many or ''}__"


def variables(text: str) -> set[str]:
    """The variables of a pattern, each with its dollars."""
    return {found[0] for found in VARIABLE.finditer(text)}


def check(find: str, replace: str, given: Sequence[str] = ()) -> None:
    """Raises PatternError for a pattern that is not one expression or statement, and for a variable it doesn't bind."""
    patterns = [canonical(pattern) for pattern in (find, *given)]
    for pattern in patterns:
        if len(ast.parse(VARIABLE.sub(_holder, pattern)).body) != 1:
            raise PatternError(f"the pattern {pattern!r} is not one expression or statement")
    needed = variables(canonical(replace))
    unbound = needed - variables(" ".join(patterns)) | needed & {"$_", "$$$"}
    if unbound:
        raise PatternError(f"the pattern {find!r} does not bind {', '.join(sorted(unbound))} of the replacement")


def definitions(source: str) -> dict[str, str]:
    """All functions and classes of a module by their dotted names, those within others too, each as canonical text."""
    return {name: ast.unparse(node) for name, node, _ in _definitions(ast.parse(source), "")}


def _definitions(parent: ast.AST, within: str) -> Iterator[tuple[str, Definition, list[Any]]]:
    """Every definition below a node: its dotted name, itself, the list that it stands in."""
    for _, field in ast.iter_fields(parent):
        for node in field if isinstance(field, list) else [field]:
            if isinstance(node, Definition):
                assert isinstance(field, list)
                yield within + node.name, node, field
            if isinstance(node, ast.AST):
                yield from _definitions(node, f"{within}{node.name}." if isinstance(node, Definition) else within)


def edited(source: str, definition: str, find: str, replace: str, given: Sequence[str] = ()) -> str:
    """A module's source with the one match in a definition replaced; with `definition` empty, the one in the module.

    `given` are patterns that match once there before it: they change nothing, but bind variables. Raises
    PatternError where a pattern matches nothing there or more than once, and where no Python comes out.
    """
    tree = ast.parse(source)
    if not definition:
        return ast.unparse(_parsed(_replaced(ast.unparse(tree), find, replace, given)))
    for name, node, siblings in list(_definitions(tree, "")):
        if name == definition:
            place = siblings.index(node)
            siblings[place : place + 1] = _parsed(_replaced(ast.unparse(node), find, replace, given)).body
            return ast.unparse(tree)
    raise PatternError(f"there is no function or class {definition!r}")


def _parsed(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except SyntaxError as error:
        raise PatternError(f"the replacement gives no Python: {error.msg} in {(error.text or '').strip()!r}") from None


def _replaced(text: str, find: str, replace: str, given: Sequence[str]) -> str:
    """Canonical text with the one match of a pattern replaced. Raises PatternError."""
    replace, root = canonical(replace), SgRoot(text, "python").root()
    bound: dict[str, str] = {}
    for pattern in (*given, find):
        match, more = _match(root, _filled(canonical(pattern), bound))
        bound |= more
    body = ast.parse(VARIABLE.sub(_holder, replace)).body
    filled = _filled(replace, bound)
    if len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, LOOSE):
        filled = f"({filled})"
    return root.commit_edits([match.replace(_indented(filled, _indent(match)))])


def _match(root: SgNode, pattern: str) -> tuple[SgNode, dict[str, str]]:
    """The one match of a pattern, and what its variables stand for there. Raises PatternError."""
    matches = root.find_all(pattern=pattern)
    if len(matches) != 1:
        problem = f"is ambiguous: it matches {len(matches)} times" if matches else "is dead: it matches nothing"
        raise PatternError(f"the pattern {pattern!r} {problem}")
    return matches[0], {name: _bound(matches[0], name) for name in variables(pattern) - {"$_", "$$$"}}


def _bound(match: SgNode, name: str) -> str:
    """The text that a variable stands for, as it would stand at the left margin."""
    if name.startswith("$$$"):
        nodes = match.get_multiple_matches(name[3:])
        kept = [_outdented(node) for node in nodes if node.kind() != ","]
        return (", " if len(kept) < len(nodes) else "\n").join(kept)
    node = match.get_match(name[1:])
    assert node is not None
    written = _outdented(node)
    try:
        loose = isinstance(ast.parse(written, mode="eval").body, LOOSE)
    except SyntaxError:
        loose = False
    return f"({written})" if loose else written


def _filled(text: str, bound: Mapping[str, str]) -> str:
    """A pattern or a replacement with what is bound in the place of its variables."""
    for name, value in bound.items():
        if not value:
            quoted = re.escape(name)
            text = re.sub(rf"{quoted}, |, {quoted}\b|{quoted}\b", "", text)

    def value_of(variable: re.Match[str]) -> str:
        line = variable.string[: variable.start()].rpartition("\n")[2]
        return _indented(bound.get(variable[0], variable[0]), " " * (len(line) - len(line.lstrip())))

    return VARIABLE.sub(value_of, text)


def _indent(node: SgNode) -> str:
    """What the line that a node begins in is indented by."""
    line = node.get_root().root().text().splitlines()[node.range().start.line]
    return line[: len(line) - len(line.lstrip())]


def _outdented(node: SgNode) -> str:
    return node.text().replace(f"\n{_indent(node)}", "\n")


def _indented(text: str, indent: str) -> str:
    return text.replace("\n", f"\n{indent}")
