"""Lyra as a model of its own: one of Hugging Face's that contexts can be enabled on, whatever its family."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from transformers import AutoTokenizer, PreTrainedModel
from transformers.cache_utils import Cache

from lyra.spec.arguments import check_ids, check_text
from lyra.spec.attaching import SplitSource, chosen_heads
from lyra.spec.bos import warn_of_repeated_bos, with_one_bos
from lyra.spec.context import StaticContext
from lyra.spec.errors import InputError
from lyra.spec.fingerprint import hash_vocabulary

from .injector import Injector
from .loading import save_as_text, text_options

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""The options of from_pretrained that say where files are found; config and tokenizer lie there too."""


class ContextModel(PreTrainedModel if TYPE_CHECKING else object):  # type: ignore[misc]
    """What makes a class of Hugging Face's one with the injector's methods, `capture` from text, and its tokenizer.

    A family's class inherits from this one and from Hugging Face's, and says which family it is of. Without a context
    it is Hugging Face's, bit for bit, and it is saved as one whatever is enabled.
    """

    family: ClassVar[str]
    """The name of the family in `lyra.spec.families`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._hub_options: dict[str, Any] = {}
        self._tokenizer: Any = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, from a folder, a hub id or a state_dict, with all options. Raises InputError for a model
        of another family."""
        name = pretrained_model_name_or_path
        where = {option: kwargs[option] for option in HUB_OPTIONS if option in kwargs}
        known = "config" in kwargs or "gguf_file" in kwargs
        options = {} if name is None or known else text_options(name, cls.family, **where)
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
        """As in transformers: the plain model, whatever is enabled, with the tokenizer if there is one.

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
    ) -> Injector:
        """`Injector.enable` for this model; `with model.enable(context):` disables at the end."""
        return Injector(self).enable(context, split, **options)

    def disable(self) -> None:
        """`Injector.disable` for this model."""
        Injector(self).disable()

    def inject(
        self, external_kv_cache: StaticContext | str | os.PathLike[str] | Cache | None = None, **options: Any
    ) -> Injector:
        """`Injector.inject` for this model; `with model.inject(context, gate=1.0):` withdraws the blocks at the end."""
        return Injector(self).inject(external_kv_cache, **options)

    def withdraw(self) -> None:
        """`Injector.withdraw` for this model."""
        Injector(self).withdraw()

    attach, detach = inject, withdraw
    """Other names of the same two, as in `Injector`."""

    def context(self) -> StaticContext:
        """`Injector.context` for this model: the context that is enabled, tuned or not."""
        return Injector(self).context()

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
        injector = Injector(self)
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
