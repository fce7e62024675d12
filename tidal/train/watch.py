"""What looks on while a run is trained: speed, memory, probes, warnings, TensorBoard."""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tidal.blocks import BlockTable, passage
from tidal.cli import note
from tidal.config import Train
from tidal.model import TidalTransformer
from tidal.streams import Batch, pack
from tidal.tokenizer import MixedTokenizer
from tidal.train.health import Health
from tidal.train.records import parts_of, take

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

STEPS = 10
"""Over which the speed is averaged."""
PROBE_ROWS = 16
"""Of a batch, for `context_gain`."""
TYPO_CHARS, LEAST_TYPOS = 8000, 64
"""Characters of a batch for `typo_gain`, and how many must be misspelt."""
KINDS = ("abcdefghijklmnopqrstuvwxyz", "0123456789")


class Watch:
    """Beside the training loop; nothing here touches weights."""

    def __init__(self, out: Path, settings: Train, tokenizer: MixedTokenizer, device: torch.device,
                 rows: Iterable[Mapping[str, Any]]) -> None:  # fmt: skip
        """`rows`: those of metrics.csv that are there already; they are not warned of again."""
        rows = list(rows)
        self.settings, self.tokenizer, self.device = settings, tokenizer, device
        self.health = Health(settings.max_steps, settings.optim.warmup_steps, rows, settings.init_from is not None)
        self._recent: deque[tuple[float, float]] = deque(maxlen=STEPS)
        self._board: SummaryWriter | None = None
        if settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            last = int(rows[-1]["step"]) if rows else 0  # what an earlier process wrote after it is hidden
            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=last + 1)

    def timed(self, step: Callable[[float], dict[str, float]], rate: float) -> dict[str, float]:
        """Do a step; to its figures come `units_per_second` (of the last steps) and `memory_mib` (the peak so far),
        for its `units`.
        """
        began = time.perf_counter()
        figures = step(rate)
        self._recent.append((figures.pop("units"), time.perf_counter() - began))
        units, seconds = map(sum, zip(*self._recent, strict=True))
        return {**figures, "units_per_second": units / seconds, "memory_mib": peak_mib(self.device)}

    def probes(self, model: TidalTransformer, batch: Batch, parts: int = 1) -> dict[str, float]:
        """What the loss does not show, in nats a unit; what a batch is too small for is left out.

        `context_gain`: what reading the text before a block is worth, measured by letting the rows of a batch read each
        other's text, while what they recall stays their own. `typo_gain`: how much better than chance misspelt letters
        are predicted; above 0 only where they leak.
        A batch is computed in `parts`, as in training.
        """
        found, rows = {}, take(batch, torch.arange(min(PROBE_ROWS, len(batch.targets))))
        if len(rows.targets) > 1:
            swapped = dataclasses.replace(rows, reader_ids=rows.reader_ids.roll(1, 0))
            found["context_gain"] = self._loss(model, swapped, parts) - self._loss(model, rows, parts)
        pair = misspelt(batch, self.tokenizer, self.settings)
        if (gain := typo_gain(model, *pair, self.tokenizer, self.device, parts)) is not None:
            found["typo_gain"] = gain
        return found

    @torch.no_grad()
    def _loss(self, model: TidalTransformer, batch: Batch, parts: int) -> float:
        losses = [model(part.to(self.device)) for part in parts_of(batch, parts)]
        return float(sum(loss.units.item() for loss in losses) / sum(loss.n_units for loss in losses))

    def see(self, row: Mapping[str, Any]) -> None:
        """A row is in metrics.csv: warn of what it shows, and pass it on to TensorBoard."""
        for alarm in self.health.look(row):
            note(str(alarm))
        if self._board is not None:
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(name, float(value), int(row["step"]))

    def show(self, step: int, texts: Iterable[str]) -> None:
        """Samples, for TensorBoard."""
        if self._board is not None:
            for number, text in enumerate(texts):
                self._board.add_text(f"sample {number}", "    " + text.replace("\n", "\n    "), step)  # as code
            self._board.flush()

    def close(self) -> None:
        """Write out what TensorBoard still holds."""
        if self._board is not None:
            self._board.close()


def peak_mib(device: torch.device) -> float:
    """The most memory so far, in MiB: of a GPU what tensors took, else what the process had in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


def misspelt(batch: Batch, tokenizer: MixedTokenizer, settings: Train) -> tuple[Batch, Batch]:
    """The text of a batch, twice: as it is, and with other letters in place of every sixth.

    Letters a to z become other ones at random, digits other digits, so that the blocks stay as they are; the two differ
    in `targets` where there is such a letter.
    """
    rng, table = np.random.default_rng(0), BlockTable(tokenizer)
    pairs, most = [], TYPO_CHARS // len(batch.targets)
    for ids in batch.reader_ids.tolist():
        text = b"".join(tokenizer.id_bytes[i] for i in ids).decode(errors="replace")[:most]
        pairs.append((text, "".join(_other(c, rng) if typo else c
                                    for c, typo in zip(text, rng.random(len(text)) < 1 / 6, strict=True))))  # fmt: skip
    right, wrong = (pack([[passage(table, "", text, ends=False)] for text in texts], table,
                         steps=settings.model.steps) for texts in zip(*pairs, strict=True))  # fmt: skip
    return right, wrong


@torch.no_grad()
def typo_gain(model: TidalTransformer, right: Batch, wrong: Batch, tokenizer: MixedTokenizer, device: torch.device,
              parts: int = 1) -> float | None:  # fmt: skip
    """How much better than chance the letters of `misspelt` are predicted, in nats, among all that could stand there.

        log q(letter) - log Σ q(others of its kind, but the right one) + log 25        (9 for digits)

    The letter was drawn from those 25 by lot, so in the mean no model that does not see it is above 0, whatever it
    knows of the text (Gibbs' inequality). All the rest is what the model is used to; a leak that it has learnt to use
    serves it here, too. None where there are too few letters to say anything.

    The batch is computed in so many `parts`.
    """
    if right.targets.shape != wrong.targets.shape:
        return None
    kinds = torch.zeros(len(KINDS), tokenizer.n_head, dtype=torch.bool)
    for kind, letters in zip(kinds, KINDS, strict=True):
        kind[[tokenizer.encode_block(letter).units[0] for letter in letters]] = True
    typos = wrong.targets != right.targets
    there, instead = right.targets[typos], wrong.targets[typos]
    if len(there) < LEAST_TYPOS:
        return None
    could = kinds[(~kinds[0])[instead].long()].scatter(1, there[:, None], False)
    pieces = parts_of(wrong, parts)
    logits = [model.head(model.states(piece.to(device))[1][at.to(device)]).cpu()
              for piece, at in zip(pieces, typos.tensor_split(len(pieces)), strict=True)]  # fmt: skip
    among = torch.cat(logits).float().masked_fill(~could, -math.inf).log_softmax(-1)
    gains = among.gather(1, instead[:, None])[:, 0] + could.sum(1).log()
    return float(gains.mean())


def _other(char: str, rng: np.random.Generator) -> str:
    """Another letter or digit of the same kind, any of them as likely; what is neither stays."""
    others = next((kind.replace(char, "") for kind in KINDS if char in kind), char)
    return others[rng.integers(len(others))]
