"""Text to blocks to ids, and back: `MixedTokenizer` and `Block`."""

from tidal.tokenizer.mixed import NO_PLACE, Block, MixedTokenizer
from tidal.tokenizer.spelling import NO_NODE, ROOT, Spelling

__all__ = ["NO_NODE", "NO_PLACE", "ROOT", "Block", "MixedTokenizer", "Spelling"]
