"""Draws docs/images/reads.png and attention.png: what Lyra heads of the real 270M read of a short context.

python docs/images/draw_reads.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import lyra
import lyra.plot

CONTEXT = (
    "The library stands by the old harbour, behind the market. Its doors open at nine and close at six, and on Fridays "
    "it stays open until ten. The password of the library is heliotrope. The gallery next door has another one, which "
    "is verbena. Nobody may take a lamp inside, and dogs wait at the gate. The key to the reading room hangs on a nail "
    "beside the stairs; whoever uses it signs the green book."
)
PROMPT = "The password of the library is"
SPLIT = "gemma-3-270m-lyra-6q"


def draw(folder: Path) -> None:
    """Write the pictures."""
    model = lyra.load("gemma-3-270m")
    model.attach(model.capture(CONTEXT), SPLIT)
    lyra.plot.reads(model, PROMPT).savefig(folder / "reads.png", dpi=110)
    lyra.plot.attention(model, PROMPT, layer=11, head=2).savefig(folder / "attention.png", dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
