"""A plain causal transformer over bytes or over tokens, made of Tidal's own layers and attention.

    coder = BYTES                               or coder_of(tokenizer)
    model = CausalTransformer(CausalConfig.of(coder, d_model=256, layers=10))
    losses = model(pack([[Document(coder.encode("prompt"), coder.encode("completion"))]], coder))

cached.py generates with it.

Shape suffixes as in tidal/model.py: b rows, l positions, d width, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tidal.blocks import FACTOR
from tidal.config import Shape, TidalConfig
from tidal.kernels import TilePlan
from tidal.layers import Layer, View, log_softmax, product
from tidal.recall import N_RECALLED, repeats
from tidal.tokenizer import MixedTokenizer

NOTHING = -1  # the target of a position that is not learnt
NGRAMS = (2, 3)  # lengths of those that have hashed rows


# --------------------------------------------------------------------------------------------- text ⇄ ids


@dataclass(frozen=True)
class Coder:
    """How a text becomes ids."""

    vocab_size: int
    bos_id: int
    eos_id: int
    never: tuple[int, ...]
    """Ids that are never written."""
    encode: Callable[[str], list[int]]
    """Ids of a text, without `<bos>` and `<eos>`."""


BYTES = Coder(258, 256, 257, (256,), lambda text: list(text.encode()))


def coder_of(tokenizer: MixedTokenizer) -> Coder:
    """The tokens that Tidal's reader reads."""
    t = tokenizer
    return Coder(t.vocab_size, t.bos_id, t.eos_id, (t.eob_id, t.bob_id, t.bos_id), t.encode)


# ------------------------------------------------------------------------------------------------ batches


@dataclass(frozen=True)
class Document:
    """Ids of a prompt, which is not learnt, and of what follows."""

    prompt: Sequence[int]
    completion: Sequence[int]
    ends: bool = True
    """Whether `<eos>` comes after it."""


@dataclass(frozen=True)
class CausalBatch:
    """Rows of documents one after the other, padded with positions that see nothing."""

    ids: Tensor
    """int64 [B, L]: of every document <bos>, prompt, completion"""
    positions: Tensor
    """float32 [B, L], counted in the document"""
    sees: Tensor
    """int32 [B, L, 2, 2], ranges from the document's start up to the position itself"""
    targets: Tensor
    """int64 [B, L], -1 where nothing is learnt"""
    learnt: Tensor
    """int64 [n], the others, counted over all rows; a mask of them would make a GPU's host wait for their number"""
    recalled: Tensor | None = None
    """int64 [B, L, 3], what followed the same one, two and three ids the last time, -1 where nothing did"""
    ngrams: Tensor | None = None
    """int64 [B, L, 2], hashes of the last two and the last three ids, -1 where the document has fewer"""

    def to(self, device: torch.device | str) -> CausalBatch:
        """The batch on another device."""
        def moved(x: Any) -> Any:
            return x if x is None else x.to(device)

        return CausalBatch(*(moved(getattr(self, f.name)) for f in fields(self)))


def pack(rows: Sequence[Sequence[Document]], coder: Coder, recall: bool = False, ngrams: bool = False) -> CausalBatch:
    """Lay documents out in rows; with what they recall and hashes of their n-grams, if that is asked for."""
    width = max(sum(1 + len(d.prompt) + len(d.completion) for d in row) for row in rows)
    ids, targets = np.zeros((len(rows), width), np.int64), np.full((len(rows), width), NOTHING, np.int64)
    positions, sees = np.zeros((len(rows), width), np.float32), np.zeros((len(rows), width, 2, 2), np.int32)
    for row, documents in enumerate(rows):
        start = 0
        for d in documents:
            end = start + 1 + len(d.prompt) + len(d.completion)
            ids[row, start:end] = [coder.bos_id, *d.prompt, *d.completion]
            last = [coder.eos_id if d.ends else NOTHING]
            targets[row, start:end] = [NOTHING] * len(d.prompt) + list(d.completion) + last
            positions[row, start:end] = np.arange(end - start)
            sees[row, start:end, 0, 0], sees[row, start:end, 0, 1] = start, np.arange(start, end) + 1
            start = end
    batch = CausalBatch(*map(torch.from_numpy, (ids, positions, sees, targets, np.flatnonzero(targets != NOTHING))))
    if recall:
        found = np.stack([recalled(*row) for row in zip(ids, positions, strict=True)])
        batch = replace(batch, recalled=torch.from_numpy(found))
    return replace(batch, ngrams=torch.from_numpy(ngram_hashes(ids, positions))) if ngrams else batch


def recalled(ids: npt.NDArray[np.int64], position: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """For every id [L] of a row the ids [L, 3] that followed it, it and the one before, it and the two before, the last
    time in its document; what tidal/recall.py tells a writer. Positions [L] are counted in the document.
    """
    document = np.cumsum(position == 0)
    found = np.full((len(ids), N_RECALLED), NOTHING)
    key = document.astype(np.uint64)
    for order in range(N_RECALLED):
        key = (key ^ (np.roll(ids, order) + 1).astype(np.uint64)) * np.uint64(FACTOR)
        last, now = repeats(key, document, np.flatnonzero(position >= order))
        found[now, order] = ids[last + 1]
    return found


def ngram_hashes(ids: npt.NDArray[np.int64], positions: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """For ids [B, L], hashes [B, L, 2] of 32 bits that name the last two and the last three ids of the document; what
    the hashed suffixes are to Tidal's writer. Positions [B, L] are counted in the document.
    """
    found = np.full((*ids.shape, len(NGRAMS)), NOTHING)
    for column, order in enumerate(NGRAMS):
        key = np.full(ids.shape, order, np.uint64)
        for back in range(order):
            key = (key ^ (np.roll(ids, back, 1) + 1).astype(np.uint64)) * np.uint64(FACTOR)
        found[..., column] = np.where(positions >= order - 1, (key >> np.uint64(32)).astype(np.int64), NOTHING)
    return found


# -------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class CausalConfig:
    """The shape of a baseline."""

    vocab_size: int
    bos_id: int
    eos_id: int
    never: tuple[int, ...]
    d_model: int = 128
    n_heads: int = 4
    n_kv_heads: int = 4
    layers: int = 4
    d_ff: int = 384
    qk_norm: bool = True
    recall: bool = False
    """As Tidal's; it cannot be decoded with, and is there to be fair in benchmarks/quality.py."""
    ngram_rows: int = 0
    """Rows of a hashed table of the last two and three ids, added to the input (Huang et al. 2025, "Over-Tokenized
    Transformer"), as Tidal's writer has one of suffixes; also for the sake of fairness."""

    @classmethod
    def of(cls, coder: Coder, **shape: Any) -> CausalConfig:
        """For the ids of `coder`."""
        return cls(coder.vocab_size, coder.bos_id, coder.eos_id, coder.never, **shape)

    def with_parameters(self, total: int) -> CausalConfig:
        """With the feed-forward width, a multiple of 8, that brings the parameters nearest to `total`."""
        with torch.device("meta"):
            narrow = CausalTransformer(replace(self, d_ff=8)).n_parameters()["total"]
        per_step = 8 * 3 * self.d_model * self.layers
        return replace(self, d_ff=8 * max(1, 1 + round((total - narrow) / per_step)))


class CausalTransformer(nn.Module):
    """`forward` is the packed pass; `run` is what it shares with the decoder."""

    head_mask: Tensor

    def __init__(self, config: CausalConfig) -> None:
        super().__init__()
        self.config, d = config, config.d_model
        shape = Shape(d_model=d, n_heads=config.n_heads, n_kv_heads=config.n_kv_heads, qk_norm=config.qk_norm)
        as_tidal = TidalConfig(config.vocab_size, config.vocab_size, config.vocab_size, 1, "", shape)  # for the shape
        self.embedding = nn.Embedding(config.vocab_size, d)  # also the head
        self.layers = nn.ModuleList(Layer(as_tidal, config.d_ff) for _ in range(config.layers))
        self.norm = nn.RMSNorm(d, eps=1e-6)
        if config.recall:  # of each V + 1 rows, the first says that nothing is recalled
            self.recall_embedding = nn.Embedding(N_RECALLED * (config.vocab_size + 1), d)
        if config.ngram_rows:  # row 0 is "none" and stays zero
            self.ngram_embedding = nn.Embedding(1 + config.ngram_rows, d, padding_idx=0)
        mask = torch.zeros(config.vocab_size)
        mask[list(config.never)] = -math.inf
        self.register_buffer("head_mask", mask, persistent=False)
        self.reset()

    def reset(self) -> None:
        """Initialise the weights as Tidal does."""
        d = self.config.d_model
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                residual = name.endswith((".out", ".down"))
                scale = 0.6 / (math.sqrt(2 * len(self.layers)) if residual else 1.0)
                nn.init.normal_(module.weight, std=d**-0.5 * scale)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=d**-0.5)
        if self.config.recall:
            table = self.recall_embedding.weight.data.view(N_RECALLED, -1, d)
            table[:, 0], table[:, 1:] = 0, self.embedding.weight.data / math.sqrt(N_RECALLED)
        if self.config.ngram_rows:  # what was never met adds nothing
            nn.init.zeros_(self.ngram_embedding.weight)

    def run(self, ids: Tensor, views: Sequence[View], recalled: Tensor | None = None,
            ngrams: Tensor | None = None) -> Tensor:  # fmt: skip
        """States [B, L, D] of ids [B, L]; one view a layer."""
        x_bld = self.embedding(ids)
        if self.config.recall:
            if recalled is None:
                raise RuntimeError("this baseline recalls; pack its batches with recall=True")
            rows = recalled - NOTHING + (self.config.vocab_size + 1) * torch.arange(N_RECALLED, device=ids.device)
            told = F.embedding_bag(rows.flatten(0, 1), self.recall_embedding.weight, mode="sum")
            x_bld = x_bld + told.view_as(x_bld)
        if self.config.ngram_rows:
            if ngrams is None:
                raise RuntimeError("this baseline has hashed n-grams; pack its batches with ngrams=True")
            rows = torch.where(ngrams == NOTHING, 0, 1 + ngrams % self.config.ngram_rows)
            told = F.embedding_bag(rows.flatten(0, 1), self.ngram_embedding.weight, mode="sum", padding_idx=0)
            x_bld = x_bld + told.view_as(x_bld)
        for layer, view in zip(self.layers, views, strict=True):
            x_bld = layer(x_bld, view)
        states: Tensor = self.norm(x_bld)
        return states

    def head(self, states: Tensor) -> Tensor:
        """Logits [..., V]; ids that are never written are -inf."""
        return product(states, self.embedding.weight) + self.head_mask

    def supervised(self, batch: CausalBatch) -> tuple[Tensor, Tensor]:
        """Logits [n, V] and targets [n] of all that is learnt, row by row."""
        plan = TilePlan.build(batch.sees, batch.ids.shape[1])
        view = View(batch.sees, batch.positions, batch.positions, plan=plan)
        states = self.run(batch.ids, [view] * len(self.layers), batch.recalled, batch.ngrams)
        states, targets = (x.flatten(0, 1).index_select(0, batch.learnt) for x in (states, batch.targets))
        return self.head(states), targets

    def forward(self, batch: CausalBatch) -> tuple[Tensor, int]:
        """Sum of the losses in nats, and of how many targets."""
        logits_nv, targets = self.supervised(batch)
        return F.cross_entropy(logits_nv, targets, reduction="sum"), len(targets)

    def log_probs(self, batch: CausalBatch) -> Tensor:
        """Log-probability of every target [n], row by row."""
        logits_nv, targets = self.supervised(batch)
        return log_softmax(logits_nv).gather(-1, targets[:, None])[:, 0]

    def tables(self) -> list[Tensor]:
        """The parameters that learn faster and without weight decay, as in Tidal."""
        return [m.weight for m in self.modules() if isinstance(m, nn.Embedding)]

    def n_parameters(self) -> dict[str, int]:
        """Counts of parameters: `tables` and `total`."""
        return {"tables": sum(t.numel() for t in self.tables()), "total": sum(p.numel() for p in self.parameters())}

    def cache_bytes(self, n: int) -> int:
        """Bytes of cached keys and values for a context of `n` ids, in the dtype of the weights."""
        config = self.config
        width = 2 * config.n_kv_heads * (config.d_model // config.n_heads)
        return n * config.layers * width * self.embedding.weight.element_size()
