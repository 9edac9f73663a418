"""Which of Hugging Face's attention implementations a layer of Lyra works under."""

from __future__ import annotations

from lyra.spec.errors import InputError

ATTENTION_KINDS = ("sdpa", "eager")
"""Those whose masks say which key is seen."""


def check_kind(kind: str | None) -> None:
    """Refuse one that a model was loaded with, or set to since. Raises InputError."""
    if kind not in ATTENTION_KINDS:
        raise InputError(
            f"attn_implementation is {kind!r}; expected one of {', '.join(ATTENTION_KINDS)}: load the model with one, "
            f"or call its set_attn_implementation"
        )


def check_gives_weights(kind: str | None) -> None:
    """Refuse one with which Hugging Face's layers give no `output_attentions`. Raises InputError."""
    if kind != "eager":
        raise InputError(
            f"output_attentions: attn_implementation is {kind!r}, and Hugging Face's layers give their weights with "
            f"'eager' only; call model.set_attn_implementation('eager') first"
        )
