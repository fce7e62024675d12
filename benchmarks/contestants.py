"""What benchmarks/quality.py compares: Tidal, a byte and a token transformer, on the same stretches of the same text.

    windows of text    255 reader tokens each, cut at blocks       the same for all: no one sees further back
    Tidal              reads them as they are                      tidal.train.recipes.text, tidal.train.loop
    token              <bos> and the same 255 tokens               benchmarks/baselines/causal.py
    byte               <bos> and the UTF-8 bytes of that text
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import tempfile
import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baselines import causal
from benchmarks.baselines.causal import BYTES, CausalConfig, CausalTransformer, Document, coder_of
from benchmarks.entries import Entry
from benchmarks.switches import SwitchedRecipe, Switches, model_of, optimizer_of
from tidal.blocks import EOS_BLOCK, BlockTable, Passage, passage, windows
from tidal.config import Text, Train
from tidal.corpora.build import build
from tidal.evaluate.boundary import Floats, cut_pairs, gap_between
from tidal.model import TidalTransformer
from tidal.prepare.documents import read_documents
from tidal.prepare.make import prepare, tokenizer_for
from tidal.prepare.survey import survey
from tidal.streams import Batch, pack
from tidal.train.gradient import gradients

ROWS_AT_ONCE = 16  # of held-out windows
COUNTED = 4  # batches over which the work of a step is averaged
CUTS = {"context_chars": 400, "continuation_chars": 80}  # as python -m tidal.evaluate boundary

# --------------------------------------------------------------------------------------------------- text


@dataclass(frozen=True)
class Window:
    """A stretch of a held-out document."""

    passage: Passage
    """Blocks of the table it was made with."""
    prompt: tuple[str, ...]
    """Blocks that are read and not charged."""
    completion: tuple[str, ...]
    """Blocks that are charged."""
    ends: bool
    """Whether the document ends here, and `<eos>` is charged."""


def window_of(table: BlockTable, p: Passage) -> Window:
    """The window that a passage is."""
    texts, ends = tuple(table.texts[i] for i in p.blocks.tolist()), bool(p.blocks[-1] == EOS_BLOCK)
    return Window(p, texts[1 : p.supervise_from], texts[p.supervise_from : len(texts) - ends], ends)


def corpus_folder(corpus: str) -> Path:
    """The folder with train/ and held-out/ of a corpus named so, made if need be, or that very folder."""
    folder = Path(corpus)
    if not (folder / "train").is_dir():
        folder = Path("corpora") / corpus
        build(corpus, folder)
    return folder


class Texts:
    """A corpus, prepared once for every vocabulary that is asked for, and its held-out documents."""

    def __init__(self, corpus: str, held_out_bytes: int = 0) -> None:
        """`corpus` is a name of python -m tidal.corpora or a folder with train/ and held-out/. `held_out_bytes`: of
        the held-out documents take whole ones, evenly spread, up to about so many; 0: all. Raises UserError.
        """
        self.folder = folder = corpus_folder(corpus)
        self._temporary = tempfile.TemporaryDirectory(prefix="tidal-quality-")
        documents = [d.prompt + d.completion for d in read_documents([str(folder / "held-out")])]
        total = sum(len(d.encode()) for d in documents)
        every = max(1, round(total / held_out_bytes)) if held_out_bytes else 1
        self.held_out = [d for i, d in enumerate(documents) if i % every == 0]
        self.held_out_bytes = sum(len(d.encode()) for d in self.held_out)

    def settings(self, train: Train) -> Train:
        """`train` with its data in place, prepared for its vocabulary. All seeds share a tokenizer and a split."""
        out = Path(self._temporary.name) / f"vocabulary-{train.text.vocab_size}"
        if not out.exists():
            data = survey([str(self.folder / "train")], Text.hold_out, 0)
            prepare(data, tokenizer_for(None, train.text.vocab_size, data.training_texts()), out, workers=1)
        return dataclasses.replace(train, text=dataclasses.replace(train.text, prepared=str(out), data=()))

    def windows(self, recipe: SwitchedRecipe, context: int) -> list[Window]:
        """All held-out documents in windows of `context` reader tokens that overlap by half; every byte is charged
        in exactly one of them, the first half of all but a document's first window being its context.
        """
        found = []
        for document in self.held_out:
            whole = passage(recipe.table, "", document)
            cut = windows(whole, recipe.table, context, 1 << 40, overlap=context // 2)
            here = [window_of(recipe.table, p) for p in cut]
            if "".join(t for w in here for t in w.completion) != document or [w.ends for w in here].count(True) != 1:
                raise RuntimeError("the windows of a held-out document do not add up to it")
            found += here
        return found


# ------------------------------------------------------------------------------------------------ runners


class Runner(ABC):
    """A model in training, with its own clock."""

    recipe: SwitchedRecipe
    model: TidalTransformer | CausalTransformer

    def __init__(self, entry: Entry, texts: Texts, seed: int, device: torch.device) -> None:
        self.entry, self.texts, self.seed, self.device = entry, texts, seed, device
        self.train = dataclasses.replace(texts.settings(entry.train), seed=seed)
        self.seconds = self.cpu_seconds = 0.0
        self.n_steps = 0
        self.step_seconds: list[float] = []
        self.step_cpu_seconds: list[float] = []

    def timed_step(self, done: float) -> None:
        """One step on the clock. Its rate falls with the part of the budget that is `done`; how long it rises is a
        number of steps, whatever the budget, so that a slow contestant may hardly have steps at the full rate."""
        began, cpu = time.perf_counter(), time.process_time()
        o = self.train.optim
        warm, left = (self.n_steps + 1) / max(1, o.warmup_steps), (1 - done) / max(o.decay_fraction, 1e-9)
        self.step(o.lr * min(1.0, warm, max(0.0, left)))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.step_seconds.append(time.perf_counter() - began)
        self.step_cpu_seconds.append(time.process_time() - cpu)
        self.seconds += self.step_seconds[-1]
        self.cpu_seconds += self.step_cpu_seconds[-1]
        self.n_steps += 1

    @abstractmethod
    def step(self, rate: float) -> None:
        """Prepare batch number `n_steps`, and learn from it."""

    @abstractmethod
    def batch_of(self, some: Sequence[Window]) -> Batch | causal.CausalBatch:
        """Held-out windows, one a row."""

    @abstractmethod
    def spelled(self, targets: Sequence[int]) -> tuple[bytes, int]:
        """What a row of targets spells, and how often it says `<eos>`."""

    def bits_per_byte(self, context: int, every: int = 1) -> float:
        """Of the held-out documents, or of one in `every` of their windows. Raises RuntimeError as `charges` does."""
        chosen = self.texts.windows(self.recipe, context)[::every]
        nats, _, n_bytes = self.charges(chosen)
        return float(nats.sum() / math.log(2) / n_bytes.sum())

    def boundary_gap(self, count: int) -> dict[str, Any]:
        """What it costs that a prompt ends inside a block, at `count` places of the held-out documents; the figures of
        tidal.evaluate.boundary, which says more. The baselines read what is left of a cut word as tokens of its own.
        """
        pairs = cut_pairs(self.recipe.tokenizer, self.texts.held_out, count=count, **CUTS)

        def charge(cuts: Sequence[tuple[str, str]]) -> tuple[Floats, Floats]:
            table = self.recipe.table
            nats, n_targets, _ = self.charges([window_of(table, passage(table, *cut, ends=False)) for cut in cuts])
            return nats, n_targets

        return gap_between(pairs, charge)

    @torch.inference_mode()
    def charges(self, chosen: Sequence[Window]) -> tuple[Floats, Floats, Floats]:
        """Of each window [n] the loss in nats, and how many targets and bytes it is of.

        Raises RuntimeError unless what is charged spells the text that is to be charged, byte for byte, and `<eos>`.
        """
        self.model.eval()
        found = np.zeros((3, len(chosen)))
        order = sorted(range(len(chosen)), key=lambda i: len("".join(chosen[i].prompt + chosen[i].completion)))
        for first in range(0, len(order), ROWS_AT_ONCE):  # of about the same length: little padding
            at = order[first : first + ROWS_AT_ONCE]
            some = [chosen[i] for i in at]
            batch = self.batch_of(some)
            n_bytes = self.check_charges(batch.targets, some)
            sizes = (batch.targets >= 0).sum(1).tolist()
            log_probs = self.model.log_probs(batch.to(self.device))  # type: ignore[arg-type]
            if len(log_probs) != sum(sizes):
                raise RuntimeError(f"{self.entry.label}: {len(log_probs)} log-probabilities, not one for each target")
            nats = [-part.sum().item() for part in log_probs.double().cpu().split_with_sizes(sizes)]
            found[:, at] = nats, sizes, n_bytes
        self.model.train()
        return found[0], found[1], found[2]

    def check_charges(self, targets: Tensor, some: Sequence[Window]) -> list[int]:
        """The bytes of each of `some` windows, after comparing them with what the targets [rows, L] spell."""
        n_bytes = []
        for window, row in zip(some, targets, strict=True):
            expected = "".join(window.completion).encode()
            if self.spelled(row[row >= 0].tolist()) != (expected, int(window.ends)):
                raise RuntimeError(f"{self.entry.label}: what is charged is not {expected[:40]!r}… and its <eos>")
            n_bytes.append(len(expected))
        return n_bytes

    def parameters(self) -> int:
        """How many there are."""
        return sum(p.numel() for p in self.model.parameters())

    def flops_per_step(self) -> float:
        """Floating-point operations of a step, forward, backward and optimizer, the mean of the next few.

        Matrix products as torch.utils.flop_counter counts them (with padding); of attention what is needed, two
        products for each pair that is seen, and twice that backward. It changes the model: take another to train.
        """
        seen = 0

        def stand_in(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, *_: Any, **__: Any) -> Tensor:
            nonlocal seen
            pairs = (ranges[..., 1] - ranges[..., 0]).clamp(min=0).sum().item()
            seen += int(pairs) * q.shape[1] * q.shape[3]
            return q + 0 * (k.sum() + v.sum())  # gradients still reach k and v

        with mock.patch("tidal.layers.interval_attention", stand_in), FlopCounterMode(display=False) as counter:
            for _ in range(COUNTED):
                self.step(0.0)
                self.n_steps += 1
        return float(counter.get_total_flops() + 3 * 4 * seen) / COUNTED


class TidalRunner(Runner):
    """Tidal as `python -m tidal.train --recipe text` trains it."""

    model: TidalTransformer

    def __init__(self, entry: Entry, texts: Texts, seed: int, device: torch.device) -> None:
        super().__init__(entry, texts, seed, device)
        self.recipe = SwitchedRecipe(self.train, entry.switches)
        torch.manual_seed(seed)
        self.model = model_of(self.recipe.tokenizer, self.train.model, entry.switches).to(device)
        self.optimizer = optimizer_of(self.model, self.train.optim, entry.switches.matrices)

    def step(self, rate: float) -> None:
        gradients(self.model, self.optimizer, self.recipe, self.n_steps, self.train, self.device)
        self.optimizer.step(rate)

    def batch_of(self, some: Sequence[Window]) -> Batch:
        rows = [[self.recipe.regrouped(w.passage)] for w in some]
        return self.entry.switches.on_batch(pack(rows, self.recipe.table, steps=self.train.model.steps))

    def spelled(self, targets: Sequence[int]) -> tuple[bytes, int]:
        """An `<eob>` that is missing shows too: its block would run into the next, or never end."""
        tokenizer, block = self.recipe.tokenizer, list[bytes]()
        text, ends, turn = b"", 0, 1 if self.entry.switches.write_order == "forward" else -1
        for unit in targets:
            if unit == tokenizer.eob_id:
                text, block = text + b"".join(block[::turn]), []
            elif unit == tokenizer.eos_id:
                ends += 1
            else:
                block.append(tokenizer.id_bytes[unit])
        return text + b"<block without end>" * bool(block), ends


class BaselineRunner(Runner):
    """A causal transformer on the rows that Tidal has at the same step."""

    model: CausalTransformer

    def __init__(self, entry: Entry, texts: Texts, seed: int, device: torch.device) -> None:
        super().__init__(entry, texts, seed, device)
        self.recipe = SwitchedRecipe(self.train, Switches())
        self.coder = BYTES if entry.kind == "byte" else coder_of(self.recipe.tokenizer)
        shape, b = self.train.model, entry.baseline
        torch.manual_seed(seed)
        self.model = CausalTransformer(CausalConfig.of(
            self.coder, d_model=shape.d_model, n_heads=shape.n_heads, n_kv_heads=shape.n_kv_heads,
            qk_norm=shape.qk_norm, layers=b.layers, d_ff=b.d_ff, recall=b.recall,
            ngram_rows=b.ngram_rows)).to(device)  # fmt: skip
        self.optimizer = optimizer_of(cast(TidalTransformer, self.model), self.train.optim)  # asks for its tables only
        self.rows = [[self._document(p) for p in row] for row in self.recipe.rows]  # encoded beforehand, as Tidal's are

    def _document(self, p: Passage) -> Document:
        table, body = self.recipe.table, p.blocks[1:].tolist()
        prompt, completion = body[: p.supervise_from - 1], body[p.supervise_from - 1 :]
        before, after = (self._ids([table.texts[i] for i in part]) for part in (prompt, completion))
        return Document(before, after, bool(p.blocks[-1] == EOS_BLOCK))

    def _ids(self, blocks: Sequence[str]) -> Sequence[int]:
        """Compactly. Tokens are those of each block, as everywhere in Tidal."""
        if self.entry.kind == "byte":
            return "".join(blocks).encode()
        tokens = (self.recipe.tokenizer.encode_block(text).tokens for text in blocks if text)
        return array("i", itertools.chain.from_iterable(tokens))

    def _packed(self, rows: Sequence[Sequence[Document]]) -> causal.CausalBatch:
        b = self.entry.baseline
        batch, scale = causal.pack(rows, self.coder, b.recall, b.ngram_rows > 0), b.position_scale
        return batch if scale == 1 else dataclasses.replace(batch, positions=batch.positions * scale)

    def step(self, rate: float) -> None:
        n = self.train.rows
        batch = self._packed([self.rows[self.recipe._row(i)] for i in range(self.n_steps * n, (self.n_steps + 1) * n)])
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.train.precision == "bf16"):
            nats, n_targets = self.model(batch.to(self.device))
        (nats / n_targets).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.train.optim.clip).item()
        if not math.isfinite(norm):
            raise RuntimeError(f"{self.entry.label}: gradient norm {norm} at step {self.n_steps}")
        self.optimizer.step(rate)

    def batch_of(self, some: Sequence[Window]) -> causal.CausalBatch:
        return self._packed([[Document(self._ids(w.prompt), self._ids(w.completion), w.ends)] for w in some])

    def spelled(self, targets: Sequence[int]) -> tuple[bytes, int]:
        text = [i for i in targets if i != self.coder.eos_id]
        if self.entry.kind == "byte":
            return bytes(text), len(targets) - len(text)
        return b"".join(self.recipe.tokenizer.id_bytes[i] for i in text), len(targets) - len(text)


def runner(entry: Entry, texts: Texts, seed: int, device: torch.device) -> Runner:
    """The contestant, untrained."""
    return (TidalRunner if entry.kind == "tidal" else BaselineRunner)(entry, texts, seed, device)
