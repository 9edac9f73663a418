"""The real Gemma-3 270M in PyTorch: plain, with Lyra, and with PEFT's prefixes. Tokens are random, BOS first.

All models of a process share one set of weights.
"""

from __future__ import annotations

import copy
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import DynamicCache, Gemma3ForCausalLM

from lyra.backends.torch_impl import GemmaInjector
from lyra.checkpoint import resolve
from lyra.loading import load
from lyra.spec.context import StaticContext
from lyra.spec.split import HeadSplit

from ..row import Work

NEW = 24
"""Tokens of a generation."""

Part = Literal["prefill", "decode"]


@cache
def folder() -> str:
    """The checkpoint, converted once."""
    return str(resolve("gemma-3-270m"))


@cache
def weights() -> Gemma3ForCausalLM:
    """The plain model."""
    return Gemma3ForCausalLM.from_pretrained(folder()).eval()


def plain(tokens: int, part: Part, batch: int = 1) -> Work:
    """Hugging Face's model: a prefill of `tokens`, or a decode step behind it."""
    return _part(weights(), _ids(batch, tokens), part)


def enabled(tokens: int, part: Part, batch: int = 1, static: int = 0) -> Work:
    """The same with Lyra's attention in the global layers and a context of `static` tokens, or none."""
    return _part(_with_lyra(static), _ids(batch, tokens), part)


def generate_plain(tokens: int) -> Work:
    """Hugging Face's generate: the most likely NEW tokens."""
    ids = _ids(1, tokens)
    run = partial(weights().generate, ids, do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW)
    return Work(torch.inference_mode()(run))


def generate_lyra(tokens: int) -> Work:
    """The model of lyra.load, without a context: the most likely NEW tokens."""
    engine: Any = _loaded().engine
    return Work(partial(engine.generate, _ids(1, tokens).numpy(), max_new_tokens=NEW))


def first_token_lyra(static: int, tokens: int, stored: str = "float32") -> Work:
    """From a context's file to the first token of a prompt: load, attach, prefill. Nothing is kept between runs."""
    model = _loaded()
    file = _context_file(static, stored)
    prompt = _ids(1, tokens).numpy()

    def run() -> None:
        model.attach(StaticContext.load(file))
        model.engine.generate(prompt, max_new_tokens=1)

    return Work(run, before=model.detach)


def first_token_prefill(static: int, tokens: int) -> Work:
    """The plain model: the context's tokens and the prompt in one prefill."""
    return _part(weights(), _ids(1, static + tokens), "prefill")


def first_token_copied(static: int, tokens: int, sliding: bool = True) -> Work:
    """The plain model: a prefilled cache is copied, and the prompt prefilled behind it.

    Without `sliding` the cache keeps all tokens in the sliding-window layers too, as a DynamicCache without a config.
    """
    model, prompt = weights(), _ids(1, tokens)
    prefilled = DynamicCache(config=model.config) if sliding else DynamicCache()
    with torch.inference_mode():
        for piece in _ids(1, static).split(512, dim=1):
            model(input_ids=piece, past_key_values=prefilled, logits_to_keep=1)

    @torch.inference_mode()
    def run() -> None:
        model(input_ids=prompt, past_key_values=copy.deepcopy(prefilled), logits_to_keep=1).logits.argmax(dim=-1)

    return Work(run)


def peft(kind: Literal["prefix", "cartridge"], static: int, tokens: int, part: Part, batch: int = 1) -> Work:
    """PEFT's prefix tuning or cartridge of `static` virtual tokens."""
    from peft import CartridgeConfig, PrefixTuningConfig, TaskType, get_peft_model

    chosen = {"prefix": PrefixTuningConfig, "cartridge": CartridgeConfig}[kind]
    config = chosen(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=static, inference_mode=True)
    model = get_peft_model(_own_model(), config).eval()
    return _part(model, _ids(batch, tokens), part, model.get_base_model())


def _part(model: Any, ids: torch.Tensor, part: Part, stepping: Any = None) -> Work:
    """A prefill of ids [B,T] by `model`, or one step of `stepping` (else of it) with the cache of the prefill.

    A step's cache is a copy of the prefilled one, made untimed.
    """
    prefill = torch.inference_mode()(partial(model, input_ids=ids, use_cache=True, logits_to_keep=1))
    if part == "prefill":
        return Work(prefill)
    prefilled, token = prefill().past_key_values, ids[:, -1:]
    step = model if stepping is None else stepping
    given: list[Any] = []

    def before() -> None:
        given[:] = [copy.deepcopy(prefilled)]

    @torch.inference_mode()
    def run() -> None:
        step(input_ids=token, past_key_values=given[0], logits_to_keep=1)

    return Work(run, before)


@cache
def _loaded() -> Any:
    return load(folder())


def _own_model() -> Gemma3ForCausalLM:
    """A model with the plain model's weights, in modules of its own."""
    return copy.deepcopy(weights(), {id(parameter): parameter for parameter in weights().parameters()})


def _with_lyra(static: int) -> Gemma3ForCausalLM:
    """The model with Lyra's attention in its global layers, and a context of `static` tokens, or none."""
    model = _own_model()
    injector = GemmaInjector(model)
    if static:
        injector.enable(StaticContext.load(_context_file(static)))
    else:
        injector.enable(split=HeadSplit.half(injector.spec))
    return model


@cache
def _context_file(static: int, stored: str = "float32") -> Path:
    """The file of a captured context, in a folder that goes when the worker ends."""
    if stored != "float32":
        path = _folder() / f"{static}.{stored}.safetensors"
        StaticContext.load(_context_file(static)).astype(stored).save(path)
        return path
    path = _folder() / f"{static}.safetensors"
    GemmaInjector(weights()).capture(_ids(1, static).numpy()).save(path)
    return path


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="lyra-bench-")


def _folder() -> Path:
    return Path(_temporary().name)


def _ids(batch: int, tokens: int) -> torch.Tensor:
    ids = np.random.default_rng(tokens).integers(1000, 200_000, (batch, tokens))
    ids[:, 0] = 2
    return torch.tensor(ids)
