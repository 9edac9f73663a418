"""Generic mutation of the numeric modules: does the suite notice changes that nobody chose?

The fault catalogue holds mistakes that a person thought of. Here Cosmic Ray's operators change one token at a time of
every numeric module of a backend, and the conformance suite runs against each mutant. What survives must be explained
in mutants.toml, beside this file; a survivor without an explanation is a hole in the suite, and the exit code is 1.

    python bench/mutants.py --profile smoke --json build/mutants.json
    python bench/mutants.py --profile ci --json build/mutants.json

A run goes on from its JSON file: what was noticed is not tried again, so that the larger profile, which takes minutes
for each survivor, meets only what the smaller one left. A mutant is tried on the properties that call its function;
where none does it survives without a try.
"""

from __future__ import annotations

import ast
import difflib
import json
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic
from typing import Annotated, Any, Literal

import parso.python.tree  # noqa: F401 (before Cosmic Ray, which imports parso's modules in an order that fails)
import typer
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from reach import Function, callers, home, source_of
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lyra.cli.app import run_script
from lyra.cli.conform import ProfileName
from lyra.cli.faults import FaultyBackend
from lyra.conformance.faults.catalogue import Edit, Fault, FaultError, Patch
from lyra.conformance.faults.kill import kill
from lyra.conformance.faults.workers import TURN
from lyra.conformance.launch import prepare_environment
from lyra.conformance.session import PROFILES
from lyra.spec.clauses import statements
from lyra.spec.files import write_atomically

EXPLANATIONS = Path(__file__).with_suffix(".toml")
TIMEOUT = 1800.0
"""Seconds after which a mutant that does not end counts as noticed: many times what a survivor takes."""

MODULES: dict[str, tuple[str, ...]] = {
    "norm.py": ("NORM",),
    "rope.py": ("ROPE",),
    "visibility.py": ("LIVE", "SLIDING", "MASKED"),
    "partial.py": ("TOLERANCE", "SCALE", "MASKED"),
    "heads.py": ("SPLIT",),
    "static.py": ("STATIC", "STORED", "POSITION"),
    "layer.py": ("TOLERANCE", "ORDER"),
    "cache.py": ("LIVE", "BATCH"),
    "shapes.py": ("LIVE", "STATIC", "TOLERANCE"),
    "gradients.py": ("GRAD",),
    "sequential.py": ("SEQUENTIAL",),
    "dtype.py": ("TOLERANCE",),
}
"""The numeric modules, and the clauses whose properties are asked first."""

OPERATORS = [
    f"core/{name}"
    for name in (
        *(f"ReplaceBinaryOperator_{pair}" for pair in (
            "Add_Sub", "Sub_Add", "Mul_Div", "Mul_Add", "Div_Mul", "FloorDiv_Mul", "FloorDiv_Mod", "Mod_FloorDiv",
            "Pow_Mul", "BitAnd_BitOr", "BitOr_BitAnd", "LShift_RShift", "RShift_LShift",
        )),
        *(f"ReplaceComparisonOperator_{pair}" for pair in (
            "Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_LtE", "GtE_Gt", "GtE_Lt", "Eq_NotEq", "NotEq_Eq",
            "Is_IsNot", "IsNot_Is",
        )),
        *(f"ReplaceUnaryOperator_Delete_{one}" for one in ("USub", "Not", "Invert")),
        "AddNot", "NumberReplacer", "RemoveDecorator", "ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceFalseWithTrue",
        "ReplaceTrueWithFalse", "ZeroIterationForLoop", "ReplaceBreakWithContinue", "ReplaceContinueWithBreak",
    )
]  # fmt: skip
"""Cosmic Ray's operators, one or two replacements an operator of Python: others fail in the same ways or not at all."""

Outcome = Literal["killed", "raised", "timed out", "survived"]


@dataclass(frozen=True)
class Mutant:
    """One change of one line; `source` is the whole module with the change in it."""

    backend: str
    file: str
    line: int
    before: str
    after: str
    source: str

    @property
    def name(self) -> str:
        """Where it is and what it does, in one line."""
        return f"{self.backend} {self.file}:{self.line}: {self.before.strip()} → {self.after.strip()}"

    def fault(self) -> Fault:
        """The mutant as a fault: one edit of the whole module."""
        original = source_of(self.backend, self.file)
        breaks = tuple(name for name, one in statements().items() if one.clause in MODULES[self.file])
        patch = Patch(file=self.file, edits=(Edit(find=original, replace=self.source),))
        return Fault(id=self.name, breaks=breaks, does=self.after, backends={self.backend: patch})


def mutants(backend: str, file: str) -> Iterator[Mutant]:
    """Every mutant of a module that is another program: changes of annotations and of texts are left out."""
    source = source_of(backend, file)
    seen = {meaning(source)}
    for operator in OPERATORS:
        made = get_operator(operator)()
        for occurrence in range(10_000):
            changed = mutate_code(source, made, occurrence)
            if changed is None:
                break
            try:
                means = meaning(changed)
            except SyntaxError:
                continue
            if means not in seen:
                seen.add(means)
                yield Mutant(backend, file, *first_difference(source, changed), source=changed)


def meaning(source: str) -> str:
    """The program without what does not run: annotations, whose evaluation is postponed, and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(None)
    return ast.dump(tree)


def first_difference(source: str, changed: str) -> tuple[int, str, str]:
    """Line number, the lines before and the lines after of the first change."""
    old, new = source.splitlines(), changed.splitlines()
    for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag != "equal":
            return a + 1, " ".join(line.strip() for line in old[a:b]), " ".join(line.strip() for line in new[c:d])
    raise ValueError("the sources are equal")


def asked(mutant: Mutant, known: dict[Function, set[str]]) -> str:
    """The properties that can notice a mutant, as an --only expression: those that call its function; "" for none."""
    place = home(mutant.backend, mutant.file, mutant.line)
    return "test" if place is None else " or ".join(sorted(known.get(place, ())))


def outcome(mutant: Mutant, profile: str, only: str) -> tuple[Outcome, str]:
    """What becomes of a mutant, and by which property of those that `only` names."""
    try:
        verdict = kill(mutant.fault(), mutant.backend, profile, only=only)
    except FaultError as error:
        if "cannot be imported" in str(error):
            return "raised", "import"
        raise
    if verdict.status == "survived":
        return "survived", profile
    return ("killed" if verdict.status == "killed" else "raised"), verdict.property or ""


Task = tuple[Mutant, str]
"""A mutant and the properties to ask about it, as an --only expression."""


def worker(line: Connection, profile: str) -> None:
    """Take mutants from the other end until there are none."""
    prepare_environment()
    while (task := line.recv()) is not None:
        mutant, only = task
        line.send(outcome(mutant, profile, only))


class Worker:
    """A process that tries one mutant at a time, and is replaced where one does not end."""

    def __init__(self, profile: str) -> None:
        self.profile = profile
        self.start()

    def start(self) -> None:
        """A fresh process."""
        self.tried = 0
        context = get_context("spawn")
        self.line, other = context.Pipe()
        self.process = context.Process(target=worker, args=(other, self.profile), daemon=True)
        self.process.start()
        other.close()

    def give(self, task: Task | None) -> None:
        """The next mutant, or None to end."""
        if self.tried == TURN:
            self.line.send(None)
            self.start()
        self.tried += 1
        self.task, self.since = task, monotonic()
        self.line.send(task)

    def take(self) -> tuple[Outcome, str] | None:
        """The outcome, if there is one by now.

        A process that ends has perhaps only met its limit of what can stay mapped, sooner where mutants survive and all
        of the suite is compiled for them: its mutant is tried again in a fresh one.
        """
        if self.line.poll():
            try:
                found: tuple[Outcome, str] = self.line.recv()
                return found
            except EOFError:
                fresh = self.tried == 1
                self.start()
                if fresh:
                    return "raised", "the process ended"
                self.give(self.task)
                return None
        if monotonic() - self.since > TIMEOUT:
            self.process.kill()
            self.start()
            return "timed out", ""
        return None


def try_all(work: list[Task], workers: int, profile: str, ledger: Ledger) -> None:
    """Try every mutant and enter its outcome in the ledger."""
    waiting = iter(work)
    busy: list[Worker] = []
    idle = [Worker(profile) for _ in range(workers)]
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("mutants", total=len(work))
        while True:
            while idle and (task := next(waiting, None)) is not None:
                one = idle.pop()
                one.give(task)
                busy.append(one)
            if not busy:
                break
            wait([one.line for one in busy], timeout=1.0)
            for one in list(busy):
                result = one.take()
                if result is not None:
                    ledger.enter(one.task[0], *result)
                    busy.remove(one)
                    idle.append(one)
                    progress.advance(bar)
    for one in idle:
        one.give(None)


class Ledger:
    """The outcomes so far, in a JSON file that is written after each of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def enter(self, mutant: Mutant, result: Outcome, by: str) -> None:
        """Keep an outcome, in the place of an older one of the same mutant."""
        self.entries = [one for one in self.entries if key(one) != key(vars(mutant))]
        fields = {name: value for name, value in asdict(mutant).items() if name != "source"}
        self.entries.append(fields | {"outcome": result, "by": by})
        write_atomically(self._path, json.dumps(self.entries, indent=1, ensure_ascii=False).encode())

    def done(self, mutant: Mutant, profile: str) -> bool:
        """Whether a mutant need not be tried: it was noticed, or it survived this profile or a larger one."""
        entry = next((one for one in self.entries if key(one) == key(vars(mutant))), None)
        return entry is not None and (entry["outcome"] != "survived" or PROFILES[entry["by"]].includes(profile))


def key(fields: dict[str, Any]) -> tuple[str, ...]:
    """What tells one mutant from another while lines move: backend, file, the line before and after."""
    return tuple(str(fields[name]) for name in ("backend", "file", "before", "after"))


def explained(fields: dict[str, Any]) -> bool:
    """Whether mutants.toml says why this one survives: by the line and its change, or for every change of it."""
    return any(
        (one["backend"], one["file"]) == (fields["backend"], fields["file"])
        and one["before"] in fields["before"]
        and ("after" not in one or one["after"] in fields["after"])
        for one in explanations()
    )


@cache
def explanations() -> list[dict[str, str]]:
    """The survivors of mutants.toml."""
    found: list[dict[str, str]] = tomllib.loads(EXPLANATIONS.read_text(encoding="utf-8"))["survivor"]
    return found


def report(console: Console, found: list[dict[str, Any]]) -> int:
    """Print the table and the survivors without an explanation; how many there are."""
    table = Table("backend", "module", "mutants", "killed", "raised", "timed out", "survived", title="Mutants")
    keys = dict.fromkeys((one["backend"], one["file"]) for one in found)
    for backend, file in keys:
        mine = [one["outcome"] for one in found if (one["backend"], one["file"]) == (backend, file)]
        counts = [str(mine.count(kind)) for kind in ("killed", "raised", "timed out", "survived")]
        table.add_row(backend, file, str(len(mine)), *counts)
    console.print(table)
    survivors = [one for one in found if one["outcome"] == "survived"]
    holes = [one for one in survivors if not explained(one)]
    for one in holes:
        console.print(f"unexplained: {one['backend']} {one['file']}:{one['line']}", markup=False)
        console.print(f"  - {one['before']}\n  + {one['after']}", markup=False)
    counts = (len(found) - len(survivors), len(survivors) - len(holes), len(holes))
    console.print("{} of {} noticed, {} explained, {} unexplained".format(counts[0], len(found), *counts[1:]))
    return len(holes)


def main(
    backend: Annotated[list[FaultyBackend] | None, typer.Option(help="May be repeated; both by default.")] = None,
    file: Annotated[list[str] | None, typer.Option(help="A numeric module, may be repeated; all by default.")] = None,
    profile: Annotated[ProfileName, typer.Option(help="How much the suite generates.")] = ProfileName.smoke,
    workers: Annotated[int, typer.Option(min=1, help="How many mutants are tried at once.")] = 2,
    json_path: Annotated[Path, typer.Option("--json", help="The outcome of every mutant.")] = Path(
        "build/mutants.json"
    ),
    listing: Annotated[bool, typer.Option("--list", help="Name the mutants and stop.")] = False,
) -> None:
    """Try every mutant and report; exit code 0 where each is noticed or explained."""
    for name in file or ():
        if name not in MODULES:
            raise typer.BadParameter(f"{name!r} is no numeric module; known: {', '.join(MODULES)}")
    console = Console(width=160)
    work = [
        mutant
        for one in backend or FaultyBackend
        for module in file or MODULES
        for mutant in mutants(one.value, module)
    ]
    if listing:
        for mutant in work:
            console.print(mutant.name, markup=False)
        console.print(f"{len(work)} mutants")
        return
    json_path.parent.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(json_path)
    rest = [one for one in work if not ledger.done(one, profile.value)]
    known = {name: callers(name, profile.value) for name in dict.fromkeys(one.backend for one in rest)}
    tasks = [(one, asked(one, known[one.backend])) for one in rest]
    for one, only in tasks:
        if not only:
            ledger.enter(one, "survived", profile.value)
    try_all([task for task in tasks if task[1]], workers, profile.value, ledger)
    wanted = {key(vars(one)) for one in work}
    raise typer.Exit(1 if report(console, [one for one in ledger.entries if key(one) in wanted]) else 0)


if __name__ == "__main__":
    run_script(main)
