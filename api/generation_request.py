"""What a generation from text is asked for, checked at the door."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lyra.backends.sampling import Sampling
from lyra.spec.arguments import check_seed, check_text, check_whole, is_number, several, shown
from lyra.spec.errors import InputError


@dataclass(frozen=True)
class GenerationRequest:
    """The prompts of a generation, whether it is one by itself, how many tokens it may make, and how they are drawn.

    `sampling` None takes the most likely token.
    """

    prompts: tuple[str, ...]
    alone: bool
    max_new_tokens: int
    sampling: Sampling | None
    seed: int

    @classmethod
    def of(
        cls, prompt: Any, max_new_tokens: Any, temperature: Any, top_k: Any, top_p: Any, seed: Any
    ) -> GenerationRequest:
        """The arguments of `Model.generate`, checked. Raises InputError."""
        count = check_whole("max_new_tokens", max_new_tokens, 0, what="how many tokens to generate at most")
        drawn = secrets.randbits(32) if seed is None else check_seed(seed)
        sampling = _sampling(temperature, {"top_k": top_k, "top_p": top_p, "seed": seed})
        return cls(_prompts(prompt), isinstance(prompt, str), count, sampling, drawn)


def _prompts(prompt: Any) -> tuple[str, ...]:
    """One text, or each of several. Raises InputError."""
    if isinstance(prompt, str):
        return (check_text("prompt", prompt),)
    prompts = several(prompt)
    if prompts is None:
        raise InputError(f"prompt is {shown(prompt)}; expected a text (str) or a list of texts")
    return tuple(check_text(f"prompt {number}", text) for number, text in enumerate(prompts))


def _sampling(temperature: Any, options: Mapping[str, Any]) -> Sampling | None:
    """What is drawn from; None for the most likely token. Raises InputError."""
    if not (is_number(temperature) and temperature == 0):
        top_p = options["top_p"]
        return Sampling(temperature, options["top_k"], 1.0 if top_p is None else top_p)
    idle = [name for name, value in options.items() if value is not None]
    if idle:
        raise InputError(
            f"temperature is 0, which takes the most likely token, so {' and '.join(idle)} would have no effect; "
            f"give a temperature above 0, such as 1"
        )
    return None
