"""Training with a context enabled: gradients, the trainer, adapters for Lyra heads alone, contexts that learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from ranks import gradient_of
from safetensors.torch import load_file
from tiny_gemma import GLOBAL, make_model, random_context, random_ids
from torch.utils.checkpoint import checkpoint
from transformers import Gemma3ForCausalLM, Trainer, TrainingArguments

from lyra.backends.torch_impl import LyraGemma3Attention
from lyra.backends.torch_impl.injector import GemmaInjector
from lyra.conformance.case import Case, Context
from lyra.conformance.tolerance import K, distance
from lyra.spec import ContextError, HeadSplit, InputError, StaticContext, StaticSpec
from lyra.spec.gradients import OracleGradients, gradients

pytestmark = pytest.mark.usefixtures("one_thread")

ALIGNED = HeadSplit((2, 3))
CUT = HeadSplit((1, 2, 3), share_kv=True)
MODES = {
    "causal": (ALIGNED, StaticSpec("causal", "continue")),
    "self, cut": (CUT, StaticSpec("self", "overlay")),
    "none": (CUT, StaticSpec("none", "continue")),
}


def loss_of(model: Any, ids: np.ndarray) -> torch.Tensor:
    return model(input_ids=torch.tensor(ids), labels=torch.tensor(ids)).loss


def all_gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model, random_ids(2, 9)).backward()
    named = model.named_parameters()
    return {name: part.grad.clone() for name, part in named if part.grad is not None and part.numel()}


def trainable_only(model: torch.nn.Module) -> list[str]:
    return sorted(name for name, part in model.named_parameters() if part.requires_grad)


def freeze_but_context(model: torch.nn.Module) -> None:
    for name, part in model.named_parameters():
        part.requires_grad_("static_" in name)


def train(model: Any, folder: Path, steps: int, rate: float, **more: Any) -> list[float]:
    """Losses of transformers' own trainer over one batch of two rows, step after step."""
    rows = [{"input_ids": row, "labels": row} for row in random_ids(2, 16)]
    options = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=2, learning_rate=rate, logging_steps=1, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant", weight_decay=0.0, **more,
    )  # fmt: skip
    trainer = Trainer(model, options, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# gradients


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(("split", "mode"), MODES.values(), ids=MODES)
def test_gradients_of_the_module_are_the_oracles(split: HeadSplit, mode: StaticSpec, again: bool) -> None:
    """Of the input, every weight, and the static keys as they are stored; within K·σ, checkpointed or not."""
    model = make_model()
    injector = GemmaInjector(model)
    spec = injector.spec.attention.replace(split=split, static=mode)
    problem = Case(spec, calls=(5,), batch=2, context=Context(tokens=6, hidden=(2,), gaps=True)).problem()
    assert problem.static is not None
    model.model.layers[1].self_attn.load_state_dict({name: torch.tensor(w) for name, w in problem.weights.items()})
    injector.place({1: problem.static}, {1: split}, mode, trainable=True)
    module = injector.enabled[1]
    x = torch.tensor(problem.x, requires_grad=True)
    turns = model.model.rotary_emb(x, torch.tensor(problem.positions), "full_attention")
    call = (lambda x: checkpoint(module, x, turns, use_reentrant=False)) if again else (lambda x: module(x, turns))
    cotangent = np.random.default_rng(3).normal(size=problem.x.shape).astype(np.float32)
    output, _ = call(x)
    output.backward(torch.tensor(cotangent))
    wanted = gradients(
        spec, problem.weights, cotangent, problem.x,
        positions=problem.positions, mask=problem.mask, static=problem.static,
    )  # fmt: skip
    assert x.grad is not None
    got = {"x": x.grad} | {name: gradient_of(module, name.split(".")[0]) for name in problem.weights}
    for name, expected in {"x": wanted.x, **wanted.weights}.items():
        far = distance(got[name].numpy(), expected)
        assert far.ratio <= K, far.describe(name, K)
    compare_static(module, wanted, problem.static.mask[0])


def compare_static(module: LyraGemma3Attention, wanted: OracleGradients, shown: np.ndarray) -> None:
    for name in ("static_k", "static_v"):
        parameter, expected = getattr(module, name), getattr(wanted, name)
        full = np.zeros(expected.value.shape, np.float32)
        full[:, :, shown] = parameter.grad.numpy()
        far = distance(full, expected)
        assert far.ratio <= K, far.describe(name, K)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = make_model().train()
    injector = GemmaInjector(model)
    injector.enable(random_context(injector, range(2)), CUT, trainable=True)
    plain = all_gradients(model)
    model.gradient_checkpointing_enable()
    again = all_gradients(model)
    assert plain.keys() == again.keys()
    assert sum("static_" in name for name in plain) == 2 * len(GLOBAL)
    for name, expected in plain.items():
        torch.testing.assert_close(again[name], expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_gradients_under_autocast() -> None:
    """bfloat16 elsewhere; the attention core, the context and their gradients stay float32."""
    model = make_model().train()
    injector = GemmaInjector(model)
    injector.enable(random_context(injector, range(2)), CUT, trainable=True)
    plain = all_gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = all_gradients(model)
    for name, expected in plain.items():
        assert mixed[name].dtype == torch.float32
        off = (mixed[name] - expected).norm() / expected.norm()
        assert 0 < off < 0.2, name


@pytest.mark.filterwarnings("ignore:the model's RoPE frequencies have been rounded")
def test_a_context_in_a_bfloat16_model_is_tuned_in_float32() -> None:
    model = make_model().to(torch.bfloat16)
    injector = GemmaInjector(model)
    injector.enable(random_context(injector, range(2)), CUT, trainable=True)
    loss_of(model, random_ids(2, 9)).backward()
    for module in injector.enabled.values():
        for parameter in (module.static_k, module.static_v):
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            assert torch.isfinite(parameter.grad).all()
            assert (parameter.grad != parameter.grad.bfloat16()).any()


# contexts that learn


def test_a_trainable_context_gives_what_it_gives_as_it_is() -> None:
    model = make_model()
    injector = GemmaInjector(model)
    context = random_context(injector, range(2))
    ids = torch.tensor(random_ids(2, 9))
    for split, mode in MODES.values():
        found = []
        for trainable in (False, True):
            injector.enable(context, split, live=mode.live, positions=mode.positions, trainable=trainable)
            found.append(model(ids).logits)
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)  # its keys are rotated at every call: other rounding


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
def test_the_trainer_tunes_a_context_and_nothing_else(tmp_path: Path, again: bool) -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    injector = GemmaInjector(model)
    context = random_context(injector, range(2))
    injector.enable(context, ALIGNED, trainable=True)
    freeze_but_context(model)
    assert len(trainable_only(model)) == 2 * len(GLOBAL)
    losses = train(model, tmp_path, steps=6, rate=0.1, gradient_checkpointing=again)
    assert losses[-1] < losses[0] - 0.1
    tuned = injector.context()
    trained = model.eval()(torch.tensor(random_ids(2, 9))).logits
    assert tuned.tokens is None
    for layer in GLOBAL:
        held, was = tuned.layers[layer], context.layers[layer]
        assert held.kv_heads == (0, 1)
        np.testing.assert_array_equal(held.k[:, 0], was.k[:, 0])  # that head is a vanilla one
        assert np.abs(held.k[:, 1] - was.k[:, 1]).max() > 0.1
        assert np.abs(held.v[:, 1] - was.v[:, 1]).max() > 0.1

    model.save_pretrained(tmp_path / "model")
    tuned.save(tmp_path / "tuned.safetensors")
    assert load_file(tmp_path / "model" / "model.safetensors").keys() <= before.keys()
    again = Gemma3ForCausalLM.from_pretrained(tmp_path / "model")
    for name, value in again.state_dict().items():
        assert torch.equal(value, before[name]), name
    GemmaInjector(again).enable(StaticContext.load(tmp_path / "tuned.safetensors"), ALIGNED)
    torch.testing.assert_close(again(torch.tensor(random_ids(2, 9))).logits, trained, rtol=1e-5, atol=1e-5)


def test_hidden_slots_are_not_tuned_and_rows_are() -> None:
    """A shared context loses its hidden slots; of one row by row they get no gradient."""
    model = make_model()
    injector = GemmaInjector(model)
    one = random_context(injector, range(2))
    mask = one.mask.copy()
    mask[0, 2] = False
    hidden = StaticContext(one.layers, mask, one.positions, one.fingerprint)
    for context in (hidden, StaticContext.stack([hidden, one])):
        injector.enable(context, ALIGNED, trainable=True)
        for module in injector.enabled.values():
            torch.nn.init.constant_(module.static_k, 7.0)
        k = injector.context().layers[GLOBAL[0]].k
        tuned = (k[:, 1] == 7.0).all(axis=-1)
        np.testing.assert_array_equal(tuned, context.mask if context.batch == 1 else np.ones_like(context.mask))
        assert not (k[:, 0] == 7.0).any()
        loss_of(model, random_ids(2, 9)).backward()
        gradient = injector.enabled[GLOBAL[0]].static_k.grad
        assert (gradient[0, 0, 2] == 0).all() == (context.batch == 2)
        assert gradient[-1, 0, 3].abs().max() > 0


def test_state_dicts_hold_no_context() -> None:
    model = make_model()
    plain = set(model.state_dict())
    injector = GemmaInjector(model)
    injector.enable(random_context(injector, range(2)), ALIGNED, trainable=True)
    state = model.state_dict()
    assert set(state) == plain
    kept = injector.enabled[1].static_k.detach().clone()
    model.load_state_dict(state)
    assert torch.equal(injector.enabled[1].static_k, kept)


def test_a_context_that_is_not_there_or_no_longer_finite() -> None:
    model = make_model()
    injector = GemmaInjector(model)
    context = random_context(injector, range(2))
    with pytest.raises(InputError, match=r"no context enabled; call enable\(context\)"):
        injector.context()
    assert injector.enable(context, ALIGNED).context() is context
    injector.enable(context, ALIGNED, trainable=True)
    torch.nn.init.constant_(injector.enabled[1].static_v, float("nan"))
    with pytest.raises(ContextError, match="v of layer 1 is not finite"):
        injector.context()
    injector.disable()
    with pytest.raises(InputError, match="no context enabled"):
        injector.context()


# adapters


def head_outputs(model: Any, layer: int) -> torch.Tensor:
    """What the heads of a layer give, [B,T,Hq,D]."""
    seen: list[torch.Tensor] = []
    attention = next(part for name, part in model.named_modules() if name.endswith(f"layers.{layer}.self_attn"))
    handle = attention.o_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor(random_ids(2, 9)), use_cache=False)  # as the trainer leaves it
    handle.remove()
    return seen[0].unflatten(-1, (4, -1))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("merged", [True, False])
def test_lora_of_the_lyra_projections_only(tmp_path: Path, merged: bool) -> None:
    base = make_model()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    injector = GemmaInjector(base)
    injector.enable(random_context(injector, range(2)), ALIGNED)
    was = head_outputs(base, 1)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["lyra_k_proj", "lyra_v_proj"]))
    assert len(trainable_only(model)) == 2 * 2 * len(GLOBAL)
    assert all(".lyra_" in name and "lora_" in name for name in trainable_only(model))
    losses = train(model, tmp_path, steps=6, rate=0.1, gradient_checkpointing=merged)
    assert losses[-1] < losses[0] - 0.05
    model.eval()
    now = head_outputs(model, 1)
    assert torch.equal(now[:, :, :2], was[:, :, :2])
    assert (now[:, :, 2:] - was[:, :, 2:]).abs().max() > 0.01

    model.save_pretrained(tmp_path / "adapter")
    again = make_model()
    other = GemmaInjector(again)
    other.enable(random_context(other, range(2)), ALIGNED)
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert torch.equal(head_outputs(loaded, 3), head_outputs(model, 3))

    with pytest.raises(InputError, match="merge_and_unload"):
        injector.disable()
    plain = model.merge_and_unload() if merged else model.unload()
    injector.disable()
    state = plain.state_dict()
    assert state.keys() == before.keys()
    rows = slice(before["model.layers.1.self_attn.k_proj.weight"].shape[0] // 2, None)
    for name, value in state.items():
        tuned = merged and any(f"layers.{layer}.self_attn.{kind}_proj" in name for layer in GLOBAL for kind in "kv")
        if tuned:
            assert not torch.equal(value[rows], before[name][rows]), name
            value, expected = value[: rows.start], before[name][: rows.start]
        else:
            expected = before[name]
        assert torch.equal(value, expected), name
