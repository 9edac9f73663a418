"""Which heads of a module go to Lyra, as buffers that follow `.to`. PyTorch alone: its modules move once made."""

from __future__ import annotations

import torch
from torch import nn

from lyra.spec.attention import AttentionSpec

from .heads import LyraHeads, lyra_heads
from .visibility import LiveRule, live_rule

HEADS = ("lyra_queries", "lyra_kv_heads", "lyra_places")
RULE = ("live_earlier", "live_own")


class HeadBuffers(nn.Module):
    """A module that keeps the arrays of its Lyra heads and of their live mode in buffers, which no state dict has."""

    lyra_queries: torch.Tensor | None
    lyra_kv_heads: torch.Tensor | None
    lyra_places: torch.Tensor | None
    live_earlier: torch.Tensor | None
    live_own: torch.Tensor | None

    def place_heads(self, spec: AttentionSpec, device: torch.device) -> None:
        """Make the buffers anew: on the CPU, whatever device is being initialised on, and then on their own."""
        cpu = torch.device("cpu")
        heads, rule = lyra_heads(spec, device=cpu), live_rule(spec, device=cpu)
        self._everyone = heads is not None and heads.everyone
        values = (*((None,) * 3 if heads is None else heads[:3]), *((None,) * 2 if rule is None else rule))
        for name, value in zip(HEADS + RULE, values, strict=True):
            self.register_buffer(name, None if value is None else value.to(device), persistent=False)

    @property
    def lyra(self) -> LyraHeads | None:
        """Which heads go to Lyra; None where none does."""
        buffers = self._buffers  # where __getattr__ would look, at a microsecond each
        queries, kv_heads, places = buffers["lyra_queries"], buffers["lyra_kv_heads"], buffers["lyra_places"]
        if queries is None or kv_heads is None or places is None:
            return None
        return LyraHeads(queries, kv_heads, places, self._everyone)

    @property
    def rule(self) -> LiveRule | None:
        """What the heads see of live tokens; None where every head is causal."""
        earlier, own = self._buffers["live_earlier"], self._buffers["live_own"]
        return None if earlier is None or own is None else LiveRule(earlier, own)
