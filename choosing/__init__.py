"""Which heads go to Lyra: chosen by what each is worth on real text, behind real contexts."""

from __future__ import annotations

from .choice import ChosenSplit, Point, Report
from .choose import choose_split, judge

__all__ = ["ChosenSplit", "Point", "Report", "choose_split", "judge"]
