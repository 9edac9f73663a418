"""config.json: the fields of the text model, and the spec of what they describe."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from lyra.spec import families
from lyra.spec.errors import CheckpointError, SpecError
from lyra.spec.families import Family
from lyra.spec.hf_config import checked_fields, text_fields
from lyra.spec.model import ModelSpec
from lyra.spec.text_file import read_json

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
OWNERS = ("ModelSpec.from_hf_config: ", "ModelSpec.", "ModelSpec: ", "AttentionSpec.", "AttentionSpec: ")
"""How refusals of a spec start; of a file it is the file that is named."""


class Config(NamedTuple):
    """What a config.json says.

    fields   of the text model, those of its family, as transformers fills them in
    special  SPECIAL_IDS; of a multimodal model those that the file names outside, where it does
    spec     of the text model
    """

    path: Path
    multimodal: bool
    fields: dict[str, Any]
    special: dict[str, Any]
    spec: ModelSpec


def read_config(folder: Path) -> Config:
    """The config.json of a folder. Raises CheckpointError, naming the file, the field and what was expected."""
    path = folder / "config.json"
    if not path.is_file():
        ggufs = sorted(item.name for item in folder.glob("*.gguf"))
        hint = f"; it holds {', '.join(ggufs)}: give the path of that file" if ggufs else ""
        raise CheckpointError(f"{folder} is no model: it has no config.json{hint}")
    try:
        given = read_json(path, refuse=CheckpointError, what="a model's config")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    kind = given.get("model_type")
    family = next((known for known in families.FAMILIES.values() if kind in known.model_types), None)
    if family is None:
        raise CheckpointError(
            f"{folder} holds a model of type {kind!r:.100}; Lyra reads {' and '.join(families.model_types())}: give a "
            f"model of {families.titles()}"
        )
    if kind == family.outer_type and "text_config" not in given:
        raise CheckpointError(
            f"{path}: there is no text_config; expected that of a {family.title} beside model_type {kind!r}"
        )
    try:
        spec = ModelSpec.from_hf_config(given)
        fields = checked_fields(given)
        inner = text_fields(given)
    except SpecError as refusal:
        raise CheckpointError(f"{path}: {_without_owner(str(refusal))}") from None
    for owner in (given, inner):
        if owner.get("quantization_config"):
            raise CheckpointError(
                f"{path}: quantization_config is set; Lyra reads plain weights: save the model dequantised"
            )
    _check_computed_alike(path, spec, family)
    special = {name: fields[name] if given.get(name) is None else given[name] for name in SPECIAL_IDS}
    for owner in (fields, special):
        for name in SPECIAL_IDS:
            check_ids(path, name, owner[name], spec.vocab_size)
    return Config(path, kind == family.outer_type, {name: fields[name] for name in family.fields}, special, spec)


def check_ids(path: Path, name: str, value: Any, vocab_size: int) -> None:
    """An id, or none, lies in the vocabulary; of ends there may be a list. Raises CheckpointError, naming the field."""
    several = isinstance(value, list) and name == "eos_token_id"
    for token in value if several else [value]:
        if (token is not None or several) and not (type(token) is int and 0 <= token < vocab_size):
            raise CheckpointError(f"{path}: {name} is {value!r:.100}; expected ids from 0 to {vocab_size - 1:,}")


def _check_computed_alike(path: Path, spec: ModelSpec, family: Family) -> None:
    """Refuse what one backend would compute and the other not, or not in the same way."""
    if spec.hidden_activation != family.activation:
        raise CheckpointError(
            f"{path}: {family.activation_field} is {spec.hidden_activation!r:.100}; expected {family.activation!r}"
        )
    if spec.attention.softcap is not None and not family.softcap:
        raise CheckpointError(
            f"{path}: attn_logit_softcapping is {spec.attention.softcap}; expected null: {family.title} has no softcap "
            f"of scores, and Hugging Face's model ignores it"
        )


def _without_owner(message: str) -> str:
    """A refusal of the spec in one line, from the field on."""
    lines = []
    for line in message.splitlines():
        owner = next((prefix for prefix in OWNERS if line.startswith(prefix)), "")
        lines.append(line.removeprefix(owner))
    return "; ".join(lines)
