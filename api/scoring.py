"""Score: how likely a text is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Score:
    """How likely a text is: nll [T-1] float32, the negative log-likelihood in nats of each token but the first."""

    nll: np.ndarray

    def __repr__(self) -> str:
        return f"Score({self.num_tokens} tokens, mean_nll {self.mean_nll:.4f}, perplexity {self.perplexity:.4g})"

    @property
    def num_tokens(self) -> int:
        """How many tokens were scored."""
        return len(self.nll)

    @property
    def total(self) -> float:
        """The sum over the tokens, in nats."""
        return float(self.nll.sum(dtype=np.float64))

    @property
    def mean_nll(self) -> float:
        """The mean over the tokens, in nats."""
        return self.total / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean."""
        return float(np.exp(self.mean_nll))
