"""Tiny tokenizers, random models and documents to hold the laws on."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from operator import le

import numpy as np
import torch
from hypothesis import strategies as st

from tests.tokenizer.strategies import hostile_text
from tidal.blocks import NOTHING, BlockTable, Passage, passage
from tidal.boundary_dropout import cut_at_random
from tidal.config import Shape, TidalConfig
from tidal.doctor import specimen
from tidal.model import TidalTransformer
from tidal.prepare.documents import Document, _hash, divide
from tidal.streams import Batch
from tidal.tokenizer import MixedTokenizer

# ------------------------------------------------------------------------------------------- tokenizers

_WORDS = "the there then other light night and land hand said god let be was saw fox dogs with within 'tis don't"
_HAN = "今天天气很好我们去公园玩你们明天见今天很好天气好我们明天去公园"


@functools.cache
def tokenizers() -> dict[str, MixedTokenizer]:
    """English with multi-character pieces, Chinese, digits, and one that must spell nearly all in bytes."""
    words = _WORDS.split()
    english = " ".join(f"{a} {b}, {c}." for i, a in enumerate(words) for b in words[::3] for c in words[i % 5 :: 7])
    han = [_HAN[i : i + 7] + "，" for i in range(25)] * 9
    sums = ["12 + 345 = 357\n"] * 9
    return {
        "english": MixedTokenizer.train([english, *sums], 480, max_block_units=8),
        "chinese": MixedTokenizer.train(han, 620, max_block_units=12),
        "digits": MixedTokenizer.train(sums, 400, max_block_units=6),
        "bytes": MixedTokenizer.train(sums, 288, max_block_units=4),
    }


TOKENIZERS = ("english", "chinese", "digits", "bytes")
tokenizer_names = st.sampled_from(TOKENIZERS)

# ----------------------------------------------------------------------------------------------- models

SHAPES = {
    "memory": Shape(d_model=16, n_heads=4, n_kv_heads=2, reader_layers=2, writer_layers=1, reader_ff=24, writer_ff=24,
                    suffix_rows=61, qk_norm=False, rotary_places=True),
    "memory deep": Shape(d_model=32, n_heads=2, n_kv_heads=2, reader_layers=0, writer_layers=3, reader_ff=16,
                         writer_ff=40, suffix_rows=0, qk_norm=True, query_gain=2.0, step_stride=1.0, step_window=3,
                         place_jitter=5),
    "block": Shape(d_model=24, n_heads=3, n_kv_heads=1, reader_layers=2, writer_layers=2, reader_ff=24, writer_ff=24,
                   recall=True, suffix_rows=7, writer_attention="block", qk_norm=True, step_stride=0.375,
                   step_window=2),
    "none": Shape(d_model=16, n_heads=2, n_kv_heads=1, reader_layers=3, writer_layers=2, reader_ff=24, writer_ff=24,
                  foretell=True, recall=True, suffix_rows=1000, writer_attention="none", qk_norm=False),
}  # fmt: skip
shape_names = st.sampled_from(tuple(SHAPES))


def config_of(tokenizer: MixedTokenizer, shape: Shape) -> TidalConfig:
    """What training would write for this tokenizer."""
    return TidalConfig(tokenizer.vocab_size, tokenizer.n_writable, tokenizer.n_head, tokenizer.max_block_units,
                       tokenizer.fingerprint, shape)  # fmt: skip


def random_model(tokenizer: MixedTokenizer, shape: Shape, dtype: torch.dtype = torch.float64,
                 seed: int = 0) -> TidalTransformer:  # fmt: skip
    """A model in which everything matters."""
    return specimen.random_model(tokenizer, shape, seed).to(dtype)


@functools.cache
@torch.inference_mode(False)  # whichever test is the first to ask for it
def _shared(tokenizer: str, shape: str, dtype: torch.dtype) -> TidalTransformer:
    return random_model(tokenizers()[tokenizer], SHAPES[shape], dtype)


def tiny(tokenizer: str, shape: str, dtype: torch.dtype = torch.float64) -> tuple[TidalTransformer, MixedTokenizer]:
    """A random model with its tokenizer. The model is shared: copy it before changing it."""
    return _shared(tokenizer, shape, dtype), tokenizers()[tokenizer]


def tiny_copy(tokenizer: str, shape: str) -> tuple[TidalTransformer, MixedTokenizer]:
    """Like `tiny`, to be changed."""
    model, its_tokenizer = tiny(tokenizer, shape)
    return copy.deepcopy(model), its_tokenizer


# -------------------------------------------------------------------------------------------- documents


@st.composite
def passages(draw: st.DrawFn, table: BlockTable, max_size: int = 4, dropout: bool = True) -> Passage:
    """A document with or without a prompt, an end, boundary dropout, a place offset, stretched positions; or empty."""
    whole = passage(
        table,
        draw(st.just("") | hostile_text(max_size=max_size)),
        draw(hostile_text(max_size=max_size)),
        ends=draw(st.booleans()),
        place_offset=draw(st.sampled_from((0, 0, 3))),
    )
    whole = dataclasses.replace(whole, position_scale=draw(st.sampled_from((1.0, 1.0, 1.7))))
    if not dropout:
        return whole
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    cut = cut_at_random(whole, table, rng, draw(st.sampled_from((0.0, 0.5))))
    return dataclasses.replace(cut, n_stray=draw(st.sampled_from((0, 0, 2))), stray_offset=1)


@st.composite
def rows_of_passages(draw: st.DrawFn, table: BlockTable) -> list[list[Passage]]:
    """Rows of different lengths, each with several documents."""
    row = st.lists(passages(table), min_size=1, max_size=3)
    return draw(st.lists(row, min_size=1, max_size=3))


def short_text() -> st.SearchStrategy[str]:
    """Hostile, and short enough to be decoded step by step."""
    return hostile_text(max_size=4).map(lambda text: text[:14])


def differing(one: Batch, other: Batch) -> list[str]:
    """The fields in which two batches differ, be it in dtype or padding."""
    def alike(a: object, b: object) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        return a == b

    return [f.name for f in dataclasses.fields(Batch) if not alike(getattr(one, f.name), getattr(other, f.name))]


def remembered(scripts: Sequence[list[int]], written: list[int]) -> list[int]:
    """What followed `written` the last time, of blocks written as `scripts` (the first is `<bos>`): in any of them, in
    one that followed the same block, the same two. A search, where the package looks up hashes."""
    found = []
    for order in range(3):
        same = scripts[-order:] if order else []
        at = [i for i in range(max(1, order), len(scripts))
              if scripts[i][: len(written)] == written and len(scripts[i]) > len(written)
              and scripts[i - order : i] == same and (order or written)]  # fmt: skip
        found.append(scripts[at[-1]][len(written)] if at else NOTHING)
    return found


def fill_rows(whole: Iterable[Passage], table: BlockTable, reader_budget: int,
              writer_budget: int) -> Iterator[list[Passage]]:  # fmt: skip
    """What `share_rows` must come to: rows of the longest passages left while they fit, then of the shortest.

    A passage over a budget on its own gets a row of its own.
    """
    def size(*row: Passage) -> tuple[int, int]:
        return (sum(int(table.n_tokens(p.blocks).sum()) for p in row),
                sum(int(table.n_targets(p.blocks[p.supervised]).sum()) for p in row))  # fmt: skip

    left = sorted(whole, key=lambda p: -size(p)[0])
    while left:
        row = [left.pop(0)]
        for end in (0, -1):
            while left and all(map(le, size(*row, left[end]), (reader_budget, writer_budget))):
                row.append(left.pop(end))
        yield row


def hold_out(
    documents: Iterable[Document], fraction: float = 0.05, seed: int = 0, cap: int = 1_000_000
) -> tuple[list[Document], list[Document]]:
    """What `survey` and its parts must come to, with all documents in memory; both sides keep their order."""
    everything = list(documents)
    sizes = np.array([len(document) for document in everything], np.int64)
    digests = np.frombuffer(b"".join(_hash(document.prompt + document.completion) for document in everything), "u8")
    has_prompt = np.array([bool(document.prompt) for document in everything])
    division = divide(sizes, has_prompt, digests, fraction, seed, cap)
    held_out = [everything[i] for i in np.flatnonzero(division.held_out)]
    if division.cut >= 0:
        whole = everything[division.cut]
        at = division.tail_start(whole.completion[slice(*division.reach)])
        everything[division.cut] = Document("", whole.completion[:at], whole.source)
        held_out = [Document("", whole.completion[at:], f"{whole.source} (tail)")]
    return [everything[i] for i in np.flatnonzero(~(division.held_out | division.left_out))], held_out
