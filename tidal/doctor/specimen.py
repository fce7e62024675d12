"""Small models with random weights, for examining the package itself."""

from __future__ import annotations

import dataclasses

import torch

from tidal.config import Shape
from tidal.doctor.texts import BUILT_IN
from tidal.model import TidalTransformer
from tidal.tokenizer import MixedTokenizer
from tidal.tokenizer.split import find_blocks

SHAPE = Shape(d_model=32, n_heads=4, n_kv_heads=2, reader_layers=2, writer_layers=2, reader_ff=48, writer_ff=48,
              foretell=True, recall=True, suffix_rows=97, place_jitter=3, step_stride=0.5)  # fmt: skip
"""Shared key heads, places that are added, foretelling, recall, suffixes, jitter, steps that stand apart."""

OTHER = dataclasses.replace(SHAPE, rotary_places=True, step_window=3)
"""The same, where places turn queries and keys, and a step sees the last ones of its block only."""
OF_SHAPE = range(7, 17)
"""Checks in which the two could differ: of attention, streams and decoding."""


def random_model(tokenizer: MixedTokenizer, shape: Shape, seed: int = 0) -> TidalTransformer:
    """A model in which everything matters, float32, in evaluation mode: no weight is zero, and `<eob>` and `<eos>` are
    likely enough for blocks and documents to end.
    """
    model = TidalTransformer.of(tokenizer, shape)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.3 * noise if "norm" in name else noise * shape.d_model**-0.5)
        model.unit_embedding.weight[[tokenizer.eob_id, tokenizer.eos_id]] *= 3
        if shape.suffix_rows:
            model.suffix_embedding.weight[0] = 0
    return model.eval()


def make(shape: Shape = SHAPE) -> tuple[TidalTransformer, MixedTokenizer]:
    """Such a model, and a tokenizer of words, digits and bytes."""
    plain = [d.text for d in BUILT_IN if "def" not in d.text]  # é becomes a unit, 你 and 👍 are spelt in bytes
    words = [block.strip() for text in plain for block in find_blocks(text) if block.strip().isalpha()]
    prose = [" ".join(words[i:] + words[:i]) + ", " for i in range(len(words))]
    tokenizer = MixedTokenizer.train([*prose * 4, *plain], 520, max_block_units=12)
    return random_model(tokenizer, shape), tokenizer
