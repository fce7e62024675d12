"""`--recipe text`: text files, folders, globs and .jsonl, with a sentencepiece model of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tidal.blocks import BlockTable, Passage, cut_at_random, fill_rows, passage, windows
from tidal.cli import UserError, note, progress
from tidal.config import Train
from tidal.infer.score import bits_per_byte
from tidal.model import TidalTransformer
from tidal.streams import Batch, pack
from tidal.tokenizer import MixedTokenizer
from tidal.train.documents import Document, hold_out, read_documents

STEPS_PER_TOKEN = 8  # writer budget for a token of the reader budget; English writes about four
VALIDATION_ROWS = 96
PROMPT_BLOCKS = 8  # of held-out text, for samples


class TextRecipe:
    """Rows are packed once; an epoch is a permutation of them, so a batch is a pure function of (seed, step)."""

    def __init__(self, settings: Train) -> None:
        self.settings, text = settings, settings.text
        if not text.data:
            raise UserError("--recipe text needs --data: text files, folders, globs or .jsonl")
        documents, held_out = hold_out(read_documents(text.data), text.hold_out, settings.seed)
        self.tokenizer = self._tokenizer(documents)
        self.table = BlockTable(self.tokenizer, suffixes=settings.model.suffix_rows > 0)
        order = np.random.default_rng([settings.seed, 1]).permutation(len(documents))
        self.rows = self._rows(self._passages([documents[i] for i in order]))
        self.held_out = self._rows(self._passages(held_out))[:VALIDATION_ROWS]
        n_bytes = sum(int(self.table.n_bytes.view()[p.blocks].sum()) for row in self.rows for p in row)
        note(f"{len(documents):,} documents, {n_bytes:,} bytes in {len(self.rows):,} rows; {len(held_out):,} held out; "
             f"vocabulary {self.tokenizer.vocab_size:,}, {self.tokenizer.n_writable} writable")  # fmt: skip

    def _tokenizer(self, documents: Sequence[Document]) -> MixedTokenizer:
        text = self.settings.text
        try:
            if text.tokenizer:
                return MixedTokenizer.load(text.tokenizer)
            note("training the tokenizer")
            return MixedTokenizer.train((d.prompt + d.completion for d in documents), text.vocab_size)
        except ValueError as error:
            raise UserError(str(error)) from error

    def _passages(self, documents: Sequence[Document]) -> Iterator[Passage]:
        budget = self.settings.text.reader_budget
        with progress(sum(map(len, documents)), "read", "characters") as bar:
            for document in documents:
                whole = passage(self.table, document.prompt, document.completion)
                yield from windows(whole, self.table, budget, budget * STEPS_PER_TOKEN)
                bar.update(len(document))

    def _rows(self, passages: Iterator[Passage]) -> list[list[Passage]]:
        budget = self.settings.text.reader_budget
        return list(fill_rows(passages, self.table, budget, budget * STEPS_PER_TOKEN))

    def batch(self, step: int) -> Batch:
        """The batch of a step: a pure function of (seed, step)."""
        s = self.settings
        rng = np.random.default_rng([s.seed, 2, step])
        chosen = [self.rows[self._row(i)] for i in range(step * s.rows, (step + 1) * s.rows)]
        cut = [[cut_at_random(p, self.table, rng, s.text.cut_probability) for p in row] for row in chosen]
        return pack(cut, self.table, step_stride=s.model.step_stride)

    def _row(self, i: int) -> int:
        epoch, rank = divmod(i, len(self.rows))
        if epoch != self.__dict__.get("_epoch"):
            self._epoch = epoch
            self._order = np.random.default_rng([self.settings.seed, 3, epoch]).permutation(len(self.rows))
        return int(self._order[rank])

    def validate(self, model: TidalTransformer) -> dict[str, float]:
        """Bits per byte of the held-out documents, cut into windows like the training data."""
        bits, _, _ = bits_per_byte(model, self.held_out, self.table)
        return {"quality": -bits, "held_out_bits_per_byte": bits}

    def sample_prompts(self, step: int) -> list[str]:
        """Of two held-out windows the prompts, or where there are none the beginnings."""
        rng = np.random.default_rng([self.settings.seed, 4, step])
        rows = [self.held_out[i] for i in rng.integers(0, len(self.held_out), 2)]
        passages = [row[0] for row in rows]
        ends = [p.supervise_from if p.supervise_from > 1 else 1 + PROMPT_BLOCKS for p in passages]
        return ["".join(self.table.texts[i] for i in p.blocks[1:end]) for p, end in zip(passages, ends, strict=True)]
