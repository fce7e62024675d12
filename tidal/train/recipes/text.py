"""`--recipe text`: text files, folders, globs, .jsonl and prepared shards, with a sentencepiece model of their own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tidal.blocks import BlockTable, Passage
from tidal.boundary_dropout import cut_at_random
from tidal.cli import UserError, note
from tidal.config import Train
from tidal.infer.score import bits_per_byte
from tidal.model import TidalTransformer
from tidal.prepare.corpus import Rows
from tidal.prepare.make import prepare_for_training
from tidal.ranks import share_of
from tidal.streams import Batch, pack
from tidal.train.recipes import taken

STEPS_PER_TOKEN = 8  # writer budget for a token of the reader budget; English writes about four
VALIDATION_ROWS = 96  # at most, drawn once
PROMPT_BLOCKS = 8  # of held-out text, for samples


class TextRecipe:
    """Rows are planned once; an epoch is a permutation of them, so a batch is a pure function of (seed, step).

    Whether the data were prepared before or are prepared here makes no difference to the rows. Blocks are looked up
    when a row is used; the table is emptied when it has grown large, which no batch shows.
    """

    def __init__(self, settings: Train) -> None:
        self.settings, text = settings, settings.text
        if not text.data and text.prepared is None:
            raise UserError("--recipe text needs --data: text files, folders, globs or .jsonl; or --prepared")
        data = prepare_for_training(text, settings.seed)
        self.tokenizer, self.digest = data.tokenizer, data.digest
        if text.prepared and settings.model_size and self.tokenizer.vocab_size < text.vocab_size:
            note(f"{text.prepared} has a vocabulary of {self.tokenizer.vocab_size:,}, not the {text.vocab_size:,} of "
                 f"--model-size {settings.model_size}; prepare with --vocab-size {text.vocab_size}")  # fmt: skip
        self.table = BlockTable(self.tokenizer)
        training, held_out = data.training.documents, data.held_out.documents
        budgets = text.reader_budget, text.reader_budget * STEPS_PER_TOKEN
        if not held_out[:, 4].any():
            raise UserError(f"the held-out documents ({len(held_out):,}) have no text to learn, only prompts: nothing "
                            f"can be validated; give --validation-data {'to tidal.prepare ' if text.prepared else ''}"
                            "with completions")  # fmt: skip
        order = np.random.default_rng([settings.seed, 1]).permutation(len(training))
        self.rows = Rows(data.training, order, self.table, *budgets)
        self._validation = Rows(data.held_out, np.arange(len(held_out)), self.table, *budgets)
        drawn = np.random.default_rng([settings.seed, 5]).permutation(len(self._validation))[:VALIDATION_ROWS]
        self._drawn = sorted(drawn.tolist())
        epochs = settings.rows * settings.optim.accumulate * settings.max_steps / len(self.rows)
        note(f"{len(training):,} documents, {training[:, 2].sum():,} bytes in {len(self.rows):,} rows, "
             f"{self.rows.fill:.0%} full ({epochs:,.2f} epochs in {settings.max_steps:,} steps); "
             f"{len(held_out):,} held out; vocabulary {self.tokenizer.vocab_size:,}, "
             f"{self.tokenizer.n_writable} writable")  # fmt: skip

    @property
    def held_out(self) -> list[list[Passage]]:
        """The rows of validation: of all that are held out, so many drawn by lot."""
        return [self._validation[i] for i in self._drawn]

    def batch(self, step: int, share: tuple[int, int] = (0, 1)) -> Batch:
        """The batch of a step: a pure function of (seed, step); or the share (i, n) of its rows."""
        self.table.limit()
        s, cut = self.settings, []
        for i in share_of(s.rows, share):
            rng = np.random.default_rng([s.seed, 2, step, i])  # of the row, whoever builds it
            row = [self.cut(p, rng) for p in self.rows[self._row(step * s.rows + i)]]
            if s.model.place_jitter:
                offsets = rng.integers(0, s.model.place_jitter + 1, len(row)).tolist()
                row = [replace(p, place_offset=offset) for p, offset in zip(row, offsets, strict=True)]
            cut.append(row)
        return pack(cut, self.table, steps=s.model.steps)

    def cut(self, p: Passage, rng: np.random.Generator) -> Passage:
        """Boundary dropout."""
        return cut_at_random(p, self.table, rng, self.settings.text.cut_probability)

    def _row(self, i: int) -> int:
        return taken(self.settings.seed, 3, i, len(self.rows))

    def validate(self, model: TidalTransformer) -> dict[str, float]:
        """Bits per byte of the held-out documents, cut into windows like the training data; of 96 rows at most."""
        self.table.limit()
        bits, _, _ = bits_per_byte(model, self.held_out, self.table)
        return {"quality": -bits, "held_out_bits_per_byte": bits}

    def sample_prompts(self, step: int) -> list[str]:
        """Of two rows of validation the prompts, or where there are none the beginnings."""
        self.table.limit()
        rng = np.random.default_rng([self.settings.seed, 4, step])
        rows = [self._validation[self._drawn[i]] for i in rng.integers(0, len(self._drawn), 2)]
        passages = [row[0] for row in rows]
        ends = [p.supervise_from if p.supervise_from > 1 else 1 + PROMPT_BLOCKS for p in passages]
        return ["".join(self.table.texts[i] for i in p.blocks[1:end]) for p, end in zip(passages, ends, strict=True)]
