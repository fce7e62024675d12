"""Prepared data give the rows and batches that the definition gives, however they were cut, stored and interrupted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.strategies import fill_rows, tokenizer_names, tokenizers
from tests.tokenizer.strategies import HOSTILE, hostile_text
from tests.train.test_recipes import SHAPE, equal, some_text
from tidal.blocks import BlockTable, Passage, passage, windows
from tidal.cli import UserError
from tidal.config import Text, Train
from tidal.prepare import corpus, make, reading, shards
from tidal.prepare.corpus import Rows
from tidal.prepare.documents import Document, hold_out, read_documents
from tidal.prepare.make import prepare, prepare_for_training
from tidal.prepare.reading import Part
from tidal.prepare.seams import at_seams
from tidal.prepare.survey import Survey, survey
from tidal.tokenizer import MixedTokenizer
from tidal.train.presets import PRESETS
from tidal.train.recipes.text import TextRecipe

# --------------------------------------------------------------------------------------------- seams


def cut(text: str, cap: int, size: int, piece: int) -> list[str]:
    pieces = [text[i : i + piece] for i in range(0, len(text), piece)] or [""]
    parts = [Part(p, False, i == len(pieces) - 1, "f") for i, p in enumerate(pieces)]
    found = list(at_seams(parts, cap, size))
    assert [part.ends for part in found] == [False] * (len(found) - 1) + [True]
    return [part.text for part in found]


def check_seams(text: str, tokenizer: MixedTokenizer, size: int, piece: int) -> int:
    """The blocks of the pieces are the blocks of the whole; returns how many pieces there are."""
    pieces = cut(text, tokenizer.max_block_units, size, piece)
    assert "".join(pieces) == text
    alike = [block for p in pieces for block in tokenizer.split(p)] == tokenizer.split(text)
    assert alike, "other blocks"  # not compared in the assert: pytest would take minutes to show the difference
    return len(pieces)


FRAGMENTS = (*HOSTILE, *"aZ09 \n\t'’_(.\u0301\u200d今é", "don't", "f(x)=[1,2];", "  ")
texts = st.one_of(hostile_text(), st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join))


@settings(max_examples=400)
@given(texts, tokenizer_names, st.integers(1, 12), st.integers(1, 9))
@example("a" * 60 + "'s", "english", 9, 4)
@example(" " * 60 + "a", "english", 9, 4)
@example("a" * 30 + "\u0301" * 3 + "b" * 30, "digits", 8, 8)
def test_pieces_have_the_blocks_of_the_whole(text: str, name: str, size: int, piece: int) -> None:
    check_seams(text, tokenizers()[name], size, piece)


LONG = {
    "prose": "The dogs said: don't run within 12 miles, 'tis night.\n\n  " * 40,
    "minified": "f(a,b){return(a+b[0]);}" * 100,
    "genome": "ACGT" * 600,
    "digits": " " + "31415926" * 300,
    "blank": "x" + " \n" * 1200 + " y",
    "rule": "=-" * 1200,
    "chinese": "今天天气很好，我们去公园玩。\n" * 150,
}


@pytest.mark.parametrize("kind", LONG)
def test_long_texts_are_cut(kind: str) -> None:
    """In pieces whose number says that memory is bounded."""
    for tokenizer in tokenizers().values():
        assert check_seams(LONG[kind], tokenizer, 50, 20) > len(LONG[kind]) / 150


def test_what_has_no_seam_is_held_until_there_is_one() -> None:
    text = "今天天气很好我们去公园玩" * 30
    assert cut(text + "\n" + text, 12, 50, 20) == [text, "\n" + text]


def test_what_a_shard_has_no_room_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of a part are int32, which would be wrapped without a word."""
    monkeypatch.setattr(shards, "MOST", 29)
    parts = [Part("今" * 9, False, False, "a.txt"), Part("今" * 10, False, True, "b.txt")]
    with pytest.raises(UserError, match=r"^b\.txt has 10 characters without a place where they can be cut"):
        shards.Shard.encode(parts, BlockTable(tokenizers()["chinese"]))


# ---------------------------------------------------------------------------------- rows, by definition


@contextmanager
def small(part: int = 40, shard: int = 150, read: int = 1) -> Iterator[None]:
    """Everything in tiny pieces, so that tiny texts fill many."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in ((reading, "PART", part), (make, "PART", part), (make, "SHARD", shard),
                                    (make, "PER_PART", 5), (corpus, "READ_BLOCKS", read), (reading, "CHUNK", 7),
                                    (corpus, "OPEN", 2)):  # fmt: skip
            patch.setattr(module, name, value)
        yield


def by_definition(documents: Sequence[Document], table: BlockTable, budget: int, steps: int) -> list[list[Passage]]:
    whole = [passage(table, d.prompt, d.completion) for d in documents]
    return list(fill_rows((w for p in whole for w in windows(p, table, budget, steps)), table, budget, steps))


def shown(rows: Sequence[list[Passage]], table: BlockTable) -> list[list[tuple[list[str], list[int], int]]]:
    return [[([table.texts[i] for i in p.blocks], (p.blocks[p.blocks < 2]).tolist(), p.supervise_from) for p in row]
            for row in rows]  # fmt: skip


def check_rows(folder: Path, documents: list[dict[str, str]], tokenizer: MixedTokenizer, budget: int, steps: int,
               fraction: float = 0.3) -> int:  # fmt: skip
    """Rows of prepared documents, training and held out, are those of the definition; returns how many."""
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(d) + "\n" for d in documents))
    tokenizer.save(folder / "t")
    training, held_out = hold_out(read_documents([str(path)]), fraction, 3)
    found = prepare_for_training(Text(data=(str(path),), tokenizer=str(folder / "t"), hold_out=fraction), 3)
    table = BlockTable(tokenizer)
    for some, wanted in ((found.training, training), (found.held_out, held_out)):
        order = np.random.default_rng(len(wanted)).permutation(len(wanted))
        rows = Rows(some, order, table, budget, steps)
        alike = shown(rows, table) == shown(by_definition([wanted[i] for i in order], table, budget, steps), table)
        assert alike, "other rows"  # not compared in the assert: pytest would take minutes to show the difference
    return len(rows)


lines = st.lists(
    st.one_of(
        st.builds(lambda text: {"text": text}, hostile_text(max_size=20).filter(str.strip)),
        st.builds(lambda p, c: {"prompt": p, "completion": c}, hostile_text(max_size=12), hostile_text(max_size=9)),
    ).filter(lambda d: any(value.strip() for value in d.values())),
    min_size=2, max_size=7,
)  # fmt: skip


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines, tokenizer_names, st.integers(4, 60), st.integers(4, 200), st.integers(1, 60), st.integers(1, 300))
@example([{"text": "a"}, {"prompt": "the fox " * 9, "completion": " said"}], "english", 9, 20, 7, 20)
def test_rows_are_those_of_the_definition(tmp_path: Path, documents: list[dict[str, str]], name: str, budget: int,
                                          steps: int, part: int, shard: int) -> None:  # fmt: skip
    with small(part, shard):
        try:
            check_rows(tmp_path, documents, tokenizers()[name], budget, steps)
        except UserError as error:
            assert "too little data" in str(error)  # noqa: PT017


def test_a_long_document_is_cut_and_its_tail_held_out(tmp_path: Path) -> None:
    documents = [{"text": some_text(1, 900)}, {"prompt": some_text(2, 60), "completion": some_text(3, 60)}]
    for fraction in (0.02, 0.1):
        with small():
            assert check_rows(tmp_path, documents, tokenizers()["english"], 50, 400, fraction) > 2


def test_copies_of_what_is_held_out_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As by definition; a line says how many. Without copies the digest is the one of the rule before."""
    alike, tail = [{"text": some_text(i, 20)} for i in range(9)], [{"text": some_text(1, 900)}, {"text": "sea"}]
    for different, left_out in ((alike, 4), (tail, 2)):
        with small():
            assert check_rows(tmp_path, different * 3, tokenizers()["english"], 50, 400) > 1
        said = f"{2 * len(different)} of {3 * len(different)} documents are copies of others; {left_out} of them,"
        assert said in capsys.readouterr().err
        found = []
        for n in (1, 2):
            (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in different * n))
            data = survey([str(tmp_path / "a.jsonl")], 0.3, 3)
            found.append(data.digest == hashlib.sha256(f"{data.content} 0.3 3".encode()).hexdigest())
        assert found == [True, False]
        capsys.readouterr()


# ------------------------------------------------------------------------------- however they were made


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
        assert equal(made.batch(step), wanted.batch(step))
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
    with pytest.raises(UserError, match="leave --data away"):
        TextRecipe(wanting(folder, prepared=str(out)))
    with pytest.raises(UserError, match="holds something else"):
        prepare(surveyed(folder), tokenizers()["english"], tmp_path, workers=1)
    assert files(out) == before


def check_changes_are_noticed(folder: Path) -> None:
    """Data that change between the two readings stop the preparation, and leave nothing that looks finished."""
    path = folder / "a.txt"
    path.write_text(some_text(1, 300))
    with small():
        data = surveyed(folder)
        path.write_text(some_text(2, 300))
        with pytest.raises(UserError, match="changed while it was read"):
            prepare(data, tokenizers()["english"], folder / "out", workers=1)
        with pytest.raises(UserError, match="not finished"):
            make.load(folder / "out")


def test_data_that_change_meanwhile_are_noticed(tmp_path: Path) -> None:
    check_changes_are_noticed(tmp_path)
