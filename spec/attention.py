"""AttentionSpec: one attention layer, declaratively. Everything a backend needs to know, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from .base import SpecModel
from .errors import SpecError
from .split import HeadSplit

Size = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
Live = Literal["causal", "self", "none"]
Positions = Literal["continue", "overlay"]


class LiveMode(NamedTuple):
    """What a Lyra head sees of the live tokens: those before its own, and its own; `words` say so."""

    earlier: bool
    own: bool
    words: str


LIVE_MODES: Mapping[Live, LiveMode] = {
    "causal": LiveMode(earlier=True, own=True, words=" and the live tokens"),
    "self": LiveMode(earlier=False, own=True, words=" and its own token"),
    "none": LiveMode(earlier=False, own=False, words=" only"),
}
"""Every live mode, all but the oracle go by it (clause LIVE)."""

STAGES = ("project", "norm", "rope", "attend", "output")
"""The one legal order of stages (clause ORDER)."""

MOST_KV_HEADS_NAMED = 1024
"""A refusal names what divides the number of query heads up to here."""

TRACES: dict[str, tuple[str, ...]] = {
    "project": ("q_proj", "k_proj", "v_proj"),
    "norm": ("q_norm", "k_norm"),
    "rope": ("q_rope", "k_rope"),
    "attend": ("heads",),
    "output": ("output",),
}
"""What each stage leaves in a trace. Shapes: q_* and heads [B,T,Hq,D], k_* and v_proj [B,T,Hkv,D], output [B,T,E]."""


class RopeSpec(SpecModel):
    """Rotary position embedding in the half-split layout (clause ROPE).

    Pair i of a head (elements i and i + D/2) turns by position · theta**(-2i/D) / factor radians.
    """

    theta: Positive = 1_000_000.0
    factor: Positive = 1.0


class QKNormSpec(SpecModel):
    """RMSNorm over head_dim with weight 1 + w, on queries and keys, never on values (clause NORM)."""

    eps: Positive = 1e-6


class StaticSpec(SpecModel):
    """What Lyra heads see of the live tokens, and where the live tokens sit (clauses LIVE and POSITION)."""

    live: Live = "causal"
    positions: Positions = "continue"

    @property
    def sees(self) -> LiveMode:
        """What Lyra heads see of the live tokens."""
        return LIVE_MODES[self.live]


class AttentionSpec(SpecModel):
    """One attention layer.

    Symbols used throughout: E hidden_size, Hq num_attention_heads, Hkv num_key_value_heads, D head_dim,
    R = Hq / Hkv the group size. Query head h reads KV head h // R.

    scale multiplies the scores (often head_dim ** -0.5); softcap, if any, follows it as
    softcap · tanh(score / softcap), before the mask. sliding_window W lets a query at t see keys t-W+1 .. t.
    bias adds a bias to all four projections. qk_norm and rope may be None (written "none" in TOML and JSON).

    Raises SpecError. Source: SPEC.md.
    """

    hidden_size: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    scale: Positive
    softcap: Positive | None = None
    sliding_window: Size | None = None
    bias: bool = False
    qk_norm: QKNormSpec | None = QKNormSpec()
    rope: RopeSpec | None = RopeSpec()
    split: HeadSplit | None = None
    static: StaticSpec = StaticSpec()
    order: tuple[str, ...] = STAGES

    @field_validator("softcap", "sliding_window", "qk_norm", "rope", "split", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return None if value == "none" else value

    @field_validator("order")
    @classmethod
    def _one_order(cls, order: tuple[str, ...]) -> tuple[str, ...]:
        if order != STAGES:
            raise ValueError(
                f"{order} is not a legal order; this version has one, {STAGES}, because static keys are stored "
                f"normed and unrotated (clauses ORDER and STORED)"
            )
        return order

    @model_validator(mode="after")
    def _consistent(self) -> AttentionSpec:
        if self.num_attention_heads % self.num_key_value_heads:
            most = min(self.num_attention_heads, MOST_KV_HEADS_NAMED)
            divisors = [n for n in range(1, most + 1) if self.num_attention_heads % n == 0]
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; use one of {divisors} KV heads"
            )
        if self.rope is not None and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; RoPE turns pairs, so use an even one or rope=None")
        if self.split is not None:
            if self.split.lyra_q_heads and self.sliding_window is not None:
                raise ValueError(
                    f"a sliding-window layer (sliding_window={self.sliding_window}) carries no Lyra heads, got "
                    f"{self.split.lyra_q_heads}; put the split on a global layer (clause SLIDING)"
                )
            object.__setattr__(self, "split", self.split.bind(self))
        return self

    @property
    def group_size(self) -> int:
        """R, query heads per KV head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def lyra_q_heads(self) -> tuple[int, ...]:
        """The query heads that go to Lyra; empty without a split."""
        return self.split.lyra_q_heads if self.split else ()

    @property
    def lyra_kv_heads(self) -> tuple[int, ...]:
        """The KV heads that the Lyra heads read, ascending: axis Hs of a StaticLayer."""
        return self.split.lyra_kv_heads if self.split else ()

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight, in Hugging Face's names and layout ([out, in])."""
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "q_proj.weight": (queries, self.hidden_size),
            "k_proj.weight": (keys, self.hidden_size),
            "v_proj.weight": (keys, self.hidden_size),
            "o_proj.weight": (self.hidden_size, queries),
        }
        if self.bias:
            shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items()}
        if self.qk_norm is not None:
            shapes |= {"q_norm.weight": (self.head_dim,), "k_norm.weight": (self.head_dim,)}
        return shapes

    def trace_names(self) -> tuple[str, ...]:
        """The trace entries of this layer, in order; a stage that is switched off leaves none."""
        absent = {"norm"} if self.qk_norm is None else set()
        absent |= {"rope"} if self.rope is None else set()
        return tuple(name for stage in self.order if stage not in absent for name in TRACES[stage])


def grouped(
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    *,
    head_dim: int | None = None,
    rope: RopeSpec | None = None,
    bias: bool = False,
) -> AttentionSpec:
    """The spec of a plain layer: MHA where no KV heads are named, head_dim = hidden_size / num_heads, no norms.

    Raises SpecError for sizes that do not divide.
    """
    if num_heads < 1 or hidden_size < 1:
        raise SpecError(f"hidden_size={hidden_size} and num_heads={num_heads}; expected 1 or more of each")
    if head_dim is None and hidden_size % num_heads:
        raise SpecError(f"hidden_size={hidden_size} is not a multiple of num_heads={num_heads}; give head_dim")
    size = hidden_size // num_heads if head_dim is None else head_dim
    if size < 1:
        raise SpecError(f"head_dim={size}; expected 1 or more")
    return AttentionSpec(
        hidden_size=hidden_size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads if num_kv_heads is None else num_kv_heads,
        head_dim=size,
        scale=size**-0.5,
        bias=bias,
        qk_norm=None,
        rope=rope,
    )
