"""The defaults of each recipe, and named sizes of models; no torch here, `--help` shows them."""

from __future__ import annotations

import dataclasses

from tidal.config import Addition, Optim, Shape, Train

GREEDY = frozenset({"addition", "characters"})
"""Recipes with one right answer."""

PRESETS: dict[str, Train] = {
    "addition": Train(
        recipe="addition",
        max_steps=1600,
        rows=64,
        validate_every=200,
        model=Shape(d_model=64, n_heads=2, n_kv_heads=2, reader_layers=1, writer_layers=2, reader_ff=192, writer_ff=192,
                    suffix_rows=0, query_gain=2.0, rotary_places=True, place_jitter=50, step_window=2),
        optim=Optim(lr=3e-3, table_lr_scale=4.0, weight_decay=0.3, decay_fraction=0.4, aux_weight=0.0),
        addition=Addition(elsewhere=0.5, stretch=4.0),
    ),
    "characters": Train(
        recipe="characters",
        max_steps=6000,
        rows=16,
        validate_every=500,
        model=Shape(d_model=64, n_heads=4, n_kv_heads=4, reader_layers=3, writer_layers=2, reader_ff=192, writer_ff=192,
                    suffix_rows=0),
        optim=Optim(lr=4e-3, table_lr_scale=4.0, decay_fraction=0.8, aux_weight=0.0),
    ),
    "text": Train(
        recipe="text",
        max_steps=1000,
        rows=8,
        validate_every=200,
        model=Shape(reader_layers=2, foretell=True, recall=True, writer_ff=128,
                    writer_attention="none", suffix_rows=24576),
        # docs/ablations.md
        optim=Optim(lr=4e-3),
    ),
}  # fmt: skip


def _size(d: int, heads: int, layers: tuple[int, int], vocab: int, budget: int, rows: int, lr: float) -> Train:
    """Defaults for text with a model of this size; `layers`: of the reader and of the writer. In proportion, the shape
    of the preset, which was measured."""
    text = PRESETS["text"]
    return dataclasses.replace(
        text, rows=rows, optim=dataclasses.replace(text.optim, lr=lr),
        text=dataclasses.replace(text.text, vocab_size=vocab, reader_budget=budget),
        model=dataclasses.replace(text.model, d_model=d, n_heads=heads, reader_layers=layers[0],
                                  writer_layers=layers[1], reader_ff=3 * d, writer_ff=d, suffix_rows=32768),
    )  # fmt: skip


SIZES: dict[str, Train] = {
    "tiny": PRESETS["text"],
    "mini": _size(256, 4, (5, 1), 4096, 256, 8, 2e-3),
    "small": _size(512, 8, (8, 2), 8192, 512, 16, 1e-3),
    "medium": _size(768, 12, (12, 2), 16384, 1024, 16, 8e-4),
    "large": _size(1024, 16, (22, 2), 16384, 1024, 32, 6e-4),
    "xl": _size(1536, 12, (24, 3), 32768, 2048, 32, 4e-4),
    "1.3b": _size(2048, 16, (22, 3), 32768, 2048, 32, 3e-4),
}
"""`--model-size`: width, heads, layers, vocabulary, length of a row, rows in a batch, learning rate. Those above tiny
follow the usual proportions (heads of 64 and 128, which the kernels have; a rate that falls with the width); they are
not tuned."""
