"""What there is to learn: `addition` and `characters` make their own data, `text` reads files."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from tidal.blocks import Ints
from tidal.infer.engine import Completion, generate
from tidal.model import TidalTransformer
from tidal.tokenizer import MixedTokenizer


def taken(seed: int, stream: int, i: int, n: int) -> int:
    """Which of n things is the i-th to be learnt: each comes once an epoch, whose order is drawn by lot; the `stream`
    tells recipes' random numbers apart."""
    epoch, rank = divmod(i, n)
    return int(_order(seed, stream, epoch, n)[rank])


@functools.lru_cache(2)  # validation, at the beginning of an epoch, looks back into the one before
def _order(seed: int, stream: int, epoch: int, n: int) -> Ints:
    return np.random.default_rng([seed, stream, epoch]).permutation(n)


def wrong_answers(model: TidalTransformer, tokenizer: MixedTokenizer, problems: Sequence[tuple[str, str]],
                  batch_size: int = 256) -> dict[int, Completion]:  # fmt: skip
    """Greedy completions that are not exactly the right answer, by the number of their problem.

    `problems`: prompts, each with its only right answer. A completion is right only if it also ends there.
    """
    longest = max(len(answer) for _, answer in problems)
    written = generate(model, tokenizer, [prompt for prompt, _ in problems], max_new_units=2 * longest + 8,
                       batch_size=batch_size)  # fmt: skip
    return {i: c for i, (c, (_, answer)) in enumerate(zip(written, problems, strict=True))
            if c.completion != answer or c.stop_reason != "eos"}  # fmt: skip
