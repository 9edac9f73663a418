"""Cases and problems of blocks that properties share: a block alone, what is within it, one in a decoder layer's place.

Hugging Face's layer takes seconds to import: a run without such a property does without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from hypothesis import strategies as st

from lyra.conformance.case import Block, Case, Problem
from lyra.conformance.scope import Scope
from lyra.conformance.strategies import block_cases
from lyra.spec.attention import QKNormSpec, RopeSpec
from lyra.spec.sequential import SequentialSpec, Source
from lyra.spec.uncertain import exact, rms_norm

if TYPE_CHECKING:
    from lyra.conformance.oracles.hf_sequential import DecoderLayerOracle


def any_block(scope: Scope, source: Source = "external") -> st.SearchStrategy[Case]:
    """Whatever there is; every other case has a context, and shows all of it."""
    shown = block_cases(scope, source=source, context=True, min_context=1, hidden=False)
    return st.one_of(block_cases(scope, source=source), shown)


def block_of(case: Case) -> Block:
    """The case's block."""
    assert case.block is not None
    return case.block


def alone(problem: Problem) -> Problem:
    """The same block, without residual and its gate at 1."""
    assert problem.block is not None
    return problem.replace(block=problem.block.replace(residual=False, gate=1.0))


def between_norms(problem: Problem) -> Problem:
    """The attention in a block by itself, its inputs normed as the block norms them."""
    assert problem.block is not None
    weights = problem.weights
    normed = rms_norm(exact(problem.x), weights["input_norm.weight"], problem.block.norm_eps).value.astype(np.float32)
    names = problem.spec.weight_shapes()
    return problem.replace(block=None, x=normed, weights={name: weights[name] for name in names})


def decoder_layer(case: Case) -> Case:
    """The case as Hugging Face's decoder layer can express it: one eps, norms, RoPE, no softcap, finite padding."""
    spec = case.spec
    norm = spec.qk_norm or QKNormSpec()
    case = case.replace(
        poison=min(case.poison, 1e3), block=block_of(case).replace(gate=1.0, residual=True, norm_eps=norm.eps)
    )
    return case.respec(qk_norm=norm, rope=spec.rope or RopeSpec(), softcap=None)


def with_its_layer(problem: Problem, seed: int) -> tuple[Problem, DecoderLayerOracle]:
    """The problem with weights taken from a decoder layer, and that layer."""
    from lyra.conformance.oracles.hf_sequential import DecoderLayerOracle

    plain = problem.spec.replace(split=None)
    layer = DecoderLayerOracle(plain, problem.weights, problem.positions, problem.mask, seed)
    described = problem.described
    assert isinstance(described, SequentialSpec)
    return problem.replace(weights=described.weights_of(layer.weights)), layer
