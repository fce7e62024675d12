"""`python -m tidal.corpora NAME --out DIR`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tidal.cli import UserError, main, note, parse

DESCRIPTION = """Make a corpus: DIR/train and DIR/held-out with a text file for each document, and DIR/corpus.json.
Usage: python -m tidal.corpora NAME --out DIR, with NAME one of
  kjv          the King James Bible, by books
  shakespeare  Shakespeare, by plays and poems
  english      both
  chinese      poems and sayings, manual pages, an office suite's help
  code         the running Python's standard library, by modules (nothing is fetched)"""


@dataclass(frozen=True)
class Corpora:
    """Settings of `python -m tidal.corpora`."""

    out: str
    """The folder to make."""
    archives: str | None = None
    """A folder with the packages' archives (.deb, .tar.gz); none: apt-get and pip fetch them."""


def run(argv: list[str]) -> None:
    """Make the corpus that the first argument names."""
    name = argv.pop(0) if argv and not argv[0].startswith("-") else None
    settings = parse(Corpora, argv, "tidal.corpora", DESCRIPTION)
    from tidal.corpora.build import CORPORA, build

    if name not in CORPORA:
        said = "no corpus named" if name is None else f"unknown corpus {name!r}"
        raise UserError(f"{said}; say one of {', '.join(CORPORA)} first")
    archives = None if settings.archives is None else Path(settings.archives)
    content, new = build(name, Path(settings.out), archives)
    if not new:
        note(f"{settings.out} is there already and complete")
    for split in ("train", "held-out"):
        count = content[split]
        print(f"{settings.out}/{split}: {count['documents']:,} documents, {count['bytes']:,} bytes")
    note(f"done; try: python -m tidal.train --recipe text --data {settings.out}/train")


if __name__ == "__main__":
    main(run, "tidal.corpora")
