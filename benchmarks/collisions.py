"""How many suffixes share the rows of the suffix table, on a corpus: counted, nothing is trained.

    python -m benchmarks.collisions --corpus kjv --rows 24576 65536

A row may serve several suffixes (tidal/blocks.py names them by hashes); all but the most frequent of them are read
with what another one has learnt. Beside the share of such reads stands what a random choice of rows would make it. Ends
in one JSON line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks import record
from benchmarks.contestants import corpus_folder
from tidal.blocks import NOTHING, BlockTable, Ints
from tidal.cli import main, parse
from tidal.config import Text
from tidal.prepare.documents import read_documents
from tidal.prepare.make import tokenizer_for


@dataclass(frozen=True)
class Collisions:
    """Settings of `python -m benchmarks.collisions`."""

    corpus: str = "kjv"
    """A name of python -m tidal.corpora (made in corpora/NAME if need be), or a folder with train/."""
    vocab_size: int = Text.vocab_size
    """Of the tokenizer, which is trained on the corpus."""
    rows: tuple[int, ...] = (4096, 8192, 24576, 65536, 262144)
    """Sizes of the table."""


def run(argv: list[str]) -> None:
    """Count, and print a table and one JSON line."""
    settings = parse(Collisions, argv, "python -m benchmarks.collisions", __doc__)
    texts = [d.prompt + d.completion for d in read_documents([str(corpus_folder(settings.corpus) / "train")])]
    hashes, reads = suffixes(BlockTable(tokenizer_for(None, settings.vocab_size, texts)), texts)
    print(f"{settings.corpus}: {len(hashes):,} suffixes, {reads.sum():,} reads")
    print(f"{'rows':>9} {'suffixes a row':>15} {'reads that share':>17} {'at random':>10}")
    results, generator = [], np.random.default_rng(0)
    for n in settings.rows:
        share, chance = sharing(hashes % n, reads), sharing(generator.integers(0, n, len(hashes)), reads)
        print(f"{n:>9,} {len(hashes) / n:>15.2f} {share:>17.2%} {chance:>10.2%}")
        results.append({"rows": n, "sharing": round(share, 5), "sharing_at_random": round(chance, 5)})
    print(json.dumps({"benchmark": "collisions", "corpus": settings.corpus, "vocab_size": settings.vocab_size,
                      "suffixes": len(hashes), "results": results, **record.machine()}))  # fmt: skip


def suffixes(table: BlockTable, texts: Sequence[str]) -> tuple[Ints, Ints]:
    """Of all suffixes that the steps of these texts stand on: the hash [n], and how often it is looked up [n].

    The same hash under two orders counts twice: they name different things.
    """
    counts = np.zeros(0, np.int64)
    for text in texts:
        found = np.bincount(table.indices(table.tokenizer.split(text)), minlength=len(table))
        counts = np.pad(counts, (0, len(table) - len(counts))) + found
    steps = np.repeat(counts, table.n_targets(np.arange(len(table), dtype=np.int32)))
    named = []
    for hashes in table.hashes.view().T:
        known = (hashes != NOTHING) & (steps > 0)
        names, which = np.unique(hashes[known], return_inverse=True)
        named.append((names, np.bincount(which, steps[known], len(names)).astype(np.int64)))
    return np.concatenate([names for names, _ in named]), np.concatenate([reads for _, reads in named])


def sharing(rows: Ints, reads: Ints) -> float:
    """The share of reads that find a row whose most frequent suffix is another one."""
    most = np.zeros(rows.max() + 1, np.int64)
    np.maximum.at(most, rows, reads)
    return float(1 - most.sum() / reads.sum())


if __name__ == "__main__":
    main(run, "benchmarks.collisions")
