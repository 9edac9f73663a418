"""What holds of a block whether it keeps a cache of its own or shares its layer's: checks that properties share."""

from __future__ import annotations

import numpy as np

from lyra.conformance.case import Case
from lyra.conformance.judge import Judge
from lyra.conformance.properties.block_problems import block_of
from lyra.conformance.subject import Subject


def hold_stages(case: Case, judge: Judge) -> None:
    """The trace has the stages of the block, in order; each is right by itself, and the last is what the block gave."""
    problem = case.problem()
    wanted = problem.described.trace_names()

    def check(subject: Subject) -> None:
        outcome = subject.run(problem, trace=True)
        names = tuple(outcome.trace)
        subject.expect(problem, names == wanted, f"trace {names}, expected {wanted}")
        subject.expect_stages(problem, outcome)
        subject.expect_equal(problem, outcome.trace["output"], outcome.output, "what the block gave")

    judge.each(case, check)


def hold_closed(case: Case, judge: Judge) -> None:
    """Gate 0 gives h to the last bit, the sign of zero included; the gate of the case gives the oracle's values."""
    problem = case.problem()
    h = problem.x.copy()
    h[:, :, 0] = -0.0
    closed = problem.replace(x=h, block=block_of(case).replace(gate=0.0))

    def check(subject: Subject) -> None:
        got = np.asarray(subject.run(closed).output, np.float32)
        same = got[closed.real].tobytes() == h[closed.real].tobytes()
        subject.expect(closed, same, "a closed gate changes bits of the residual stream")
        subject.expect_oracle(problem, subject.run(problem))

    judge.each(case, check)


def hold_cuts(case: Case, judge: Judge) -> None:
    """In one call, in the case's calls and, if these are few, token by token: the same outputs."""
    problem = case.problem()

    def check(subject: Subject) -> None:
        whole = subject.run(problem, (case.tokens,))
        subject.expect_oracle(problem, whole)
        subject.expect_close(problem, subject.run(problem).output, whole.output, "one call")
        if case.tokens <= 7:
            singly = subject.run(problem, (1,) * case.tokens)
            subject.expect_close(problem, singly.output, whole.output, "one call, against token by token")

    judge.each(case, check)
