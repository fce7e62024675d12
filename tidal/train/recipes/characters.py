"""`--recipe characters`: questions about the letters of words, after CUTE, with one right answer each.

The prompt ends in "=", and the answer is one block, written last letter first:

    spell later = l'a't'e'r          insert o after t in later = latoer       contains t in later = yes
    join l'a't'e'r = later           delete t in later = laer                 count t in later = 1
    reverse later = retal            substitute o for t in later = laoer      swap t r in later = laret

The model reads " later" as a few tokens of several letters each, and is told nowhere which letters these are: that is
what it has to learn. Edman et al. 2024, "CUTE: Measuring LLMs' Understanding of Their Tokens", ask large models the
same; there letters are spelled with spaces between them, here with apostrophes, which keep them in one block.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tidal.blocks import BlockTable, passage
from tidal.config import Train
from tidal.corpora.code import standard_library
from tidal.corpora.documents import held_out_by_hash
from tidal.infer.engine import Completion
from tidal.model import TidalTransformer
from tidal.ranks import share_of
from tidal.streams import Batch, pack
from tidal.tokenizer import MixedTokenizer
from tidal.train.recipes import wrong_answers

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SHORTEST, LONGEST = 3, 12
"""Letters of a word."""
HELD_OUT_OF = 10
"""Of all strings of letters, one in so many is held out."""
PER_ROW = 8
"""Questions in a row; lengths differ much, and eight together have less padding than eight apart."""
PER_TASK = 50
"""Questions of each task in a validation."""


class Question(NamedTuple):
    """A prompt and its only right completion."""

    task: str
    word: str
    prompt: str
    answer: str


def held_out(word: str) -> bool:
    """Whether a string is kept from training, as the word asked about and as an answer: a function of its SHA-256."""
    return held_out_by_hash(word, HELD_OUT_OF)


@functools.cache
def library_words() -> tuple[str, ...]:
    """Distinct words of 3 to 12 letters a to z that stand at least twice in the running Python's standard library.

    Prose and parts of identifiers, sorted. Every Python has them; other versions differ in a few.
    """
    pattern = re.compile(rf"(?<![^\W_])[a-z]{{{SHORTEST},{LONGEST}}}(?![^\W_])")
    counts: Counter[str] = Counter()
    for document in standard_library():
        counts.update(pattern.findall(document.text))
    return tuple(sorted(word for word, count in counts.items() if count > 1))


def spelled(word: str) -> str:
    """`l'a't'e'r`"""
    return "'".join(word)


# Each task makes of a word, a letter x (most often of the word) and another letter y its prompt and answer.
TASKS: dict[str, Callable[[str, str, str], tuple[str, str]]] = {
    "spell": lambda word, x, y: (f"spell {word} =", spelled(word)),
    "join": lambda word, x, y: (f"join {spelled(word)} =", word),
    "contains": lambda word, x, y: (f"contains {x} in {word} =", "yes" if x in word else "no"),
    "count": lambda word, x, y: (f"count {x} in {word} =", str(word.count(x))),
    "insert": lambda word, x, y: (f"insert {y} after {x} in {word} =", word.replace(x, x + y)),
    "delete": lambda word, x, y: (f"delete {x} in {word} =", word.replace(x, "")),
    "substitute": lambda word, x, y: (f"substitute {y} for {x} in {word} =", word.replace(x, y)),
    "swap": lambda word, x, y: (f"swap {x} {y} in {word} =", word.translate(str.maketrans(x + y, y + x))),
    "reverse": lambda word, x, y: (f"reverse {word} =", word[::-1]),
}

SEARCHES = ("contains", "count")
WEIGHTS = {"contains": 2, "count": 2, "insert": 4, "delete": 3, "substitute": 2, "swap": 3, "reverse": 2}
"""How often tasks are asked in training; the others once."""


def ask(task: str, word: str, rng: np.random.Generator) -> Question:
    """A question about a word.

    x is a letter of the word, but for `contains` and `count` any letter half of the time; y is another letter, for
    `swap` one of the word. Of a word like "xxx", x and y are any two letters.
    """
    own = sorted(set(word))
    x = own[int(rng.integers(len(own)))]
    if (task in SEARCHES and rng.random() < 0.5) or len(own) == 1:
        x = LETTERS[int(rng.integers(26))]
    others = [c for c in (own if task == "swap" and len(own) > 1 else LETTERS) if c != x]
    prompt, answer = TASKS[task](word, x, others[int(rng.integers(len(others)))])
    return Question(task, word, prompt, " " + answer)


def questions(words: Sequence[str], count: int, rng: np.random.Generator) -> dict[str, list[Question]]:
    """`count` questions of every task, about random words."""
    return {task: [ask(task, words[i], rng) for i in rng.integers(0, len(words), count).tolist()] for task in TASKS}


def exact_match(model: TidalTransformer, tokenizer: MixedTokenizer, asked: Mapping[str, Sequence[Question]],
                batch_size: int = 256) -> tuple[dict[str, float], list[tuple[Question, Completion]]]:  # fmt: skip
    """Share of questions of each task answered exactly (greedy), and the wrong answers."""
    flat = [question for several in asked.values() for question in several]
    wrong = wrong_answers(model, tokenizer, [(q.prompt, q.answer) for q in flat], batch_size)
    failed = Counter(flat[i].task for i in wrong)
    return ({task: 1 - failed[task] / len(several) for task, several in asked.items()},
            [(flat[i], completion) for i, completion in wrong.items()])  # fmt: skip


class CharactersRecipe:
    """Half of the words are the library's, half are made up; those that are held out never come."""

    def __init__(self, settings: Train) -> None:
        self.settings = settings
        words = library_words()
        self.words = [word for word in words if not held_out(word)]
        self.digest = hashlib.sha256(" ".join(words).encode()).hexdigest()
        rng = np.random.default_rng(0)
        texts = [q.prompt + q.answer for several in questions(self.words, 100, rng).values() for q in several]
        self.tokenizer = MixedTokenizer.train([*texts, *(f" {word}" for word in self.words)],
                                              settings.characters.word_vocab_size)  # fmt: skip
        self.table = BlockTable(self.tokenizer)
        unseen = [word for word in words if held_out(word)]
        self.held_out = questions(unseen, PER_TASK, np.random.default_rng([settings.seed, 1]))

    def word(self, rng: np.random.Generator) -> str:
        """A word to learn from: of the library, or the beginning of one with the end of another, or any letters."""
        kind = rng.random()
        one, other = (self.words[int(i)] for i in rng.integers(0, len(self.words), 2))
        if kind < 0.5:
            return one
        if kind < 0.75:
            made = one[: int(rng.integers(1, len(one)))] + other[int(rng.integers(1, len(other))) :]
        else:
            made = "".join(LETTERS[i] for i in rng.integers(0, 26, rng.integers(SHORTEST, LONGEST + 1)))
        return made if SHORTEST <= len(made) <= LONGEST and not held_out(made) else one

    def question(self, rng: np.random.Generator) -> Question:
        """A question to learn from; neither its word nor its answer is held out."""
        tasks = [task for task in TASKS for _ in range(WEIGHTS.get(task, 1))]
        while True:
            asked = ask(tasks[int(rng.integers(len(tasks)))], self.word(rng), rng)
            if asked.task in SEARCHES or not held_out(asked.answer.strip().replace("'", "")):
                return asked

    def batch(self, step: int, share: tuple[int, int] = (0, 1)) -> Batch:
        """The batch of a step: a pure function of (seed, step); or the share (i, n) of its rows."""
        self.table.limit()
        s, rows = self.settings, []
        for i in share_of(s.rows, share):
            rng = np.random.default_rng([s.seed, 2, step, i])
            offsets = rng.integers(0, s.model.place_jitter + 1, PER_ROW).tolist()
            asked = [self.question(rng) for _ in offsets]
            rows.append([passage(self.table, q.prompt, q.answer, place_offset=offset)
                         for q, offset in zip(asked, offsets, strict=True)])  # fmt: skip
        return pack(rows, self.table, steps=s.model.steps)

    def validate(self, model: TidalTransformer) -> dict[str, float]:
        """Exact match of every task on held-out words; `quality` is the mean."""
        scores, _ = exact_match(model, self.tokenizer, self.held_out)
        return {"quality": sum(scores.values()) / len(scores), **scores}

    def sample_prompts(self, step: int) -> list[str]:
        """Held-out questions to show, one of each task."""
        return [several[step % len(several)].prompt for several in self.held_out.values()]
