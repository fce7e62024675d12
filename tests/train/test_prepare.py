"""Prepared data give the rows and batches that the definition gives, however they were cut, stored and interrupted."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.strategies import fill_rows, hold_out, tokenizer_names, tokenizers
from tests.tokenizer.strategies import HOSTILE, hostile_text
from tests.train.test_recipes import some_text
from tidal.blocks import BlockTable, Passage, passage, windows
from tidal.cli import UserError
from tidal.config import Text
from tidal.prepare import corpus, make, reading, shards
from tidal.prepare.again import also_trained_on, held_out_again
from tidal.prepare.corpus import Rows
from tidal.prepare.documents import Document, read_documents
from tidal.prepare.make import prepare_for_training
from tidal.prepare.reading import Part
from tidal.prepare.seams import at_seams
from tidal.prepare.survey import survey
from tidal.tokenizer import MixedTokenizer

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


# -------------------------------------------------------------------------------------- the tokenizer


def test_a_tokenizer_sees_a_little_of_all_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the first files only. Of what is small enough it sees all."""
    (tmp_path / "a.txt").write_text("The tide comes in and goes out again.\n" * 2000)
    (tmp_path / "b.txt").write_text("今天天气很好，我们去公园玩。\n" * 3000)
    data = survey([str(tmp_path)], 0.05, 3)
    whole = "".join(data.training_texts())
    monkeypatch.setattr("tidal.prepare.survey.PIECE", 100)
    monkeypatch.setattr("tidal.prepare.survey.TRAINED_ON", limit := 60_000)  # a.txt has more
    texts = list(data.training_texts())
    assert 0.8 * limit < len("".join(texts).encode()) < limit
    assert texts == list(data.training_texts())
    tokenizer = MixedTokenizer.train(texts, 600, max_bytes=limit)
    assert all(len(tokenizer.encode_block(char).units) == 1 for char in "今天气")
    monkeypatch.setattr("tidal.prepare.survey.TRAINED_ON", data.n_bytes)
    assert "".join(data.training_texts()) == whole


# ------------------------------------------------------------------------------------ the first reading


def test_a_document_that_is_cut_is_read_once_to_survey_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("The tide comes in and goes out again.\n" * 200)
    read: list[Sequence[str]] = []

    def reading_of(paths: Sequence[str], *rest: Any) -> Iterator[Part]:
        read.append(paths)
        return reading.read_parts(paths, *rest)

    monkeypatch.setattr("tidal.prepare.survey.read_parts", reading_of)
    assert survey([str(tmp_path)], 0.05, 3).division.cut == 0
    assert read == [[str(tmp_path)]]


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
        by_document = [list(rows.of_document(i)) for i in range(len(wanted))]
        cut = [windows(passage(table, d.prompt, d.completion), table, budget, steps) for d in wanted]
        alike = shown(by_document, table) == shown(cut, table)
        assert alike, "other windows of a document"
    return len(rows)


@pytest.mark.parametrize("read", [1, 300, 1 << 20])
def test_rows_are_planned_shard_by_shard(read: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order of the documents, no shard is opened again and again."""
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": some_text(i, 30)}) + "\n" for i in range(160)))
    tokenizer, opened, right = tokenizers()["english"], Counter[str](), shards.Shard.open

    def noted(folder: Path) -> shards.Shard:
        opened[folder.name] += 1
        return right(folder)

    with small(shard=800, read=read):
        monkeypatch.setattr(shards.Shard, "open", noted)
        data = survey([str(tmp_path / "d.jsonl")], 0.05, 3)
        found = make.prepare(data, tokenizer, tmp_path / "out", workers=1).training
        assert len(opened) > 20
        opened.clear()
        order = np.random.default_rng(3).permutation(len(found.documents))
        assert len(Rows(found, order, BlockTable(tokenizer), 20, 300)) > 300
    assert max(opened.values()) <= 2


lines = st.lists(
    st.one_of(
        st.builds(lambda text: {"text": text}, hostile_text(max_size=20).filter(str.strip)),
        st.builds(lambda p, c: {"prompt": p, "completion": c}, hostile_text(max_size=12), hostile_text(max_size=9)),
    ).filter(lambda d: any(value.strip() for value in d.values())),
    min_size=2, max_size=7,
)  # fmt: skip


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines, tokenizer_names, st.integers(4, 60), st.integers(4, 200), st.integers(1, 60), st.integers(1, 300),
       st.sampled_from([1, 20, 1 << 20]))  # fmt: skip
@example([{"text": "a"}, {"prompt": "the fox " * 9, "completion": " said"}], "english", 9, 20, 7, 20, 1)
@example([{"text": "a"}, {"prompt": "the fox " * 9, "completion": " said"}], "english", 9, 20, 7, 20, 1 << 20)
def test_rows_are_those_of_the_definition(tmp_path: Path, documents: list[dict[str, str]], name: str, budget: int,
                                          steps: int, part: int, shard: int, read: int) -> None:  # fmt: skip
    with small(part, shard, read):
        try:
            check_rows(tmp_path, documents, tokenizers()[name], budget, steps)
        except UserError as error:
            assert "too little data" in str(error)  # noqa: PT017


def test_a_long_document_is_cut_and_its_tail_held_out(tmp_path: Path) -> None:
    documents = [{"text": some_text(1, 900)}, {"prompt": some_text(2, 60), "completion": some_text(3, 60)}]
    for fraction, read in itertools.product((0.02, 0.1), (1, 1 << 20)):
        with small(read=read):
            assert check_rows(tmp_path, documents, tokenizers()["english"], 50, 400, fraction) > 2


def test_copies_of_what_is_held_out_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As by definition; a line says how many."""
    alike, tail = [{"text": some_text(i, 20)} for i in range(9)], [{"text": some_text(1, 900)}, {"text": "sea"}]
    for different, left_out in ((alike, 4), (tail, 2)):
        with small():
            assert check_rows(tmp_path, different * 3, tokenizers()["english"], 50, 400) > 1
        said = f"{2 * len(different)} of {3 * len(different)} documents are copies of others; {left_out} of them,"
        assert said in capsys.readouterr().err


# ------------------------------------------------------------------------------- validation data of one's own


def check_own_validation(folder: Path) -> None:
    """In memory and in shards: all of it is held out, once, in its order, and nothing that is learnt is in it."""
    different = [some_text(i, 30) for i in range(12)]
    for name, which in (("data", [0, 1, 2, 3, 2, 8, 9]), ("own", [8, 10, 0, 10, 11])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": different[i]}) + "\n" for i in which))
    paths, own = (str(folder / "data.jsonl"),), (str(folder / "own.jsonl"),)
    tokenizers()["english"].save(folder / "t")
    text = Text(data=paths, validation_data=own, tokenizer=str(folder / "t"))
    with small():
        here = prepare_for_training(text, 3)
        shards = make.prepare(survey(paths, 0.05, 3, own), here.tokenizer, folder / "shards", workers=1)
    for found in (here, shards):
        assert [completion for _, completion in found.training.texts()] == [different[i] for i in (1, 2, 3, 2, 9)]
        assert [completion for _, completion in found.held_out.texts()] == [different[i] for i in (8, 10, 0, 11)]
    assert here.digest == shards.digest
    assert json.loads((folder / "shards" / "plan.json").read_bytes())["validation"] == list(own)
    documents, source = held_out_again(text, 3, here.digest)
    assert [d.completion for d in documents] == [different[i] for i in (8, 10, 0, 11)]
    assert source == "the run's held-out text"
    assert also_trained_on(own, text) == [str(folder.resolve() / "own.jsonl")]


def test_validation_data_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_own_validation(tmp_path)
    assert "4 of 12 documents are copies of others; 3 of them, copies of what is held out," in capsys.readouterr().err
    paths, own = [str(tmp_path / "data.jsonl")], [str(tmp_path / "own.jsonl")]
    digests = [survey(paths, 0.05, 3).digest, survey(paths, 0.05, 3, own).digest, survey(own, 0.05, 3, paths).digest]
    assert len(set(digests)) == 3
    assert survey(paths, 0.2, 4, own).digest == digests[1]  # neither part nor seed decides anything
    with pytest.raises(UserError, match="every document of --data is in --validation-data, too"):
        survey(own, 0.05, 3, own)
