"""A model's folder, checked before any framework sees it: what both backends load, and refuse in the same words.

`open_checkpoint` reads config.json and the headers of the weights; nothing is allocated for a folder that is refused.
"""

from .config import check_ids, read_config
from .folder import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "check_ids", "open_checkpoint", "read_config"]
