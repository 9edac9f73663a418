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
import faulthandler
import itertools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from queue import SimpleQueue
from time import monotonic
from typing import Annotated, Literal, get_args

import parso.python.tree  # noqa: F401 (before Cosmic Ray, which imports parso's modules in an order that fails)
import typer
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from reach import Function, callers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from survivors import explained

from lyra.cli.app import run_script
from lyra.cli.conform import ProfileName
from lyra.cli.faults import FaultyBackend
from lyra.conformance.faults.catalogue import Edit, Fault, FaultError, backend_package, sources
from lyra.conformance.faults.kill import kill
from lyra.conformance.faults.patterns import definitions
from lyra.conformance.faults.workers import TURN
from lyra.conformance.launch import prepare_environment
from lyra.conformance.session import PROFILES
from lyra.spec.clauses import statements
from lyra.spec.files import write_atomically

KEY = ("backend", "file", "definition", "before", "after")
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
    """One change of one statement of a backend's file, as `ast.unparse` writes both.

    definition  the innermost function or class that is changed; "" for a statement outside all
    old, new    the text of that definition or statement, before and after
    source      the whole file with the change in it
    """

    backend: str
    file: str
    definition: str
    old: str = field(repr=False)
    new: str = field(repr=False)
    source: str = field(repr=False)

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from others while code moves: backend, file, definition, the lines before and after."""
        old, new = self.old.splitlines(), self.new.splitlines()
        changes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
        _, a, b, c, d = next(change for change in changes if change[0] != "equal")
        lines = (" ".join(line.strip() for line in part) for part in (old[a:b], new[c:d]))
        return (self.backend, self.file, self.definition, *lines)

    @property
    def name(self) -> str:
        """Where it is and what it does, in one line."""
        backend, file, definition, before, after = self.key
        return f"{backend} {file}{definition and f' {definition}'}: {before} → {after}"

    def fault(self) -> Fault:
        """The mutant as a fault: one edit of the whole definition."""
        breaks = tuple(name for name, one in statements().items() if one.clause in MODULES[self.file])
        where = f"{self.file.removesuffix('.py')}.{self.definition}" if self.definition else self.file
        edit = Edit(where=where, find=self.old, replace=self.new)
        return Fault(id=self.name, breaks=breaks, does=self.new, backends={self.backend: (edit,)})

    def asked(self, known: dict[Function, set[str]]) -> str:
        """The properties that can notice it, as an --only expression: those that call its function; "" for none."""
        function = self.file, self.definition
        return " or ".join(sorted(known.get(function, ()))) if self.old.startswith(("def ", "@")) else "test"


def mutants(backend: str, file: str) -> Iterator[Mutant]:
    """Every mutant of a module that is another program: changes of annotations and of texts are left out."""
    written = sources(backend_package(backend)).get(file, "")
    source = ast.unparse(ast.parse(written))
    seen = {meaning(source)}
    for operator in OPERATORS:
        made = get_operator(operator)()
        for occurrence in itertools.count():
            changed = mutate_code(source, made, occurrence)
            if changed is None:
                break
            with suppress(SyntaxError):
                if (means := meaning(changed)) not in seen:
                    seen.add(means)
                    changed = ast.unparse(ast.parse(changed))
                    yield Mutant(backend, file, *difference(source, changed), source=changed)


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


def difference(source: str, changed: str) -> tuple[str, str, str]:
    """The innermost definition that differs, "" for none, and its text, or that of a statement, before and after."""
    old, new = definitions(source), definitions(changed)
    if differing := [name for name, text in old.items() if new.get(name) != text]:
        name = max(differing, key=lambda name: name.count("."))
        return name, old[name], new[name]
    pairs = zip(ast.parse(source).body, ast.parse(changed).body, strict=True)
    before, after = next((a, b) for a, b in pairs if ast.dump(a) != ast.dump(b))
    return "", ast.unparse(before), ast.unparse(after)


def outcome(mutant: Mutant, profile: str, only: str) -> tuple[Outcome, str]:
    """What becomes of a mutant, and by which property of those that `only` names; what takes too long ends."""
    prepare_environment()
    faulthandler.dump_traceback_later(TIMEOUT, exit=True)
    try:
        verdict = kill(mutant.fault(), mutant.backend, profile, only=only)
    except FaultError as error:
        if "cannot be imported" in str(error):
            return "raised", "import"
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()
    if verdict.status == "survived":
        return "survived", profile
    return ("killed" if verdict.status == "killed" else "raised"), verdict.property or ""


class Lane:
    """One mutant after another, in a process that is replaced where one does not end or ends it."""

    def __init__(self) -> None:
        self._fresh()

    def _fresh(self) -> None:
        context = get_context("spawn")  # not forked: threads of a framework do not survive that
        self._pool, self._tried = ProcessPoolExecutor(1, context, max_tasks_per_child=TURN), 0

    def outcome(self, mutant: Mutant, profile: str, only: str) -> tuple[Outcome, str]:
        """What becomes of a mutant.

        A process that ends has perhaps only met its limit of what can stay mapped, sooner where mutants survive and all
        of the suite is compiled for them: its mutant is tried again in a fresh one.
        """
        started, self._tried = monotonic(), self._tried + 1
        try:
            return self._pool.submit(outcome, mutant, profile, only).result()
        except BrokenProcessPool:
            alone = self._tried == 1
            self._fresh()
        if monotonic() - started >= TIMEOUT:
            return "timed out", ""
        return ("raised", "the process ended") if alone else self.outcome(mutant, profile, only)


def try_all(work: Sequence[tuple[Mutant, str]], workers: int, profile: str, ledger: Ledger) -> None:
    """Try every mutant on the properties that `only` of its pair names, and enter its outcome in the ledger."""
    lanes: SimpleQueue[Lane] = SimpleQueue()
    for _ in range(workers):
        lanes.put(Lane())

    def tried(task: tuple[Mutant, str]) -> tuple[Mutant, Outcome, str]:
        lane = lanes.get()
        try:
            return task[0], *lane.outcome(task[0], profile, task[1])
        finally:
            lanes.put(lane)

    with ThreadPoolExecutor(workers) as threads:
        futures = [threads.submit(tried, task) for task in work]
        for future in track(as_completed(futures), "mutants", total=len(work), console=Console(stderr=True)):
            ledger.enter(*future.result())


class Ledger:
    """The outcomes so far, in a JSON file that is written after each of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        self._entries: dict[tuple[str, ...], dict[str, str]] = {
            tuple(one[name] for name in KEY): one for one in entries
        }

    def enter(self, mutant: Mutant, result: Outcome, by: str) -> None:
        """Keep an outcome, in the place of an older one of the same mutant."""
        entry = dict(zip(KEY, mutant.key, strict=True)) | {"outcome": result, "by": by}
        self._entries[mutant.key] = entry
        write_atomically(self._path, json.dumps(list(self._entries.values()), indent=1, ensure_ascii=False).encode())

    def outcome(self, mutant: Mutant) -> str:
        """What became of a mutant."""
        return self._entries[mutant.key]["outcome"]

    def done(self, mutant: Mutant, profile: str) -> bool:
        """Whether a mutant need not be tried: it was noticed, or it survived this profile or a larger one."""
        entry = self._entries.get(mutant.key)
        return entry is not None and (entry["outcome"] != "survived" or PROFILES[entry["by"]].includes(profile))


def report(console: Console, work: Sequence[Mutant], ledger: Ledger) -> int:
    """Print the table and the survivors without an explanation; how many there are."""
    outcomes = get_args(Outcome)
    table = Table("backend", "module", "mutants", *outcomes, title="Mutants")
    for backend, file in dict.fromkeys((one.backend, one.file) for one in work):
        mine = [ledger.outcome(one) for one in work if (one.backend, one.file) == (backend, file)]
        table.add_row(backend, file, str(len(mine)), *(str(mine.count(kind)) for kind in outcomes))
    console.print(table)
    survivors = [one for one in work if ledger.outcome(one) == "survived"]
    holes = [one for one in survivors if not explained(one.backend, one.file, one.source)]
    for one in holes:
        backend, file, definition, before, after = one.key
        console.print(f"unexplained: {backend} {file} {definition}\n  - {before}\n  + {after}", markup=False)
    noticed = len(work) - len(survivors)
    told = f"{len(survivors) - len(holes)} explained, {len(holes)} unexplained"
    console.print(f"{noticed} of {len(work)} noticed, {told}")
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
    tasks = [(one, one.asked(known[one.backend])) for one in rest]
    for one, only in tasks:
        if not only:
            ledger.enter(one, "survived", profile.value)
    try_all([task for task in tasks if task[1]], workers, profile.value, ledger)
    raise typer.Exit(1 if report(console, work, ledger) else 0)


if __name__ == "__main__":
    run_script(main)
