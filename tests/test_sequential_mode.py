"""The sequential mode of the front door: `lyra.load(mode="sequential")`, the gate, and the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import lyra
from lyra import HeadSplit, Model, ModelError, StaticContext
from lyra.backends.protocol import ModelBackend, SequentialBackend, SequentialEngine, get_backend
from lyra.cli import application
from lyra.conformance.tolerance import K, distance
from lyra.model import GATE
from lyra.spec.errors import ContextError, InputError, SpecError
from lyra.spec.reference_sequential import reference_sequential

pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "and the note of a hand, then that of the other"
LIVE = "the hand and the other note"


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> Model:
    return lyra.load(tiny_folder, mode="sequential")


@pytest.fixture
def model(loaded: Model):
    yield loaded
    loaded.detach()


@pytest.fixture(scope="module")
def book(loaded: Model) -> StaticContext:
    return loaded.capture(TEXT)


def test_the_mode_is_part_of_the_protocol(model: Model) -> None:
    backend = get_backend("torch")
    assert "inject" in backend.capabilities
    assert isinstance(backend, ModelBackend)
    assert isinstance(backend, SequentialBackend)
    assert isinstance(model.engine, SequentialEngine)


def test_a_closed_gate_is_the_plain_model(model: Model, book: StaticContext) -> None:
    plain, text = model.logits(LIVE), model.generate(LIVE, 8)
    model.attach(book, gate=0.0)
    assert np.array_equal(model.logits(LIVE), plain)
    assert model.generate(LIVE, 8) == text
    model.attach(book)
    assert np.abs(model.logits(LIVE) - plain).max() > 1e-3
    model.detach()
    assert np.array_equal(model.logits(LIVE), plain)
    assert (model.context, model.blocks) == (None, {})


def test_the_gate_can_be_set(model: Model, book: StaticContext) -> None:
    model.attach(book)
    assert model.gate == GATE
    found = {}
    for gate in (0.5, 0.0, -1.0):
        model.gate = gate
        assert model.gate == gate
        assert {block.gate for block in model.blocks.values()} == {gate}
        found[gate] = model.logits(LIVE)
        model.attach(book, gate=gate)
        assert np.array_equal(model.logits(LIVE), found[gate])
    first, *_, last = model.blocks
    model.gate = {first: 0.5, last: 0.0}
    assert model.gate == {first: 0.5, last: 0.0}
    one = model.logits(LIVE)
    model.attach(book, gate={first: 0.5, last: 0.0})
    assert np.array_equal(model.logits(LIVE), one)
    assert all(np.abs(one - other).max() > 1e-3 for other in found.values())
    with pytest.raises(SpecError, match=r"gate names layers \[0\]; the layers with a block are \[1, 3\]"):
        model.gate = {0: 1.0}
    with pytest.raises(InputError, match=r"layers \[0\] have no block; those with one are \[1, 3\]"):
        model.engine.set_gates({0: 1.0})
    model.detach()
    for use in (lambda: model.gate, lambda: setattr(model, "gate", 1.0)):
        with pytest.raises(ModelError, match="no block is there"):
            use()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"live": "causal", "positions": "overlay", "residual": False},
        {"split": HeadSplit((1, 2, 3), share_kv=True), "gate": -0.5},
    ],
    ids=str,
)
def test_the_block_that_is_attached_equals_the_oracle(model: Model, book: StaticContext, options: dict) -> None:
    """With what `attach` was told, the first block makes of the residual stream what the oracle makes of it."""
    model.attach(book, **options)
    layer, spec = next(iter(model.blocks.items()))
    decoder = model.module.model.layers[layer]
    seen = {}
    hook = decoder.injected.register_forward_hook(lambda _module, args, out: seen.update(h=args[0], out=out))
    ids = np.array(model.text.encode(LIVE))
    model.logits(ids)
    hook.remove()
    weights = spec.weights_of({name: value.numpy() for name, value in decoder.state_dict().items()})
    static = book.static_layer(layer, spec.attention.lyra_kv_heads)
    wanted = reference_sequential(
        spec, weights, seen["h"].numpy(), positions=np.arange(len(ids))[None], static=static
    )["output"]  # fmt: skip
    assert distance(seen["out"].numpy(), wanted).ratio < K
    assert spec.attention.static.live == options.get("live", "none")
    assert (spec.gate, spec.residual) == (options.get("gate", GATE), options.get("residual", True))


def test_the_splits_of_load_are_those_of_the_blocks(tiny_folder: Path, book: StaticContext, tmp_path: Path) -> None:
    split = HeadSplit((2, 3))
    book.save(tmp_path / "book.safetensors")
    model = lyra.load(tiny_folder, mode="sequential", split=split, context=tmp_path / "book.safetensors")
    assert {block.attention.lyra_q_heads for block in model.blocks.values()} == {(2, 3)}
    assert "in 2 blocks" in repr(model)
    assert not model.spec.splits  # the model's own attention is whole


def test_streams_batches_and_scores(model: Model, book: StaticContext) -> None:
    plain = model.score(LIVE).total
    model.attach(book, gate=0.5, live="causal")
    made = model.generate(LIVE, 8)
    assert "".join(model.stream(LIVE, 8)) == made
    assert model.generate([LIVE, TEXT], 8)[0] == made
    assert abs(model.score(LIVE).total - plain) > 1e-3


def test_what_cannot_be_is_refused(model: Model, book: StaticContext, tiny_folder: Path, other_folder: Path) -> None:
    parallel = lyra.load(tiny_folder)
    for options in ({"gate": 1.0}, {"residual": True}):
        with pytest.raises(ModelError, match="load the model with mode='sequential'"):
            parallel.attach(book, **options)
    model.attach(book, gate=0.5)
    before = model.logits(LIVE)
    with pytest.raises(ContextError, match="does not fit"):
        model.attach(lyra.load(other_folder).capture(TEXT))
    with pytest.raises(ContextError, match=r"holds KV heads \(1,\)"):
        model.attach(book.take([1]), HeadSplit((0, 1)))
    with pytest.raises(SpecError, match="gate names layers"):
        model.attach(book, gate={1: 1.0})
    with pytest.raises(InputError, match="captured by the plain model; detach first"):
        model.capture(TEXT)
    assert np.array_equal(model.logits(LIVE), before)
    assert model.gate == 0.5


def test_modes_that_a_backend_does_not_have(tiny_folder: Path, loaded: Model) -> None:
    class Older:
        """A backend as they were before the mode."""

        name, capabilities = "older", frozenset({"static"})
        attention = load = staticmethod(lambda *_arguments, **_options: pytest.fail("not to be called"))

    with pytest.raises(ModelError, match="backend 'older' has no whole models with injected blocks"):
        lyra.load(tiny_folder, backend=Older(), mode="sequential")

    class Engine:
        spec, module = loaded.spec, None

    with pytest.raises(ModelError, match="a Engine holds no injected blocks"):
        Model(Engine(), mode="sequential")


def run(*arguments: object) -> Result:
    environment = {"COLUMNS": "100", "NO_COLOR": "1"}
    return CliRunner().invoke(application(), [str(argument) for argument in arguments], env=environment)


def test_the_command_line(book: StaticContext, model: Model, tiny_folder: Path, tmp_path: Path) -> None:
    path, text = tmp_path / "book.safetensors", tmp_path / "text.txt"
    book.save(path)
    text.write_text(TEXT)
    common = ("--model", tiny_folder, "--context", path, "--mode", "sequential")
    model.attach(book, gate=0.5)
    expected, score = model.generate(LIVE, 6), model.score(TEXT).total
    result = run("generate", LIVE, "-n", 6, *common, "--gate", 0.5)
    assert result.exit_code == 0, result.output
    assert result.stdout == expected + "\n"
    result = run("score", text, *common, "--gate", 0.5, "--json", "-")
    assert json.loads(result.stdout)["with context"]["total_nll"] == pytest.approx(score, rel=1e-6)
    model.gate = GATE
    result = run("score", text, *common, "--json", "-")
    assert json.loads(result.stdout)["with context"]["total_nll"] == pytest.approx(model.score(TEXT).total, rel=1e-6)
    result = run("generate", LIVE, "--model", tiny_folder, "--context", path, "--gate", 0.5)
    assert result.exit_code == 2
    assert "--mode sequential" in result.stderr
