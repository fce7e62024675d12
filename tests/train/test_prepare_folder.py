"""Folders of prepared data: the same however they were made, whole or refused, and made whole again."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest

from tests.strategies import differing, tokenizers
from tests.train.test_prepare import shown, small
from tests.train.test_recipes import SHAPE, some_text
from tidal.cli import UserError
from tidal.config import Text, Train
from tidal.prepare import make
from tidal.prepare.make import prepare
from tidal.prepare.survey import Survey, survey
from tidal.tokenizer import MixedTokenizer
from tidal.train.presets import PRESETS
from tidal.train.recipes.text import TextRecipe


def write_data(folder: Path) -> None:
    """Texts of several sizes and pairs: eight shards of `small` and more."""
    folder.mkdir(exist_ok=True)
    for i in range(6):
        (folder / f"{i}.txt").write_text(some_text(i, 20 + 30 * i))
    pairs = [{"prompt": f"{i} sea", "completion": f" goes {i}\n"} for i in range(20)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tokenizers()["english"].save(folder / ".tokenizer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def wanting(folder: Path, **text: object) -> Train:
    given: dict[str, object] = {"data": (str(folder),), "tokenizer": str(folder / ".tokenizer"), "reader_budget": 64}
    return dataclasses.replace(PRESETS["text"], rows=3, model=SHAPE, text=Text(**{**given, **text}))  # type: ignore[arg-type]


def surveyed(folder: Path) -> Survey:
    return survey([str(folder)], Text.hold_out, 0)


def check_same(made: TextRecipe, wanted: TextRecipe) -> None:
    """Same rows, same batches, bit for bit."""
    assert made.digest == wanted.digest
    assert shown(made.rows, made.table) == shown(wanted.rows, wanted.table)
    assert shown(made.held_out, made.table) == shown(wanted.held_out, wanted.table)
    for step in (0, 1, 7):
        assert not differing(made.batch(step), wanted.batch(step))
    assert made.sample_prompts(5) == wanted.sample_prompts(5)


def test_shards_memory_and_cache_train_alike(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = TextRecipe(wanting(folder))  # in memory, in one shard
    with small():
        prepare(surveyed(folder), tokenizers()["english"], tmp_path / "two", workers=2)
        assert len(list((tmp_path / "two").glob("shard-*"))) > 7
    prepare(surveyed(folder), tokenizers()["english"], tmp_path / "one", workers=1)
    monkeypatch.setattr(make, "IN_MEMORY", 100)
    cached = wanting(folder, cache=str(tmp_path / "cache"))
    made = [TextRecipe(cached), TextRecipe(cached)]
    for name in ("one", "two"):
        made.append(TextRecipe(wanting(folder, data=(), tokenizer=None, prepared=str(tmp_path / name))))
    monkeypatch.setattr("tidal.blocks.MAX_BLOCKS", 3)
    for recipe in made:
        check_same(recipe, wanted)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Interrupted(BaseException):
    """As Ctrl-C, or worse."""


def check_goes_on(folder: Path, out: Path, seed: int = 0) -> None:
    """Interrupted again and again, a preparation ends as if it had not been."""
    where = random.Random(seed)
    tokenizer = tokenizers()["english"]
    with small():
        prepare(surveyed(folder), tokenizer, out / "whole", workers=1)
        made = 0
        saved = np.save

        def save(file: object, array: object, **options: bool) -> None:
            nonlocal made
            made += 1
            if where.random() < 0.15:
                raise Interrupted
            saved(file, array, **options)  # type: ignore[call-overload]

        for _ in range(200):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(np, "save", save)
                try:
                    prepare(surveyed(folder), tokenizer, out / "torn", workers=1)
                    break
                except Interrupted:
                    assert not (out / "torn" / make.MANIFEST).exists()
        assert made > 3 + 3 * len(list((out / "whole").glob("shard-*"))), "it was never interrupted inside a shard"
        assert files(out / "torn") == files(out / "whole")


@pytest.mark.parametrize("seed", range(2))
def test_an_interrupted_preparation_goes_on(folder: Path, tmp_path: Path, seed: int) -> None:
    check_goes_on(folder, tmp_path, seed)


def check_keeps(folder: Path, out: Path) -> None:
    """Intact shards stay, damaged and missing ones and remains are replaced, and the result is the same."""
    tokenizer = tokenizers()["english"]
    with small():
        prepare(surveyed(folder), tokenizer, out, workers=1)
        before = files(out)
        times = {p: p.stat().st_mtime_ns for p in out.glob("shard-*/*.npy")}
        (out / make.MANIFEST).unlink()
        (out / "shard-000001.77.tmp").mkdir()
        for name in ("shard-000001.77.tmp/text.npy", ".manifest.json.77.tmp", "tokenizer/.tokenizer.model.77.tmp"):
            (out / name).write_bytes(b"half")
        damaged = out / "shard-000002" / "text.npy"
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
        prepare(surveyed(folder), tokenizer, out, workers=1)
        assert files(out) == before
        changed = {p.parent.name for p, time in times.items() if p.stat().st_mtime_ns != time}
        assert changed <= {"shard-000002"}


def test_intact_shards_stay_and_damaged_ones_are_made_again(folder: Path, tmp_path: Path) -> None:
    check_keeps(folder, tmp_path / "out")


def test_files_of_the_user_are_left_alone(folder: Path, tmp_path: Path) -> None:
    """Whatever their names end in."""
    (tmp_path / "notes.tmp").mkdir()
    (tmp_path / "notes.tmp" / "a").write_bytes(b"dear")
    with pytest.raises(UserError, match="holds something else"):
        prepare(surveyed(folder), tokenizers()["english"], tmp_path, workers=1)
    assert list(files(tmp_path)) == ["notes.tmp/a"]
    shutil.move(tmp_path / "notes.tmp", tmp_path / "kept")
    (tmp_path / "out" / "tokenizer").mkdir(parents=True)
    prepare(surveyed(folder), tokenizers()["english"], tmp_path / "other", workers=1)
    shutil.copy(tmp_path / "other" / make.PLAN, tmp_path / "out")
    mine = [tmp_path / "out" / name for name in ("a.tmp", "tokenizer/a.tmp")]
    for path in mine:
        path.write_bytes(b"dear")
    prepare(surveyed(folder), tokenizers()["english"], tmp_path / "out", workers=1)
    assert all(path.exists() for path in mine)


def test_a_file_system_that_cannot_sync_folders_will_do(folder: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    prepare(surveyed(folder), tokenizers()["english"], tmp_path, workers=1)


def check_damage_is_found(folder: Path, out: Path) -> None:
    """One flipped bit in any file, a missing file or a truncated one: an error that names the place."""
    with small():
        prepare(surveyed(folder), tokenizers()["english"], out, workers=1)
    where = random.Random(0)
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[where.randrange(len(whole))] ^= 1 << where.randrange(8)
        for data in (bytes(flipped), whole[: len(whole) // 2], None):
            path.unlink()
            if data is not None:
                path.write_bytes(data)
            try:
                found = make.load(out)
            except UserError as error:
                assert str(out) in str(error)  # noqa: PT017
            else:
                assert path.name == make.PLAN, path  # names, of no account to the shards
                assert "paths" in json.loads(data or b"{}") or found.digest != json.loads(whole)["data"]
        path.write_bytes(whole)
    make.load(out)


def test_damage_is_found(folder: Path, tmp_path: Path) -> None:
    check_damage_is_found(folder, tmp_path / "out")


def test_a_finished_folder_is_compared_by_several_at_once(folder: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    data, tokenizer, load, both = surveyed(folder), tokenizers()["english"], make.load, Barrier(2)
    prepare(data, tokenizer, tmp_path, workers=1)

    def when_both_are_here(out: Path) -> make.Prepared:
        both.wait(30)
        return load(out)

    monkeypatch.setattr(make, "load", when_both_are_here)
    with ThreadPoolExecutor(2) as pool:
        for found in [pool.submit(prepare, data, tokenizer, tmp_path, 1) for _ in range(2)]:
            assert found.result().digest == data.digest


@pytest.mark.parametrize("name", ["shard-000000", "shard-000000/text.npy", "tokenizer/tokenizer.model", make.MANIFEST])
@pytest.mark.parametrize("gone", [True, False])
def test_damage_is_mended(name: str, gone: bool, folder: Path, tmp_path: Path) -> None:
    """By preparing once more, which is what the error of `load` says."""
    out = tmp_path / "out"
    with small():
        prepare(surveyed(folder), tokenizers()["english"], out, workers=1)
        before = files(out)
        if gone and (out / name).is_dir():
            shutil.rmtree(out / name)
        elif gone:
            (out / name).unlink()
        else:
            (path := out / name if (out / name).is_file() else out / name / "blocks.npy").write_bytes(b"")
            assert path.exists()
        prepare(surveyed(folder), tokenizers()["english"], out, workers=1)
    assert files(out) == before
    make.load(out)


@pytest.mark.parametrize("gone", ["shard-000001", "held-out-000000", "digest", ""])
def test_a_manifest_that_lacks_something_is_refused(gone: str, folder: Path, tmp_path: Path) -> None:
    with small():
        prepare(surveyed(folder), tokenizers()["english"], tmp_path, workers=1)
        before = files(tmp_path)
        left = {name: digest for name, digest in json.loads(before[make.MANIFEST]).items() if gone not in (name, "")}
        (tmp_path / make.MANIFEST).write_text(json.dumps(left))
        with pytest.raises(UserError, match=r"manifest\.json is damaged, or of an older version; run the same"):
            make.load(tmp_path)
        prepare(surveyed(folder), tokenizers()["english"], tmp_path, workers=1)
        assert files(tmp_path) == before


@pytest.mark.parametrize(("cores", "workers"), [(None, 1), (3, 3), (200, 16)])
def test_workers_where_the_system_does_not_tell(cores: int | None, workers: int, folder: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Which cores a process may use; and not as many as a large machine has."""
    asked = []

    @contextmanager
    def pool(workers: int, tokenizer: MixedTokenizer) -> Iterator[None]:
        asked.append(workers)
        make._begin_work(tokenizer)
        yield None

    monkeypatch.setattr(make, "_pool", pool)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    prepare(surveyed(folder), tokenizers()["english"], tmp_path)
    assert asked == [workers]


def test_other_data_or_tokenizers_are_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(surveyed(folder), tokenizers()["english"], out, workers=1)
    before = files(out)
    with pytest.raises(UserError, match="prepared from another tokenizer"):
        prepare(surveyed(folder), tokenizers()["digits"], out, workers=1)
    with pytest.raises(UserError, match="prepared from another data"):
        prepare(survey([str(folder)], Text.hold_out, 1), tokenizers()["english"], out, workers=1)
    tokenizers()["digits"].save(tmp_path / "t")
    with pytest.raises(UserError, match="with another tokenizer than"):
        TextRecipe(wanting(folder, data=(), prepared=str(out), tokenizer=str(tmp_path / "t")))
    with pytest.raises(UserError, match="leave --data out"):
        TextRecipe(wanting(folder, prepared=str(out)))
    with pytest.raises(UserError, match="holds something else"):
        prepare(surveyed(folder), tokenizers()["english"], tmp_path, workers=1)
    assert files(out) == before


def check_changes_are_noticed(folder: Path) -> None:
    """Data that change between the two readings stop the preparation, and leave nothing that looks finished; and once
    they are as before, shards that were made of the others are not kept."""
    path = folder / "a.txt"
    path.write_text(some_text(1, 300))
    with small():
        data = surveyed(folder)
        path.write_text(some_text(2, 300))
        with pytest.raises(UserError, match="changed while it was read"):
            prepare(data, tokenizers()["english"], folder / "out", workers=1)
        with pytest.raises(UserError, match="not finished"):
            make.load(folder / "out")
        path.write_text(some_text(1, 300))
        for name in ("out", "other"):
            prepare(data, tokenizers()["english"], folder / name, workers=1)
    assert files(folder / "out") == files(folder / "other")


def test_data_that_change_meanwhile_are_noticed(tmp_path: Path) -> None:
    check_changes_are_noticed(tmp_path)
