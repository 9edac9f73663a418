"""Damaged context files, drawn by a seed, and what loading makes of them: the fuzzer of the context's file.

    python tests/context_damage.py --count 10000 --seed 0

A damaged file is refused with a ContextError in one line that names it, or it loads as what was saved: layers, mask,
positions, tokens and fingerprint, bit for bit. Nothing else is allowed: not another context ("wrong"), not another
exception ("raw"), not more than SECONDS ("hung"), not more than BYTES of memory ("huge").

Some files are damaged by someone who forms the digests anew ("crafted"), or are older than digests ("older"). What such
a file holds nobody can know; but it is refused in a line too, or loads, in the same time and memory.
"""

from __future__ import annotations

import argparse
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.append(str(Path(__file__).parent))  # where Python is told to look in no script's folder
from context_damage_kinds import KINDS, older, picked, resealed
from small_contexts import make_context, make_fingerprint

from lyra.spec import ContextError, StaticContext, UncheckedContextWarning
from lyra.spec.storage import Int8, Values

SECONDS, BYTES = 5.0, 1 << 30
"""What loading one of these files, each of less than 100 KB, may take."""

STATES = ("sealed", "sealed", "sealed", "sealed", "crafted", "older")
"""What is done to a file besides, drawn evenly from these: nothing, digests formed anew, or none."""


def contexts() -> dict[str, StaticContext]:
    """Small contexts of every kind: three storages, rows, masked slots, several blocks, no tokens, no RoPE, nothing."""
    plain, rows = make_context(6), StaticContext.stack([make_context(5), make_context(3, seed=1)])
    bare = make_fingerprint(tokenizer=None, bos=None)
    unturned = make_fingerprint(attention=bare.attention.replace(rope=None))
    one_head = make_context(4, kv_heads=(2,)).take({1: (2,)})
    return {
        "float32": plain,
        "far": plain.moved(100_000),
        "rows": rows,
        "bfloat16": rows.astype("bfloat16"),
        "int8": plain.astype("int8"),
        "composed": make_context(4).astype("int8") + make_context(5, seed=2).astype("int8"),
        "int8 rows": StaticContext.stack([make_context(2).astype("int8"), make_context(7, seed=3).astype("int8")]),
        "no tokens": replace(plain, tokens=None, fingerprint=bare),
        "no rope": replace(plain, fingerprint=unturned),
        "one head": one_head,
        "empty": make_context(0, batch=3),
    }


class Outcome(NamedTuple):
    """What became of a file: "same", "refused", "loads" (only what has no digest, or a forged one), or a fault."""

    verdict: str
    kind: str
    state: str
    detail: str


class Hung(BaseException):
    """Loading took too long."""


def damaged_files(count: int, seed: int) -> Iterator[tuple[str, str, StaticContext, bytes]]:
    """Kind of damage, state, the context that was saved, and the damaged file."""
    originals = []
    with tempfile.TemporaryDirectory() as folder:
        for number, context in enumerate(contexts().values()):
            context.save(Path(folder) / str(number))
            originals.append((context, (Path(folder) / str(number)).read_bytes()))
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        context, whole = picked(originals, rng)
        damage, state = KINDS[index % len(KINDS)], picked(STATES, rng)
        file = damage(older(whole) if state == "older" else whole, rng)
        yield damage.__name__, state, context, resealed(file) if state == "crafted" else file


def outcome(path: Path, kind: str, state: str, context: StaticContext) -> Outcome:
    """Load one file, within the limits."""
    try:
        with limits(), warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", UncheckedContextWarning)
            loaded = StaticContext.load(path)
            loaded.describe()
    except ContextError as error:
        clear = str(error).startswith(f"{path}: ") and str(error).isprintable() and len(str(error)) < 2000
        return Outcome("refused" if clear else "raw", kind, state, str(error))
    except Hung:
        return Outcome("hung", kind, state, traceback.format_exc(limit=-3))
    except MemoryError:
        return Outcome("huge", kind, state, traceback.format_exc(limit=-3))
    except Exception:
        return Outcome("raw", kind, state, traceback.format_exc(limit=-3))
    if same(loaded, context):
        return Outcome("same", kind, state, "")
    return Outcome("wrong" if state == "sealed" else "loads", kind, state, repr(loaded))


def same(one: StaticContext, other: StaticContext) -> bool:
    """Whether two contexts mean the same, bit for bit."""

    def bits(values: Values | np.ndarray | None) -> list[tuple[Any, ...]]:
        parts = [values.codes, values.scales, values.blocks] if isinstance(values, Int8) else [values]
        return [(part.dtype, part.shape, part.tobytes()) if part is not None else () for part in parts]

    def meaning(context: StaticContext) -> list[Any]:
        arrays = [context.mask, context.positions, context.tokens]
        arrays += [values for layer in context.layers.values() for values in layer[1:]]
        return [context.fingerprint, context.kv_heads, *(bits(array) for array in arrays)]

    return meaning(one) == meaning(other)


@contextmanager
def limits() -> Iterator[None]:
    """SECONDS and BYTES more than the process has now, for what stands within."""

    def too_long(*_: object) -> None:
        raise Hung

    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, before[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcomes(count: int, seed: int, folder: Path) -> list[Outcome]:
    """What becomes of so many damaged files."""
    path = folder / "damaged.safetensors"
    found = []
    for kind, state, context, file in damaged_files(count, seed):
        path.write_bytes(file)
        found.append(outcome(path, kind, state, context))
        path.unlink()
    return found


def main() -> None:
    """Damage many files and say what became of them; exit 1 where one was wrong, raw, hung or huge."""
    parser = argparse.ArgumentParser(description="Damage context files and load them.")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = outcomes(arguments.count, arguments.seed, Path(folder))
    for (state, verdict), number in sorted(Counter((one.state, one.verdict) for one in found).items()):
        print(f"{state:8} {verdict:8} {number:7,}")
    faults = [one for one in found if one.verdict not in {"same", "refused", "loads"}]
    for fault in faults[:20]:
        print(f"\n{fault.verdict}: {fault.kind}, {fault.state}\n{fault.detail}")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
