"""The checks of prepared data must catch each of these bugs, planted one at a time; without a bug they all pass."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tests.doctor.bugs_training import after_the_space, prompts_are_learnt
from tests.strategies import tokenizers
from tests.train.test_prepare import LONG, check_own_validation, check_rows, check_seams, small
from tests.train.test_prepare_folder import (
    check_changes_are_noticed,
    check_damage_is_found,
    check_goes_on,
    check_keeps,
    wanting,
    write_data,
)
from tests.train.test_recipes import read_text, some_text
from tidal.blocks import BlockTable, Ints, Passage
from tidal.cli import UserError
from tidal.prepare import documents, make, seams, shards
from tidal.prepare.corpus import Rows
from tidal.prepare.documents import Division
from tidal.prepare.reading import Part
from tidal.prepare.shards import Shard
from tidal.train.recipes.text import TextRecipe


def all_seams() -> None:
    for text in LONG.values():
        check_seams(text, tokenizers()["english"], 53, 20)
    check_seams("don't (a'b) 'tis said" * 20, tokenizers()["english"], 12, 5)


def run_cut_anywhere(patch: pytest.MonkeyPatch) -> None:
    right = seams.seam
    patch.setattr(seams, "seam", lambda text, cap: right(text, 1))


def end_of_text(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(seams, "seam", lambda text, _: len(text) - 1)


def last_window_kept(patch: pytest.MonkeyPatch) -> None:
    """The last window of a stretch, into which more would fit, is taken as it is."""
    right = Rows._cut

    def _cut(self: Rows, documents: Ints, *budgets: int) -> tuple[Ints, Ints]:
        which, windows = right(self, documents, *budgets)
        if not documents[-1, 4]:  # the last window is dropped: an empty one after it
            block, byte, n = windows[-1, :3]
            n_bytes = int(self.corpus.read("blocks", block, block + n)[:, 0].sum())
            after = [block + n, byte + n_bytes, 0, 0, 0, 1, 0]
            which, windows = np.append(which, which[-1:]), np.concatenate([windows, [after]])
        return which, windows

    patch.setattr(Rows, "_cut", _cut)


def one_document_more(patch: pytest.MonkeyPatch) -> None:
    """Documents that span shards are taken for two."""
    right = Shard.encode

    def encode(parts: Sequence[Part], table: BlockTable) -> Shard:
        shard = right(parts, table)
        shard.parts[-1, 5] = 1
        return shard

    patch.setattr(Shard, "encode", encode)


def shard_named_first(patch: pytest.MonkeyPatch) -> None:
    """A shard has its name before its files are complete."""

    def write(self: Shard, folder: Path) -> str:
        folder.mkdir()
        for name in shards.ARRAYS:
            with open(folder / f"{name}.npy", "wb") as file:
                np.save(file, getattr(self, name), allow_pickle=False)
        hashes = {name: shards._sha256(folder / f"{name}.npy") for name in shards.ARRAYS}
        (folder / shards.SUMMARY).write_text(json.dumps(hashes, indent=2) + "\n")
        return shards._sha256(folder / shards.SUMMARY)

    patch.setattr(Shard, "write", write)
    patch.setattr(make, "_intact", named)


def named(folder: Path, group: object) -> str | None:
    """The digest of a shard that has its name, whatever is in it."""
    summary = folder / shards.SUMMARY
    return None if not folder.exists() else shards._sha256(summary) if summary.exists() else ""


def everything_again(patch: pytest.MonkeyPatch) -> None:
    """What is intact is made again."""

    def remove(folder: Path, group: object) -> None:
        shards.shutil.rmtree(folder, ignore_errors=True)

    patch.setattr(make, "_intact", remove)


def damaged_is_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(make, "_intact", named)


def unverified(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(make, "verify", lambda *_: "")


def not_compared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("tidal.prepare.survey._Content.hexdigest", lambda _: "")


def table_emptied_late(patch: pytest.MonkeyPatch) -> None:
    """The table is emptied between the rows of a batch."""
    right = Rows._passage

    def _passage(self: Rows, *window: int) -> Passage:
        self.table.clear()
        return right(self, *window)

    patch.setattr(Rows, "_passage", _passage)


def copies_are_learnt(patch: pytest.MonkeyPatch) -> None:
    """Of validation data of one's own."""
    def apart(digests: npt.NDArray[np.uint64], n: int) -> Division:
        return replace(found := right(digests, n), left_out=np.zeros_like(found.left_out))

    right = documents.apart
    patch.setattr("tidal.prepare.survey.apart", apart)


def on_rows(folder: Path) -> None:
    with small():
        check_rows(folder, [{"text": some_text(1, 900)}, {"prompt": some_text(2, 60), "completion": some_text(3, 60)}],
                   tokenizers()["english"], 50, 400)  # fmt: skip


def on_batches(folder: Path) -> None:
    """What batches read are documents, whole ones here."""
    texts = [some_text(i, 12) for i in range(30)]
    tokenizers()["english"].save(folder / "t")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = TextRecipe(wanting(folder / "a.jsonl", tokenizer=str(folder / "t"), reader_budget=400))
    for step in range(3):
        batch = recipe.batch(step)
        found = [text for row in range(len(batch.targets)) for text in read_text(batch, row, recipe.tokenizer)]
        assert len(found) > 3 and set(found) <= set(texts)  # noqa: PT018


def data_in(folder: Path) -> Path:
    write_data(data := folder / "data")
    return data


Check = Callable[[Path], object]
PLANTED: list[tuple[Callable[[pytest.MonkeyPatch], None], Check]] = [
    (run_cut_anywhere, lambda _: all_seams()),
    (after_the_space, lambda _: all_seams()),
    (end_of_text, lambda _: all_seams()),
    (last_window_kept, on_rows),
    (prompts_are_learnt, on_rows),
    (one_document_more, on_rows),
    (table_emptied_late, on_batches),
    (damaged_is_kept, lambda folder: check_keeps(data_in(folder), folder / "out")),
    (everything_again, lambda folder: check_keeps(data_in(folder), folder / "out")),
    (shard_named_first, lambda folder: check_goes_on(data_in(folder), folder)),
    (unverified, lambda folder: check_damage_is_found(data_in(folder), folder / "out")),
    (not_compared, check_changes_are_noticed),
    (copies_are_learnt, check_own_validation),
]


@pytest.mark.parametrize(("plant", "check"), PLANTED, ids=[plant.__name__ for plant, _ in PLANTED])
def test_planted_bugs_are_noticed(plant: Callable[[pytest.MonkeyPatch], None], check: Check, tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    (tmp_path / "well").mkdir()
    check(tmp_path / "well")
    plant(monkeypatch)
    with pytest.raises((AssertionError, UserError, ValueError, IndexError, pytest.fail.Exception)):
        check(tmp_path)
