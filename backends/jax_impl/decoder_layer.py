"""One layer of a decoder: attention, an injected block's place, and the feed-forward part."""

from __future__ import annotations

from flax import nnx
from jax import Array

from lyra.spec import families
from lyra.spec.model import ModelSpec

from .cache import LiveCache
from .injected import Injected, run_injected
from .layer import Cache, Call
from .modules import Activation, Attached, Attention, GatedMLP, RMSNorm
from .sharding import ShardingConfig


class DecoderLayer(nnx.Module):
    """x + norm(attention(norm(x))), and the same of the feed-forward part; a family has all of these norms or some.

    The parameters carry the names that the family gives them, the norms' too.
    """

    def __init__(
        self,
        spec: ModelSpec,
        index: int,
        sharding: ShardingConfig,
        activation: Activation,
        norm: type[RMSNorm] = RMSNorm,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        family = families.of(spec)
        self.family = family.name
        self.self_attn = Attention(spec.layer(index).replace(split=None), sharding, rngs=rngs)
        self.mlp = GatedMLP(spec, activation, rngs=rngs)
        for name in family.norms:
            if name is not None:
                setattr(self, name, norm(spec.hidden_size, spec.rms_norm_eps))

    def __call__(
        self,
        x: Array,
        call: Call,
        attached: Attached | Injected | None,
        memory: LiveCache | None,
        trace: dict[str, Array] | None = None,
    ) -> tuple[Array, Cache, LiveCache | None]:
        """The residual stream [B,T,E] behind this layer, its cache, and its block's live keys.

        `trace` is given what the attention's stages make.
        """
        of_heads = attached if isinstance(attached, Attached) else None
        h, cache = self.attend(x, call, of_heads, trace)
        if isinstance(attached, Injected):
            h, memory = self.run_block(h, attached, call, cache, memory)
        return self.feed_forward(h), cache, memory

    def attend(
        self, x: Array, call: Call, attached: Attached | None, trace: dict[str, Array] | None = None
    ) -> tuple[Array, Cache]:
        """The residual stream [B,T,E] behind the attention's residual add, and its cache."""
        attended, cache = self.self_attn(self._normed("attention_in", x), call, attached, trace)
        return x + self._normed("attention_out", attended), cache

    def run_block(
        self,
        h: Array,
        injected: Injected,
        call: Call,
        own: Cache,
        memory: LiveCache | None,
        trace: dict[str, Array] | None = None,
    ) -> tuple[Array, LiveCache | None]:
        """The residual stream h [B,T,E] behind an injected block, see `run_injected`. Clause SEQUENTIAL-1."""
        shape = self.self_attn.shape
        return run_injected(h, injected, self.block_weights(), shape, call, own, memory, trace)

    def feed_forward(self, h: Array) -> Array:
        """The residual stream [B,T,E] behind the feed-forward part's residual add."""
        return h + self._normed("feed_forward_out", self.mlp(self._normed("feed_forward_in", h)))

    def block_weights(self) -> dict[str, Array]:
        """The weights that an injected block takes from its layer. Clause SEQUENTIAL-7."""
        names = families.family(self.family).block_weights
        norms = {ours: getattr(self, theirs.removesuffix(".weight")).weight[...] for ours, theirs in names.items()}
        return norms | self.self_attn.weights()

    def _normed(self, role: str, x: Array) -> Array:
        """x [B,T,E] through the norm of a role of `LayerNorms`, if the family has it."""
        name = getattr(families.family(self.family).norms, role)
        normed: Array = x if name is None else getattr(self, name)(x)
        return normed
