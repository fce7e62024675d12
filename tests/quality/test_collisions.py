"""The count of suffixes that share rows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks import collisions
from tests.strategies import tokenizers
from tidal.blocks import NOTHING, BlockTable, suffix_hashes

TEXTS = ["the light of the world", "the fox met the light 12 times", "world of light"]


def test_suffixes_are_counted_once_a_step() -> None:
    """Against a walk over all blocks of all texts."""
    tokenizer = tokenizers()["english"]
    counted: Counter[tuple[int, int]] = Counter()
    for text in TEXTS:
        for block in tokenizer.split(text):
            written = tokenizer.write_units(block)
            for t in range(len(written) + 1):
                found = suffix_hashes(written[:t], tokenizer.digit_units)
                counted.update((order, h) for order, h in enumerate(found) if h != NOTHING)
    hashes, reads = collisions.suffixes(BlockTable(tokenizer), TEXTS)
    assert Counter(zip(hashes.tolist(), reads.tolist(), strict=True)) == Counter(
        (h, n) for (_, h), n in counted.items()
    )


def test_all_but_the_most_frequent_of_a_row_share() -> None:
    rows, reads = np.array([0, 2, 2, 2]), np.array([5, 1, 3, 1])
    assert collisions.sharing(rows, reads) == 1 - (5 + 3) / 10


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "text.txt").write_text("\n".join(TEXTS * 40))
    collisions.run(["--corpus", str(tmp_path), "--vocab-size", "300", "--rows", "1", "100000"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    one, many = line["results"]
    assert one["sharing"] == one["sharing_at_random"] > 0.9  # one row: all but the most frequent suffix
    assert 0 <= many["sharing"] < 0.1
    assert {"processor", "torch", "date"} <= set(line)
