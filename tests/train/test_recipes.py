"""What the recipes feed and hold out; a batch is a pure function of (seed, step)."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.strategies import differing, hold_out
from tidal.blocks import EOS_BLOCK, BlockTable, Passage
from tidal.cli import UserError
from tidal.config import Addition, Shape, Text, Train
from tidal.prepare.documents import read_documents
from tidal.streams import Batch
from tidal.tokenizer import NO_PLACE, MixedTokenizer
from tidal.train import recipes
from tidal.train.loop import Recipe
from tidal.train.presets import PRESETS
from tidal.train.recipes import addition
from tidal.train.recipes.addition import AdditionRecipe, random_operand, random_sums
from tidal.train.recipes.text import TextRecipe

SHAPE = Shape(d_model=8, n_heads=2, n_kv_heads=1, suffix_rows=50, place_jitter=4)
SUMS = dataclasses.replace(PRESETS["addition"], rows=16, model=SHAPE, addition=Addition(digits=3, max_block_units=32))


def read_text(batch: Batch, row: int, tokenizer: MixedTokenizer) -> list[str]:
    """The documents that a row reads."""
    ids = batch.reader_ids[row][batch.reader_sees[row, :, 1] > 0].tolist()  # padding sees nothing
    starts = [*(n for n, i in enumerate(ids) if i == tokenizer.bos_id), len(ids)]
    return [tokenizer.decode(ids[start + 1 : end]) for start, end in itertools.pairwise(starts)]


def written_blocks(batch: Batch, row: int, tokenizer: MixedTokenizer) -> list[str]:
    """The blocks that a row is asked to write, turned round; "<eos>" where a document ends."""
    blocks: list[str] = []
    units: list[int] = []
    for unit in batch.targets[row].tolist():
        if unit == tokenizer.eos_id:
            blocks.append("<eos>")
        elif unit == tokenizer.eob_id:
            blocks.append(tokenizer.unreverse(units))
            units = []
        elif unit >= 0:
            units.append(unit)
    assert not units
    return blocks


# ------------------------------------------------------------------------------------------- addition


@pytest.mark.usefixtures("one_a_row")
def test_sums_are_right_and_only_answers_are_learnt() -> None:
    recipe = AdditionRecipe(SUMS)
    lengths: Counter[tuple[int, int]] = Counter()
    for step in range(40):
        batch = recipe.batch(step)
        for row in range(SUMS.rows):
            (text,) = read_text(batch, row, recipe.tokenizer)
            found = re.fullmatch(r"(\d+) \+ (\d+) = (\d+)\n", text)
            assert found
            a, b, c = found.groups()
            assert int(a) + int(b) == int(c)
            assert f"{int(a)}{int(b)}{int(c)}" == a + b + c  # no leading zeros
            assert written_blocks(batch, row, recipe.tokenizer) == [f" {c}", "\n", "<eos>"]
            lengths[len(a), len(b)] += 1
    assert set(lengths) == {(n, m) for n in (1, 2, 3) for m in (1, 2, 3)}
    assert min(lengths.values()) > 40  # 71 each are expected
    assert batch.n_bytes == sum(len("".join(written_blocks(batch, r, recipe.tokenizer)[:2])) for r in range(SUMS.rows))


@pytest.mark.usefixtures("one_a_row")
def test_places_are_jittered_by_document() -> None:
    recipe = AdditionRecipe(SUMS)
    offsets: Counter[int] = Counter()
    for step in range(20):
        batch = recipe.batch(step)
        for row in range(SUMS.rows):
            first = int(batch.writer_places[row, 0])
            places = batch.reader_places[row][batch.reader_sees[row, :, 1] > 0]
            assert int(places[places != NO_PLACE].min()) == first
            offsets[first] += 1
    assert set(offsets) == set(range(SHAPE.place_jitter + 1))
    assert min(offsets.values()) > 32  # 64 each are expected


def test_held_out_sums() -> None:
    recipe = AdditionRecipe(SUMS)
    assert list(recipe.held_out) == [3, 4, 5]
    for digits, problems in recipe.held_out.items():
        assert len(problems) == 100
        assert {len(number) for prompt, _ in problems for number in re.findall(r"\d+", prompt)} == {digits}
    prompts = [recipe.sample_prompts(step) for step in (0, 1, 0)]
    assert prompts[0] == prompts[2] != prompts[1]
    assert prompts[1] == [problems[1][0] for problems in recipe.held_out.values()]
    again, other = AdditionRecipe(SUMS), AdditionRecipe(dataclasses.replace(SUMS, seed=1))
    assert again.held_out == recipe.held_out != other.held_out
    assert other.tokenizer.fingerprint == recipe.tokenizer.fingerprint


@pytest.mark.parametrize("digits", [1, 2, 9, 30])
def test_random_operands_have_the_digits_asked_for(digits: int) -> None:
    rng = np.random.default_rng(0)
    numbers = [random_operand(rng, digits) for _ in range(200)]
    assert {len(str(number)) for number in numbers} == {digits}
    assert {number % 10 for number in numbers} == set(range(10))
    assert len(random_sums(rng, digits, 7)) == 7


def test_the_whole_answer_and_its_end_must_be_right(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [(" 3\n", "eos"), (" 3\n", "length"), (" 3", "eos"), ("3\n", "eos"), (" 30\n", "eos"), ("", "eos")]

    def generate(_model: object, _tokenizer: object, prompts: list[str], **_: object) -> list[Any]:
        return [SimpleNamespace(prompt=p, completion=c, stop_reason=s)
                for p, (c, s) in zip(prompts, answers, strict=True)]  # fmt: skip

    monkeypatch.setattr(recipes, "generate", generate)
    wrong = recipes.wrong_answers(None, None, [("1 + 2 =", " 3\n")] * 6)  # type: ignore[arg-type]
    assert {i: (c.completion, c.stop_reason) for i, c in wrong.items()} == dict(enumerate(answers[1:], start=1))


def test_what_chooses_the_best_checkpoint_is_the_share_of_right_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = AdditionRecipe(PRESETS["addition"])
    recipe.held_out = {n: problems[: 4 * n] for n, problems in recipe.held_out.items()}
    monkeypatch.setattr(addition, "wrong_answers", lambda *_: dict.fromkeys(range(5)))
    wanted = {f"exact_{n}": (4 * n - 5) / (4 * n) for n in recipe.held_out}
    assert recipe.validate(None) == {"quality": sum(wanted.values()) / 3, **wanted}  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------- text

WORDS = ("tide", "sea", "comes", "goes", "out", "in", "day", "night", "moon", "the", "don't", "12", "345", "今天", "😀")


def some_text(seed: int, n_words: int = 120) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), n_words)) + ".\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty documents, the last of which is far over the budget."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(20):
        (folder / f"{i:02}.txt").write_text(some_text(i, 900 if i == 19 else 20 + 7 * i), encoding="utf-8")
    return folder


def text_settings(folder: Path, seed: int = 0, place_jitter: int = 4, **text: Any) -> Train:
    given = {"vocab_size": 320, "reader_budget": 100, "hold_out": 0.2, "cut_probability": 0.1, **text}
    shape = dataclasses.replace(SHAPE, place_jitter=place_jitter)
    return dataclasses.replace(PRESETS["text"], seed=seed, rows=5, model=shape, text=Text(data=(str(folder),), **given))


@pytest.fixture(scope="module")
def recipe(folder: Path) -> TextRecipe:
    return TextRecipe(text_settings(folder))


def joined(p: Passage, table: BlockTable) -> str:
    return "".join(table.texts[i] for i in p.blocks)


def test_every_document_is_learnt_or_held_out_once_and_whole(recipe: TextRecipe, folder: Path) -> None:
    documents, held_out = hold_out(read_documents([str(folder)]), 0.2, 0)
    assert 1 <= len(held_out) < 10
    for rows, wanted in ((recipe.rows, documents), (recipe._validation, held_out)):
        found, windows = [], []
        for i in range(len(wanted)):
            whole = list(rows.of_document(i))
            assert [p.blocks[-1] == EOS_BLOCK for p in whole] == [False] * (len(whole) - 1) + [True]
            assert all(p.supervise_from == 1 for p in whole)
            windows += [joined(p, recipe.table) for p in whole]
            found.append("".join(windows[-len(whole) :]))
        assert found == [d.completion for d in wanted]
        assert sorted(joined(p, recipe.table) for row in rows for p in row) == sorted(windows)
    assert len(recipe.held_out) == len(recipe._validation)


def test_validation_draws_from_all_that_is_held_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidal.train.recipes.text.VALIDATION_ROWS", 4)
    recipe, again = (TextRecipe(text_settings(folder, reader_budget=40)) for _ in range(2))
    every, drawn, redrawn = (["".join(joined(p, r.table) for p in row) for row in rows]
                             for r, rows in ((recipe, recipe._validation), (recipe, recipe.held_out),
                                             (again, again.held_out)))  # fmt: skip
    assert len(every) > len(drawn) == 4
    assert redrawn == drawn == [row for row in every if row in drawn] != every[:4]
    assert all(any(row.startswith(p) for row in drawn) for step in range(9) for p in recipe.sample_prompts(step))


def test_it_is_said_how_many_epochs_there_will_be(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = text_settings(folder)
    settings = dataclasses.replace(settings, max_steps=1234, optim=dataclasses.replace(settings.optim, accumulate=3))
    recipe = TextRecipe(settings)
    n, tokens = len(recipe.rows), sum(int(recipe.table.n_tokens(p.blocks).sum()) for row in recipe.rows for p in row)
    full = tokens / (100 * n)
    assert full > 0.9
    assert f" in {n} rows, {full:.0%} full ({5 * 3 * 1234 / n:,.2f} epochs in 1,234 steps); " in capsys.readouterr().err


def test_an_epoch_takes_every_row_once(recipe: TextRecipe) -> None:
    n = len(recipe.rows)
    assert n > 5
    first, second = ([recipe._row(i) for i in range(e * n, (e + 1) * n)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(n))
    assert first != second


def test_batches_hold_the_rows_with_some_blocks_cut(recipe: TextRecipe) -> None:
    """Boundary dropout changes the blocks, never the text, and of a cut one only the end is learnt, split as a text of
    its own; about as often as asked; and not when validating."""
    cut, expected = 0, 0.0
    for step in range(8):
        batch = recipe.batch(step)
        for i in range(5):
            row = recipe.rows[recipe._row(5 * step + i)]
            texts = [joined(p, recipe.table) for p in row]
            assert read_text(batch, i, recipe.tokenizer) == texts
            blocks = [recipe.table.texts[j] if j != EOS_BLOCK else "<eos>" for p in row for j in p.blocks[1:]]
            written = written_blocks(batch, i, recipe.tokenizer)
            for block in blocks:
                rest = written.pop(0)
                while not block.endswith(rest):
                    rest += written.pop(0)
                cut += rest != block
            assert not written
            expected += sum(1 - 0.9 ** (len(block) - 1) for block in blocks if block != "<eos>")
    assert expected > 100
    assert 0.8 < cut / expected < 1.2
    for row in recipe.held_out:
        for p in row:
            text = joined(p, recipe.table)
            assert "".join(recipe.tokenizer.split(text)) == text


def test_places_of_texts_are_jittered_by_document(recipe: TextRecipe, folder: Path) -> None:
    """And by nothing else: what is read and written is what it would be without; validation moves none."""
    plain, offsets = TextRecipe(text_settings(folder, place_jitter=0)), Counter[int]()
    for step in range(20):
        batch, without = recipe.batch(step), plain.batch(step)
        assert set(differing(batch, without)) <= {"reader_places", "writer_places"}
        for row in range(5):
            documents = (batch.reader_ids[row] == recipe.tokenizer.bos_id).cumsum(0)
            placed = (batch.reader_sees[row, :, 1] > 0) & (without.reader_places[row] != NO_PLACE)
            asked = batch.targets[row] >= 0
            read = (batch.reader_places[row] - without.reader_places[row])[placed]
            written = (batch.writer_places[row] - without.writer_places[row])[asked]
            for n in documents.unique():
                own = {*read[documents[placed] == n].tolist(),
                       *written[documents[batch.context[row]][asked] == n].tolist()}  # fmt: skip
                assert len(own) == 1, "reader and writer have one offset"
                offsets[own.pop()] += 1
    assert set(offsets) == set(range(SHAPE.place_jitter + 1))
    assert min(offsets.values()) > 0.1 * offsets.total()  # a fifth each is expected
    assert {p.place_offset for row in recipe.held_out for p in row} == {0}


def test_without_boundary_dropout_blocks_are_those_of_the_tokenizer(folder: Path) -> None:
    plain = TextRecipe(text_settings(folder, cut_probability=0.0, reader_budget=5000))
    blocks = [b for b in written_blocks(plain.batch(0), 0, plain.tokenizer) if b != "<eos>"]
    texts = read_text(plain.batch(0), 0, plain.tokenizer)
    assert blocks == [b for text in texts for b in plain.tokenizer.split(text)]


def test_rows_keep_to_the_budget(recipe: TextRecipe) -> None:
    for row in (*recipe.rows, *recipe.held_out):
        assert sum(int(recipe.table.n_tokens(p.blocks).sum()) for p in row) <= 100


def test_prompts_are_read_and_only_completions_learnt(tmp_path: Path) -> None:
    lines = [f'{{"prompt": "{i} sea", "completion": " goes {i}\\n"}}\n' for i in range(50)]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    pairs = TextRecipe(text_settings(tmp_path / "pairs.jsonl"))
    batch = pairs.batch(0)
    for row in range(5):
        texts = read_text(batch, row, pairs.tokenizer)
        assert all(re.fullmatch(r"(\d+) sea goes \1\n", text) for text in texts)
        learnt = written_blocks(batch, row, pairs.tokenizer)
        each = ([" goes", *pairs.tokenizer.split(text.partition("goes")[2]), "<eos>"] for text in texts)
        blocks = list(itertools.chain.from_iterable(each))
        assert len(learnt) == len(blocks)
        assert all(map(str.endswith, blocks, learnt))  # of blocks that are cut, the ends


def test_held_out_prompts_alone_can_validate_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the sea", "completion": ""}\n')
    with pytest.raises(UserError, match=r"documents \(1\) have no text to learn, .* give --validation-data with compl"):
        TextRecipe(text_settings(folder, hold_out=Text().hold_out, validation_data=(str(tmp_path / "prompts.jsonl"),)))


def test_sample_prompts_come_from_held_out_text(recipe: TextRecipe, folder: Path) -> None:
    _, held_out = hold_out(read_documents([str(folder)]), 0.2, 0)
    for step in range(5):
        for prompt in recipe.sample_prompts(step):
            assert prompt
            assert any(prompt in d.completion for d in held_out)
    assert recipe.sample_prompts(3) == recipe.sample_prompts(3)


def test_a_given_tokenizer_is_used(recipe: TextRecipe, folder: Path, tmp_path: Path) -> None:
    other = MixedTokenizer.train(["other words altogether"], 300)
    other.save(tmp_path)
    assert TextRecipe(text_settings(folder, tokenizer=str(tmp_path))).tokenizer.fingerprint == other.fingerprint
    assert recipe.tokenizer.fingerprint != other.fingerprint
    with pytest.raises(UserError, match=r"cannot read .*tokenizer\.json"):
        TextRecipe(text_settings(folder, tokenizer=str(folder)))
    with pytest.raises(UserError, match="needs --data"):
        TextRecipe(dataclasses.replace(text_settings(folder), text=Text()))


# --------------------------------------------------------------------------------------------- purity


@pytest.mark.parametrize("name", ["addition", "text"])
def test_a_batch_is_a_pure_function_of_seed_and_step(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was asked for before, in another instance, and where the table of blocks is emptied in between."""

    def make(seed: int = 0) -> Recipe:
        kinds: dict[str, Callable[[], Recipe]] = {
            "addition": lambda: AdditionRecipe(dataclasses.replace(SUMS, seed=seed)),
            "text": lambda: TextRecipe(text_settings(folder, seed)),
        }
        return kinds[name]()

    one, two = make(), make()
    steps = [0, 1, 2, 3, 7, 40]
    wanted = {step: one.batch(step) for step in steps}
    for step in reversed(steps):
        assert not differing(two.batch(step), wanted[step])
    monkeypatch.setattr("tidal.blocks.MAX_BLOCKS", 3)
    for step in steps:
        torch.manual_seed(step)
        np.random.seed(step)
        assert not differing(one.batch(step), wanted[step])
    assert all(differing(wanted[a], wanted[b]) for a in steps for b in steps if a < b)
    assert differing(make(seed=1).batch(0), wanted[0])
