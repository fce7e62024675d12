"""The training loop: batches in, a run folder out."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from tidal import checkpoint
from tidal.blocks import NOTHING
from tidal.cli import UserError, note, progress
from tidal.config import TidalConfig, Train
from tidal.device import pick_device, set_threads
from tidal.infer.engine import generate
from tidal.model import TidalTransformer
from tidal.streams import Batch
from tidal.tokenizer import MixedTokenizer
from tidal.train.disk import check_space, keep_lines, patiently
from tidal.train.optim import Optimizer, learning_rate
from tidal.train.presets import GREEDY
from tidal.train.records import Metrics, bad_batch, parts_of, show_samples, write_samples
from tidal.train.resume import Found, Saved, generators, set_generators
from tidal.train.stop import Stop

LOG_EVERY = 10
T = TypeVar("T")


class Recipe(Protocol):
    """What the loop asks of a task."""

    tokenizer: MixedTokenizer
    digest: str
    """Of the data, where they come from outside: a run is continued on the same ones only."""

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


def train(settings: Train, recipe: Recipe, out: Path, *, stop: Stop | None = None, found: Found | None = None) -> Path:
    """Train into the run folder `out`, from scratch or from the checkpoint `found`; returns the folder.

    Raises:
        UserError: a loss or gradient that is not finite, no memory even for one row, `found` does not fit.
        Stopped: `stop` was signalled. A checkpoint of the last step is saved.
    """
    run = Run(settings, recipe, out, stop or Stop())
    if found is not None:
        run.restore(found)
    run.open(found)
    run.to_the_end()
    return out


class Run:
    """One training run. What is in `saved`, the weights, the moments and the generators is all there is to it:

        step ─▶ log ─▶ save ─▶ validate ─▶ samples ─▶ step …     a signal is obeyed before each arrow; where it comes
                       (every validate_every)                    after `save`, the resumed run validates first
    """

    def __init__(self, settings: Train, recipe: Recipe, out: Path, stop: Stop) -> None:
        self.settings, self.recipe, self.out, self.stop = settings, recipe, out, stop
        set_threads(settings.model.d_model, settings.threads)
        self.device = pick_device(settings.device)
        self.model = model_for(settings, recipe.tokenizer).to(self.device)
        self.optimizer = Optimizer(self.model, settings.optim)
        self.saved = Saved()

    def restore(self, found: Found) -> None:
        """Go back to a checkpoint. Raises UserError where it does not fit the settings, the data or the model."""
        tensors, moments, self.saved = found.read(self.model.config, self.recipe.digest)
        try:
            self.model.load_state_dict(tensors)
            set_generators(moments, self.device)
            self.optimizer.load_state(moments)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{found.folder} does not fit the model: {error}") from error

    def open(self, found: Found | None) -> None:
        """Make the run folder what it was at `found`: what was written after it goes."""
        out, saved = self.out, self.saved
        sizes = self.model.n_parameters()
        note(f"{out}: {sizes['total']:,} parameters ({sizes['tables']:,} in tables), {self.settings.recipe}, "
             f"on {self.device}, {torch.get_num_threads()} CPU threads")  # fmt: skip
        if found is not None:
            note(f"continuing at step {saved.step} of {self.settings.max_steps}, from {found.folder.name}")
        checkpoint.sweep(out)
        one = 3 * sum(t.nbytes for t in self.model.state_dict().values())  # weights and at most two moments
        check_space(out, one * max(1, self.settings.keep + 2 - len(checkpoint.checkpoints(out))))
        self._write(lambda: self.recipe.tokenizer.save(out / "tokenizer"))
        config = json.dumps(dataclasses.asdict(self.settings), indent=2) + "\n"
        self._write(lambda: checkpoint.atomic_write(out / "config.json", config))
        self.metrics = self._write(lambda: Metrics(out / "metrics.csv", saved.metrics))
        first = saved.step + (saved.due is None)  # whose samples are still to come
        self._write(lambda: keep_lines(out / "samples.jsonl", lambda values: values.get("step", first) < first))
        if found is not None:
            self._write(lambda: checkpoint.set_pointer(out, "latest", found.folder.name))
        if saved.best_name not in {folder.name for folder in checkpoint.checkpoints(out)}:
            saved.best, saved.best_name = None, None
            (out / "best").unlink(missing_ok=True)
        else:
            self._write(lambda: checkpoint.set_pointer(out, "best", saved.best_name or ""))

    def to_the_end(self) -> None:
        """All remaining steps, until `max_steps` or `max_seconds`."""
        s, saved = self.settings, self.saved
        began = time.monotonic() - saved.seconds
        with progress(s.max_steps, "train", done=saved.step) as bar:
            if saved.due is not None:
                self._examine(saved.due)
            while not saved.ended(s):
                rate = learning_rate(saved.step, s.max_steps, s.optim)
                figures = self._step(rate)
                saved.step += 1
                saved.seconds = time.monotonic() - began
                row = {"step": saved.step, "seconds": saved.seconds, "lr": rate, **figures}
                if saved.ended(s) or saved.step % s.validate_every == 0:
                    saved.due = row
                elif saved.step % LOG_EVERY == 0:
                    self._write(lambda row=row: self.metrics.add(**row))  # type: ignore[misc]
                if saved.due is not None or self.stop.signal is not None:
                    self._save()
                self.stop.check()
                if saved.due is not None:
                    self._examine(saved.due)
                bar.update(loss=figures["loss"])

    def _step(self, rate: float) -> dict[str, float]:
        """One step; where memory is short, with batches cut into more and more parts."""
        saved, rows = self.saved, self.settings.rows
        while True:
            try:
                figures = gradients(self.model, self.optimizer, self.recipe, saved.step, self.settings, self.device,
                                    saved.parts)  # fmt: skip
                break
            except NotFiniteError as error:
                raise self._explained(error) from error
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                said = _first_line(error)
            # Here, not above: the error's traceback holds on to the tensors.
            self.optimizer.zero_grad()
            _empty_cache(self.device)
            if saved.parts >= rows:
                raise UserError(f"out of memory with one row at a time ({said}); try a smaller model or shorter rows")
            saved.parts = min(2 * saved.parts, rows)
            note(f"step {saved.step}: OUT OF MEMORY ({said}); from now on batches of {rows} rows are computed in "
                 f"{saved.parts} parts, which is slower and gives the same gradient")  # fmt: skip
        self.optimizer.step(rate)
        return figures

    def _explained(self, error: NotFiniteError) -> UserError:
        """Write down the batches that gave no finite loss or gradient."""
        step, n = self.saved.step, self.settings.optim.accumulate
        batches = {i: self.recipe.batch(i) for i in range(step * n, (step + 1) * n)}
        content = bad_batch(self.model, self.recipe.tokenizer, batches, step=step, seed=self.settings.seed,
                            loss=str(error.loss), grad_norm=str(error.norm))  # fmt: skip
        path = self.out / "bad-batch.json"
        self._write(lambda: checkpoint.atomic_write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n"))
        return UserError(f"{error}; what it was fed is in {path}")

    def _save(self) -> None:
        """Write a checkpoint and point `latest` to it."""
        self.saved.metrics = self.metrics.rows
        name = self._write(lambda: save(self.out, self.saved, self.model, self.optimizer, self.settings, self.recipe,
                                        self.device))  # fmt: skip
        self._write(lambda: checkpoint.set_pointer(self.out, "latest", name))

    def _examine(self, row: dict[str, float]) -> None:
        """Validate, show samples, choose the best checkpoint, remove old ones; at last the row in metrics.csv, whose
        presence says that all of this is done.
        """
        saved, step = self.saved, self.saved.step
        with self.stop.anywhere():
            held_out = self._if_memory("validation", lambda: self.recipe.validate(self.model)) or {}
            note(f"step {step}: " + "  ".join(f"{k} {v:.4g}" for k, v in held_out.items() if k != "quality"))
            temperature = 0.0 if self.settings.recipe in GREEDY else 0.8
            completions = self._if_memory("sampling", lambda: generate(
                self.model, self.recipe.tokenizer, self.recipe.sample_prompts(step), temperature=temperature,
                seed=step)) or []  # fmt: skip
            show_samples(completions)
        if held_out.get("quality", -math.inf) >= (-math.inf if saved.best is None else saved.best):
            saved.best, saved.best_name = held_out.get("quality"), checkpoint.name_of(step)  # of equals the later one,
            self._write(lambda: checkpoint.set_pointer(self.out, "best", checkpoint.name_of(step)))  # which knows more
        checkpoint.prune(self.out, self.settings.keep)
        self._write(lambda: write_samples(self.out / "samples.jsonl", step, completions))
        self._write(lambda: self.metrics.add(**row, **held_out))
        saved.due = None

    def _if_memory(self, what: str, do: Callable[[], T]) -> T | None:
        """Validation and sampling are left out where there is no memory for them: the run is worth more."""
        try:
            return do()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            said = _first_line(error)
        _empty_cache(self.device)
        note(f"step {self.saved.step}: OUT OF MEMORY in {what} ({said}); left out, training goes on")
        return None

    def _write(self, write: Callable[[], T]) -> T:
        return patiently(write, self.out, self.stop)


class NotFiniteError(UserError):
    """A loss or a gradient that is not finite."""

    def __init__(self, step: int, loss: float, norm: float) -> None:
        super().__init__(f"step {step}: loss {loss} and gradient norm {norm}; weights were left as they were, "
                         "and so were the checkpoints; try a smaller --lr")  # fmt: skip
        self.loss, self.norm = loss, norm


def gradients(model: TidalTransformer, optimizer: Optimizer, recipe: Recipe, step: int, settings: Train,
              device: torch.device, parts: int = 1) -> dict[str, float]:  # fmt: skip
    """Leave the clipped gradients of a step; returns the loss (nats a unit), bits per byte and the gradient's norm.

    Each batch is computed in `parts`, whose sums are divided by the units of the whole batch: the gradient is the
    same whatever their number, but for rounding. Raises NotFiniteError.
    """
    optimizer.zero_grad()
    n = settings.optim.accumulate
    nats, n_units, n_bytes = 0.0, 0, 0
    for batch in [recipe.batch(step * n + i) for i in range(n)]:
        n_next = int((batch.next_tokens != NOTHING).sum())
        for part in parts_of(batch, parts):
            losses = model(part.to(device))
            loss = losses.units / batch.n_units
            if settings.optim.aux_weight:
                loss = loss + settings.optim.aux_weight * losses.next_tokens / max(1, n_next)
            (loss / n).backward()
            nats += losses.units.item()
        n_units, n_bytes = n_units + batch.n_units, n_bytes + batch.n_bytes
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optim.clip).item()
    if not (math.isfinite(nats) and math.isfinite(norm)):
        raise NotFiniteError(step, nats / n_units, norm)
    return {"loss": nats / n_units, "bits_per_byte": nats / math.log(2) / max(1, n_bytes), "grad_norm": norm}


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory: CUDA has a class for it, the CPU's allocator only words."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def save(out: Path, saved: Saved, model: TidalTransformer, optimizer: Optimizer, settings: Train,
         recipe: Recipe, device: torch.device) -> str:  # fmt: skip
    """Write a checkpoint; returns its name. Raises UserError as `write_checkpoint`."""
    trainer: dict[str, Any] = {"settings": dataclasses.asdict(settings), "data": recipe.digest, **saved.to_dict()}
    return checkpoint.write_checkpoint(
        out, saved.step, tensors=model.state_dict(), config=model.config.to_dict(), trainer=trainer,
        tokenizer=recipe.tokenizer, optimizer={**optimizer.state(), **generators(device)}).name  # fmt: skip


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:160] or type(error).__name__


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
