"""lyra.Lyra: the PyTorch model by itself, for code written against transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeGuard

from lyra.backends.protocol import import_extra
from lyra.spec.errors import InputError

from .checkpoint import HUB_ID, resolve

import_extra("torch", "torch")
import_extra("lyra.backends.torch_impl.versions", "torch").check_transformers()

from lyra.backends.torch_impl import LyraForCausalLM  # noqa: E402  # only what has been checked


class Lyra(LyraForCausalLM):
    """A transformers model, a Gemma3ForCausalLM, that static contexts can be enabled on.

        model = Lyra()                              # the default model: LYRA_MODEL, else the extra gemma-270m
        model = Lyra.from_pretrained("folder")      # or a hub id, a .gguf file, "gemma-3-270m"
        with model.enable(model.capture("a long text")):
            model.generate(**model.tokenizer("a prompt", return_tensors="pt"))

    `Lyra(config)` has random weights, as in transformers. Raises CheckpointError where there is no such model.
    """

    def __init__(self, config: Any = None) -> None:
        if config is None:
            self.__dict__.update(type(self).from_pretrained().__dict__)
        else:
            super().__init__(config)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None = None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, and from whatever `lyra.load` takes. Raises CheckpointError, InputError.

        With a `state_dict` and no name the weights are those of the dict, as in transformers: of the model of `config`,
        what the dict lacks is new. Without either it is the default model.
        """
        name = pretrained_model_name_or_path
        if name is None and kwargs.get("state_dict") is not None:
            if kwargs.get("config") is None:
                raise InputError("from_pretrained: a state_dict without a name says no model; give its config too")
        elif not _is_transformers_own(name):
            name = resolve(name)
        return super().from_pretrained(name, *model_args, **kwargs)


def _is_transformers_own(name: str | os.PathLike[str] | None) -> TypeGuard[str | os.PathLike[str]]:
    """Whether transformers itself reads a model of that name, with all its options: a folder, or a hub id."""
    if name is None or Path(name).is_file():
        return False
    return Path(name).is_dir() or HUB_ID.fullmatch(os.fspath(name)) is not None


Lyra.__name__ = LyraForCausalLM.__name__  # as for its parent
