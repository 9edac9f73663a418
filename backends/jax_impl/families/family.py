"""What the backend has to know of one family of models, and asks nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..modules import Activation, RMSNorm


class Family(NamedTuple):
    """How the parts of a family's decoder compute.

    name         that of the family in `lyra.spec.families`, which says what its parts are called and how they stand
    activations  of the feed-forward part, by the names that configs give them
    norm         of the decoder and its layers
    """

    name: str
    activations: Mapping[str, Activation]
    norm: type[RMSNorm] = RMSNorm
