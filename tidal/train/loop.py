"""The training loop: batches in, a run folder out."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch

from tidal import checkpoint
from tidal.cli import UserError, note, progress
from tidal.config import TidalConfig, Train
from tidal.device import pick_device, set_threads
from tidal.infer.engine import generate
from tidal.model import TidalTransformer
from tidal.streams import Batch
from tidal.tokenizer import MixedTokenizer
from tidal.train.optim import Optimizer, learning_rate
from tidal.train.presets import GREEDY

LOG_EVERY = 10


class Recipe(Protocol):
    """What the loop asks of a task."""

    tokenizer: MixedTokenizer

    def batch(self, step: int) -> Batch:
        """The batch of a step, a pure function of seed and step."""

    def validate(self, model: TidalTransformer) -> dict[str, float]:
        """Figures on held-out data; `quality` (higher is better) chooses the best checkpoint."""

    def sample_prompts(self, step: int) -> list[str]:
        """Prompts to show samples for."""


def make_recipe(settings: Train) -> Recipe:
    """The recipe the settings ask for. Raises UserError where its data cannot be used."""
    if settings.recipe == "addition":
        from tidal.train.recipes.addition import AdditionRecipe

        return AdditionRecipe(settings)
    from tidal.train.recipes.text import TextRecipe

    return TextRecipe(settings)


def model_for(settings: Train, tokenizer: MixedTokenizer) -> TidalTransformer:
    """A fresh model, seeded."""
    torch.manual_seed(settings.seed)
    t = tokenizer
    return TidalTransformer(
        TidalConfig(t.vocab_size, t.n_writable, t.n_head, t.max_block_units, t.fingerprint, settings.model)
    )


def train(settings: Train, recipe: Recipe, out: Path) -> Path:
    """Train from scratch into the run folder `out`; returns it. Raises UserError on a loss that is not finite."""
    set_threads(settings.model.d_model, settings.threads)
    device = pick_device(settings.device)
    model = model_for(settings, recipe.tokenizer).to(device)
    optimizer = Optimizer(model, settings.optim)
    sizes = model.n_parameters()
    note(f"{out}: {sizes['total']:,} parameters ({sizes['tables']:,} in tables), {settings.recipe}, on {device}, "
         f"{torch.get_num_threads()} CPU threads")  # fmt: skip
    checkpoint.atomic_write(out / "config.json", json.dumps(dataclasses.asdict(settings), indent=2) + "\n")
    recipe.tokenizer.save(out / "tokenizer")

    best = -math.inf
    began = time.monotonic()
    step = 0
    with open(out / "metrics.csv", "w", newline="") as file, progress(settings.max_steps, "train") as bar:
        metrics = Metrics(file)
        while step < settings.max_steps:
            rate = learning_rate(step, settings.max_steps, settings.optim)
            figures = train_step(model, optimizer, recipe, step, rate, settings, device)
            step += 1
            seconds = time.monotonic() - began
            last = step == settings.max_steps or bool(settings.max_seconds and seconds >= settings.max_seconds)
            if last or step % settings.validate_every == 0:
                name = save(out, step, model, optimizer, settings, recipe.tokenizer)
                held_out = recipe.validate(model)
                metrics.add(step=step, seconds=seconds, lr=rate, **figures, **held_out)
                note(f"step {step}: " + "  ".join(f"{k} {v:.4g}" for k, v in held_out.items() if k != "quality"))
                if held_out["quality"] >= best:  # of equals the later one, which has learnt more
                    best = held_out["quality"]
                    checkpoint.set_pointer(out, "best", name)
                checkpoint.prune(out, settings.keep)
                show_samples(out, step, model, recipe, 0.0 if settings.recipe in GREEDY else 0.8)
            elif step % LOG_EVERY == 0:
                metrics.add(step=step, seconds=seconds, lr=rate, **figures)
            bar.update(loss=figures["loss"])
            if last:
                break
    return out


def train_step(model: TidalTransformer, optimizer: Optimizer, recipe: Recipe, step: int, rate: float,
               settings: Train, device: torch.device) -> dict[str, float]:  # fmt: skip
    """One step over `accumulate` batches; returns the loss (nats a unit), bits per byte and the gradient's norm."""
    optimizer.zero_grad()
    n = settings.optim.accumulate
    nats, n_units, n_bytes = 0.0, 0, 0
    for batch in [recipe.batch(step * n + i) for i in range(n)]:
        losses = model(batch.to(device))
        loss = losses.units / losses.n_units
        if settings.optim.aux_weight:
            loss = loss + settings.optim.aux_weight * losses.next_tokens / max(1, losses.n_next)
        (loss / n).backward()
        nats, n_units, n_bytes = nats + losses.units.item(), n_units + losses.n_units, n_bytes + batch.n_bytes
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optim.clip).item()
    if not (math.isfinite(nats) and math.isfinite(norm)):
        raise UserError(f"step {step}: loss {nats / n_units} and gradient norm {norm}; weights were left as they were, "
                        "and so were the checkpoints; try a smaller --lr")  # fmt: skip
    optimizer.step(rate)
    return {"loss": nats / n_units, "bits_per_byte": nats / math.log(2) / max(1, n_bytes), "grad_norm": norm}


class Metrics:
    """metrics.csv: one row every few steps; the columns of validation are filled where it ran."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.names = file, ["step", "seconds", "lr", "loss", "bits_per_byte", "grad_norm"]
        self.rows: list[dict[str, Any]] = []

    def add(self, **row: float) -> None:
        """Append a row; a new column makes the file be written anew."""
        new = [name for name in row if name not in self.names]
        self.names += new
        self.rows.append({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        writer = csv.DictWriter(self.file, self.names, restval="")
        if new or len(self.rows) == 1:
            self.file.seek(0)
            self.file.truncate()
            writer.writeheader()
            writer.writerows(self.rows)
        else:
            writer.writerow(self.rows[-1])
        self.file.flush()


def save(out: Path, step: int, model: TidalTransformer, optimizer: Optimizer, settings: Train,
         tokenizer: MixedTokenizer) -> str:  # fmt: skip
    """Write a checkpoint and point `latest` to it; returns its name."""
    trainer = {"step": step, "settings": dataclasses.asdict(settings)}
    path = checkpoint.write_checkpoint(out, step, tensors=model.state_dict(), config=model.config.to_dict(),
                                       trainer=trainer, tokenizer=tokenizer, optimizer=optimizer.state())  # fmt: skip
    checkpoint.set_pointer(out, "latest", path.name)
    return path.name


def show_samples(out: Path, step: int, model: TidalTransformer, recipe: Recipe, temperature: float) -> None:
    """Print and store what the model writes now."""
    completions = generate(model, recipe.tokenizer, recipe.sample_prompts(step), temperature=temperature, seed=step)
    with open(out / "samples.jsonl", "a", encoding="utf-8") as file:
        for c in completions:
            note(f"  {c.prompt!r} → {c.completion!r}")
            values = {"step": step, **c.to_dict()}
            del values["log_probs"]  # a long list
            file.write(json.dumps(values, ensure_ascii=False) + "\n")
