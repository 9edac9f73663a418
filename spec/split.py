"""HeadSplit: which query heads attend to the static context (clause SPLIT)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Protocol, Self

from pydantic import Field, field_validator

from .arguments import is_whole, several, shown
from .base import SpecModel
from .errors import SpecError


class HasHeads(Protocol):
    """Anything that says how many heads it has: an AttentionSpec or a ModelSpec."""

    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...


class HeadSplit(SpecModel):
    """The query heads that go to Lyra; all others are vanilla.

    `lyra_q_heads` are query head indices, kept in ascending order. `share_kv` allows the split to cut a GQA group,
    so that one KV head serves both streams. The last two fields are the head counts of the layer the split belongs
    to: the constructors below and AttentionSpec fill them in, and `lyra_kv_heads` and its kin need them.

    Source: SPEC.md, clause SPLIT.
    """

    lyra_q_heads: tuple[int, ...] = ()
    share_kv: bool = False
    num_attention_heads: int | None = Field(default=None, exclude=True)
    num_key_value_heads: int | None = Field(default=None, exclude=True)

    @field_validator("lyra_q_heads", mode="before")
    @classmethod
    def _ascending(cls, heads: Any) -> tuple[int, ...]:
        heads = _whole_numbers(heads)
        repeated = sorted(head for head, times in Counter(heads).items() if times > 1)
        if repeated:
            raise ValueError(f"query heads {repeated} are named twice; name each head once")
        return tuple(sorted(heads))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HeadSplit):
            return NotImplemented
        return (self.lyra_q_heads, self.share_kv) == (other.lyra_q_heads, other.share_kv)

    def __hash__(self) -> int:
        return hash((self.lyra_q_heads, self.share_kv))

    @classmethod
    def none(cls) -> Self:
        """No head goes to Lyra: the layer is an ordinary one."""
        return cls(lyra_q_heads=())

    @classmethod
    def all(cls, spec: HasHeads) -> Self:
        """Every head goes to Lyra."""
        _check_spec("all", spec)
        return cls.from_q_heads(spec, range(spec.num_attention_heads))

    @classmethod
    def half(cls, spec: HasHeads) -> Self:
        """The last half of the KV heads; with a single KV head the last half of the query heads, sharing it."""
        _check_spec("half", spec)
        if spec.num_key_value_heads > 1:
            return cls.last_kv(spec, spec.num_key_value_heads // 2)
        return cls.last_q(spec, max(1, spec.num_attention_heads // 2))

    @classmethod
    def last_kv(cls, spec: HasHeads, n: int) -> Self:
        """The last `n` KV heads with all their query heads: 4 of 8 on 16 query heads is 8 Q / 4 KV to Lyra."""
        _check_spec("last_kv", spec)
        if not is_whole(n) or not 0 <= n <= spec.num_key_value_heads:
            known = spec.num_key_value_heads
            raise SpecError(f"HeadSplit.last_kv: {shown(n)} KV heads asked for, the layer has {known}")
        return cls.from_kv_heads(spec, range(spec.num_key_value_heads - n, spec.num_key_value_heads))

    @classmethod
    def from_kv_heads(cls, spec: HasHeads, heads: Iterable[int]) -> Self:
        """Whole groups: every query head that reads one of the named KV heads. Always KV-aligned."""
        _check_spec("from_kv_heads", spec)
        heads = sorted(set(_heads("from_kv_heads", heads)))
        outside = [head for head in heads if not 0 <= head < spec.num_key_value_heads]
        if outside:
            raise SpecError(
                f"HeadSplit.from_kv_heads: there are no KV heads {outside}; the layer has heads 0 to "
                f"{spec.num_key_value_heads - 1}"
            )
        group = spec.num_attention_heads // spec.num_key_value_heads
        return cls.from_q_heads(spec, (head * group + i for head in heads for i in range(group)))

    @classmethod
    def last_q(cls, spec: HasHeads, n: int) -> Self:
        """The last `n` query heads; `share_kv` is set where that cuts a group."""
        _check_spec("last_q", spec)
        if not is_whole(n) or not 0 <= n <= spec.num_attention_heads:
            known = spec.num_attention_heads
            raise SpecError(f"HeadSplit.last_q: {shown(n)} query heads asked for, the layer has {known}")
        return cls.from_q_heads(spec, range(spec.num_attention_heads - n, spec.num_attention_heads), share_kv=None)

    @classmethod
    def from_q_heads(cls, spec: HasHeads, heads: Iterable[int], share_kv: bool | None = False) -> Self:
        """Any query heads, bound to `spec` and checked. `share_kv=None` sets the flag if and only if it is needed."""
        _check_spec("from_q_heads", spec)
        heads = _heads("from_q_heads", heads)
        if share_kv is None:
            share_kv = bool(cls(lyra_q_heads=heads, share_kv=True).bind(spec).cut_kv_heads)
        return cls(lyra_q_heads=heads, share_kv=share_kv).bind(spec)

    def bind(self, spec: HasHeads) -> Self:
        """The same split with the head counts of `spec`, checked against them. Raises SpecError."""
        _check_spec("bind", spec)
        query_heads, kv_heads = spec.num_attention_heads, spec.num_key_value_heads
        outside = [head for head in self.lyra_q_heads if not 0 <= head < query_heads]
        if outside:
            raise SpecError(
                f"HeadSplit.lyra_q_heads: there are no query heads {outside}; "
                f"the layer has heads 0 to {query_heads - 1}"
            )
        bound = self.replace(num_attention_heads=query_heads, num_key_value_heads=kv_heads)
        if bound.cut_kv_heads and not self.share_kv:
            raise SpecError(bound._cut_message())
        return bound

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self._query_heads // self._kv_heads

    @property
    def vanilla_q_heads(self) -> tuple[int, ...]:
        """The query heads that do not go to Lyra, ascending."""
        lyra = set(self.lyra_q_heads)
        return tuple(head for head in range(self._query_heads) if head not in lyra)

    @property
    def lyra_kv_heads(self) -> tuple[int, ...]:
        """The KV heads that the Lyra query heads read, ascending: the heads a static context must hold."""
        return self._kv_of(self.lyra_q_heads)

    @property
    def vanilla_kv_heads(self) -> tuple[int, ...]:
        """The KV heads that the vanilla query heads read, ascending."""
        return self._kv_of(self.vanilla_q_heads)

    @property
    def cut_kv_heads(self) -> tuple[int, ...]:
        """The KV heads whose group the split cuts: read by both streams."""
        return tuple(sorted(set(self.lyra_kv_heads) & set(self.vanilla_kv_heads)))

    @property
    def is_kv_aligned(self) -> bool:
        """Whether the split is a union of whole GQA groups."""
        return not self.cut_kv_heads

    def nearest_aligned(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The query heads of the two nearest aligned splits: without the cut groups, and with all of them."""
        group, cut = self.group_size, set(self.cut_kv_heads)
        whole = set(self.lyra_kv_heads) - cut

        def queries(kv_heads: set[int]) -> tuple[int, ...]:
            return tuple(head * group + i for head in sorted(kv_heads) for i in range(group))

        return queries(whole), queries(whole | cut)

    @property
    def _query_heads(self) -> int:
        return self._bound(self.num_attention_heads)

    @property
    def _kv_heads(self) -> int:
        return self._bound(self.num_key_value_heads)

    @staticmethod
    def _bound(count: int | None) -> int:
        if count is None:
            raise SpecError("HeadSplit: the layer's head counts are not known; call split.bind(spec) first")
        return count

    def _kv_of(self, query_heads: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted({head // self.group_size for head in query_heads})) if query_heads else ()

    def _cut_message(self) -> str:
        fewer, more = self.nearest_aligned()
        lyra = set(self.lyra_q_heads)
        cut = "; ".join(
            f"KV head {kv} is read by query heads {list(range(kv * self.group_size, (kv + 1) * self.group_size))}, "
            f"of which only {[h for h in range(kv * self.group_size, (kv + 1) * self.group_size) if h in lyra]} "
            f"go to Lyra"
            for kv in self.cut_kv_heads
        )
        return (
            f"HeadSplit.lyra_q_heads={self.lyra_q_heads} cuts a GQA group: {cut}. "
            f"Set share_kv=True to let the cut KV heads serve both streams, "
            f"or take a nearest aligned split: {fewer} or {more}"
        )


def _whole_numbers(heads: Any) -> tuple[int, ...]:
    """Heads as ints. Raises ValueError for anything else."""
    found = several(heads)
    if found is None:
        raise ValueError(f"expected heads, whole numbers from 0 up, got {shown(heads)}")
    wrong = [head for head in found if not is_whole(head)]
    if wrong:
        raise ValueError(f"expected heads, whole numbers from 0 up, got {shown(wrong[0])} among them")
    return tuple(int(head) for head in found)


def _heads(call: str, heads: Any) -> tuple[int, ...]:
    """The same for a constructor. Raises SpecError."""
    try:
        return _whole_numbers(heads)
    except ValueError as error:
        raise SpecError(f"HeadSplit.{call}: {error}") from None


def _check_spec(call: str, spec: Any) -> None:
    """Refuse what has no head counts. Raises SpecError."""
    counts = [getattr(spec, name, None) for name in ("num_attention_heads", "num_key_value_heads")]
    if not all(is_whole(count) and count > 0 for count in counts):
        raise SpecError(f"HeadSplit.{call}: expected an AttentionSpec or a ModelSpec, got {shown(spec)}")
