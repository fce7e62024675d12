"""Bugs in text, ids and what may be written: checks 1 to 6."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.doctor.plant import Plant, both, replacing
from tidal.blocks import BlockTable, Passage, passage
from tidal.infer.grammar import Grammar
from tidal.model import Losses, TidalTransformer
from tidal.streams import Batch
from tidal.tokenizer import Block, MixedTokenizer

# ------------------------------------------------------------------------------------------ 1 to 4, text


def prompt_stripped(stream: Callable[..., Any]) -> Callable[..., Any]:
    return lambda model, tokenizer, prompts, **how: stream(model, tokenizer, [p.strip() for p in prompts], **how)


def joined_before_split(table: BlockTable, prompt: str, completion: str, **how: Any) -> Passage:
    right = passage(table, prompt, completion, **how)
    whole = passage(table, "", prompt + completion, **how)
    n = len(table.tokenizer.split(prompt)) if prompt else 0
    return dataclasses.replace(whole, supervise_from=min(1 + n, len(whole.blocks)), place_offset=right.place_offset)


def cache_without_space(encode: Callable[..., Block]) -> Callable[..., Block]:
    def bugged(self: MixedTokenizer, text: str) -> Block:
        seen: dict[str, Block] = self.__dict__.setdefault("_seen", {})
        return seen.setdefault(text.strip(" ") or text, encode(self, text))

    return bugged


def lower_case_in_training(entry: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, text: entry(self, text.lower())


def mark_is_space(make: Callable[..., Block]) -> Callable[..., Block]:
    return lambda self, text: make(self, text.replace("\u2581", " "))


def bytes_not_turned_round(self: MixedTokenizer, block: Block) -> dict[str, Any]:
    """Characters are, but the bytes of each are written first byte first."""
    runs: list[list[int]] = []
    for unit in block.units:
        is_byte = 2 <= unit < 258
        if is_byte and runs and 2 <= runs[-1][0] < 258:
            runs[-1].append(unit)
        else:
            runs.append([unit])
    return {"units": tuple(unit for run in runs for unit in run[::-1])}


def read_back_in_characters(retokenize: Callable[..., Block]) -> Callable[..., Block]:
    def bugged(self: MixedTokenizer, units: Sequence[int]) -> Block:
        right = retokenize(self, units)
        return dataclasses.replace(right, tokens=right.units, places=tuple(range(len(right.units)))[::-1])

    return bugged


def space_tokenized_apart(retokenize: Callable[..., Block]) -> Callable[..., Block]:
    def bugged(self: MixedTokenizer, units: Sequence[int]) -> Block:
        right = retokenize(self, units)
        if right.text[0] != " " or len(right.text) == 1:
            return right
        space, rest = self.encode_block(" "), self.encode_block(right.text[1:])
        return dataclasses.replace(right, tokens=space.tokens + rest.tokens,
                                   places=(len(rest.units), *rest.places))  # fmt: skip

    return bugged


def places_of_read_back(retokenize: Callable[..., Block]) -> Callable[..., Block]:
    def bugged(self: MixedTokenizer, units: Sequence[int]) -> Block:
        right = retokenize(self, units)
        return dataclasses.replace(right, places=right.places[::-1])

    return bugged


def special_strings(names: dict[str, Callable[[MixedTokenizer], int]]) -> Plant:
    """Literal strings that become one id, as most tokenizers do with "special tokens"."""
    pattern = re.compile(f"({'|'.join(map(re.escape, names))})")

    def split(right: Callable[..., list[str]]) -> Callable[..., list[str]]:
        def bugged(self: MixedTokenizer, text: str, *rest: Any) -> list[str]:
            parts = [part for part in pattern.split(text) if part]
            return [b for part in parts for b in ([part] if part in names else right(self, part, *rest))]

        return bugged

    def make(right: Callable[..., Block]) -> Callable[..., Block]:
        def bugged(self: MixedTokenizer, text: str) -> Block:
            block = right(self, text)
            return dataclasses.replace(block, tokens=(names[text](self),), places=(0,)) if text in names else block

        return bugged

    return both(replacing(MixedTokenizer, "split", split), replacing(MixedTokenizer, "_make_block", make))


# --------------------------------------------------------------------------- 5 and 6, the head and the mask


def head_without_mask(head: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, states: states @ self.unit_embedding.weight.T


def bob_can_be_written(model: TidalTransformer) -> None:
    model.head_mask[model.config.n_writable] = 0


def wider_head(model: TidalTransformer) -> None:
    weight = model.unit_embedding.weight
    model.unit_embedding.weight = nn.Parameter(torch.cat([weight, torch.randn(64, weight.shape[1]) / 4]))
    model.head_mask = torch.cat([model.head_mask, torch.zeros(64)])


def loss_over_padding(self: TidalTransformer, batch: Batch) -> Losses:
    """The normalizer of the training loss counts the columns that pad the head."""
    _, states = self.states(batch)
    written = batch.targets != -1
    logits = states[written] @ self.unit_embedding.weight.T
    units = F.cross_entropy(logits, batch.targets[written], reduction="sum")
    return Losses(units, int(written.sum()), units * 0, 1)


def padding_in_beams(take: Callable[..., Any]) -> Callable[..., Any]:
    def bugged(logits: Tensor, allowed: Tensor, *rest: Any) -> Any:
        width = allowed.shape[1]
        return take(logits.masked_fill(logits == -torch.inf, 1.0),
                    allowed | (torch.arange(width) >= width - 8), *rest)  # fmt: skip

    return bugged


def masked_with_zero(choose: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda logits, allowed, *rest: choose(logits.masked_fill(~allowed, 0.0), torch.ones_like(allowed), *rest)


def grammar_only_when_greedy(choose: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda logits, allowed, settings, *rest: choose(
        logits, torch.ones_like(allowed) if settings[0].temperature else allowed, settings, *rest)  # fmt: skip


def eob_first(allowed: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def bugged(self: Grammar, written: Sequence[int]) -> Tensor:
        mask = allowed(self, written).clone()
        mask[self.tokenizer.eob_id] |= not written
        return mask

    return bugged


def no_cap(allowed: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, written: allowed(self, written[-2:])


def beams_masked_with_zero(take: Callable[..., Any]) -> Callable[..., Any]:
    def bugged(logits: Tensor, allowed: Tensor, *rest: Any) -> Any:
        return take(logits.masked_fill(~allowed & (logits > -torch.inf), 0.0), allowed | (logits > -torch.inf), *rest)

    return bugged


def one_more_in_beams(take: Callable[..., Any]) -> Callable[..., Any]:
    """A block that must end may as well go on by the first character of the alphabet."""

    def bugged(logits: Tensor, allowed: Tensor, *rest: Any) -> Any:
        either = torch.isin(torch.arange(allowed.shape[1]), torch.tensor([0, 258]))
        must_end = allowed.sum(1, keepdim=True) == 1
        return take(torch.where(must_end, torch.where(either, 0.0, -50.0), logits),
                    allowed | must_end & either, *rest)  # fmt: skip

    return bugged


def no_lead_of(byte: int) -> Plant:
    """As where an overlong spelling is to be refused."""
    return replacing(Grammar, "_finishes", lambda right: lambda self, spelling: spelling[0] != byte and right(
        self, spelling))  # fmt: skip
