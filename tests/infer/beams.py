"""What beam search must hold, as functions: against an oracle without caches, greedy decoding and the packed pass."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from tests.laws import EXACT, assert_close, packed_log_probs, passage_of
from tests.strategies import SHAPES, random_model, tokenizers
from tidal.blocks import BlockTable
from tidal.infer import engine
from tidal.infer.beam import Hypothesis, beam_search
from tidal.infer.completion import degenerate
from tidal.infer.decoder import Decoder
from tidal.infer.grammar import FIRST_BYTE, Grammar
from tidal.model import TidalTransformer
from tidal.tokenizer import MixedTokenizer

PROMPTS = ["the light and", "", "1 + 2 =", "é"]


def names(hypotheses: Sequence[Hypothesis]) -> list[tuple[Any, ...]]:
    return [(h.text, h.blocks, h.stop_reason, h.units) for h in hypotheses]


def assert_same(some: Sequence[Sequence[Hypothesis]], others: Sequence[Sequence[Hypothesis]]) -> None:
    assert len(some) == len(others)
    for mine, its in zip(some, others, strict=True):
        assert names(mine) == names(its)
        assert_close([h.log_prob for h in mine], [h.log_prob for h in its], EXACT)
        assert_close([h.score for h in mine], [h.score for h in its], EXACT)


@torch.inference_mode()
def oracle(model: TidalTransformer, tokenizer: MixedTokenizer, prompt: str, num_beams: int, max_new_units: int,
           length_penalty: float) -> list[Hypothesis]:  # fmt: skip
    """The same search in plain Python: a new decoder for every step of every beam, and no early end."""
    grammar = Grammar(tokenizer)

    @functools.cache
    def candidates(blocks: tuple[str, ...], written: tuple[int, ...]) -> list[tuple[int, float]]:
        decoder = Decoder(model, tokenizer, 1)
        decoder.read([0], [[tokenizer.encode_block(text) for text in (*tokenizer.split(prompt), *blocks)]])
        for t in range(len(written) + 1):
            logits = decoder.step([0], [written[:t]])[0]
        allowed = [u for u in grammar.allowed(written).nonzero()[:, 0].tolist() if logits[u] > -math.inf]
        return list(zip(allowed, logits.log_softmax(-1)[allowed].tolist(), strict=True))

    def hypothesis(blocks: tuple[str, ...], reason: Any, kept: float, total: float, units: int) -> Hypothesis:
        text = "".join(blocks)
        return Hypothesis(prompt, text, prompt + text, list(blocks), reason, kept, total / n**length_penalty, units,
                          degenerate(blocks))  # fmt: skip

    live: list[Any] = [(0.0, (), (), 0.0, 0)]  # total, blocks, written, log_prob and units of the blocks
    found: list[Hypothesis] = []
    for n in range(1, max_new_units + 1):
        taken = [(total + p, unit, blocks, written, kept, units) for total, blocks, written, kept, units in live
                 for unit, p in candidates(blocks, written)]  # fmt: skip
        live = []
        for total, unit, blocks, written, kept, units in sorted(taken, key=lambda c: -c[0])[:num_beams]:
            if unit == tokenizer.eos_id:
                found.append(hypothesis(blocks, "eos", total, total, n))
            elif unit == tokenizer.eob_id:
                live.append((total, (*blocks, tokenizer.unreverse(written)), (), total, n))
            else:
                live.append((total, blocks, (*written, unit), kept, units))
    found += [hypothesis(blocks, "length", kept, total, units)
              for total, blocks, _, kept, units in sorted(live, key=lambda b: -b[0])]  # fmt: skip
    best: dict[str, Hypothesis] = {}
    for h in sorted(found, key=lambda h: -h.score):
        best.setdefault(h.text, h)
    return list(best.values())[:num_beams]


def check_beams(model: TidalTransformer, tokenizer: MixedTokenizer, prompts: Sequence[str], num_beams: int = 3,
                max_new_units: int = 12, length_penalty: float = 1.0) -> list[list[Hypothesis]]:  # fmt: skip
    """Cached, recomputed, alone and in any batch the same; with the log-probabilities of training."""
    search = functools.partial(beam_search, model, tokenizer, num_beams=num_beams, max_new_units=max_new_units,
                               length_penalty=length_penalty)  # fmt: skip
    found, table = search(prompts), BlockTable(tokenizer)
    for prompt, mine in zip(prompts, found, strict=True):
        assert 1 <= len(mine) <= num_beams
        assert len({h.text for h in mine}) == len(mine), "a text twice"
        assert [h.score for h in mine] == sorted((h.score for h in mine), reverse=True), "not best first"
        for h in mine:
            assert (h.prompt, h.text, h.completion) == (prompt, prompt + h.completion, "".join(h.blocks))
            assert all(h.blocks), "an empty block"
            ends: list[str | None] = [None] if h.stop_reason == "eos" else []
            trained = packed_log_probs(model, table, [[passage_of(table, (tokenizer.split(prompt), h.blocks + ends))]])
            assert len(trained) == h.units <= max_new_units
            assert_close(h.log_prob, trained.sum(), EXACT)
            if h.stop_reason == "eos" or h.units == max_new_units:
                assert_close(h.score, h.log_prob / h.units**length_penalty, EXACT)
            else:
                assert h.score * max_new_units**length_penalty < h.log_prob, "a dropped block counts in the score"
    assert_same(search(prompts, cached=False), found)
    assert_same(search(prompts, batch_size=1), found)
    assert_same(search(prompts[::-1], batch_size=3), found[::-1])
    return found


def check_oracle(model: TidalTransformer, tokenizer: MixedTokenizer, prompts: Sequence[str], num_beams: int = 3,
                 max_new_units: int = 9, length_penalty: float = 1.0) -> None:  # fmt: skip
    """The definition, written out, finds the same: nothing is dropped, and the search never ends too early."""
    found = beam_search(model, tokenizer, prompts, num_beams=num_beams, max_new_units=max_new_units,
                        length_penalty=length_penalty)  # fmt: skip
    assert_same(found, [oracle(model, tokenizer, p, num_beams, max_new_units, length_penalty) for p in prompts])


def check_greedy(model: TidalTransformer, tokenizer: MixedTokenizer, prompts: Sequence[str],
                 max_new_units: int = 14, tolerance: float = EXACT) -> None:  # fmt: skip
    """One beam is greedy decoding."""
    for length_penalty in (0.0, 1.0):
        found = beam_search(model, tokenizer, prompts, num_beams=1, max_new_units=max_new_units,
                            length_penalty=length_penalty)  # fmt: skip
        for mine, greedy in zip(found, engine.generate(model, tokenizer, prompts, max_new_units=max_new_units),
                                strict=True):  # fmt: skip
            assert names(mine) == [(greedy.text, greedy.blocks, greedy.stop_reason, greedy.units)]
            assert_close(mine[0].log_prob, greedy.log_prob, tolerance)


def check_kept(model: TidalTransformer, tokenizer: MixedTokenizer, prompts: Sequence[str], num_beams: int = 3) -> None:
    """Going on for longer loses no finished hypothesis, unless `num_beams` better ones are found."""
    before: list[list[Hypothesis]] = [[] for _ in prompts]
    n_kept = 0
    for max_new_units in range(1, 10):
        found = beam_search(model, tokenizer, prompts, num_beams=num_beams, max_new_units=max_new_units)
        for mine, old in zip(found, before, strict=True):
            for h in old:
                if h.stop_reason == "eos":
                    kept = any(m.text == h.text and m.score >= h.score - EXACT for m in mine)
                    n_kept += kept
                    assert kept or (len(mine) == num_beams and mine[-1].score >= h.score), f"{h} was dropped"
        before = found
    assert n_kept


def few_units(seed: int = 0, shape: str = "memory deep") -> tuple[TidalTransformer, MixedTokenizer]:
    """A model that can write two characters, A as a byte, `<eob>` and `<eos>`, and nothing else.

    Short and long hypotheses compete under it.
    """
    tokenizer = tokenizers()["bytes"]
    model = random_model(tokenizer, SHAPES[shape], seed=seed)
    mask = torch.full_like(model.head_mask, -math.inf)
    first = FIRST_BYTE + 256
    mask[[tokenizer.eob_id, tokenizer.eos_id, FIRST_BYTE + ord("A"), first, first + 3]] = 0
    model.head_mask = mask
    return model, tokenizer


def check_optimum(seed: int, penalty: float) -> None:
    """As many beams as there are texts find the best of them all."""
    model, tokenizer = few_units(seed)
    everything = oracle(model, tokenizer, "1", 10**6, 3, penalty)
    assert len(everything) > 8
    found = beam_search(model, tokenizer, ["1"], num_beams=80, max_new_units=3, length_penalty=penalty)
    assert_same(found, [everything])
    assert found[0][0].score == max(h.score for h in found[0])
    if penalty == 0:  # all that may be written, cut off or not, has probability one, less what the grammar forbids
        assert sum(math.exp(h.score) for h in everything) <= 1


def check_no_padding(model: TidalTransformer, tokenizer: MixedTokenizer) -> None:
    """Not even a head that prefers its padding gets a padded or control id written."""
    model.head_mask = torch.zeros_like(model.head_mask)
    with torch.no_grad():
        model.unit_embedding.weight[tokenizer.n_writable :] *= 50
    for cached in (True, False):
        for mine in beam_search(model, tokenizer, PROMPTS, max_new_units=8, cached=cached):
            for h in mine:
                assert [tokenizer.retokenize(tokenizer.write_units(text)).text for text in h.blocks] == h.blocks
                assert math.isfinite(h.score)
