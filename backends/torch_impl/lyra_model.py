"""Lyra as a model of its own: a Gemma3ForCausalLM that contexts can be enabled on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig
from transformers.cache_utils import Cache

from lyra.spec.arguments import check_ids, check_text
from lyra.spec.attaching import SplitSource, chosen_heads
from lyra.spec.bos import warn_of_repeated_bos, with_one_bos
from lyra.spec.context import StaticContext
from lyra.spec.errors import InputError
from lyra.spec.fingerprint import hash_vocabulary

from .injector import GemmaInjector
from .loading import NOT_TEXT, save_as_text, text_options

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""The options of from_pretrained that say where files are found; config and tokenizer lie there too."""


class LyraForCausalLM(Gemma3ForCausalLM):
    """A Gemma3ForCausalLM with GemmaInjector's methods, `capture` from text, and its tokenizer.

    Without a context it is Gemma3ForCausalLM, bit for bit, and it is saved as one whatever is enabled: plain
    transformers load what it saves. Of a multimodal checkpoint it takes the text model.
    """

    _keys_to_ignore_on_load_unexpected = NOT_TEXT

    def __init__(self, config: Gemma3TextConfig) -> None:
        super().__init__(config)
        self._hub_options: dict[str, Any] = {}
        self._tokenizer: Any = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, from a folder, a hub id or a state_dict, with all options. Raises InputError for no
        Gemma-3."""
        name = pretrained_model_name_or_path
        where = {option: kwargs[option] for option in HUB_OPTIONS if option in kwargs}
        known = "config" in kwargs or "gguf_file" in kwargs
        options = {} if name is None or known else text_options(name, **where)
        loaded: Any = super().from_pretrained(name, *model_args, **kwargs, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if options:
            save_as_text(model)
        if name is None:  # which transformers writes down as "None"; its tokenizer is its config's, as in Lyra(config)
            model.name_or_path = model.config.name_or_path = getattr(kwargs["config"], "name_or_path", "")
        model._hub_options = where
        return loaded

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """As in transformers: a plain Gemma3ForCausalLM, whatever is enabled, with the tokenizer if there is one.

        Contexts are not part of the model; save them by `StaticContext.save`.
        """
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process and self.tokenizer is not None:
            self.tokenizer.save_pretrained(save_directory)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that lies with the weights, loaded when it is first asked for; None where there is none."""
        if self._tokenizer is None and self.name_or_path:
            folder = Path(self.name_or_path, self._hub_options.get("subfolder", ""))
            if not folder.is_dir() or (folder / "tokenizer.json").is_file():
                self._tokenizer = AutoTokenizer.from_pretrained(self.name_or_path, **self._hub_options)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def enable(
        self,
        context: StaticContext | str | os.PathLike[str] | None = None,
        split: SplitSource | None = None,
        **options: Any,
    ) -> GemmaInjector:
        """`GemmaInjector.enable` for this model; `with model.enable(context):` disables at the end."""
        return GemmaInjector(self).enable(context, split, **options)

    def disable(self) -> None:
        """`GemmaInjector.disable` for this model."""
        GemmaInjector(self).disable()

    def attach(
        self, external_kv_cache: StaticContext | str | os.PathLike[str] | Cache | None = None, **options: Any
    ) -> GemmaInjector:
        """`GemmaInjector.attach` for this model; `with model.attach(context, gate=1.0):` detaches at the end."""
        return GemmaInjector(self).attach(external_kv_cache, **options)

    def detach(self) -> None:
        """`GemmaInjector.detach` for this model."""
        GemmaInjector(self).detach()

    def context(self) -> StaticContext:
        """`GemmaInjector.context` for this model: the context that is enabled, tuned or not."""
        return GemmaInjector(self).context()

    def capture(
        self,
        text: str | Sequence[int] | np.ndarray,
        *,
        layers: Iterable[int] | None = None,
        kv_heads: Iterable[int] | Mapping[int, Iterable[int]] | None = None,
        chunk_size: int = 512,
    ) -> StaticContext:
        """The static context of a text (BOS in front), or of token ids [S] taken as they are (clause CAPTURE).

        `layers` are global layers, all of them by default; `kv_heads` those to keep, by layer if a mapping. Raises
        InputError while a context is enabled, and for a text where there is no tokenizer.
        """
        injector = GemmaInjector(self)
        wanted, given = (
            chosen_heads(injector.spec, layers, kv_heads),
            self._ids(text) if isinstance(text, str) else text,
        )
        ids = check_ids(given, injector.spec.vocab_size, axes=(1,), what="a text or whole numbers")
        warn_of_repeated_bos(ids[None], self.config.bos_token_id)
        context = injector.capture(ids[None], layers=list(wanted), chunk_size=chunk_size)
        if self.tokenizer is not None:
            vocabulary = hash_vocabulary(self.tokenizer.get_vocab())
            known = replace(context.fingerprint, tokenizer=vocabulary, bos=self.config.bos_token_id)
            context = replace(context, fingerprint=known)
        return context if kv_heads is None else context.take(wanted)

    def _ids(self, text: str) -> list[int]:
        """The ids of a text, BOS first, once, whether the tokenizer adds it or not, and whether the text has it."""
        if self.tokenizer is None:
            raise InputError("capture: this model has no tokenizer; set model.tokenizer, or give token ids")
        return with_one_bos(self.tokenizer(check_text("text", text))["input_ids"], self.config.bos_token_id)


# transformers goes by a class's name to choose the loss, to know what a pipeline serves and to save `architectures`.
LyraForCausalLM.__name__ = Gemma3ForCausalLM.__name__
