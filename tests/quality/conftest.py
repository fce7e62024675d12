"""A corpus, and contestants that have not been trained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.contestants import Runner, Texts, runner
from benchmarks.entries import KINDS, entries_of
from tests.quality.tiny import CPU, TINY


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus as tidal.corpora makes them: English, some Chinese, a character that is spelled in bytes."""
    folder = tmp_path_factory.mktemp("corpus")
    words = re.findall(r"[^ ]+", "the sea came in and the sea went out, and no man of the land said why")
    for name, n in (("train", 12), ("held-out", 3)):
        (folder / name).mkdir()
        for i in range(n):
            lines = [" ".join(words[(i + j) % 7 : 7 + (3 * i + j) % 9]) + f" {i * j} 今天天气很好\n" for j in range(30)]
            (folder / name / f"{i}.txt").write_text("".join(lines) + "☃\n" * (i % 2), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def texts(corpus: Path) -> Texts:
    return Texts(str(corpus))


@pytest.fixture(scope="session")
def trio(texts: Texts) -> dict[str, Runner]:
    """One of each kind. Tests leave them as they were."""
    return {entry.kind: runner(entry, texts, 0, CPU) for entry in entries_of(KINDS, TINY)}
