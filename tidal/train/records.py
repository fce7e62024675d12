"""What a run writes down beside its checkpoints: metrics.csv, samples.jsonl, and the batch that spoilt it."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tidal.config import Train
from tidal.files import atomic_write
from tidal.infer.engine import Completion
from tidal.model import TidalTransformer
from tidal.streams import Batch
from tidal.tokenizer import MixedTokenizer
from tidal.train.disk import append
from tidal.train.figures import COLUMNS

EXCERPT = 300  # characters of a row that are shown


def write_settings(out: Path, settings: Train) -> None:
    """Write the config.json of a run folder. OSError: nothing was done."""
    atomic_write(out / "config.json", json.dumps(dataclasses.asdict(settings), indent=2) + "\n")


class Metrics:
    """metrics.csv: one row every few steps; the columns of validation are filled where it ran.

    The rows are also in every checkpoint, so the file begins with those of `rows`, whatever was in it.
    """

    def __init__(self, path: Path, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self.path, self.names = path, list(COLUMNS)
        self.rows: list[dict[str, Any]] = []
        for row in rows:
            self._take(row)
        self._whole()

    def add(self, **row: float) -> None:
        """Append a row; a new column makes the file be written anew. OSError: nothing was done."""
        n_names = len(self.names)
        self._take({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        try:
            if len(self.names) > n_names:
                self._whole()
            else:
                append(self.path, self._lines(self.rows[-1:]))
        except OSError:
            self.rows.pop()
            del self.names[n_names:]
            raise

    def _take(self, row: Mapping[str, Any]) -> None:
        self.names += [name for name in row if name not in self.names]
        self.rows.append(dict(row))

    def _whole(self) -> None:
        atomic_write(self.path, self._lines([dict(zip(self.names, self.names, strict=True)), *self.rows]))

    def _lines(self, rows: Sequence[Mapping[str, Any]]) -> str:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self.names, restval="").writerows(rows)
        return text.getvalue()


def write_samples(path: Path, step: int, completions: Iterable[Completion]) -> None:
    """Store what the model writes after `step` steps. OSError: nothing was done."""
    lines = [json.dumps({"step": step, **c.to_dict(per_unit=False)}, ensure_ascii=False) + "\n" for c in completions]
    append(path, "".join(lines), sync=True)  # the next checkpoint takes them for granted


@torch.no_grad()
def bad_batch(model: TidalTransformer, tokenizer: MixedTokenizer, batches: Mapping[int, Batch],
              **said: Any) -> dict[str, Any]:  # fmt: skip
    """What bad-batch.json holds: `said`, and for every row of the `batches` (by number) its loss and its text.

    A row's loss is in nats a unit, by itself; JSON has no NaN, so that one is the string "nan".
    """
    rows = []
    for number, batch in batches.items():
        for r, part in enumerate(parts_of(batch, len(batch.targets))):
            losses = model(part.to(model.device))
            loss = losses.units.item() / max(1, losses.n_units)
            ids = part.reader_ids[0][part.reader_sees[0, :, 1] > 0].tolist()  # padding sees nothing
            text = b"".join(tokenizer.id_bytes[i] for i in ids).decode(errors="replace")
            rows.append({"batch": number, "row": r, "loss": loss if math.isfinite(loss) else str(loss),
                         "text": text[:EXCERPT]})  # fmt: skip
    return {**said, "rows": rows}


def parts_of(batch: Batch, n: int) -> list[Batch]:
    """A batch cut by rows into at most `n` parts of about as many; bytes, which cannot be told apart, count as 0."""
    if n == 1:
        return [batch]
    return [take(batch, rows) for rows in torch.arange(len(batch.targets)).tensor_split(min(n, len(batch.targets)))]


def take(batch: Batch, rows: torch.Tensor) -> Batch:
    """Rows of a batch that follow each other, by their numbers; bytes, which cannot be told apart, count as 0."""
    part: dict[str, Any] = {f.name: value[rows[0] : rows[-1] + 1] for f in dataclasses.fields(batch)
                            if isinstance(value := getattr(batch, f.name), torch.Tensor)}  # fmt: skip
    return dataclasses.replace(batch, **part, n_children=batch.n_children[rows[0] : rows[-1] + 1], n_bytes=0)
