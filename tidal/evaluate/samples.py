"""What a model writes when nobody leads it: how much of it is empty, cut off, or the same again and again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tidal.infer.completion import repeats
from tidal.infer.engine import Completion, generate
from tidal.model import TidalTransformer
from tidal.tokenizer import MixedTokenizer


def prompts_from(tokenizer: MixedTokenizer, texts: Sequence[str], count: int, blocks: int, seed: int,
                 follow: int = 0) -> list[tuple[str, list[str]]]:  # fmt: skip
    """`count` prompts of up to `blocks` blocks, from random places of random texts, the longer ones more often, each
    with up to `follow` blocks that come after it.

    Raises ValueError where there is no text.
    """
    splits = [split for text in texts if (split := tokenizer.split(text))]
    if not splits:
        raise ValueError("there is no text to take prompts from")
    rng, lengths = np.random.default_rng(seed), np.array([len(split) for split in splits], float)
    chosen = [splits[i] for i in rng.choice(len(splits), count, p=lengths / lengths.sum())]
    starts = [int(rng.integers(max(1, len(split) - blocks + 1))) for split in chosen]
    return [("".join(split[start : start + blocks]), split[start + blocks : start + blocks + follow])
            for split, start in zip(chosen, starts, strict=True)]  # fmt: skip


def count_degenerate(completions: Sequence[Completion]) -> dict[str, float]:
    """Shares of completions that are empty, repeat themselves, ended at once, or never ended, and their lengths.

    `repeating`: see `tidal.infer.completion.repeats`. `distinct_blocks`: of all blocks written, the share that is the
    first of its kind in its completion; English prose has about 0.8 in 50 words, a loop next to nothing.
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


def within(tokenizer: MixedTokenizer, blocks: Sequence[str], units: int) -> list[str]:
    """Those of the first `blocks` that are written in `units` units, `<eob>` included."""
    lengths = np.cumsum([len(tokenizer.write_units(block)) + 1 for block in blocks])
    return list(blocks[: int(np.searchsorted(lengths, units, "right"))])


def samples(model: TidalTransformer, tokenizer: MixedTokenizer, texts: Sequence[str], *, count: int,
            prompt_blocks: int, max_new_units: int, temperature: float,
            seed: int) -> tuple[dict[str, float], list[Completion]]:  # fmt: skip
    """Continue prompts taken from `texts`; the shares of `count_degenerate`, two of them also of what follows the
    prompts in the texts, as far as `max_new_units` go (`…_in_data`), and the completions.
    """
    found = prompts_from(tokenizer, texts, count, prompt_blocks, seed, follow=max_new_units)
    done = generate(model, tokenizer, [prompt for prompt, _ in found], max_new_units=max_new_units,
                    temperature=temperature, seed=seed)  # fmt: skip
    true = [(blocks, within(tokenizer, blocks, max_new_units - 1)) for _, blocks in found]  # and one for <eos>
    in_data = {"repeating_in_data": sum(repeats(room) for _, room in true) / count,
               "endless_in_data": sum(len(room) < len(blocks) for blocks, room in true) / count}  # fmt: skip
    return {**count_degenerate(done), **in_data}, done
