"""How fast MHA, GQA and MQA are: a layer's prefill and decode, in turns, against what the machine can read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from lyra.spec.attention import AttentionSpec
from lyra.speed.measure import alternate, floor_seconds, probe, ratio
from lyra.speed.row import Contestant, Floor
from lyra.speed.workers import Workers

from .cache import calculate_kv_cache_size
from .language_model import LMSpec
from .parameters import kind, projections

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
FLOAT32 = 4


@dataclass(frozen=True)
class Load:
    """What a layer is given in a phase: rows, and tokens, which in decoding are those of the cache and the new one."""

    batch: int
    tokens: int


def floor(spec: AttentionSpec, phase: Phase, load: Load) -> Floor:
    """What no implementation of a layer can avoid, in float32.

    Read: the weights, and in decoding keys and values. Operations: two for each weight and token, and the attention's.
    """
    counts = projections(spec)
    weights = counts.qkv + counts.o
    new = 1 if phase == "decode" else load.tokens
    cached = calculate_kv_cache_size(
        1, spec.num_key_value_heads, load.tokens - new, spec.head_dim, load.batch, "float32"
    )
    own = attention_operations(spec, phase, load)
    return Floor(weights * FLOAT32 + cached, 2 * weights * new * load.batch + own)


def attention_operations(spec: AttentionSpec, phase: Phase, load: Load) -> int:
    """Operations of scores and weighted values: two each for every query head, visible key and element of a head."""
    new = 1 if phase == "decode" else load.tokens
    seen = sum(range(load.tokens - new + 1, load.tokens + 1))
    return 4 * spec.num_attention_heads * spec.head_dim * seen * load.batch


def measure(
    spec: AttentionSpec,
    kv_heads: Sequence[int],
    loads: Mapping[Phase, Load],
    backends: Sequence[str],
    workers: Workers,
    rounds: int = 15,
    moved: Callable[[str, int, int], None] = lambda *_: None,
) -> list[dict[str, Any]]:
    """A row for each phase, backend and number of KV heads: seconds, how many times faster than the first, the floor.

    The kinds of one phase and backend take turns; faster is the median of the ratios of their rounds, with quartiles.
    floor_faster is what the floors alone would give.
    """
    rates, rows = probe(workers), list[dict[str, Any]]()
    races = [(phase, backend) for phase in loads for backend in backends]
    for number, (phase, backend) in enumerate(races):
        moved(f"{phase}, {backend}", number, len(races))
        specs = [spec.replace(num_key_value_heads=heads) for heads in kv_heads]
        found = in_turns(backend, phase, [one.to_dict() for one in specs], loads[phase], workers, rounds)
        floors = [floor(one, phase, loads[phase]) for one in specs]
        least = [floor_seconds(one, rates) for one in floors]
        for place, heads in enumerate(kv_heads):
            rows.append(
                {
                    "phase": phase,
                    "backend": backend,
                    "kind": kind(spec.num_attention_heads, heads),
                    "kv_heads": heads,
                    **found[place],
                    "floor": least[place],
                    "floor_faster": least[0] / least[place],
                    "read": floors[place].read,
                    "operations": floors[place].operations,
                    "attention_operations": attention_operations(specs[place], phase, loads[phase]),
                }
            )
    return rows


def repeating(
    spec: AttentionSpec,
    kv_heads: Sequence[int],
    load: Load,
    backends: Sequence[str],
    workers: Workers,
    rounds: int = 9,
) -> list[dict[str, Any]]:
    """What a decode step costs more, where keys and values are first repeated for every query head: a row for each
    backend and number of KV heads but MHA's. slower is the median of the ratios of rounds, with quartiles.
    """
    rows = []
    for backend in backends:
        for heads in (one for one in kv_heads if one < spec.num_attention_heads):
            one = spec.replace(num_key_value_heads=heads)
            listed = [_contestant(backend, what, one.to_dict(), load) for what in ("repeated_decode", "decode")]
            found = alternate(listed, rounds, workers)
            workers.drop()
            repeated, own = (list(column) for column in zip(*found, strict=True))
            middle, low, high = ratio(own, repeated)
            name = kind(spec.num_attention_heads, heads)
            rows.append(
                {"backend": backend, "kind": name, "kv_heads": heads, "slower": middle, "low": low, "high": high}
            )
    return rows


def model_steps(
    spec: LMSpec, kv_heads: Sequence[int], load: Load, backend: str, workers: Workers, rounds: int = 9
) -> list[dict[str, float]]:
    """For each number of KV heads a language model's decode step: seconds, and how many times faster than the first."""
    specs = [spec.replace(num_kv_heads=heads).to_dict() for heads in kv_heads]
    return in_turns(backend, "model_decode", specs, load, workers, rounds)


def in_turns(
    backend: str, what: str, specs: Sequence[dict[str, Any]], load: Load, workers: Workers, rounds: int
) -> list[dict[str, float]]:
    """Time one function of the backend's module for every spec, in turns."""
    contestants = [_contestant(backend, what, one, load) for one in specs]
    times = [list(column) for column in zip(*alternate(contestants, rounds, workers), strict=True)]
    workers.drop()
    found = []
    for own in times:
        middle, low, high = ratio(own, times[0])
        found.append({"seconds": median(own), "faster": middle, "low": low, "high": high})
    return found


def _contestant(backend: str, what: str, spec: Mapping[str, Any], load: Load) -> Contestant:
    """One function of the backend's module, as a contestant."""
    framework: Any = backend
    make = f"lyra.studies.{backend}_speed:{what}"
    return Contestant(what, framework, make, {"batch": load.batch, "tokens": load.tokens, "spec": spec})
