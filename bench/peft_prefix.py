"""What works with a context in Gemma-3: Lyra beside PEFT's prefix tuning, on a small random model with a sliding window
shorter than the prompts. Exit code 0 if everything works with Lyra, else 1.

python bench/peft_prefix.py --json works.json
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import numpy as np
import peft
import torch
import transformers
import typer
from peft import LoraConfig, PrefixTuningConfig, TaskType, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    CompileConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
)

from lyra.backends.torch_impl.injector import GemmaInjector
from lyra.cli.app import run_script
from lyra.cli.files import check_files
from lyra.cli.options import JsonPath
from lyra.cli.output import show
from lyra.progress import steps
from lyra.spec import HeadSplit, StaticContext
from lyra.terminal import new_table

WORDS, WINDOW, SLOTS, NEW = 97, 8, 20, 6
KINDS = ["sliding_attention", "full_attention"] * 2
PROMPTS = [np.random.default_rng(8).integers(3, WORDS, length) for length in (13, 10)]
TOLERANCE = 1e-4
"""Largest difference of log-probabilities and, relative to the largest, of gradients that counts as none."""


class WrongError(Exception):
    """It ran, and gave something else than it should."""


@dataclass(frozen=True)
class Given:
    """A way to give a model a context: `make()` is a fresh model with one, `rows()` one with another for each prompt.

    `options_for_rows` go to the generation of the latter, `learns` is in the names of the context's own parameters.
    """

    make: Callable[[], Any]
    rows: Callable[[], Any]
    options_for_rows: dict[str, Any]
    learns: str


def plain(seed: int = 0) -> Any:
    """A random Gemma-3 of four layers; half of them slide."""
    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=len(KINDS), num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=WINDOW, layer_types=KINDS, eos_token_id=None,
        tie_word_embeddings=False,  # tied, a random model repeats its last word
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3 if parameter.ndim == 1 else 0.2)
    return model


def captured(count: int) -> StaticContext:
    """The contexts of `count` random texts, as rows."""
    texts = np.random.default_rng(7).integers(3, WORDS, (count, SLOTS))
    return StaticContext.stack([GemmaInjector(plain()).capture(text[None]) for text in texts])


def with_lyra(count: int) -> Any:
    """The model with `count` contexts, whose keys and values can learn."""
    model = plain().requires_grad_(False)
    GemmaInjector(model).enable(captured(count), HeadSplit((1, 2, 3), share_kv=True), trainable=True)
    return model


def with_prefix(count: int) -> Any:
    """The model with `count` prefixes, each an adapter."""
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=SLOTS)
    model = get_peft_model(plain(), config, adapter_name="row0")
    for number in range(1, count):
        model.add_adapter(f"row{number}", config)
    return model.eval()


WAYS = {
    "Lyra": Given(lambda: with_lyra(1), lambda: with_lyra(2), {}, "static_"),
    "PEFT prefix tuning": Given(
        lambda: with_prefix(1), lambda: with_prefix(2), {"adapter_names": ["row0", "row1"]}, "prompt_encoder"
    ),
}


# what is tried


def generate(model: Any, prompts: list[np.ndarray], **options: Any) -> Any:
    """Tokens and beams' scores of left-padded prompts."""
    width = max(map(len, prompts))
    ids = torch.tensor(np.stack([np.pad(prompt, (width - len(prompt), 0)) for prompt in prompts]))
    mask = torch.tensor([[int(place >= width - len(prompt)) for place in range(width)] for prompt in prompts])
    settings = {"max_new_tokens": NEW, "do_sample": False, "length_penalty": 0.0, "return_dict_in_generate": True}
    torch.manual_seed(0)
    return model.generate(input_ids=ids, attention_mask=mask, **(settings | options))


def greedy(model: Any, prompt: np.ndarray, count: int = NEW) -> list[int]:
    """The most likely continuation, each token from a call over all before it, without a cache."""
    with torch.no_grad():
        for _ in range(count):
            prompt = np.append(prompt, model(input_ids=torch.tensor(prompt)[None]).logits[0, -1].argmax().item())
    return prompt[-count:].tolist()


def agree(got: Any, expected: Any, what: str) -> None:
    """Raise WrongError for a difference."""
    if got != expected:
        raise WrongError(f"other {what}")


def same_as_greedy(way: Given, prompts: int = 1, **options: Any) -> None:
    """Generation with these options gives the most likely continuation of every prompt."""
    model = way.make()
    made = generate(model, PROMPTS[:prompts], **options).sequences[:, -NEW:].tolist()
    agree(made, [greedy(model, prompt) for prompt in PROMPTS[:prompts]], "tokens")


def beams(way: Given) -> None:
    """The score of a beam is the log-probability that the model gives its tokens."""
    model = way.make()
    made = generate(model, PROMPTS[:1], num_beams=3, output_scores=True)
    with torch.no_grad():
        logits = model(input_ids=made.sequences).logits[0, -NEW - 1 : -1]
    found = logits.log_softmax(dim=-1).gather(1, made.sequences[0, -NEW:, None]).sum()
    if abs(found - made.sequences_scores[0]) > TOLERANCE * NEW:
        raise WrongError(f"a beam's score is {made.sequences_scores[0]:.3f}, its log-probability {found:.3f}")


def context_for_each_row(way: Given) -> None:
    """Two rows with the same prompt get different contexts: the first row's is not the second's."""
    model = way.rows()
    made = generate(model, PROMPTS[:1] * 2, max_new_tokens=20, **way.options_for_rows).sequences
    if torch.equal(made[0], made[1]):
        raise WrongError("both rows read the same context")


def assistant(way: Given) -> None:
    """A plain target with an assistant that has the context gives its own most likely continuation."""
    target = plain(5)
    made = generate(target, PROMPTS[:1], assistant_model=way.make()).sequences[:, -NEW:].tolist()
    agree(made, [greedy(target, PROMPTS[0])], "tokens")


def streaming(way: Given) -> None:
    """The pieces that a streamer gets are the text of the tokens."""
    words = {f"w{number}": number for number in range(WORDS)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")))
    model, pieces = way.make(), TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    worker = Thread(target=generate, args=(model, PROMPTS[:1]), kwargs={"streamer": pieces})
    worker.start()
    found = "".join(pieces)
    worker.join()
    agree(found, tokenizer.decode(greedy(model, PROMPTS[0])), "text")


def compiled(way: Given) -> None:
    """The step of a static cache is compiled without a break, as often for many tokens as for few."""

    def graphs(count: int) -> int:
        seen: list[Any] = []
        settings = CompileConfig(fullgraph=True, mode=None, backend=lambda graph, _inputs: seen.append(graph) or graph)
        settings._compile_all_devices = True
        torch._dynamo.reset()
        model, options = way.make(), {"cache_implementation": "static", "compile_config": settings}
        made = generate(model, PROMPTS[:1], max_new_tokens=count, **options).sequences[0, -count:].tolist()
        agree(made, greedy(model, PROMPTS[0], count), "tokens")
        return len(seen)

    few, many = graphs(4), graphs(9)
    if not 0 < few == many:
        raise WrongError(f"{few} graphs for 4 tokens, {many} for 9")


def gradients(model: Any, learns: str) -> dict[str, torch.Tensor]:
    """Those of the context's own parameters."""
    ids = torch.tensor(PROMPTS[0])[None]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    return {name: part.grad for name, part in model.named_parameters() if learns in name and part.grad is not None}


def checkpointing(way: Given) -> None:
    """Gradients of the context are the same with gradient checkpointing."""
    model, again = way.make(), way.make()
    again.gradient_checkpointing_enable()
    again.load_state_dict(model.state_dict())
    expected, got = gradients(model, way.learns), gradients(again, way.learns)
    agree(sorted(got), sorted(expected), "parameters get gradients")
    for name, one in expected.items():
        if (got[name] - one).abs().max() > TOLERANCE * one.abs().max():
            raise WrongError("other gradients")


def trainer(way: Given) -> None:
    """Steps of transformers' Trainer over the context's parameters bring the loss down."""
    rows = [{"input_ids": PROMPTS[0], "labels": PROMPTS[0]}]
    model = way.make()
    with TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder, max_steps=6, learning_rate=0.1, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True,
            disable_tqdm=True,
        )  # fmt: skip
        run = Trainer(model, options, train_dataset=rows)
        run.remove_callback(PrinterCallback)
        run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    if not losses[-1] < losses[0]:
        raise WrongError(f"the loss goes from {losses[0]:.3f} to {losses[-1]:.3f}")


def lora(way: Given) -> None:
    """An adapter of the query projections trains while the context is there."""
    model = get_peft_model(way.make(), LoraConfig(target_modules=["q_proj"]))
    if not gradients(model, "lora_B"):
        raise WrongError("the adapter has no gradients")


FEATURES: dict[str, Callable[[Given], None]] = {
    "greedy": same_as_greedy,
    "a batch padded on the left": lambda way: same_as_greedy(way, prompts=2),
    "sampling": lambda way: same_as_greedy(way, do_sample=True, top_k=1),
    "beam search": beams,
    "a context for each row": context_for_each_row,
    'cache_implementation="static"': lambda way: same_as_greedy(way, cache_implementation="static"),
    "prefill_chunk_size": lambda way: same_as_greedy(way, prefill_chunk_size=3),
    "both of these": lambda way: same_as_greedy(way, cache_implementation="static", prefill_chunk_size=3),
    "assisted decoding, as target": lambda way: same_as_greedy(way, assistant_model=plain(3)),
    "assisted decoding, as assistant": assistant,
    "prompt lookup decoding": lambda way: same_as_greedy(way, prompt_lookup_num_tokens=3),
    "streaming": streaming,
    "compiled decode step": compiled,
    "training by Trainer": trainer,
    "gradient checkpointing": checkpointing,
    "LoRA beside the context": lora,
}


def outcome(feature: Callable[[Given], None], way: Given) -> str:
    """works, or how it fails, in a few words."""
    try:
        feature(way)
    except WrongError as error:
        return f"wrong: {error}"
    except Exception as error:  # whatever another library raises is its answer
        first = str(error).strip().partition("\n")[0]
        return f"fails: {type(error).__name__}: {first if len(first) <= 72 else first[:69] + '...'}"
    return "works"


def tried() -> dict[str, dict[str, str]]:
    """The outcome of every feature, by way."""
    found: dict[str, dict[str, str]] = {}
    with warnings.catch_warnings(), steps("Trying") as move:
        warnings.simplefilter("ignore")
        for number, (name, feature) in enumerate(FEATURES.items()):
            move(name, number, len(FEATURES))
            found[name] = {way: outcome(feature, given) for way, given in WAYS.items()}
    return found


def main(json_path: JsonPath = None) -> None:
    """Try every feature with Lyra and with prefix tuning, and print what works."""
    check_files(json_path=json_path)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    found = tried()
    versions = {"transformers": transformers.__version__, "peft": peft.__version__}
    made = new_table(f"transformers {versions['transformers']}, PEFT {versions['peft']}")
    for column in ("feature", *WAYS):
        made.add_column(column)
    for name, cells in found.items():
        made.add_row(name, *cells.values())
    show({"versions": versions, "features": found}, json_path, made)
    raise typer.Exit(0 if all(cells["Lyra"] == "works" for cells in found.values()) else 1)


if __name__ == "__main__":
    run_script(main)
