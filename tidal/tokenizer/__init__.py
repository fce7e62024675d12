"""Text to blocks to ids, and back: `MixedTokenizer` and `Block`."""

from tidal.tokenizer.mixed import Block, MixedTokenizer
from tidal.tokenizer.spelling import NO_NODE, ROOT, Spelling

__all__ = ["NO_NODE", "ROOT", "Block", "MixedTokenizer", "Spelling"]
