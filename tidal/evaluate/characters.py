"""Exact match on questions about the letters of words that training never saw."""

from __future__ import annotations

from typing import Any

import numpy as np

from tidal.infer.engine import Completion
from tidal.model import TidalTransformer
from tidal.tokenizer import MixedTokenizer
from tidal.train.recipes.characters import LONGEST, Question, exact_match, held_out, library_words, questions


def characters(model: TidalTransformer, tokenizer: MixedTokenizer, *, count: int, seed: int,
               batch_size: int = 256) -> tuple[dict[str, Any], list[tuple[Question, Completion]]]:  # fmt: skip
    """Exact match of each task on `count` questions about the held-out words, and the wrong answers.

    Besides: how many held-out words there are, and how many of these have a token that none of the library's other
    words has, so that the recipe's model can hardly know its letters. Raises ValueError where the longest answer does
    not fit a block.
    """
    if tokenizer.max_block_units < 2 * LONGEST:
        raise ValueError(f"answers have up to {2 * LONGEST} units, and the model writes blocks of "
                         f"{tokenizer.max_block_units}")  # fmt: skip
    known = {token for word in library_words() if not held_out(word) for token in _tokens(tokenizer, word)}
    words = [word for word in library_words() if held_out(word)]
    scores, wrong = exact_match(model, tokenizer, questions(words, count, np.random.default_rng(seed)), batch_size)
    return {
        "questions_of_a_task": count, "seed": seed, **scores, "held_out_words": len(words),
        "with_a_token_never_seen": sum(not known.issuperset(_tokens(tokenizer, word)) for word in words),
        "letters_a_token": sum(map(len, words)) / sum(len(_tokens(tokenizer, word)) for word in words),
        "vocabulary": tokenizer.vocab_size,
    }, wrong  # fmt: skip


def _tokens(tokenizer: MixedTokenizer, word: str) -> tuple[int, ...]:
    """A word as prompts hold it, behind a space."""
    return tokenizer.encode_block(f" {word}").tokens
