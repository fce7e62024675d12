"""`--recipe addition`: documents `a + b = c\\n`, with the prompt `a + b =` and the completion ` c\\n`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tidal.blocks import BlockTable, passage
from tidal.config import Train
from tidal.infer.engine import Completion, generate
from tidal.model import TidalTransformer
from tidal.streams import Batch, pack
from tidal.tokenizer import MixedTokenizer

Sum = tuple[int, int]
MAX_TABLE = 300_000  # distinct blocks remembered before the table is emptied


def prompt_of(a: int, b: int) -> str:
    """`a + b =`"""
    return f"{a} + {b} ="


def answer_of(a: int, b: int) -> str:
    """` c\\n`"""
    return f" {a + b}\n"


def random_operand(rng: np.random.Generator, digits: int) -> int:
    """A number of exactly so many digits, of any size."""
    first = rng.integers(1 if digits > 1 else 0, 10)
    return int("".join(map(str, [first, *rng.integers(0, 10, digits - 1)])))


def random_sums(rng: np.random.Generator, digits: int, count: int) -> list[Sum]:
    """Sums whose operands both have exactly `digits` digits."""
    return [(random_operand(rng, digits), random_operand(rng, digits)) for _ in range(count)]


def exact_match(model: TidalTransformer, tokenizer: MixedTokenizer, sums: Sequence[Sum],
                batch_size: int = 256) -> tuple[float, list[Completion]]:  # fmt: skip
    """Share of sums answered exactly (greedy), and the wrong answers."""
    prompts = [prompt_of(a, b) for a, b in sums]
    longest = max(len(answer_of(a, b)) for a, b in sums)
    answers = generate(model, tokenizer, prompts, max_new_units=2 * longest + 8, batch_size=batch_size)
    wrong = [c for c, (a, b) in zip(answers, sums, strict=True)
             if c.completion != answer_of(a, b) or c.stop_reason != "eos"]  # fmt: skip
    return (len(sums) - len(wrong)) / len(sums), wrong


class AdditionRecipe:
    """Operands of 1 to `digits` digits, each length as often; places are jittered, so longer sums work too."""

    digest = ""  # no data from outside

    def __init__(self, settings: Train) -> None:
        self.settings, self.digits = settings, settings.addition.digits
        rng = np.random.default_rng(0)  # only the characters matter, and these are the same for every seed
        texts = [prompt_of(a, b) + answer_of(a, b) for a, b in random_sums(rng, 5, 200)]
        self.tokenizer = MixedTokenizer.train(texts, max_block_units=settings.addition.max_block_units)
        self.table = BlockTable(self.tokenizer, suffixes=settings.model.suffix_rows > 0)
        rng = np.random.default_rng([settings.seed, 1])
        lengths = (self.digits, self.digits + 1, self.digits + 2)
        self.held_out = {n: random_sums(rng, n, 100) for n in lengths}

    def batch(self, step: int) -> Batch:
        """The batch of a step: a pure function of (seed, step)."""
        if len(self.table) > MAX_TABLE:
            self.table.clear()
        s, rng = self.settings, np.random.default_rng([self.settings.seed, 2, step])
        lengths = rng.integers(1, self.digits + 1, (s.rows, 2))
        offsets = rng.integers(0, s.model.place_jitter + 1, s.rows)
        rows = []
        for (n, m), offset in zip(lengths.tolist(), offsets.tolist(), strict=True):
            a, b = random_operand(rng, n), random_operand(rng, m)
            rows.append([passage(self.table, prompt_of(a, b), answer_of(a, b), place_offset=offset)])
        return pack(rows, self.table, step_stride=s.model.step_stride)

    def validate(self, model: TidalTransformer) -> dict[str, float]:
        """Exact match at the trained number of digits and at one and two more; `quality` is their mean."""
        scores = {f"exact_{n}": exact_match(model, self.tokenizer, sums)[0] for n, sums in self.held_out.items()}
        return {"quality": sum(scores.values()) / len(scores), **scores}

    def sample_prompts(self, step: int) -> list[str]:
        """Held-out sums to show, in turn."""
        return [prompt_of(*sums[step % len(sums)]) for sums in self.held_out.values()]
