"""The kinds of refusal: a spec, a context or a checkpoint that is none, and an input that does not fit."""

from __future__ import annotations

import reprlib

from pydantic import ValidationError

SHOWN = 8
"""Problems of one spec that a message tells."""


class SpecError(ValueError):
    """A spec, split or preset that cannot be built. The message names the value, what was expected and what to do."""

    @classmethod
    def from_validation(cls, owner: str, error: ValidationError) -> SpecError:
        """Flatten pydantic's report into one line per problem, without its links and input dumps."""
        lines = []
        problems = error.errors(include_url=False, include_context=False)
        for item in problems[:SHOWN]:
            where = ".".join(str(part) for part in item["loc"])
            message = item["msg"].removeprefix("Value error, ")
            speaks = item["type"] in {"value_error", "missing", "extra_forbidden"}
            got = "" if speaks else f", got {reprlib.repr(item['input'])}"
            if item["type"] == "value_error" and message.startswith(owner):
                lines.append(message)
            else:
                lines.append(f"{owner}{'.' + where if where else ''}: {message}{got}")
        if len(problems) > SHOWN:
            lines.append(f"{len(problems) - SHOWN} more of the kind")
        return cls("\n".join(lines))


class ContextError(ValueError):
    """A static context that cannot be read, or does not fit the model it is attached to."""


class InputError(ValueError):
    """Arguments of an attention call that contradict the spec (shape, dtype, static heads)."""


class NotFiniteError(ValueError):
    """A model that gives NaN or infinity in place of an answer: its numbers do not fit the type that it computes in.

    The message names the layer and the token where that begins.
    """


class TextWarning(UserWarning):
    """A text or token ids that a model can read, but hardly as they were meant."""


class UncheckedContextWarning(UserWarning):
    """A context was loaded from a file that has no digest: were it damaged, nobody would know."""


class CheckpointError(InputError):
    """A checkpoint that cannot be found, read or converted. The message says what was given and what to do."""
