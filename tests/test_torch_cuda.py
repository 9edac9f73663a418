"""PyTorch on a CUDA device: the suite's backend for it, and whole models. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import lyra
from lyra import HeadSplit
from lyra.backends.protocol import get_backend
from lyra.conformance import runner
from lyra.conformance.launch import make_session
from lyra.conformance.report.data import report_data

CUDA = "lyra.backends.torch_impl:CudaBackend"
TEXT = "and the note of a hand, then that of the other; and the end of it"
LIVE = "the hand and"
CLOSE = {"rtol": 2e-4, "atol": 2e-4}

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="this torch sees no CUDA device")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_backend_is_refused_where_there_is_no_device() -> None:
    with pytest.raises(ImportError, match="sees no CUDA device; take the backend 'torch'"):
        get_backend(CUDA)


@needs_cuda
def test_the_suite_passes_on_the_device() -> None:
    session = make_session([CUDA], profile="smoke", seed=0, spec=None)
    run = runner.run(session, only="not (real_size or real_weights)")
    assert run.exit_code == 0, run.log
    assert session.record.cases > 1000
    assert report_data(session, 1.0).backends[0].hardware == torch.cuda.get_device_name()


@needs_cuda
@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_a_model_on_the_device_is_the_same_as_on_the_cpu(tiny_folder: Path, mode: str) -> None:
    on_cpu = lyra.load(tiny_folder, mode=mode)
    on_device = lyra.load(tiny_folder, mode=mode, device="cuda")
    context = on_device.capture(TEXT)
    same = on_cpu.capture(TEXT)
    for layer, held in context.layers.items():
        np.testing.assert_allclose(held.k, same.layers[layer].k, **CLOSE)
        np.testing.assert_allclose(held.v, same.layers[layer].v, **CLOSE)
    for model in (on_cpu, on_device):
        model.attach(same, split=HeadSplit((0, 3), share_kv=True))
    np.testing.assert_allclose(on_device.logits(LIVE), on_cpu.logits(LIVE), **CLOSE)
    assert on_device.generate(LIVE, 12) == on_cpu.generate(LIVE, 12)
    for model in (on_cpu, on_device):
        model.detach()
    np.testing.assert_allclose(on_device.logits(LIVE), on_cpu.logits(LIVE), **CLOSE)
