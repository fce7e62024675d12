"""The training loop: batches in, a run folder out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from tidal import checkpoint
from tidal.cli import UserError, note, progress
from tidal.config import Train
from tidal.device import pick_device, set_threads
from tidal.files import atomic_write
from tidal.infer.engine import generate
from tidal.model import TidalTransformer
from tidal.ranks import OwnError, local_size
from tidal.tokenizer import MixedTokenizer
from tidal.train.disk import check_space, keep_lines, retry_while_full
from tidal.train.fine_tuning import load_weights
from tidal.train.gradient import NotFiniteError, gradients
from tidal.train.memory import first_line, memory_for, out_of_memory
from tidal.train.optim import Optimizer, learning_rate
from tidal.train.parallel import Parallel, shard_like
from tidal.train.presets import GREEDY
from tidal.train.records import Metrics, bad_batch, write_samples, write_settings
from tidal.train.resume import Found, Saved
from tidal.train.stop import Stop, Stopped
from tidal.train.watch import Watch
from tidal.train.workers import PrefetchLoader, Source, n_workers, said_if_killed

LOG_EVERY = 10
NO_COMPILER = re.compile(r"No working C\+\+ compiler found|Failed to find C compiler")
"""What torch's inductor and triton say, in errors of many classes."""
T = TypeVar("T")


class Recipe(Source, Protocol):
    """What the loop asks of a task."""

    tokenizer: MixedTokenizer
    digest: str
    """Of the data, where they come from outside: a run is continued on the same ones only."""

    def validate(self, model: TidalTransformer) -> dict[str, float]:
        """Figures on held-out data; `quality` (higher is better) chooses the best checkpoint."""

    def sample_prompts(self, step: int) -> list[str]:
        """Prompts to show samples for."""


def make_recipe(settings: Train) -> Recipe:
    """The recipe the settings ask for. Raises UserError where its data cannot be used."""
    if settings.recipe == "addition":
        from tidal.train.recipes.addition import AdditionRecipe

        return AdditionRecipe(settings)
    if settings.recipe == "characters":
        from tidal.train.recipes.characters import CharactersRecipe

        return CharactersRecipe(settings)
    from tidal.train.recipes.text import TextRecipe

    return TextRecipe(settings)


def model_for(settings: Train, tokenizer: MixedTokenizer, source: Path | None = None) -> TidalTransformer:
    """A fresh model, seeded; with the weights of the checkpoint `source`, if given. UserError if they do not fit."""
    torch.manual_seed(settings.seed)
    model = TidalTransformer.of(tokenizer, settings.model)
    if source is not None:
        load_weights(model, source)
    return model


def train(settings: Train, recipe: Recipe, out: Path, *, stop: Stop | None = None, found: Found | None = None,
          source: Path | None = None, after_validation: Callable[[Path], None] = lambda out: None,
          parallel: Parallel | None = None) -> Path:  # fmt: skip
    """Train into the run folder `out`: from scratch, with the weights of `source`, or on from the checkpoint `found`.
    Returns the folder.

    `after_validation` is called with it. With `parallel`, all its processes call this function alike.

    Raises:
        UserError: a loss or gradient that is not finite, no memory even for one row, `found` does not fit, a worker was
            killed.
        Stopped: `stop` was signalled. A checkpoint of the last step, if there was one, is saved.
    """
    run = Run(settings, recipe, out, stop or Stop(), after_validation, parallel, source)
    if found is not None:
        run.restore(found)
    run.open(found)
    with contextlib.closing(run), said_if_killed():
        run.to_the_end()
    return out


class Run:
    """One training run. What is in `saved`, the weights and the moments is all there is to it:

        step ─▶ log ─▶ save ─▶ validate ─▶ samples ─▶ step …     a signal is obeyed before each arrow; where it comes
                       (every validate_every)                    after `save`, the resumed run validates first
    """

    def __init__(self, settings: Train, recipe: Recipe, out: Path, stop: Stop,
                 after_validation: Callable[[Path], None] = lambda out: None,
                 parallel: Parallel | None = None, source: Path | None = None) -> None:  # fmt: skip
        self.settings, self.out, self.stop, self.after_validation = settings, out, stop, after_validation
        self.parallel = parallel or Parallel()
        set_threads(settings.model.d_model, settings.threads)
        self.device = pick_device(settings.device)
        workers = n_workers(settings.workers, self.device, local_size())
        self.recipe, self.prefetched = recipe, PrefetchLoader(recipe, workers) if workers else None
        with memory_for("the weights and the optimizer's moments; try a smaller model"):
            self.model = model_for(settings, recipe.tokenizer, source).to(self.device)
            self.wrapped = self.parallel.wrap(self.model, settings)
            self.optimizer = Optimizer(self.model, settings.optim)
        self.saved = Saved(parts=settings.parts)

    def restore(self, found: Found) -> None:
        """Go back to a checkpoint. Raises UserError where it does not fit the settings, the data or the model."""
        tensors, moments, self.saved = found.read(self.model.config, self.recipe.digest)
        asked = self.settings.parts  # if it is the same as before, then more of them were found to be needed
        self.saved.parts = max(self.saved.parts, asked) if asked == found.settings.parts else asked
        try:
            with memory_for(f"the weights and moments of {found.folder}"):
                own = self.model.state_dict()
                self.model.load_state_dict({name: shard_like(own[name], tensor) if name in own else tensor
                                            for name, tensor in tensors.items()})  # fmt: skip
                self.optimizer.load_state(moments)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{found.folder} does not fit the model: {error}") from error

    def open(self, found: Found | None) -> None:
        """Make the run folder what it was at `found`: what was written after it goes."""
        out, saved = self.out, self.saved
        sizes = self.model.n_parameters()
        note(f"{out}: {sizes['total']:,} parameters ({sizes['tables']:,} in tables), {self.settings.recipe}, "
             f"on {self.device}, {self.parallel}{torch.get_num_threads()} CPU threads")  # fmt: skip
        if self.device.type == "cuda" and self.settings.precision == "float32":
            note("float32 does not use the GPU's tensor cores; --precision bf16 does")
        if found is not None:
            note(f"continuing at step {saved.step} of {self.settings.max_steps}, from {found.folder.name}")
        if not self.parallel.leads:
            self.watch = Watch(out, dataclasses.replace(self.settings, tensorboard=False), self.recipe.tokenizer,
                               self.device, [])  # fmt: skip
            return
        checkpoint.sweep(out)
        (out / "bad-batch.json").unlink(missing_ok=True)
        one = sum(t.nbytes for t in (*self.model.state_dict().values(), *self.optimizer.state().values()))
        kept, every = self.settings.keep + 2 - len(checkpoint.checkpoints(out)), self.settings.validate_every
        check_space(out, one * max(1, min(kept, math.ceil(self.settings.max_steps / every) - saved.step // every)))
        if found is not None:
            self._write(lambda: checkpoint.set_pointer(out, "latest", found.folder.name))
            if later := checkpoint.undo(out, saved.step):
                note(f"what was written later goes: {', '.join(later)}")
        self._write(lambda: self.recipe.tokenizer.save(out / "tokenizer"))
        self._write(lambda: write_settings(out, self.settings))
        self.metrics = self._write(lambda: Metrics(out / "metrics.csv", saved.metrics))
        self.watch = Watch(out, self.settings, self.recipe.tokenizer, self.device, self.metrics.rows)
        first = saved.step + (saved.due is None)  # whose samples are still to come
        self._write(lambda: keep_lines(out / "samples.jsonl", lambda values: values.get("step", first) < first))
        if saved.best_name not in {folder.name for folder in checkpoint.checkpoints(out)}:
            saved.best, saved.best_name = None, None
            (out / "best").unlink(missing_ok=True)
        else:
            self._write(lambda: checkpoint.set_pointer(out, "best", saved.best_name or ""))

    def close(self) -> None:
        """End what runs beside it."""
        if self.prefetched:
            self.prefetched.close()
        self.watch.close()

    def to_the_end(self) -> None:
        """All remaining steps, until `max_steps` or `max_seconds`."""
        s, saved = self.settings, self.saved
        began = time.monotonic() - self.stop.waited - saved.seconds
        with progress(s.max_steps, "train", done=saved.step) as bar:
            if saved.due is not None:
                self._validate(saved.due)
            elif s.init_from is not None and saved.step == 0:
                self._validate({})  # a fine-tuner wants to know where it begins
            while not saved.ended(s):
                rate = learning_rate(saved.step, s.max_steps, s.optim)
                figures = self.watch.timed(self._step, rate)
                saved.step += 1
                asked = self._agree(time.monotonic() - self.stop.waited - began)
                row = {"step": saved.step, "seconds": saved.seconds, "lr": rate, **figures}
                if saved.ended(s) or saved.step % s.validate_every == 0:
                    saved.due = row
                elif saved.step % LOG_EVERY == 0 and self.parallel.leads:
                    self._record(row)
                if saved.due is not None or asked:
                    self._save()
                if saved.due is not None:
                    self._validate(saved.due)
                bar.update(loss=figures["loss"])

    def _step(self, rate: float) -> dict[str, float]:
        """One step; where memory is short, with batches cut into more and more parts."""
        saved, n, share = self.saved, self.settings.optim.accumulate, (self.parallel.rank, self.parallel.size)
        while True:
            try:
                figures = gradients(self.wrapped, self.optimizer, self.prefetched or self.recipe, saved.step,
                                    self.settings, self.device, saved.parts, self.parallel)  # fmt: skip
                break
            except NotFiniteError as error:
                explained = self._explained(error)
                self.parallel.barrier()  # who ends before has torchrun end the first process, too
                raise explained from error
            except (RuntimeError, MemoryError) as error:
                if self.settings.compile and (missing := NO_COMPILER.search(str(error))):
                    raise UserError(f"--compile: {missing[0]}; install g++ (and gcc), or leave it out") from error
                if not out_of_memory(error):
                    raise
                said = first_line(error)
            # Here, not above: the error's traceback holds on to the tensors.
            self.optimizer.zero_grad()
            torch.cuda.empty_cache()
            rows = len(self.recipe.batch(n * saved.step, share).targets)  # of addition, half of --rows
            if saved.parts >= rows:
                raise OwnError(f"out of memory with one row at a time ({said}); try a smaller model or shorter rows")
            saved.parts = min(2 * saved.parts, rows)
            if self.parallel.size > 1:
                raise OwnError(f"process {self.parallel.rank} is out of memory ({said}) in the middle of a step, which "
                               f"the others wait for; the same command with --parts {saved.parts} goes on from the "
                               "last checkpoint")  # fmt: skip
            note(f"step {saved.step}: OUT OF MEMORY ({said}); from now on batches of {rows} rows are computed in "
                 f"{saved.parts} parts, which is slower and gives the same gradient")  # fmt: skip
        with memory_for("the optimizer's update: weights that are half updated are not saved, the last checkpoint is "
                        "intact; try a smaller model"):  # fmt: skip
            self.optimizer.step(rate)
        return figures

    def _agree(self, seconds: float = 0.0) -> signal.Signals | None:
        """Let all processes have the clock of the first, which alone waits for a full disk, and know of a signal that
        came to any of them."""
        seconds, number = self.parallel.all_reduce_max([seconds * self.parallel.leads, self.stop.signal or 0])
        self.saved.seconds = seconds or self.saved.seconds
        if not number:
            return None
        self.stop.signal = signal.Signals(int(number))
        return self.stop.signal

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Around what only the first process does: the others come to its end and wait there. A signal stops all."""
        with contextlib.suppress(Stopped):
            yield
        if asked := self._agree():
            raise Stopped(asked)

    def _explained(self, error: NotFiniteError) -> UserError:
        """Write down the batches that gave no finite loss or gradient."""
        step, n = self.saved.step, self.settings.optim.accumulate
        model = self.parallel.unsharded(self.model)
        if not self.parallel.leads:
            return error
        batches = {i: self.recipe.batch(i) for i in range(step * n, (step + 1) * n)}
        content = self._if_memory("looking for the bad row", lambda: bad_batch(
            model.to(self.device), self.recipe.tokenizer, batches, step=step, seed=self.settings.seed,
            loss=str(error.loss), grad_norm=str(error.norm)))  # fmt: skip
        if content is None:
            return error
        path = self.out / "bad-batch.json"
        self._write(lambda: atomic_write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n"))
        return UserError(f"{error}; what it was fed is in {path}")

    def _save(self) -> None:
        """Write a checkpoint and point `latest` to it."""
        tensors = self.parallel.gathered(self.model.state_dict())
        moments = self.parallel.gathered(self.optimizer.state())
        with self._alone():
            if self.parallel.leads:
                self.saved.metrics = self.metrics.rows
                trainer = {"settings": dataclasses.asdict(self.settings), "data": self.recipe.digest,
                           **dataclasses.asdict(self.saved)}  # fmt: skip
                folder = self._write(lambda: checkpoint.write_checkpoint(
                    self.out, self.saved.step, tensors=tensors, config=self.model.config.to_dict(), trainer=trainer,
                    tokenizer=self.recipe.tokenizer, optimizer=moments))  # fmt: skip
                self._write(lambda: checkpoint.set_pointer(self.out, "latest", folder.name))

    def _validate(self, row: dict[str, float]) -> None:
        """Validate, show samples, choose the best checkpoint, remove old ones; at last the row in metrics.csv, whose
        presence says that all of this is done.

        The first process does it, in float32, with a model that it can use alone: its own under DDP (not DDP's wrapper,
        whose `forward` would wait for the others), a whole copy under FSDP, which is moved to the device first.
        """
        model = self.parallel.unsharded(self.model)
        with self._alone(), eager(self.settings.compile):
            if self.parallel.leads:
                self._validate_with(model, row)
        self.saved.due = None

    def _validate_with(self, model: TidalTransformer, row: dict[str, float]) -> None:
        saved, step = self.saved, self.saved.step
        with self.stop.anywhere():
            held_out = self._if_memory("validation", lambda: self.recipe.validate(model.to(self.device))) or {}
            note(f"step {step}: " + "  ".join(f"{k} {v:.4g}" for k, v in held_out.items() if k != "quality"))
            if step == 0:
                return
            batch = self.recipe.batch((step - 1) * self.settings.optim.accumulate)
            probes = self._if_memory("probing", lambda: self.watch.probes(
                model.to(self.device), batch, saved.parts)) or {}  # fmt: skip
            temperature = 0.0 if self.settings.recipe in GREEDY else 0.8
            completions = self._if_memory("sampling", lambda: generate(
                model.to(self.device), self.recipe.tokenizer, self.recipe.sample_prompts(step),
                temperature=temperature, seed=step)) or []  # fmt: skip
            for c in completions:
                note(f"  {c.prompt!r} → {c.completion!r}")
        if held_out.get("quality", -math.inf) >= (-math.inf if saved.best is None else saved.best):
            saved.best, saved.best_name = held_out.get("quality"), checkpoint.name_of(step)  # of equals the later one,
            self._write(lambda: checkpoint.set_pointer(self.out, "best", checkpoint.name_of(step)))  # which knows more
        checkpoint.prune(self.out, self.settings.keep)
        self._write(lambda: write_samples(self.out / "samples.jsonl", step, completions))
        self._record({**row, **held_out, **probes})
        self.watch.show(step, (c.text for c in completions))
        self.after_validation(self.out)

    def _record(self, row: Mapping[str, float]) -> None:
        """One more row of metrics.csv."""
        self._write(lambda: self.metrics.add(**row))
        self.watch.see(self.metrics.rows[-1])

    def _if_memory(self, what: str, do: Callable[[], T]) -> T | None:
        """Validation and sampling are left out where there is no memory for them: the run is worth more."""
        try:
            return do()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            said = first_line(error)
        torch.cuda.empty_cache()
        note(f"step {self.saved.step}: OUT OF MEMORY in {what} ({said}); left out")
        return None

    def _write(self, write: Callable[[], T]) -> T:
        return retry_while_full(write, self.out, self.stop)


def eager(compiled: bool) -> contextlib.AbstractContextManager[object]:
    """Where compiled layers are called as they are written: decoding has too many shapes to compile for each."""
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
