"""Pass keys in filler: a text that only heads which look things up in the context can complete.

Source: Mohtashami and Jaggi 2023, "Landmark Attention"; several keys in one text as in DuoAttention (Xiao et al. 2024).
"""

from __future__ import annotations

import random

from lyra.spec.errors import InputError

from .documents import Document, Encode, Passage

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NAMES = ("Ada", "Emmy", "Grace", "Sofia")
DIGITS = 8


def passkey_document(seed: int, encode: Encode, context_tokens: int) -> Document:
    """Filler of at most `context_tokens` tokens with a pass key for each name, and a question for each.

    Scored are the keys' digits. Raises InputError where the context has no room for the keys.
    """
    draw = random.Random(seed)
    keys = {name: "".join(draw.choice("0123456789") for _ in range(DIGITS)) for name in NAMES}
    facts = [f"The pass key of {name} is {key}. Remember it. " for name, key in keys.items()]
    room = context_tokens - len(encode("".join(facts)))
    repeats = room // (len(encode(FILLER)) - 1)
    if repeats < 0:
        raise InputError(
            f"a context of {context_tokens} tokens has no room for {len(NAMES)} pass keys; ask for a longer one"
        )
    places = sorted(draw.randrange(repeats + 1) for _ in facts)
    pieces, done = [], 0
    for place, fact in zip(places, facts, strict=True):
        pieces.append(FILLER * (place - done) + fact)
        done = place
    context = encode("".join(pieces) + FILLER * (repeats - done))[:context_tokens]
    passages = tuple(_question(name, key, encode) for name, key in keys.items())
    return Document(f"pass keys {seed}", tuple(context), passages)


def _question(name: str, key: str, encode: Encode) -> Passage:
    asked, answered = encode(f"The pass key of {name} is"), encode(f"The pass key of {name} is {key}")
    same = next((at for at, (a, b) in enumerate(zip(asked, answered, strict=False)) if a != b), len(asked))
    return Passage("passkey", tuple(answered), len(answered) - same)
