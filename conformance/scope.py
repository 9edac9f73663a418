"""What cases are drawn from: sizes and, where a run is held to one spec, that spec. Every strategy is handed one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from lyra.spec.attention import AttentionSpec
from lyra.spec.split import HeadSplit

from .case_sizes import FEWEST, CaseSizes, make_sizes


@dataclass(frozen=True)
class Scope:
    """What the cases of a run have in common.

    sizes     the shapes and structures that they come in, the smallest first
    spec      the spec that the run is held to, if there is one: their sizes, structure and numbers are its own
    splits    the splits of its layers, where they differ; each case takes one of them
    seed      of whatever is drawn without Hypothesis
    examples  what is generated for a property of weight 1
    """

    sizes: tuple[CaseSizes, ...]
    spec: AttentionSpec | None = None
    splits: tuple[HeadSplit, ...] = ()
    seed: int = 0
    examples: int = 1

    @property
    def has_split(self) -> bool:
        """Whether the spec says which heads go to Lyra, so that cases may not."""
        return self.spec is not None and self.spec.split is not None

    @property
    def has_window(self) -> bool:
        """Whether the spec says how far a sliding window reaches."""
        return self.spec is not None and self.spec.sliding_window is not None


@cache
def small_scope() -> Scope:
    """What cases are drawn from where nobody says it: as many sizes as profile `smoke` has, any numbers."""
    return Scope(make_sizes(FEWEST, seed=0))
