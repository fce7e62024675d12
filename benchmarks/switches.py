"""Ways to build Tidal that were tried and are no part of the package, for benchmarks/ablations.py.

Each is the package's own code with one thing changed after it or in a subclass, and is as honest as the default:
what is asked for is never fed earlier (tests/quality/test_variants.py).
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from tidal.blocks import EOS_BLOCK, NOTHING, SUFFIX_ORDERS, BlockTable, Passage
from tidal.boundary_dropout import cut_blocks
from tidal.config import Optim, Shape, TidalConfig, Train
from tidal.model import TidalTransformer
from tidal.prepare.corpus import Rows
from tidal.streams import Batch
from tidal.tokenizer import NO_PLACE, MixedTokenizer, Spelling
from tidal.train.optim import Optimizer
from tidal.train.recipes.text import TextRecipe


@dataclass(frozen=True)
class Switches:
    """What can be changed; the first of each is what the package does."""

    write_order: Literal["backward", "forward"] = "backward"
    """Forward: first character first. What has been written is then a prefix, whose hashes take the suffixes' part;
    places count from the block's beginning, for a forward writer knows only the number of its step."""
    reading: Literal["block", "causal", "tokens"] = "block"
    """What a token sees of its own block: all of it, or what is before it; `tokens`: and every token, not only a
    block's last, learns to foretell the next one."""
    places: Literal["on", "off"] = "on"
    """Off: every place is 0, so that only attention and suffixes know the order in a block."""
    suffix_orders: str = "".join(map(str, SUFFIX_ORDERS))
    """Which suffixes are looked up: 0 all that was written, 2 the last two units, 3 the last three."""
    suffix_gains: Literal["on", "off"] = "on"
    """Off: suffixes only add to what a step is fed, and do not scale the context."""
    block_rule: Literal["word", "token", "pair", "many"] = "word"
    """What is written at a time: a word, a token of it, two words, as much of a line as the longest block holds."""
    cuts: Literal["places", "blocks"] = "places"
    """Blocks: boundary dropout cuts long blocks no more often than short ones; the probability is that of a block."""
    beginnings: Literal["read", "learnt"] = "read"
    """Learnt: of a block that boundary dropout cuts, not only the rest is asked for."""
    head: Literal["tied", "own"] = "tied"
    """Own: the head has weights of its own, in place of the unit embeddings."""
    matrices: Literal["muon", "adamw"] = "muon"
    """What learns the matrices."""

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(Switches).items():
            if (allowed := typing.get_args(kind)) and getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if strange := set(self.suffix_orders) - set(map(str, SUFFIX_ORDERS)):
            raise ValueError(f"suffix_orders has {sorted(strange)}; there are {SUFFIX_ORDERS}")

    def on_batch(self, batch: Batch) -> Batch:
        """The batch as these switches feed it."""
        changed: dict[str, Tensor] = {}
        if self.reading != "block":
            sees = batch.reader_sees.clone()
            itself = torch.arange(1, 1 + sees.shape[1], dtype=sees.dtype)
            sees[..., 1] = torch.minimum(sees[..., 1], itself)  # padding stays as it is, empty
            changed["reader_sees"] = sees
        if self.reading == "tokens":
            after, position = batch.reader_ids.roll(-1, 1), batch.reader_positions
            follows = position.roll(-1, 1) == position + 1
            follows[:, -1] = False
            asked = (batch.aux_targets == NOTHING) & follows
            changed["aux_targets"] = torch.where(asked, after, batch.aux_targets)
        if self.places == "off":
            changed |= {name: torch.zeros_like(getattr(batch, name)) for name in ("reader_places", "writer_places")}
        off = [i for i, order in enumerate(SUFFIX_ORDERS) if str(order) not in self.suffix_orders]
        if off:
            changed["suffixes"] = batch.suffixes.index_fill(2, torch.tensor(off), NOTHING)
        return dataclasses.replace(batch, **changed) if changed else batch  # type: ignore[arg-type]


class ForwardTable(BlockTable):
    """Blocks that are written first character first; a token's place is the number of units before it."""

    def _entry(self, text: str) -> tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
        block = self.tokenizer.encode_block(text)
        long = [i >= self.tokenizer.n_writable for i in block.tokens]
        widths = [len(self.tokenizer.id_bytes[i].decode()) if x else 1 for i, x in zip(block.tokens, long, strict=True)]
        before = (np.cumsum(widths) - widths).tolist()
        places = tuple(n if place != NO_PLACE else place for n, place in zip(before, block.places, strict=True))
        return text, block.tokens, places, (*block.units, self.tokenizer.eob_id), block.tokens[0]


class OwnHead(TidalTransformer):
    """A head of its own."""

    def __init__(self, config: TidalConfig, spelling: Spelling | None = None) -> None:
        super().__init__(config, spelling)
        self.own_head = nn.Embedding(config.n_head, config.shape.d_model, _weight=self.unit_embedding.weight.clone())

    def head(self, states: Tensor) -> Tensor:
        logits: Tensor = states @ self.own_head.weight.T + self.head_mask
        return logits


def forward_spelling(tokenizer: MixedTokenizer) -> Spelling:
    """How tokens are spelled first character first."""
    words = {i: tokenizer.id_bytes[i].decode() for i in tokenizer.spelling.order.tolist() if i != tokenizer.eos_id}
    spelled = [(i, tuple(tokenizer.write_units(word)[::-1])) for i, word in words.items()]
    return Spelling([(tokenizer.eos_id, (tokenizer.eos_id,)), *spelled], tokenizer.eob_id, tokenizer.eos_id)


def model_of(tokenizer: MixedTokenizer, shape: Shape, switches: Switches) -> TidalTransformer:
    """A fresh model."""
    model = (OwnHead if switches.head == "own" else TidalTransformer).of(tokenizer, shape)
    if switches.suffix_gains == "off":  # they begin as zeros, and so they stay
        added = (torch.arange(2 * shape.d_model) >= shape.d_model).float()
        model.suffix_embedding.weight.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: gradient * added.to(gradient))  # fmt: skip
    return model


def optimizer_of(model: TidalTransformer, settings: Optim, matrices: str = "muon") -> Optimizer:
    """Tidal's optimizer, or one with AdamW for the matrices, too, at the same rate and decay."""
    optimizer = Optimizer(model, settings)
    if matrices == "adamw":
        muon = optimizer.parts[0].param_groups[0]
        optimizer.parts[0] = torch.optim.AdamW([{"params": muon["params"], "scale": 1.0}], lr=settings.lr,
                                               weight_decay=settings.weight_decay, betas=(0.9, settings.beta2),
                                               fused=True)  # fmt: skip
    return optimizer


class SwitchedRecipe(TextRecipe):
    """The recipe `text` with switches. Its table must be the only one that its rows and passages ever meet."""

    def __init__(self, settings: Train, switches: Switches) -> None:
        super().__init__(settings)
        self.switches = switches
        if switches.write_order == "forward":
            self.tokenizer.spelling = forward_spelling(self.tokenizer)
            self.table = ForwardTable(self.tokenizer)
            self.rows.table = self._validation.table = self.table
        if switches.block_rule != "word":
            self.rows = _Regrouped(self.rows, self.regrouped)  # type: ignore[assignment]

    def batch(self, step: int, share: tuple[int, int] = (0, 1)) -> Batch:
        return self.switches.on_batch(super().batch(step, share))

    def cut(self, p: Passage, rng: np.random.Generator) -> Passage:
        if self.switches.cuts == "blocks":
            p = cut_blocks(p, self.table, rng, np.full(len(p.blocks), self.settings.text.cut_probability))
        else:
            p = super().cut(p, rng)
        return p if self.switches.beginnings == "read" else dataclasses.replace(p, read_only=())

    def regrouped(self, p: Passage) -> Passage:
        """The passage in the blocks of the switches; its prompt ends where it did."""
        if self.switches.block_rule == "word":
            return p
        ends = len(p.blocks) > p.supervise_from and p.blocks[-1] == EOS_BLOCK
        text = [self.table.texts[i] for i in p.blocks.tolist()]
        before, after = text[1 : p.supervise_from], text[p.supervise_from : len(text) - ends]
        parts = [self._group(before), self._group(after)]
        blocks = np.concatenate([p.blocks[:1], *map(self.table.indices, parts), p.blocks[-1:] if ends else []])
        return dataclasses.replace(p, blocks=blocks.astype(np.int32), supervise_from=1 + len(parts[0]))

    def _group(self, texts: Sequence[str]) -> list[str]:
        rule, tokenizer = self.switches.block_rule, self.tokenizer
        grouped: list[str] = []
        if rule == "token":
            for text in texts:
                pieces = [tokenizer.id_bytes[i] for i in tokenizer.encode_block(text).tokens]
                characters = b"".join(pieces).decode() == text and all(map(_is_text, pieces))
                grouped += [piece.decode() for piece in pieces] if characters else [text]
            return grouped
        words = units = 0
        most = 2 if rule == "pair" else tokenizer.max_block_units
        for text in texts:
            n = len(tokenizer.encode_block(text).units)
            if words in (0, most) or units + n > tokenizer.max_block_units or "\n" in grouped[-1]:
                grouped.append("")
                words = units = 0
            grouped[-1] += text
            words, units = words + 1, units + n
        return grouped


class _Regrouped:
    def __init__(self, rows: Rows, regroup: Callable[[Passage], Passage]) -> None:
        self.rows, self.regroup = rows, regroup

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> list[Passage]:
        return [self.regroup(p) for p in self.rows[i]]


def _is_text(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True
