"""`python -m tidal.prepare`: data once, training often."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tidal.cli import UserError, check_least, main, note, parse
from tidal.config import Data

DESCRIPTION = """Split, tokenize and count data into a folder of shards that training maps into memory. Interrupted, the
same command goes on where it stopped. Then: python -m tidal.train --prepared OUT"""


@dataclass(frozen=True, kw_only=True)
class Prepare(Data):
    """Settings of `python -m tidal.prepare`."""

    out: str
    """Folder of the shards; new, or one that was begun with the same settings."""
    seed: int = 0
    """Chooses the documents held out."""
    workers: int = 0
    """Processes; 0: one for every core, at most 16."""


def run(argv: list[str]) -> None:
    """Parse the flags, look through the data, write what is missing."""
    settings = parse(Prepare, argv, "tidal.prepare", DESCRIPTION)
    check_least(settings, workers=0, seed=0, vocab_size=288)
    if settings.tokenizer and settings.vocab_size != Prepare.vocab_size:
        raise UserError(f"--vocab-size does nothing with --tokenizer {settings.tokenizer}, which is trained already")
    if settings.validation_data and settings.hold_out != Prepare.hold_out:
        raise UserError("--hold-out does nothing with --validation-data; leave one of them out")
    from tidal.prepare.make import check_folder, prepare, tokenizer_for
    from tidal.prepare.survey import survey

    check_folder(Path(settings.out))  # reading the data and training a tokenizer takes its time
    data = survey(settings.data, settings.hold_out, settings.seed, settings.validation_data)
    tokenizer = tokenizer_for(settings.tokenizer, settings.vocab_size, data.training_texts())
    found = prepare(data, tokenizer, Path(settings.out), settings.workers)
    n, held_out = len(found.training.documents), len(found.held_out.documents)
    n_bytes = sum(int(corpus.documents[:, 2].sum()) for corpus in (found.training, found.held_out))
    print(f"{settings.out}: {n:,} documents, {n_bytes:,} bytes; {held_out:,} held out; vocabulary "
          f"{tokenizer.vocab_size:,}, {tokenizer.n_writable} writable")  # fmt: skip
    note(f"done; try: python -m tidal.train --prepared {settings.out}")


if __name__ == "__main__":
    main(run, "tidal.prepare")
