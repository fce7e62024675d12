"""The defaults of each recipe; no torch here, `--help` shows them."""

from __future__ import annotations

from tidal.config import Optim, Shape, Train

GREEDY = frozenset({"addition"})
"""Recipes with one right answer."""

PRESETS: dict[str, Train] = {
    "addition": Train(
        recipe="addition",
        max_steps=1600,
        rows=64,
        validate_every=200,
        model=Shape(d_model=64, n_heads=4, n_kv_heads=4, reader_layers=1, writer_layers=2, reader_ff=192, writer_ff=192,
                    suffix_rows=0, place_jitter=20),
        optim=Optim(lr=3e-3, table_lr_scale=4.0, weight_decay=0.3, decay_fraction=0.4, aux_weight=0.0),
    ),
    "text": Train(recipe="text", max_steps=1000, rows=8, validate_every=200),
}  # fmt: skip
