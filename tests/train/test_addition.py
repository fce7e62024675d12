"""Options of the recipe `addition`."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tidal.blocks import NOTHING
from tidal.cli import UserError
from tidal.config import Addition, Shape, Train
from tidal.streams import Batch
from tidal.tokenizer import NO_PLACE, MixedTokenizer
from tidal.train.__main__ import run as train
from tidal.train.loop import model_for
from tidal.train.presets import PRESETS
from tidal.train.recipes import addition as recipe_module
from tidal.train.recipes.addition import AdditionRecipe, Asked, answer_of, paired, prompt_of

pytestmark = pytest.mark.usefixtures("one_a_row")

SHAPE = Shape(d_model=16, n_heads=2, n_kv_heads=2, reader_layers=1, writer_layers=1, reader_ff=16, writer_ff=16,
              suffix_rows=0, place_jitter=4)  # fmt: skip
TINY = ("d-model=16", "n-heads=2", "n-kv-heads=2", "reader-ff=16", "writer-ff=16", "writer-layers=1", "rows=8")


def settings(rows: int = 16, seed: int = 0, **addition: Any) -> Train:
    own = Addition(**{"digits": 3, "max_block_units": 32, **addition})
    return dataclasses.replace(PRESETS["addition"], rows=rows, seed=seed, model=SHAPE, addition=own)


def texts(batch: Batch, tokenizer: MixedTokenizer) -> list[str]:
    """What each row reads: one document."""
    kept = [ids[sees[:, 1] > 0].tolist()[1:] for ids, sees in zip(batch.reader_ids, batch.reader_sees, strict=True)]
    return [tokenizer.decode(ids) for ids in kept]


def some(n_steps: int = 20, **addition: Any) -> list[str]:
    """Documents of the first steps."""
    recipe = AdditionRecipe(settings(**addition))
    return [text for step in range(n_steps) for text in texts(recipe.batch(step), recipe.tokenizer)]


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


# ---------------------------------------------------------------------------------------- kinds of problems


def test_answers_are_right() -> None:
    assert (prompt_of(5, 7), answer_of(5, 7)) == ("5 + 7 =", " 12\n")
    assert (prompt_of(5, 7, 9), answer_of(5, 7, 9)) == ("5 + 7 + 9 =", " 21\n")
    assert (prompt_of(7, 5, operation="-"), answer_of(7, 5, operation="-")) == ("7 - 5 =", " 2\n")
    assert (prompt_of(12, 5, operation="*"), answer_of(12, 5, operation="*")) == ("12 * 5 =", " 60\n")


def test_operations_come_equally_often() -> None:
    found: Counter[str] = Counter()
    for text in some(operations="+-*"):
        question, right = text.removesuffix("\n").split(" = ")
        assert right == str(eval_of(question))
        operation = question.split(" ")[1]
        found[operation] += 1
        first, second = numbers(question)
        assert operation != "-" or first >= second
        assert operation != "*" or second < 10
    assert set(found) == set("+-*")
    assert min(found.values()) > 70  # 107 are expected


def eval_of(question: str) -> int:
    """By another way than the recipe's."""
    first, operation, *rest = question.split(" ")
    value = int(first)
    for n in map(int, rest[::2]):
        value = {"+": value.__add__, "-": value.__sub__, "*": value.__mul__}[operation](n)
    return value


def test_sums_of_several_numbers() -> None:
    found: Counter[int] = Counter()
    for text in some(terms=4):
        *terms, total = numbers(text)
        assert sum(terms) == total
        found[len(terms)] += 1
    assert set(found) == {2, 3, 4}
    assert min(found.values()) > 70


def test_lengths_of_operands() -> None:
    lengths = {kind: [tuple(len(str(n)) for n in numbers(text)[:2]) for text in some(40, lengths=kind)]
               for kind in ("uniform", "rising", "equal", "numbers")}  # fmt: skip
    assert {a == b for a, b in lengths["equal"]} == {True}
    assert min(Counter(lengths["equal"]).values()) > 160  # 213 each are expected
    assert min(Counter(lengths["uniform"]).values()) > 40
    rising = Counter(n for pair in lengths["rising"] for n in pair)
    assert all(abs(rising[n] / rising.total() - n / 6) < 0.05 for n in (1, 2, 3))
    longest = sum(a == 3 for a, _ in lengths["numbers"]) / len(lengths["numbers"])
    assert 0.86 < longest < 0.94
    assert {a for a, _ in lengths["numbers"]} == {1, 2, 3}


def test_documents_of_several_problems_learn_the_last() -> None:
    recipe = AdditionRecipe(settings(problems=3))
    found: Counter[int] = Counter()
    for step in range(20):
        batch = recipe.batch(step)
        for row, text in enumerate(texts(batch, recipe.tokenizer)):
            lines = text.splitlines()
            for line in lines:
                a, b, c = numbers(line)
                assert a + b == c
            learnt = [t for t in batch.targets[row].tolist() if t != NOTHING]
            answer = " " + lines[-1].split(" = ")[1]
            units = recipe.tokenizer.write_units(answer)
            assert learnt[: len(units) + 1] == [*units, recipe.tokenizer.eob_id]
            assert len(learnt) == len(units) + 1 + 2 + 1  # "\n" with its <eob>, and <eos>
            found[len(lines)] += 1
    assert set(found) == {1, 2, 3}
    assert min(found.values()) > 70


def test_what_stands_elsewhere_meets_no_place_of_the_problem() -> None:
    own = settings(rows=64, elsewhere=0.5)
    recipe = AdditionRecipe(dataclasses.replace(own, model=dataclasses.replace(SHAPE, place_jitter=12)))
    found: Counter[bool] = Counter()
    distances: Counter[int] = Counter()
    for step in range(10):
        batch = recipe.batch(step)
        for row, text in enumerate(texts(batch, recipe.tokenizer)):
            *stray, last = text.splitlines(keepends=True)
            assert len(stray) <= 1
            found[bool(stray)] += 1
            a, b, c = numbers(last)
            assert a + b == c
            offset = int(batch.writer_places[row, 0])
            blocks = [recipe.tokenizer.encode_block(block) for block in recipe.tokenizer.split(last)]
            own_places = [offset + place if place != NO_PLACE else place for block in blocks for place in block.places]
            n_read = int((batch.reader_sees[row, :, 1] > 0).sum())
            places = batch.reader_places[row, :n_read].tolist()
            assert places[0] == NO_PLACE
            assert places[n_read - len(own_places) :] == own_places
            if stray:
                blocks = [recipe.tokenizer.encode_block(block) for block in recipe.tokenizer.split(stray[0])]
                plain = [place for block in blocks for place in block.places]
                fed = places[1 : 1 + len(plain)]
                assert [p == NO_PLACE for p in fed] == [p == NO_PLACE for p in plain]
                (moved,) = {place - before for place, before in zip(fed, plain, strict=True) if before != NO_PLACE}
                assert 0 <= moved <= 12
                own = set(batch.writer_places[row, batch.targets[row] != NOTHING].tolist())
                assert not own & set(fed)
                distances[moved - offset] += 1
    assert min(found.values()) > 200
    assert min(distances) == -12
    assert max(distances) == 12
    assert {-2, 3} <= set(distances)  # as near as numbers of one or two digits can be


def test_positions_are_stretched() -> None:
    own = settings(rows=64)
    plain, stretched = (AdditionRecipe(dataclasses.replace(own, addition=dataclasses.replace(own.addition, stretch=s)))
                        for s in (1.0, 3.0))  # fmt: skip
    scales = []
    for step in range(5):
        one, other = plain.batch(step), stretched.batch(step)
        assert torch.equal(one.reader_ids, other.reader_ids)
        assert torch.equal(one.writer_places, other.writer_places)
        scales.append(scale := other.reader_positions[:, 1])  # where it was 1
        torch.testing.assert_close(other.reader_positions, one.reader_positions * scale[:, None])
        torch.testing.assert_close(other.writer_positions, one.writer_positions * scale[:, None])
    every = torch.cat(scales)
    assert 1 <= every.min() < 1.05
    assert 2.95 < every.max() <= 3
    assert 1.9 < every.mean() < 2.1
    asked = stretched.packed([[Asked("12 + 3 =", " 15\n")]])  # as in decoding
    assert asked.reader_positions[0].tolist() == list(range(asked.reader_positions.shape[1]))


@pytest.mark.parametrize("rows", [1, 2, 7, 16])
def test_two_documents_to_a_row_are_learnt_like_one(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With strays before some, whose places are moved where they stand in the row."""
    own = settings(rows=rows, elsewhere=0.5, stretch=2.0)
    own = dataclasses.replace(own, model=dataclasses.replace(SHAPE, place_jitter=12))
    recipe = AdditionRecipe(own)
    model = model_for(own, recipe.tokenizer).double()
    for step in range(3):
        alone = recipe.batch(step)
        with monkeypatch.context() as patch:
            patch.setattr(recipe_module, "paired", paired)
            both = recipe.batch(step)
        assert len(both.targets) == (rows + 1) // 2
        assert (both.n_units, both.n_bytes) == (alone.n_units, alone.n_bytes)
        one, other = (model.log_probs(batch).sort().values for batch in (both, alone))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
    lengths = both.reader_sees[..., 1].amax(1)
    assert rows < 16 or lengths.min() > 0.6 * lengths.max()


# ----------------------------------------------------------------------------------------------- finite sets


def test_a_finite_set_is_learnt_once_an_epoch_and_nothing_else_is() -> None:
    recipe = AdditionRecipe(settings(rows=10, samples=50, digits=2))
    known = [prompt + answer for prompt, answer in recipe.samples]
    assert len(set(known)) == 50
    epochs = [[text for step in range(5 * e, 5 * e + 5) for text in texts(recipe.batch(step), recipe.tokenizer)]
              for e in (0, 1)]  # fmt: skip
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(known)
    assert epochs[0] != epochs[1]
    again = texts(recipe.batch(3), recipe.tokenizer)
    assert again == epochs[0][30:40]  # a pure function of the step
    assert AdditionRecipe(settings(samples=50, digits=2, seed=1)).samples != recipe.samples


def test_a_finite_set_is_also_the_only_context() -> None:
    recipe = AdditionRecipe(settings(samples=20, digits=2, problems=3))
    known = {(prompt + answer).strip() for prompt, answer in recipe.samples}
    read = {line for text in texts(recipe.batch(0), recipe.tokenizer) for line in text.splitlines()}
    assert read <= known


def test_validation_asks_for_nothing_that_was_learnt() -> None:
    recipe = AdditionRecipe(settings(samples=60, digits=1, lengths="equal", operations="+-"))
    assert len(recipe.held_out[1]) == 100
    assert not set(recipe.samples) & {p for problems in recipe.held_out.values() for p in problems}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"operations": ""}, "--operations is ''"), ({"operations": "+/"}, "--operations is '+/'"),
     ({"samples": 101, "digits": 1}, "only 100 different"),
     ({"samples": 100, "digits": 1}, "nothing of 1 digits is left"),
     ({"elsewhere": 0.5, "digits": 3}, "--place-jitter is 4; with --elsewhere and operands of 3 digits it must be at")],
)  # fmt: skip
def test_what_cannot_be_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        AdditionRecipe(settings(**wrong))


@pytest.mark.parametrize("flags", ["--terms 1", "--problems 0", "--samples -1"])
def test_limits_of_the_flags(flags: str) -> None:
    with pytest.raises(UserError, match=f"{flags.split(' ')[0]} is .*it must be"):
        train(flags.split(" "))


@pytest.mark.parametrize("terms", [2, 10, 11, 99])
def test_blocks_have_room_for_the_largest_sum(terms: int, tmp_path: Path) -> None:
    """Of as many digits as validation asks."""
    longest = len(answer_of(*[10**8 - 1] * terms).rstrip("\n"))
    with pytest.raises(UserError, match=f"--digits is 6; such sums need --max-block-units {longest} or more"):
        train(["--digits", "6", "--terms", str(terms), "--max-block-units", str(longest - 1), "--max-steps", "1",
               "--out", str(tmp_path), "--no-doctor", *(f"--{flag}" for flag in TINY)])  # fmt: skip
