"""`--recipe addition`: documents `a + b = c\\n`, with the prompt `a + b =` and the completion ` c\\n`.

Also differences, products with a number of one digit, sums of several numbers, and documents of several problems;
endless new ones, or a finite set of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from tidal.blocks import BlockTable, Passage, joined
from tidal.cli import UserError
from tidal.config import Addition, Train
from tidal.model import TidalTransformer
from tidal.ranks import share_of
from tidal.streams import Batch, pack
from tidal.tokenizer import MixedTokenizer
from tidal.train.recipes import taken, wrong_answers

Sum = tuple[int, int]
Problem = tuple[str, str]
"""A prompt, and its answer."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A problem in a batch, and what stands before it in its document; by default, as it is decoded."""

    prompt: str
    answer: str
    place_offset: int = 0
    position_scale: float = 1.0
    stray: str = ""
    """A solved problem before the prompt, ..."""
    stray_offset: int = 0
    """... whose places are moved by this instead."""


def prompt_of(*numbers: int, operation: str = "+") -> str:
    """`a + b =`"""
    return f" {operation} ".join(map(str, numbers)) + " ="


def answer_of(*numbers: int, operation: str = "+") -> str:
    """` c\\n`; of `+`, `-` and `*`."""
    results = {"+": sum(numbers), "-": 2 * numbers[0] - sum(numbers), "*": math.prod(numbers)}
    return f" {results[operation]}\n"


def random_operand(rng: np.random.Generator, digits: int) -> int:
    """A number of exactly so many digits, of any size."""
    number = int(rng.integers(1 if digits > 1 else 0, 10))
    for digit in rng.integers(0, 10, digits - 1).tolist():
        number = 10 * number + digit
    return number


def random_sums(rng: np.random.Generator, digits: int, count: int) -> list[Sum]:
    """Sums whose operands both have exactly `digits` digits."""
    return [(random_operand(rng, digits), random_operand(rng, digits)) for _ in range(count)]


def random_problem(rng: np.random.Generator, settings: Addition, operation: str, digits: int | None = None) -> Problem:
    """A new problem, its operands as long as the settings say, or all of exactly so many `digits`.

    A difference has the larger number first; the second number of a product has one digit.
    """
    count = int(rng.integers(2, settings.terms + 1)) if operation == "+" else 2
    most = settings.digits
    if digits is not None:
        lengths = [digits] * count
    elif settings.lengths == "numbers":  # of the numbers below 10^n, nine tenths have n digits
        lengths = [max(1, most + 1 - n) for n in rng.geometric(0.9, count).tolist()]
    else:
        every = np.arange(1, most + 1)
        rising = settings.lengths == "rising"
        drawn = rng.choice(every, count, p=every / every.sum()) if rising else rng.integers(1, most + 1, count)
        lengths = drawn.tolist()
        lengths = lengths[:1] * count if settings.lengths == "equal" else lengths
    if operation == "*":
        lengths[1] = 1
    numbers = [random_operand(rng, n) for n in lengths]
    if operation == "-":
        numbers.sort(reverse=True)
    return prompt_of(*numbers, operation=operation), answer_of(*numbers, operation=operation)


def paired(asked: Sequence[Asked]) -> list[list[Asked]]:
    """Two documents to a row, the shortest with the longest, so that rows are about as long and little is padding."""
    by_length, n = sorted(asked, key=lambda a: len(a.stray + a.prompt + a.answer)), len(asked)
    half = (n + 1) // 2
    return [[by_length[i], *by_length[max(half, n - 1 - i) : n - i]] for i in range(half)]


def longest_number(text: str) -> int:
    """Digits of the longest number in a text."""
    return max(map(len, re.findall(r"[0-9]+", text)))


class AdditionRecipe:
    """Operands of 1 to `digits` digits; places are jittered, so longer sums work too."""

    digest = ""  # no data from outside

    def __init__(self, settings: Train) -> None:
        """Raises UserError for operations that there are not, and for more samples than there are problems."""
        self.settings, self.own = settings, settings.addition
        if not self.own.operations or set(self.own.operations) - set("+-*"):
            raise UserError(f"--operations is {self.own.operations!r}; give one or several of + - *, such as '+-'")
        if self.own.elsewhere and settings.model.place_jitter < self.own.digits + 2:
            raise UserError(f"--place-jitter is {settings.model.place_jitter}; with --elsewhere and operands of "
                            f"{self.own.digits} digits it must be at least {self.own.digits + 2}")  # fmt: skip
        rng = np.random.default_rng(0)  # only the characters matter, and these are the same for every seed
        plain = random_sums(rng, 5, 200)
        texts = [prompt_of(*pair, operation=o) + answer_of(*pair) for o in self.own.operations for pair in plain]
        self.tokenizer = MixedTokenizer.train(texts, max_block_units=self.own.max_block_units)
        self.table = BlockTable(self.tokenizer)
        self.samples = self._samples(np.random.default_rng([settings.seed, 3])) if self.own.samples else []
        rng = np.random.default_rng([settings.seed, 1])
        lengths = (self.own.digits, self.own.digits + 1, self.own.digits + 2)
        self.held_out = {n: self._held_out(rng, n) for n in lengths}

    def _samples(self, rng: np.random.Generator) -> list[Problem]:
        """The finite set to learn from, no two alike."""
        found: dict[Problem, None] = {}
        for _ in range(100 * self.own.samples):
            found[self._new(rng)] = None
            if len(found) == self.own.samples:
                return list(found)
        raise UserError(f"--samples is {self.own.samples}, of which only {len(found)} different ones were found; "
                        "give fewer, or more --digits")  # fmt: skip

    def _held_out(self, rng: np.random.Generator, digits: int) -> list[Problem]:
        """100 problems that are not among the samples."""
        known, found = set(self.samples), list[Problem]()
        for i in range(10_000):
            operation = self.own.operations[i % len(self.own.operations)]
            problem = random_problem(rng, self.own, operation, digits)
            if problem not in known:
                found.append(problem)
            if len(found) == 100:
                return found
        raise UserError(f"--samples is {self.own.samples}: nothing of {digits} digits is left to validate with")

    def _new(self, rng: np.random.Generator) -> Problem:
        operations = self.own.operations
        return random_problem(rng, self.own, operations[rng.integers(len(operations))])

    def batch(self, step: int, share: tuple[int, int] = (0, 1)) -> Batch:
        """The batch of a step: a pure function of (seed, step); or the share (i, n) of its rows."""
        s, rng = self.settings, np.random.default_rng([self.settings.seed, 2, step])
        offsets = rng.integers(0, s.model.place_jitter + 1, s.rows).tolist()
        before = rng.integers(0, self.own.problems, s.rows).tolist()
        strays = (rng.random(s.rows) < self.own.elsewhere).tolist()
        asked = list[Asked]()
        for offset, n_before, has_stray in zip(offsets, before, strays, strict=True):
            prompt, answer = self._sample(step * s.rows + len(asked)) if self.samples else self._new(rng)
            prompt = "".join(self._solved(rng) for _ in range(n_before)) + prompt
            stray = self._solved(rng) if has_stray else ""
            far = self._far(rng, offset, prompt + answer, stray) if stray else None
            asked.append(Asked(prompt, answer, offset, stray="" if far is None else stray, stray_offset=far or 0))
        scales = rng.uniform(1, self.own.stretch, s.rows).tolist()
        return self.packed(paired([replace(asked[i], position_scale=scales[i]) for i in share_of(s.rows, share)]))

    def packed(self, rows: Sequence[Sequence[Asked]]) -> Batch:
        """Rows of documents."""
        self.table.limit()
        split = self.tokenizer.split
        blocks = [[(split(a.stray), split(a.prompt), split(a.answer)) for a in row] for row in rows]
        self.table.indices(chain.from_iterable(chain(*some) for row in blocks for some in row))  # new ones, all at once

        def document(a: Asked, stray: list[str], prompt: list[str], answer: list[str]) -> Passage:
            p = joined(self.table, [*stray, *prompt], answer, place_offset=a.place_offset)
            return replace(p, position_scale=a.position_scale, n_stray=len(stray), stray_offset=a.stray_offset)

        documents = [[document(a, *some) for some, a in zip(*both, strict=True)]
                     for both in zip(blocks, rows, strict=True)]  # fmt: skip
        return pack(documents, self.table, steps=self.settings.model.steps)

    def _far(self, rng: np.random.Generator, offset: int, text: str, stray: str) -> int | None:
        """An offset for a stray whose digits then have none of the places that are read or written in this text, moved
        by its own offset; None where there is none.
        """
        own, strange = longest_number(text) + 2, longest_number(stray)  # a space and `<eob>` are written, too
        below = max(0, offset - strange + 1)
        above = max(0, self.settings.model.place_jitter - offset - own + 1)
        if below + above == 0:
            return None
        far = int(rng.integers(below + above))
        return far if far < below else offset + own + far - below

    def _solved(self, rng: np.random.Generator) -> str:
        """A problem with its answer, to stand before another one."""
        known = self.samples
        return "".join(known[rng.integers(len(known))] if known else self._new(rng))

    def _sample(self, n: int) -> Problem:
        """The n-th sample to be learnt."""
        return self.samples[taken(self.settings.seed, 4, n, len(self.samples))]

    def validate(self, model: TidalTransformer) -> dict[str, float]:
        """Exact match at the trained number of digits and at one and two more; `quality` is their mean."""
        wrong = {n: wrong_answers(model, self.tokenizer, problems) for n, problems in self.held_out.items()}
        scores = {f"exact_{n}": (len(of) - len(wrong[n])) / len(of) for n, of in self.held_out.items()}
        return {"quality": sum(scores.values()) / len(scores), **scores}

    def sample_prompts(self, step: int) -> list[str]:
        """Held-out problems to show, in turn."""
        return [problems[step % len(problems)][0] for problems in self.held_out.values()]
