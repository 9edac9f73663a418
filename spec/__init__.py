"""What is true: the spec of split-head attention, its presets and the context file. Needs NumPy and pydantic only."""

from .attention import AttentionSpec, QKNormSpec, RopeSpec, StaticSpec
from .context import StaticContext
from .errors import ContextError, InputError, NotFiniteError, SpecError, TextWarning, UncheckedContextWarning
from .fingerprint import Fingerprint
from .model import LayerSplit, ModelSpec, load_spec, presets
from .sequential import SequentialSpec
from .split import HeadSplit
from .storage import ContextLayer

__all__ = [
    "AttentionSpec",
    "ContextError",
    "ContextLayer",
    "Fingerprint",
    "HeadSplit",
    "InputError",
    "LayerSplit",
    "ModelSpec",
    "NotFiniteError",
    "QKNormSpec",
    "RopeSpec",
    "SequentialSpec",
    "SpecError",
    "StaticContext",
    "StaticSpec",
    "TextWarning",
    "UncheckedContextWarning",
    "load_spec",
    "presets",
]
