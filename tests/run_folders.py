"""Checkpoints with made-up contents, for tests."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from tidal.checkpoint import write_checkpoint


class Tokenizer:
    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.model").write_bytes(b"\0\1\2")
        (folder / "tokenizer.json").write_text("{}")


CONFIG = {"d_model": 8, "name": "Größe"}
TRAINER = {"step": 5, "best": math.inf, "lr": 0.1 + 0.2, "rng": 2**127 + 1}


def write(run_dir: Path, step: int = 500, fill: float = 1.0) -> Path:
    shared = torch.full((3, 4), fill)
    tensors = {
        "a": shared,
        "tied": shared,
        "transposed": shared.T,
        "row": shared[1],
        "alone": torch.arange(10.0)[2:5],
        "half": torch.tensor([1.5, math.nan], dtype=torch.bfloat16),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 2),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    optimizer = {"exp_avg": torch.arange(6).view(2, 3).T}
    return write_checkpoint(
        run_dir,
        step,
        tensors=tensors,
        config=CONFIG,
        trainer=TRAINER,
        tokenizer=Tokenizer(),
        optimizer=optimizer,
    )


FILES = ["model.safetensors", "config.json", "optimizer.safetensors", "trainer.json", "manifest.json",
         "tokenizer/tokenizer.model", "tokenizer/tokenizer.json"]  # fmt: skip
