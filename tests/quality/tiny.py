"""Tiny contestants."""

from __future__ import annotations

import torch

from benchmarks.entries import Entry, entries_of

CPU = torch.device("cpu")
TINY = ("vocab-size=320", "d-model=16", "n-heads=2", "n-kv-heads=1", "reader-layers=1", "reader-ff=24", "writer-ff=24",
        "suffix-rows=500", "rows=2", "reader-budget=48", "layers=2", "d-ff=24", "warmup-steps=2")  # fmt: skip


def entry(spec: str) -> Entry:
    """A tiny contestant."""
    kind = spec.partition(":")[0]
    return entries_of([spec], [s for s in TINY if Entry(kind, kind).takes(s.partition("=")[0])])[0]
