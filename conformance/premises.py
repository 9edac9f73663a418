"""What a property is about has to come up in its cases: a property whose premise was never met has shown nothing.

Premises that several properties share stand here; one that belongs to a single property stands beside it. Each brings
the tame generator that never meets it: `lyra faults` shows that a property given tame cases is vacuous.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np

from lyra.spec.attention import AttentionSpec, Live
from lyra.spec.bfloat16 import to_bfloat16

from . import tame
from .case import Case, Problem
from .recorded_inputs import RecordedInput
from .scored import scored
from .subject import expected


@dataclass(frozen=True)
class Premise:
    """A condition that a property is named for, looked for in everything that a backend is asked within a check.

    name   how it reads in a table: "a group is cut"
    holds  whether an input of a backend meets it; None where the property says so itself (`Judge.meet`)
    tame   a case as a generator would make it that never meets the premise
    names  what stands in the property's module instead, where it is not in its cases that the premise is met
    """

    name: str
    holds: Callable[[Problem], bool] | None = None
    tame: Callable[[Case], Case] | None = None
    names: Mapping[str, Any] = field(default_factory=dict, compare=False)
    of_calls: Callable[[tuple[int, ...]], bool] | None = None

    def __post_init__(self) -> None:
        if self.tame is None and not self.names:
            raise ValueError(f"premise {self.name!r} says neither by `tame` nor by `names` how it is never met")

    def met_by(self, recorded: RecordedInput) -> bool:
        """Whether an input meets it, found out once."""
        if self.name not in recorded.facts:
            of_problem = self.holds is not None and self.holds(recorded.problem)
            of_calls = self.of_calls is not None and self.of_calls(recorded.calls)
            recorded.facts[self.name] = bool(of_problem or of_calls)
        return recorded.facts[self.name]


# what premises look at


def _real(problem: Problem) -> bool:
    return bool(problem.mask.any())


def several_tokens(problem: Problem) -> bool:
    """Whether a row has two real tokens or more."""
    return bool((problem.mask.sum(axis=1) > 1).any())


def _hides_slots(problem: Problem) -> bool:
    return problem.static is not None and not problem.static.mask.all() and bool(problem.spec.lyra_q_heads)


def visible_slots(problem: Problem) -> int:
    """The most static slots that a row's Lyra heads see; 0 where there is no real token or no Lyra head."""
    if problem.static is None or not problem.spec.lyra_q_heads or not _real(problem):
        return 0
    return int(problem.static.mask.sum(axis=1).max(initial=0))


def _of_own(problem: Problem) -> Problem:
    """What a block that shares a cache is about is in the layer that it shares it with."""
    return problem if problem.own is None else problem.own


def _sees_context(problem: Problem) -> bool:
    return visible_slots(_of_own(problem)) > 0


def _both(spec: AttentionSpec) -> bool:
    return 0 < len(spec.lyra_q_heads) < spec.num_attention_heads


def _cut(problem: Problem) -> bool:
    split = problem.spec.split
    return split is not None and bool(split.cut_kv_heads)


def _behind_window(problem: Problem) -> bool:
    """Whether a real token is W or more positions behind a later one of its row."""
    window = problem.spec.sliding_window
    if window is None:
        return False
    first = np.where(problem.mask, problem.positions, np.iinfo(np.int64).max).min(axis=1)
    last = np.where(problem.mask, problem.positions, -1).max(axis=1)
    return bool((problem.mask.any(axis=1) & (last - first >= window)).any())


def _eps_decides(problem: Problem) -> bool:
    """Whether eps is more than a hundredth of the mean square that it is added to, in a head of a real token."""
    if problem.spec.qk_norm is None:
        return False
    q = expected(problem)["q_proj"].value[problem.mask]
    return bool(((q**2).mean(axis=-1) < 100 * problem.spec.qk_norm.eps).any())


def _block_eps_decides(problem: Problem) -> bool:
    h = problem.x[problem.mask].astype(np.float64)
    return problem.block is not None and bool(((h**2).mean(axis=-1) < 100 * problem.block.norm_eps).any())


def _uncentred(problem: Problem) -> bool:
    x = problem.x[problem.mask]
    return bool(x.size) and (float(np.abs(x).max()) > 1000 or (several_tokens(problem) and _offset(x)))


def _offset(x: np.ndarray) -> bool:
    """Whether tokens have a mean that is large beside how they differ."""
    return bool(np.abs(x.mean(axis=0)).mean() > 1.5 * x.std(axis=0).mean())


def _garbage(problem: Problem) -> bool:
    """Whether something hidden holds a value that would decide whatever it entered."""
    hidden = [problem.x[~problem.mask]]
    if problem.static is not None:
        hidden.append(problem.static.k.swapaxes(1, 2)[~problem.static.mask])
    return any(float(np.abs(part).max(initial=0)) >= 1e4 for part in hidden)


def _rotates(problem: Problem) -> bool:
    return problem.spec.rope is not None and bool((problem.positions[problem.mask] > 0).any())


def _context_at(positions: str) -> Callable[[Problem], bool]:
    """Whether Lyra heads see static tokens whose place the mode decides."""

    def holds(problem: Problem) -> bool:
        spec = problem.spec
        return spec.rope is not None and spec.static.positions == positions and visible_slots(problem) > 0

    return holds


def _sees_live(problem: Problem) -> bool:
    """Whether Lyra heads see live tokens, their own or others."""
    sees = problem.spec.static.sees
    return sees.earlier or sees.own


def _nothing_seen(problem: Problem) -> bool:
    """Whether Lyra heads see no key at a real token."""
    spec = problem.spec
    if _sees_live(problem) or not spec.lyra_q_heads or not _real(problem):
        return False
    return problem.static is None or not problem.static.mask.any(axis=1).all()


def _spread(problem: Problem) -> float:
    """How far apart two scores are that one query sees."""
    far = [np.where(heads.seen.any(axis=-1), heads.top - heads.low, 0.0).max(initial=0) for heads in scored(problem)]
    return float(max(far, default=0.0))


def _beyond_softcap(problem: Problem) -> bool:
    cap = problem.spec.softcap
    return cap is not None and any(
        float(np.abs(heads.score[heads.seen]).max(initial=0)) > cap for heads in scored(problem)
    )


def _of_mode(live: str) -> Callable[[Problem], bool]:
    def holds(problem: Problem) -> bool:
        spec = problem.spec
        return bool(spec.lyra_q_heads) and spec.static.live == live and several_tokens(problem)

    return holds


# live tokens

SEVERAL_TOKENS = Premise("a token that sees others", several_tokens, tame.one_token)
SEVERAL_CALLS = Premise("tokens in several calls", None, tame.at_once, of_calls=lambda calls: len(calls) > 1)
CHUNK_BEHIND = Premise(
    "a call of several tokens behind another",
    None,
    tame.at_once,
    of_calls=lambda calls: any(length > 1 for length in calls[1:]),
)
MANY_TOKENS = Premise(
    "more than 16 tokens, in several calls",
    None,
    lambda case: case.replace(calls=(3, 1), padding=()),
    of_calls=lambda calls: len(calls) > 1 and sum(calls) > 16,
)
PADDING = Premise("a padding token", lambda problem: not problem.mask.all() and _real(problem), tame.bare)
ROWS = Premise("several rows", lambda problem: len(problem.x) > 1, tame.one_row)
OF_MODE = {
    live: Premise(f'Lyra heads with live="{live}" behind another token', _of_mode(live), tame.one_token)
    for live in get_args(Live)
}
CAUSAL, SELF, NONE = (OF_MODE[live] for live in ("causal", "self", "none"))
FAR_TOKENS = Premise(
    "a live token beyond position 131,000",
    lambda problem: problem.spec.rope is not None and bool((problem.positions[problem.mask] > 131_000).any()),
    tame.from_zero,
)
ROTATED = Premise("a rotation by a position other than 0", _rotates, lambda case: tame.one_token(tame.from_zero(case)))
BEHIND_WINDOW = Premise("a key behind the window", _behind_window, tame.one_token)

# heads

LYRA_HEADS = Premise("a head goes to Lyra", lambda problem: bool(_of_own(problem).spec.lyra_q_heads), tame.no_split)
BOTH_STREAMS = Premise("Lyra heads beside vanilla ones", lambda problem: _both(problem.spec), tame.no_split)
CUT_GROUP = Premise("a group is cut", _cut, tame.aligned)
SCATTERED = Premise(
    "Lyra heads that are not next to each other",
    lambda problem: bool((np.diff(problem.spec.lyra_q_heads) > 1).any()),
    tame.first_heads,
)
SHARED_KV_HEAD = Premise(
    "query heads that share a KV head", lambda problem: problem.spec.group_size > 1, tame.no_groups
)
SEVERAL_GROUPS = Premise("several KV heads", lambda problem: problem.spec.num_key_value_heads > 1, tame.one_group)
TILED_GROUPS = Premise(
    "several groups of several query heads",
    lambda problem: problem.spec.group_size > 1 and problem.spec.num_key_value_heads > 1,
    tame.no_groups,
)
SEVERAL_KV_HEADS = Premise(
    "Lyra heads that read several KV heads of a context",
    lambda problem: len(problem.spec.lyra_kv_heads) > 1 and _sees_context(problem),
    tame.one_kv_head,
)

# contexts

CONTEXT = Premise("a context that is seen", _sees_context, tame.all_hidden)
HIDDEN = Premise("a hidden slot of a context", lambda problem: _hides_slots(_of_own(problem)), tame.all_shown)
EMPTY = Premise(
    "a Lyra head over an empty context",
    lambda problem: (
        problem.static is not None
        and not problem.static.mask.any()
        and bool(problem.spec.lyra_q_heads)
        and _real(problem)
    ),
    tame.no_split,
)
ONE_SLOT = Premise(
    "one visible slot beside hidden ones",
    lambda problem: _hides_slots(problem) and bool((problem.static.mask.sum(axis=1) == 1).any()),  # type: ignore[union-attr]
    lambda case: case if case.context is None else case.replace(context=case.context.replace(tokens=1)),
)
SEVERAL_SLOTS = Premise("several visible slots", lambda problem: visible_slots(problem) > 1, tame.no_token)
ONE_SOFTMAX = Premise(
    "static and live keys in one softmax",
    lambda problem: visible_slots(problem) > 0 and _sees_live(problem),
    tame.all_hidden,
)
CONTINUE = Premise("a context that the live tokens follow", _context_at("continue"), tame.all_hidden)
OVERLAY = Premise("a context that live tokens lie over", _context_at("overlay"), tame.no_token)
NOTHING_SEEN = Premise("a Lyra head that sees no key", _nothing_seen, tame.no_split)
SHARED_CONTEXT = Premise(
    "one context for several rows",
    lambda problem: visible_slots(problem) > 0 and len(problem.static.k) < len(problem.x),  # type: ignore[union-attr]
    tame.one_row,
)
LENGTHS = Premise(
    "rows whose contexts differ in length",
    lambda problem: problem.static is not None and len(set(problem.static.mask.sum(axis=1).tolist())) > 1,
    tame.all_shown,
)
TEXT_LENGTHS = Premise(
    "rows that differ in their number of tokens",
    lambda problem: len(set(problem.mask.sum(axis=1).tolist())) > 1,
    tame.bare,
)

# numbers

NORM_EPS = Premise("a norm that eps decides", _eps_decides, tame.normal)
BLOCK_EPS = Premise("a block's norm that eps decides", _block_eps_decides, tame.normal)
UNCENTRED = Premise("inputs far larger than 1 or with a mean far from 0", _uncentred, tame.normal)
GARBAGE = Premise("hidden values of 10,000 and more", _garbage, tame.normal)
BIAS = Premise(
    "a bias that is not 0",
    lambda problem: bool(np.any(problem.weights.get("q_proj.bias", 0))),
    lambda c: c.respec(bias=False),
)
BARE = Premise(
    "a layer without norm or without rotation",
    lambda problem: problem.spec.qk_norm is None or problem.spec.rope is None,
    tame.usual_stages,
)
SOFTCAP = Premise("a score beyond the softcap", _beyond_softcap, lambda case: case.respec(softcap=None))
ODD_SCALE = Premise(
    "a scale that is not head_dim^(-1/2)",
    lambda problem: not np.isclose(problem.spec.scale, problem.spec.head_dim**-0.5) and several_tokens(problem),
    lambda case: case.respec(scale=case.spec.head_dim**-0.5),
)
PEAKED = Premise(
    "scores a hundred apart", lambda problem: _spread(problem) > 100, lambda case: tame.normal(case.respec(scale=0.01))
)
BFLOAT16 = Premise(
    "stages in bfloat16",
    lambda problem: problem.dtype == "bfloat16" and _real(problem),
    lambda case: case.replace(dtype="float32"),
)
FINE_DATA = Premise(
    "data that are no bfloat16 values",
    lambda problem: problem.dtype == "bfloat16" and bool((problem.x != to_bfloat16(problem.x)).any()),
    lambda case: case.replace(dtype="bfloat16"),
)

# blocks

OPEN_GATE = Premise(
    "a gate other than 0 and 1",
    lambda problem: problem.block is not None and problem.block.gate not in (0, 1),
    tame.shut,
)
