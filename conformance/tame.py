"""Tame generators: maps of a case to one that never meets a premise. A property given such cases has to be vacuous."""

from __future__ import annotations

from lyra.spec.attention import QKNormSpec, RopeSpec
from lyra.spec.split import HeadSplit

from .case import Case


def bare(case: Case) -> Case:
    """Nothing padded."""
    return case.replace(padding=())


def one_token(case: Case) -> Case:
    """One real token in every row, with padding behind it."""
    return case.replace(padding=(case.tokens - 1,) * case.batch, padding_side="right")


def no_token(case: Case) -> Case:
    """Padding only: where a relation must show, there is nothing that it must show in."""
    return case.replace(padding=(case.tokens,) * case.batch)


def hides(case: Case, hidden: int) -> Case:
    """So many slots of every row of the context hidden."""
    context = case.context
    return case if context is None else case.replace(context=context.replace(hidden=(hidden,) * context.batch))


def all_shown(case: Case) -> Case:
    """No slot of the context hidden."""
    return hides(case, 0)


def all_hidden(case: Case) -> Case:
    """Every slot of the context hidden."""
    return hides(case, 0 if case.context is None else case.context.tokens)


def no_split(case: Case) -> Case:
    """No head goes to Lyra."""
    return case.respec(split=None)


def aligned(case: Case) -> Case:
    """Whole groups go to Lyra."""
    return case.respec(split=HeadSplit.from_kv_heads(case.spec, case.spec.lyra_kv_heads))


def first_heads(case: Case) -> Case:
    """As many heads go to Lyra, the first ones."""
    return case.respec(split=HeadSplit.from_q_heads(case.spec, range(len(case.spec.lyra_q_heads)), share_kv=None))


def one_kv_head(case: Case) -> Case:
    """Lyra heads read one KV head."""
    return case.respec(split=HeadSplit.from_kv_heads(case.spec, case.spec.lyra_kv_heads[:1]))


def no_groups(case: Case) -> Case:
    """As many KV heads as query heads."""
    heads = case.spec.num_attention_heads
    split = None if case.spec.split is None else HeadSplit(lyra_q_heads=case.spec.lyra_q_heads)
    return case.respec(num_key_value_heads=heads, split=split)


def one_group(case: Case) -> Case:
    """One KV head for all query heads."""
    split = HeadSplit(lyra_q_heads=case.spec.lyra_q_heads, share_kv=True)
    return case.respec(num_key_value_heads=1, split=split if split.lyra_q_heads else None)


def one_row(case: Case) -> Case:
    """A batch of one."""
    context = case.context
    if context is not None:
        context = context.replace(batch=1, hidden=context.hidden[:1])
    return case.replace(batch=1, padding=case.padding[:1], context=context)


def at_once(case: Case) -> Case:
    """All tokens in one call."""
    return case.replace(calls=(case.tokens,))


def from_zero(case: Case) -> Case:
    """Live and static tokens from position 0 on, without gaps."""
    context = None if case.context is None else case.context.replace(start=0, gaps=False)
    return case.replace(start=0, context=context)


def normal(case: Case) -> Case:
    """Data as a trained layer has them, the same garbage nowhere larger than they are."""
    return case.replace(flavour="normal", poison=1.0)


def usual_stages(case: Case) -> Case:
    """Norm and rotation, no bias."""
    spec = case.spec
    return case.respec(qk_norm=spec.qk_norm or QKNormSpec(), rope=spec.rope or RopeSpec(), bias=False)


def shut(case: Case) -> Case:
    """A block whose gate lets nothing through."""
    return case if case.block is None else case.replace(block=case.block.replace(gate=0.0))
