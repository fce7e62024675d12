"""Text to blocks to ids, and back: `MixedTokenizer` and `Block`."""

from tidal.tokenizer.mixed import Block, MixedTokenizer

__all__ = ["Block", "MixedTokenizer"]
