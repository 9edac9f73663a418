"""How fast MHA, GQA and MQA are: a layer's prefill and decode, in turns, against what the machine can read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from statistics import median
from typing import Any, Literal

from lyra.spec.attention import AttentionSpec
from lyra.speed.measure import alternate, floor_seconds, probe, ratio
from lyra.speed.row import Contestant, Floor
from lyra.speed.workers import Workers

from . import timed
from .cache import calculate_kv_cache_size
from .parameters import kind, projections

Phase = Literal["prefill", "decode"]
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
    weights = sum(projections(spec)[part] for part in "qkvo")
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
    races = list(product(loads, backends))
    specs = [spec.replace(num_key_value_heads=heads) for heads in kv_heads]
    for number, (phase, backend) in enumerate(races):
        moved(f"{phase}, {backend}", number, len(races))
        load = loads[phase]
        turns = in_turns(backend, phase, [layer.to_dict() for layer in specs], load, workers, rounds)
        floors = [floor(layer, phase, load) for layer in specs]
        least = [floor_seconds(limit, rates) for limit in floors]
        rows += [
            {
                "phase": phase,
                **_named(layer, backend),
                **times,
                "floor": seconds,
                "floor_faster": least[0] / seconds,
                "read": limit.read,
                "operations": limit.operations,
                "attention_operations": attention_operations(layer, phase, load),
            }
            for layer, times, limit, seconds in zip(specs, turns, floors, least, strict=True)
        ]
    return rows


def repeating(
    spec: AttentionSpec, kv_heads: Sequence[int], load: Load, backends: Sequence[str], workers: Workers, rounds: int = 9
) -> list[dict[str, Any]]:
    """What a decode step costs more, where keys and values are first repeated for every query head: a row for each
    backend and number of KV heads but MHA's. slower is the median of the ratios of rounds, with quartiles.
    """
    rows = []
    for backend, heads in product(backends, kv_heads):
        if heads < spec.num_attention_heads:
            layer = spec.replace(num_key_value_heads=heads)
            work = [_contestant(backend, what, layer.to_dict(), load) for what in ("repeated_decode", "decode")]
            repeated, plain = alternate(work, rounds, workers)
            workers.drop()
            middle, low, high = ratio(plain, repeated)
            rows.append({**_named(layer, backend), "slower": middle, "low": low, "high": high})
    return rows


def in_turns(
    backend: str, what: str, specs: Sequence[dict[str, Any]], load: Load, workers: Workers, rounds: int = 9
) -> list[dict[str, float]]:
    """Seconds of one work of `timed` for every spec, in turns, and how many times faster than the first each is."""
    times = alternate([_contestant(backend, what, spec, load) for spec in specs], rounds, workers)
    workers.drop()
    ratios = [ratio(own, times[0]) for own in times]
    return [
        {"seconds": median(own), "faster": faster, "low": low, "high": high}
        for own, (faster, low, high) in zip(times, ratios, strict=True)
    ]


def _named(layer: AttentionSpec, backend: str) -> dict[str, Any]:
    """What a row is of."""
    heads = layer.num_key_value_heads
    return {"backend": backend, "kind": kind(layer.num_attention_heads, heads), "kv_heads": heads}


def _contestant(backend: str, what: str, spec: Mapping[str, Any], load: Load) -> Contestant:
    """The work of `timed`, as a contestant."""
    framework: Any = backend
    options = {"what": what, "framework": backend, "spec": spec, **asdict(load)}
    return Contestant(what, framework, f"{timed.__name__}:work", options)
