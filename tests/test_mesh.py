"""A model over devices that this process does not have: what it is asked goes to another one and comes back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from backends_for_tests import NullZeros

from lyra.backends.protocol import get_backend
from lyra.conformance.case import Case, Context
from lyra.conformance.faults.catalogue import catalogue
from lyra.conformance.faults.inject import fault_in, injected
from lyra.conformance.spread import Job, over_devices
from lyra.spec.attention import AttentionSpec
from lyra.spec.errors import InputError
from lyra.spec.split import HeadSplit

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture
def job() -> Job:
    spec = AttentionSpec(
        hidden_size=8, num_attention_heads=4, num_key_value_heads=2, head_dim=4, scale=0.5,
        split=HeadSplit(lyra_q_heads=(1, 2, 3), share_kv=True),
    )  # fmt: skip
    static = Case(spec, context=Context(5, hidden=(1,), gaps=True)).problem().static
    assert static is not None
    assert spec.split is not None
    ids = np.arange(6).reshape(2, 3)
    return Job("nowhere", {"heads": 2}, ids, 2, ids[:1], {2: static}, {2: spec.split}, ({"rows": 3},))


def test_a_job_is_the_same_in_another_process(job: Job, tmp_path: Path) -> None:
    job.to_file(tmp_path / "job.npz")
    again = Job.from_file(tmp_path / "job.npz")
    assert (again.folder, again.axes, again.new, again.refused) == (job.folder, job.axes, job.new, job.refused)
    np.testing.assert_array_equal(again.ids, job.ids)
    np.testing.assert_array_equal(again.captured, job.captured)
    assert again.static.keys() == job.static.keys()
    for one, other in zip(again.static[2], job.static[2], strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert again.splits[2].lyra_q_heads == job.splits[2].lyra_q_heads


def test_too_few_devices_are_refused_with_the_way_to_more() -> None:
    pytest.importorskip("jax")
    with pytest.raises(InputError, match=r"needs 4096 devices, and JAX sees \d.*JAX_NUM_CPU_DEVICES': '4096'"):
        get_backend("jax").mesh({"heads": 64, "context": 64})  # type: ignore[attr-defined]


class Elsewhere(NullZeros):
    """Has no devices here, and cannot be made by its name elsewhere: it is in a function there."""

    name = "elsewhere"

    def mesh(self, axes: object) -> object:
        """No devices."""
        raise InputError("no devices")


def test_a_process_that_cannot_answer_is_told_in_a_line(job: Job) -> None:
    class Inner(Elsewhere):
        """Not to be imported."""

    with pytest.raises(RuntimeError, match=r"^over 3 devices: .*Inner") as refused:
        over_devices(Inner(), job)
    assert "\n" not in str(refused.value)


def test_the_fault_of_a_backend_is_known() -> None:
    fault = catalogue()["weight-without-one"]
    with injected(fault, "torch") as faulty, injected(fault, "torch") as again:
        assert fault_in(faulty) == fault_in(again) == fault
    assert fault_in(get_backend("torch")) is None
