"""lyra.Lyra: loading, saving and running it as any transformers model, with and without a context."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_gemma import CONFIG, GLOBAL, LAYERS, make_model, random_context, random_ids
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, pipeline

import lyra
from lyra import Lyra
from lyra.backends.torch_impl import LyraForCausalLM, versions
from lyra.spec import HeadSplit, InputError

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.tensor(random_ids(2, 9))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


class WithoutBos:
    """A tokenizer that adds no special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.get_vocab = tokenizer.get_vocab

    def __call__(self, text: str) -> dict[str, list[int]]:
        return self.tokenizer(text, add_special_tokens=False)


@pytest.fixture
def default(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Lyra:
    """What Lyra() gives where the default model is a tiny one, with a tokenizer."""
    monkeypatch.setenv("LYRA_MODEL", str(tiny_folder))
    return Lyra()


def test_without_arguments_it_is_the_default_model(default, tiny_folder):
    plain = Gemma3ForCausalLM.from_pretrained(tiny_folder)
    assert isinstance(default, Gemma3ForCausalLM)
    assert not default.training
    assert torch.equal(logits(default), logits(plain))
    assert default.state_dict().keys() == plain.state_dict().keys()
    assert (
        default.tokenizer("and the")["input_ids"] == AutoTokenizer.from_pretrained(tiny_folder)("and the")["input_ids"]
    )
    assert default.lm_head.weight is default.model.embed_tokens.weight


def test_a_context_from_text_is_that_of_the_front_door(default, tiny_folder):
    text = "and the other and the end of the note"
    model = lyra.load(tiny_folder, backend="torch", dtype="float32")
    expected = model.capture(text)
    found = default.float().capture(text)
    assert found.fingerprint.model == tiny_folder.name
    assert replace(found.fingerprint, model=expected.fingerprint.model) == expected.fingerprint
    assert found.tokens.tolist() == expected.tokens.tolist()
    for layer, one in found.layers.items():
        assert abs(one.k - expected.layers[layer].k).max() < 1e-5
        assert abs(one.v - expected.layers[layer].v).max() < 1e-5
    expected = default.capture(text).tokens.tolist()
    default.tokenizer = WithoutBos(default.tokenizer)
    assert default.capture(text).tokens.tolist() == expected
    default.tokenizer = default.tokenizer.tokenizer
    assert default.capture([2, 271, 270], kv_heads=[1]).kv_heads == {1: (1,), 3: (1,)}
    model.attach(found, HeadSplit((0, 3), share_kv=True))
    default.enable(found, HeadSplit((0, 3), share_kv=True))
    assert default.context() is found
    ids = default.tokenizer("and then", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        ours = default(input_ids=ids).logits[0].numpy()
        assert abs(ours - model.logits("and then")).max() < 1e-4
        default.disable()
        plain = default(input_ids=ids).logits
        with default.attach(found, gate=1.0):
            assert (default(input_ids=ids).logits - plain).abs().max() > 1e-3
        assert torch.equal(default(input_ids=ids).logits, plain)


@pytest.mark.filterwarnings("error:.*loss_type.*")
def test_it_is_what_transformers_makes_of_its_config(caplog):
    torch.manual_seed(0)
    plain = Gemma3ForCausalLM(Gemma3TextConfig(**CONFIG))
    model = Lyra(plain.config)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(logits(model.eval()), logits(plain.eval()))
    assert model.tokenizer is None
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        assert torch.equal(model(input_ids=IDS, labels=IDS).loss, plain(input_ids=IDS, labels=IDS).loss)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert caplog.text == ""


of_both_classes = pytest.mark.parametrize("kind", [LyraForCausalLM, Lyra], ids=["LyraForCausalLM", "Lyra"])


@of_both_classes
def test_from_a_state_dict_it_is_what_transformers_makes_of_it(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("LYRA_MODEL", str(tmp_path / "nothing"))  # the default model is not asked for
    source = make_model()
    options = {"config": source.config, "state_dict": source.state_dict()}
    model = kind.from_pretrained(None, **options)
    plain = Gemma3ForCausalLM.from_pretrained(None, **options)
    assert isinstance(model, kind)
    assert torch.equal(logits(model), logits(source))
    assert model.state_dict().keys() == plain.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name
    assert {*map(id, model.parameters())}.isdisjoint({*map(id, source.parameters())})
    assert kind.from_pretrained(None, **options, dtype=torch.bfloat16, device_map="cpu").dtype == torch.bfloat16
    with model.enable(), torch.inference_mode():
        assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape == (2, 11)
    assert model.tokenizer is None
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(kind.from_pretrained(tmp_path / "saved")), logits(source))


@of_both_classes
def test_what_a_state_dict_lacks_is_as_new_as_in_transformers(kind):
    config, weights = make_model().config, make_model().state_dict()
    some = {name: value for name, value in weights.items() if ".layers.0." in name}
    wrong = {"model.norm.weight": torch.zeros(7)}
    for given in ({}, some, some | wrong):
        options = {"config": config, "state_dict": given, "ignore_mismatched_sizes": True, "output_loading_info": True}
        model, report = kind.from_pretrained(None, **options)
        _, expected = Gemma3ForCausalLM.from_pretrained(None, **options)
        assert report == expected
        assert set(report["missing_keys"]) >= weights.keys() - given.keys() - {"lm_head.weight"}
        found = dict(model.named_parameters()) | dict(model.named_buffers())
        assert not any(value.is_meta for value in found.values())
        assert all(torch.equal(model.state_dict()[name], value) for name, value in given.items() if name not in wrong)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert logits(model).isfinite().all()


@of_both_classes
def test_on_no_device_yet_and_of_a_config_alone(kind):
    config = make_model().config
    with torch.device("meta"):
        model = kind(config)
    model.to_empty(device="cpu")
    model.init_weights()
    with model.enable(split=HeadSplit((0, 3), share_kv=True)):
        assert logits(model).isfinite().all()
    made = kind._from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    assert (type(made), made.dtype, made.config._attn_implementation) == (kind, torch.bfloat16, "eager")


def test_a_state_dict_alone_says_no_model():
    with pytest.raises(InputError, match="give its config too"):
        Lyra.from_pretrained(state_dict=make_model().state_dict())


@pytest.mark.parametrize("enabled", [False, True])
def test_what_it_saves_loads_in_plain_transformers(tmp_path, enabled):
    source = make_model()
    source.save_pretrained(tmp_path / "source")
    model = Lyra.from_pretrained(tmp_path / "source")
    before = logits(model)
    if enabled:
        injector = model.enable()
        injector.enable(random_context(injector, (0, 1)), HeadSplit((0, 3), share_kv=True))
        assert tuple(injector.enabled) == GLOBAL
        assert (logits(model) - before).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"] == ["Gemma3ForCausalLM"]
    found, report = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert type(found) is Gemma3ForCausalLM
    assert not any(report.values())
    assert torch.equal(logits(found), before)
    again = Lyra.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), before)
    model.disable()
    assert torch.equal(logits(model), before)


def test_the_tokenizer_is_saved_with_it(default, tmp_path):
    default.save_pretrained(tmp_path / "within")
    again = Lyra.from_pretrained(tmp_path, subfolder="within")
    assert again.tokenizer("the end")["input_ids"] == default.tokenizer("the end")["input_ids"]
    other = AutoTokenizer.from_pretrained(tmp_path / "within")
    again.tokenizer = other
    assert again.tokenizer is other


def test_a_pipeline_takes_it(default, caplog):
    context = default.capture("and the other and the end of the note")
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        run = pipeline("text-generation", model=default, tokenizer=default.tokenizer)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "not supported" not in caplog.text
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    with default.enable(context, HeadSplit.all(lyra.ModelSpec.from_hf_config(default.config.to_dict()))):
        ids = default.tokenizer("and the", return_tensors="pt")
        made = default.generate(**ids, max_new_tokens=5, do_sample=False)[:, ids["input_ids"].shape[1] :]
        found = run("and the", **options)[0]["generated_text"]
    assert found == default.tokenizer.decode(made[0], skip_special_tokens=True)


def test_a_gguf_file_is_read(tiny_gguf, tmp_path, monkeypatch):
    monkeypatch.setenv("LYRA_CACHE", str(tmp_path))
    model = Lyra.from_pretrained(str(tiny_gguf), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.config.num_hidden_layers == 4
    assert model.tokenizer is not None


def test_of_a_multimodal_checkpoint_it_takes_the_text_model(tmp_path):
    from test_torch_injector import multimodal

    whole = multimodal()
    whole.save_pretrained(tmp_path)
    model, report = Lyra.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(logits(model), logits(whole), rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "text")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "text")), logits(model))
    assert len(model.model.layers) == LAYERS


def test_refusals(tmp_path, monkeypatch):
    model = Lyra(Gemma3TextConfig(**CONFIG))
    with pytest.raises(InputError, match="has no tokenizer"):
        model.capture("a text")
    with pytest.raises(lyra.CheckpointError, match="there is no model 'nothing-of-the-kind'"):
        Lyra.from_pretrained("nothing-of-the-kind")
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="holds a model of type 'llama'"):
        Lyra.from_pretrained(tmp_path)
    monkeypatch.setattr(versions, "version", lambda _: "5.19.4")
    with pytest.raises(
        ImportError, match=r"transformers 5\.19\.4 is installed; .* pip install 'transformers>=5\.20,<6'"
    ):
        from lyra.backends.torch_impl import GemmaInjector  # noqa: F401


def test_without_its_frameworks_it_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "lyra.drop_in")
    monkeypatch.delitem(lyra.__dict__, "Lyra")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "torch", None)
        with pytest.raises(ImportError, match=r"this needs 'torch', .* pip install 'lyra\[torch\]'"):
            lyra.Lyra  # noqa: B018

    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", version)
    with pytest.raises(ImportError, match=r"needs transformers>=5\.20,<6: pip install 'lyra\[torch\]'"):
        lyra.Lyra  # noqa: B018


MEASURE = """
import os, sys
import torch
from transformers import Gemma3ForCausalLM
from lyra import Lyra

def resident(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])

def peak(work):
    read, write = os.pipe()
    if os.fork() == 0:
        open("/proc/self/clear_refs", "w").write("5")
        before = resident("VmRSS")
        touched = sum(float(value.sum()) for value in work().parameters())
        os.write(write, str(resident("VmHWM") - before).encode())
        os._exit(0)
    os.wait()
    return int(os.read(read, 100))

torch.set_num_threads(1)
folder = sys.argv[1]

def enabled():
    model = Lyra.from_pretrained(folder)
    model.enable()
    return model

print(*(peak(work) for work in (lambda: Gemma3ForCausalLM.from_pretrained(folder), enabled)))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_loading_takes_no_second_copy_of_the_weights(tmp_path):
    sizes = {"vocab_size": 20_000, "hidden_size": 1024, "intermediate_size": 2048, "head_dim": 256}
    with torch.device("meta"):
        model = Gemma3ForCausalLM(Gemma3TextConfig(**(CONFIG | sizes)))
    weights = sum(value.nbytes for value in model.parameters())
    assert weights > 200e6
    model.to_empty(device="cpu").save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-P", "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    plain, ours = (1024 * int(kib) for kib in done.stdout.split())
    assert plain > 0.9 * weights
    assert ours < 1.2 * plain


def test_the_class_of_the_backend_reads_folders_without_the_front_door(tmp_path):
    make_model().save_pretrained(tmp_path)
    model = LyraForCausalLM.from_pretrained(str(tmp_path))
    assert torch.equal(logits(model), logits(make_model()))
    assert model.loss_type == "ForCausalLM"
