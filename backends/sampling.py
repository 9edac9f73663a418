"""Sampling: the distribution that the next token is drawn from, as every backend understands it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lyra.spec.arguments import check_number, check_whole, shown
from lyra.spec.errors import InputError

COLDEST = 1e-6
"""The lowest temperature that `Sampling` takes: differences of float32 scores stay finite over it."""


@dataclass(frozen=True)
class Sampling:
    """The distribution that the next token is drawn from, made of a model's scores in this order:

    1. the scores are divided by `temperature`;
    2. `top_k` keeps the k highest ones; all of them where it is None or more than there are;
    3. `top_p` keeps the smallest set of the most probable tokens whose probabilities, after step 2, add up to it or
       more, one token at least, however small it is; all of them where it is 1;
    4. what is kept is drawn by its softmax.

    Tokens that tie with the last one kept are kept too, in both steps. Raises InputError for a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what is no distribution; numbers of NumPy become Python's."""
        warmth = f"a finite number from {COLDEST} up. For the most likely token at each step do without sampling"
        chance = "a probability above 0, at most 1"
        temperature = check_number("temperature", self.temperature, warmth)
        if temperature < COLDEST:
            raise InputError(f"temperature is {shown(self.temperature)}; expected {warmth}")
        top_p = check_number("top_p", self.top_p, chance)
        if not 0 < top_p <= 1:
            raise InputError(f"top_p is {shown(self.top_p)}; expected {chance}")
        if self.top_k is not None:
            top_k = check_whole("top_k", self.top_k, 1, what="the number of tokens to choose from")
            object.__setattr__(self, "top_k", top_k)
        object.__setattr__(self, "temperature", temperature)
        object.__setattr__(self, "top_p", top_p)


def check_sampling(sampling: Any) -> Sampling | None:
    """A Sampling, or None for the most likely token. Raises InputError."""
    if sampling is not None and not isinstance(sampling, Sampling):
        raise InputError(f"sampling is {shown(sampling)}; expected a Sampling, or None for the most likely token")
    return sampling
