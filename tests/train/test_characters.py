"""Questions about letters: right answers, words that training never sees, and what counts as answered."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import differing
from tests.train.test_recipes import read_text, written_blocks
from tidal import cli
from tidal.config import Shape, Train
from tidal.evaluate.__main__ import Characters, Subject
from tidal.evaluate.__main__ import characters as evaluate
from tidal.tokenizer import MixedTokenizer
from tidal.train import recipes
from tidal.train.presets import PRESETS
from tidal.train.recipes import characters
from tidal.train.recipes.characters import (
    TASKS,
    CharactersRecipe,
    Question,
    ask,
    exact_match,
    held_out,
    library_words,
    questions,
)

DOC = Path(__file__).parents[2] / "docs/characters.md"
SHAPE = Shape(d_model=8, n_heads=2, n_kv_heads=1, reader_layers=1, suffix_rows=0, place_jitter=2)
SETTINGS = dataclasses.replace(PRESETS["characters"], rows=6, model=SHAPE)
SOME = ("later", "water", "tide", "tides", "seas", "incoming", "letters", "token", "reads", "writes", "backwards")
WORDS = tuple(sorted({a + b for a in SOME for b in ("", "s", "ed", "ing", *SOME) if len(a + b) <= 12}))


@pytest.fixture(autouse=True)
def few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of those of the whole standard library."""
    monkeypatch.setattr(characters, "library_words", lambda: WORDS)


@pytest.fixture
def recipe() -> CharactersRecipe:
    return CharactersRecipe(SETTINGS)


def solve(prompt: str) -> str:
    """The answer to a prompt, letter by letter and without any of the recipe's code."""
    task, *rest = prompt.removesuffix(" =").split()
    word = rest[-1]
    if task in ("spell", "join", "reverse"):
        letters = [c for c in word if c != "'"]
        return " " + ("'" if task == "spell" else "").join(reversed(letters) if task == "reverse" else letters)
    if task in ("contains", "count"):
        n = sum(c == rest[0] for c in word)
        return f" {n}" if task == "count" else " yes" if n else " no"
    written = " "
    for c in word:
        if task == "insert":  # insert Y after X in WORD
            written += c + rest[0] * (c == rest[2])
        elif task == "delete":  # delete X in WORD
            written += c * (c != rest[0])
        elif task == "substitute":  # substitute Y for X in WORD
            written += rest[0] if c == rest[2] else c
        else:  # swap X Y in WORD
            written += {rest[0]: rest[1], rest[1]: rest[0]}.get(c, c)
    return written


words_to_ask = st.text(characters.LETTERS, min_size=3, max_size=12)


@given(words_to_ask, st.sampled_from(list(TASKS)), st.integers(0, 99))
def test_answers_are_right(word: str, task: str, seed: int) -> None:
    question = ask(task, word, np.random.default_rng(seed))
    assert (question.task, question.word) == (task, word)
    assert question.answer == solve(question.prompt)
    assert re.fullmatch(r"[a-z' ]+ =", question.prompt)
    if task in ("insert", "delete", "substitute", "swap") and len(set(word)) > 1:
        assert question.answer.strip() not in ("", word)


def test_the_docstring_shows_true_answers() -> None:
    shown = re.findall(r"\b((?:spell|join|reverse|insert|delete|substitute|contains|count|swap) .*? =) ([\w']+)",
                       characters.__doc__ or "")  # fmt: skip
    assert {prompt.split()[0] for prompt, _ in shown} == set(TASKS)
    for prompt, answer in shown:
        assert solve(prompt) == f" {answer}", prompt


def test_a_wrong_rule_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: only the first letter is replaced."""
    monkeypatch.setitem(TASKS, "substitute", lambda word, x, y: (f"substitute {y} for {x} in {word} =",
                                                                 word.replace(x, y, 1)))  # fmt: skip
    asked = [ask("substitute", "letter", np.random.default_rng(seed)) for seed in range(20)]
    assert any(q.answer != solve(q.prompt) for q in asked)


@given(words_to_ask, st.sampled_from(list(TASKS)), st.integers(0, 99))
def test_an_answer_is_one_block(word: str, task: str, seed: int) -> None:
    question = ask(task, word, np.random.default_rng(seed))
    tokenizer = tokenizer_of_words()
    assert tokenizer.split(question.prompt + question.answer)[-1] == question.answer
    assert len(tokenizer.encode_block(question.answer).units) <= tokenizer.max_block_units


def tokenizer_of_words(made: list[MixedTokenizer] = []) -> MixedTokenizer:  # noqa: B006  made once
    if not made:
        made.append(MixedTokenizer.train([f" {word}" for word in WORDS], 400))
    return made[0]


# --------------------------------------------------------------------------------------- held-out words


def test_the_split_is_fixed() -> None:
    """A checkpoint's words stay unseen for ever: this list must never change."""
    words = [a + b for a in ("sea", "tide", "moon", "sand", "salt") for b in ("", "s", "ed", "ing", "er", "est", "ish")]
    assert [word for word in words if held_out(word)] == ["tideer", "sandish"]
    shares = Counter(held_out(f"{i}") for i in range(5000))
    assert 0.085 < shares[True] / 5000 < 0.115


def held_out_in(recipe: CharactersRecipe, steps: int = 30) -> list[str]:
    """What is held out and yet comes up in batches, as a word or as an answer."""
    found = []
    for step in range(steps):
        batch = recipe.batch(step)
        for row in range(recipe.settings.rows):
            texts = read_text(batch, row, recipe.tokenizer)
            blocks = written_blocks(batch, row, recipe.tokenizer)
            assert len(texts) == characters.PER_ROW
            assert blocks == [block for text in texts for block in (text.partition(" =")[2], "<eos>")]
            for text in texts:
                prompt, _, answer = text.partition(" =")
                assert solve(f"{prompt} =") == answer
                words = [prompt.split()[-1], *[answer.strip()] * (prompt.split()[0] not in characters.SEARCHES)]
                found += [word for word in words if held_out(word.replace("'", ""))]
    return found


def test_training_never_sees_a_held_out_word(recipe: CharactersRecipe) -> None:
    assert held_out_in(recipe) == []
    asked = [q for several in recipe.held_out.values() for q in several]
    assert len(asked) == characters.PER_TASK * len(TASKS)
    assert all(held_out(q.word) and q.word in WORDS for q in asked)


def test_a_leak_is_noticed(recipe: CharactersRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the recipe forgets to leave them out, as words made up or as answers."""
    monkeypatch.setattr(characters, "held_out", lambda _: False)
    assert held_out_in(recipe)


def test_tasks_come_as_often_as_planned(recipe: CharactersRecipe) -> None:
    rng = np.random.default_rng(0)
    asked = [recipe.question(rng) for _ in range(6000)]
    weights = {task: characters.WEIGHTS.get(task, 1) for task in TASKS}
    for task, weight in weights.items():
        expected = len(asked) * weight / sum(weights.values())
        assert 0.75 * expected < sum(q.task == task for q in asked) < 1.3 * expected
    for task, answers in (("contains", {" yes", " no"}), ("count", {" 0", " 1", " 2"})):  # none is held out
        assert answers <= {q.answer for q in asked if q.task == task}


def test_words_come_from_the_standard_library() -> None:
    words = library_words()
    assert list(words) == sorted(set(words))
    assert all(re.fullmatch("[a-z]{3,12}", word) for word in words)
    assert {"return", "import", "the", "class"} <= set(words)
    assert sum(map(held_out, words)) > 500


# --------------------------------------------------------------------------------------- batches, figures


def test_a_batch_is_a_pure_function_of_seed_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = CharactersRecipe(SETTINGS), CharactersRecipe(SETTINGS)
    steps = [0, 1, 2, 7]
    wanted = {step: one.batch(step) for step in steps}
    monkeypatch.setattr("tidal.blocks.MAX_BLOCKS", 3)
    assert not any(differing(two.batch(step), wanted[step]) for step in reversed(steps))
    assert all(differing(wanted[a], wanted[b]) for a in steps for b in steps if a < b)
    other = CharactersRecipe(dataclasses.replace(SETTINGS, seed=1))
    assert differing(other.batch(0), wanted[0])
    assert other.tokenizer.fingerprint == one.tokenizer.fingerprint
    halves = [read_text(two.batch(0, (i, 2)), row, two.tokenizer) for i in (0, 1) for row in range(3)]
    assert sorted(halves) == sorted(read_text(wanted[0], row, one.tokenizer) for row in range(6))


def test_exact_match_counts_the_whole_answer_and_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    said = [(" yes", "eos"), (" yes", "length"), (" no", "eos"), ("yes", "eos"), (" yes\n", "eos"), ("", "eos")]

    def generate(_model: object, _tokenizer: object, prompts: list[str], **_: object) -> list[Any]:
        return [SimpleNamespace(prompt=p, completion=c, stop_reason=s)
                for p, (c, s) in zip(prompts, 2 * said, strict=True)]  # fmt: skip

    monkeypatch.setattr(recipes, "generate", generate)
    right, wrong = (Question(task, "tide", "?", f" {said}") for task, said in (("contains", "yes"), ("count", "2")))
    shares, failed = exact_match(None, None, {"contains": [right] * 6, "count": [wrong] * 6})  # type: ignore[arg-type]
    assert shares == {"contains": pytest.approx(1 / 6), "count": 0}
    assert [(q.task, c.completion) for q, c in failed][:5] == [("contains", said) for said, _ in said[1:]]
    assert len(failed) == 11


def test_words_with_an_unknown_token_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    spells = MixedTokenizer.train([], 400)  # letter by letter
    monkeypatch.setattr(characters, "exact_match", lambda *_: ({}, []))
    for others, unknown in (((), 2), (("tide", "hands"), 1), (("tide", "hands", "read"), 0)):
        monkeypatch.setattr(characters, "library_words", lambda others=others: ("sandish", "tideer", *others))
        figures, _ = evaluate(Characters(count=1, seed=0), Subject(None, spells, None, []))  # type: ignore[arg-type]
        assert (figures["held_out_words"], figures["held_out_words_with_unseen_token"]) == (2, unknown)
        assert figures["letters_per_token"] == pytest.approx(13 / 15)  # the space before a word is a token, too
    short = Subject(None, MixedTokenizer.train([], 400, max_block_units=16), None, [])  # type: ignore[arg-type]
    with pytest.raises(cli.UserError, match="up to 24 units, and the model writes blocks of 16"):
        evaluate(Characters(count=1, seed=0), short)


def test_questions_are_as_many_as_asked_and_random() -> None:
    asked = questions(WORDS, 40, np.random.default_rng(3))
    assert {task: len(several) for task, several in asked.items()} == dict.fromkeys(TASKS, 40)
    assert asked == questions(WORDS, 40, np.random.default_rng(3)) != questions(WORDS, 40, np.random.default_rng(4))


def test_the_documented_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                     capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """In one process, with a tiny model and few steps and questions."""
    tiny = ("--d-model 8 --n-heads 2 --n-kv-heads 1 --reader-layers 1 --writer-layers 1 --reader-ff 8 --writer-ff 8 "
            "--max-steps 2 --rows 1 --no-doctor")  # fmt: skip
    added = {"train": tiny, "evaluate": "--count 3 --json", "infer": ""}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(characters, "PER_TASK", 2)
    commands = re.findall(r"^\$ python -m tidal\.(\w+)(.*)$", DOC.read_text(encoding="utf-8"), re.MULTILINE)
    assert {module for module, _ in commands} == {"train", "evaluate", "infer"}
    outputs: dict[str, str] = {}
    for module, flags in commands:
        argv = [*shlex.split(flags), *added[module].split()]
        run: Callable[[list[str]], int | None] = importlib.import_module(f"tidal.{module}.__main__").run
        with pytest.raises(SystemExit) as stop:
            cli.main(run, f"tidal.{module}", argv)
        outputs[module], err = capsys.readouterr()
        assert stop.value.code == 0, err
    figures = json.loads(outputs["evaluate"])
    assert [name for name in figures if name in TASKS] == list(TASKS)
    assert all(0 <= figures[task] <= 1 for task in TASKS)
    assert figures["questions_per_task"] == 3
    assert figures["held_out_words"] == sum(map(held_out, WORDS))
    settings = Train.from_dict(json.loads((tmp_path / "runs/characters/config.json").read_text()))
    assert (settings.recipe, settings.max_steps) == ("characters", 2)
