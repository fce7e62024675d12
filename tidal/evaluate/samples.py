"""What a model writes when nobody leads it: how much of it is empty, cut off, or the same again and again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tidal.infer.engine import Completion, generate
from tidal.model import TidalTransformer
from tidal.tokenizer import MixedTokenizer


def prompts_from(tokenizer: MixedTokenizer, texts: Sequence[str], count: int, blocks: int, seed: int) -> list[str]:
    """`count` prompts of up to `blocks` blocks, from random places of random texts, the longer ones more often.

    Raises ValueError where there is no text.
    """
    splits = [split for text in texts if (split := tokenizer.split(text))]
    if not splits:
        raise ValueError("there is no text to take prompts from")
    rng, lengths = np.random.default_rng(seed), np.array([len(split) for split in splits], float)
    chosen = [splits[i] for i in rng.choice(len(splits), count, p=lengths / lengths.sum())]
    starts = [int(rng.integers(max(1, len(split) - blocks + 1))) for split in chosen]
    return ["".join(split[start : start + blocks]) for split, start in zip(chosen, starts, strict=True)]


def count_degenerate(completions: Sequence[Completion]) -> dict[str, float]:
    """Shares of completions that are empty, repeat themselves, ended at once, or never ended, and their lengths.

    `repeating`: one block and nothing else. `distinct_blocks`: of all blocks written, the share that is the first of
    its kind in its completion; English prose has about 0.8 in 50 words, a loop next to nothing.
    """
    n, blocks = max(1, len(completions)), [c.blocks for c in completions]
    return {
        "empty": sum(c.degenerate == "empty" for c in completions) / n,
        "ended_at_once": sum(c.stop_reason == "eos" and not c.blocks for c in completions) / n,
        "repeating": sum(c.degenerate == "repeats" for c in completions) / n,
        "endless": sum(c.stop_reason == "length" for c in completions) / n,
        "distinct_blocks": sum(len(set(b)) for b in blocks) / max(1, sum(map(len, blocks))),
        "blocks": sum(map(len, blocks)) / n,
    }


def samples(model: TidalTransformer, tokenizer: MixedTokenizer, texts: Sequence[str], *, count: int,
            prompt_blocks: int, max_new_units: int, temperature: float,
            seed: int) -> tuple[dict[str, float], list[Completion]]:  # fmt: skip
    """Continue prompts taken from `texts`; the shares of `count_degenerate`, and the completions."""
    prompts = prompts_from(tokenizer, texts, count, prompt_blocks, seed)
    done = generate(model, tokenizer, prompts, max_new_units=max_new_units, temperature=temperature, seed=seed)
    return count_degenerate(done), done
