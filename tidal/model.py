"""TidalTransformer: a deep reader of tokens and a shallow writer of characters.

Shape suffixes: b rows, i reader tokens, s writer steps, k keys, h heads, d width (of a head in q, k, v),
v reader vocabulary, u head columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tidal.blocks import NOTHING
from tidal.config import Shape, TidalConfig
from tidal.foretold import Foretold
from tidal.kernels import TilePlan, prepare
from tidal.layers import KeysValues, Layer, Linear, View, log_softmax, product, sinusoids
from tidal.recall import N_RECALLED
from tidal.streams import Batch
from tidal.tokenizer import MixedTokenizer, Spelling


class Losses(NamedTuple):
    """Sums over units of one batch, in nats; divide by the counts. (A tuple, in which FSDP finds the tensors.)"""

    units: Tensor
    """[] loss of the written units"""
    n_units: int
    aux: Tensor
    """[] auxiliary loss: of the next block's last token, asked of the reader"""
    n_aux: int


class TidalTransformer(nn.Module):
    """Reader and writer. `forward` is the packed pass; `read` and `write` are its two halves, for the decoder."""

    head_mask: Tensor
    place_table: Tensor
    """[n_places + 1, D], one for reader and writer, added to embeddings; or [n_places + 1, R], to turn heads by"""
    recompute = False
    """Whether layers are computed again in the backward pass, instead of being remembered."""

    def __init__(self, config: TidalConfig, spelling: Spelling | None = None) -> None:
        """`spelling` is the tokenizer's; a model that foretells cannot run without it."""
        super().__init__()
        self.config, shape = config, config.shape
        self.foretold = Foretold(config, spelling) if shape.foretell else None
        d = shape.d_model
        self.token_embedding = nn.Embedding(config.vocab_size, d)
        self.unit_embedding = nn.Embedding(config.n_head, d)  # also the head
        with torch.device("cpu"):  # small, and on `meta` its operations would import torch's compiler
            if shape.rotary_places:
                places = sinusoids(config.n_places, d // shape.n_heads // 2)
            else:  # rows have twice the norm of an embedding
                places = math.sqrt(8 / d) * sinusoids(config.n_places, d)
            places = torch.cat([places, torch.zeros_like(places[:1])])  # the last is NO_PLACE
        self.register_buffer("place_table", places.to(self.device), persistent=False)
        self.reader = nn.ModuleList(Layer(config, shape.reader_ff) for _ in range(shape.reader_layers))
        self.reader_norm = nn.RMSNorm(d, eps=1e-6)
        self.context = Linear(d, d)  # what all steps of a block are told of the reader's last state before it
        if shape.suffix_rows:  # gains of the context, and what is added to it; row 0 is "no suffix" and stays zero
            self.suffix_embedding = nn.Embedding(shape.suffix_rows + 1, 2 * d, padding_idx=0)
        if shape.recall:  # the first of each n_head + 1 rows says that nothing is recalled
            self.recall_embedding = nn.Embedding(N_RECALLED * (config.n_head + 1), d)
        self.writer = nn.ModuleList(
            Layer(config, shape.writer_ff, attends=shape.writer_attention != "none")
            for _ in range(shape.writer_layers)
        )
        self.writer_norm = nn.RMSNorm(d, eps=1e-6)
        padding = torch.zeros(config.n_head)
        padding[config.n_writable :] = -math.inf
        self.register_buffer("head_mask", padding, persistent=False)
        self.reset()

    @classmethod
    def of(cls, tokenizer: MixedTokenizer, shape: Shape) -> Self:
        """A fresh model of this shape, that reads and writes as `tokenizer` does."""
        t = tokenizer
        config = TidalConfig(t.vocab_size, t.n_writable, t.n_head, t.max_block_units, t.fingerprint, shape)
        return cls(config, t.spelling)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.unit_embedding.weight.device

    def reset(self) -> None:
        """Initialise the weights: tables so that the tied head starts near logits of variance one."""
        if self.unit_embedding.weight.is_meta:  # shapes_only
            return
        d = self.config.shape.d_model
        n_layers = len(self.reader) + len(self.writer)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                residual = name.endswith((".out", ".down"))
                nn.init.normal_(module.weight, std=d**-0.5 * 0.6 / (math.sqrt(2 * n_layers) if residual else 1.0))
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=d**-0.5)
        if self.config.shape.suffix_rows:  # strings never met add nothing
            nn.init.zeros_(self.suffix_embedding.weight)
        if self.config.shape.recall:  # what is recalled begins as a vote for it
            table = self.recall_embedding.weight.data.view(N_RECALLED, -1, d)
            table[:, 0], table[:, 1:] = 0, self.unit_embedding.weight.data / math.sqrt(N_RECALLED)
        if self.foretold:  # what is expected of a unit begins as a vote for it
            self.foretold.embedding.weight.data.copy_(self.unit_embedding.weight.data)

    def _placed(self, x_bld: Tensor, places: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embeddings with their places [B, L] added, or as they are and what turns their queries and keys."""
        rows = self.place_table[places]
        return (x_bld, rows) if self.config.shape.rotary_places else (x_bld + rows, None)

    def _layer(self, layer: nn.Module, x_bld: Tensor, view: View, rotary_blr: Tensor | None) -> Tensor:
        if isinstance(layer, Layer) and layer.attends and layer._compiled_call_impl and view.plan:
            prepare(view.plan, view.ranges, view.q_position, view.k_position, x_bld.dtype, layer.d_head)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(layer, x_bld, view, rotary_blr, use_reentrant=False,  # type: ignore[no-any-return]
                              preserve_rng_state=False)  # fmt: skip
        return layer(x_bld, view, rotary_blr)  # type: ignore[no-any-return]

    def memory(self, states_bid: Tensor, places: Tensor) -> KeysValues:
        """The first writer layer's keys and values of the reader's states, whose places [B, I] are these."""
        first = self.writer[0]
        assert isinstance(first, Layer)
        return first.keys_values(states_bid, self._placed(states_bid, places)[1])

    @property
    def has_memory(self) -> bool:
        """Whether the first writer layer attends to the reader's states."""
        return self.config.shape.writer_attention == "memory"

    def tables(self) -> list[Tensor]:
        """The parameters that learn faster and without weight decay."""
        return [m.weight for m in self.modules() if isinstance(m, nn.Embedding)]

    def read(self, ids: Tensor, places: Tensor, views: list[View]) -> Tensor:
        """Read tokens: ids and places int64 [B, I], one view a reader layer; returns states [B, I, D]."""
        x_bid, rotary = self._placed(self.token_embedding(ids), places)
        for layer, view in zip(self.reader, views, strict=True):
            x_bid = self._layer(layer, x_bid, view, rotary)
        states: Tensor = self.reader_norm(x_bid)
        return states

    def foretell(self, states: Tensor) -> Tensor:
        """Log-probabilities [..., V], float32 or better, of the last token of the block that comes next, of the
        reader's last states [..., D]."""
        return log_softmax(product(states, self.token_embedding.weight))

    def write(self, ids: Tensor, places: Tensor, suffixes: Tensor, recalled: Tensor, context_bsd: Tensor,
              views: list[View], hints_bsd: Tensor | None = None) -> Tensor:  # fmt: skip
        """One step for every [B, S]: suffixes [B, S, 3] hashes, recalled [B, S, 3] units, context [B, S, D] as
        `self.context` gives it.

        A suffix adds a vector, and scales the context (Perez et al. 2018, "FiLM"): given what is written, other parts
        of it matter. `hints` [B, S, D] are what `Foretold` tells. Returns states [B, S, D] for `head`.
        """
        x_bsd, rotary = self._placed(self.unit_embedding(ids), places)
        if self.config.shape.suffix_rows:
            rows = torch.where(suffixes == NOTHING, 0, 1 + suffixes % self.config.shape.suffix_rows)
            summed = F.embedding_bag(rows.flatten(0, 1), self.suffix_embedding.weight, mode="sum", padding_idx=0)
            gain_bsd, added_bsd = summed.view(*ids.shape, 2, self.config.shape.d_model).unbind(-2)
            x_bsd, context_bsd = x_bsd + added_bsd, context_bsd * (1 + gain_bsd)
        if self.config.shape.recall:
            first = (self.config.n_head + 1) * torch.arange(N_RECALLED, device=ids.device)
            rows = (recalled - NOTHING + first).flatten(0, 1)
            x_bsd = x_bsd + F.embedding_bag(rows, self.recall_embedding.weight, mode="sum").view_as(x_bsd)
        x_bsd = x_bsd + context_bsd
        if hints_bsd is not None:
            x_bsd = x_bsd + hints_bsd
        for layer, view in zip(self.writer, views, strict=True):
            x_bsd = self._layer(layer, x_bsd, view, rotary)
        states: Tensor = self.writer_norm(x_bsd)
        return states

    def head(self, states: Tensor) -> Tensor:
        """Logits [..., n_head] over units; columns that are no writable id are -inf."""
        return product(states, self.unit_embedding.weight, self.head_mask)

    def states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The packed pass: reader states [B, R, D] and writer states [B, W, D]."""
        reader_brd = self._reader_states(batch)
        next_nv = self._foretell_blocks(batch, reader_brd) if self.foretold else None
        return reader_brd, self._writer_states(batch, reader_brd, next_nv)

    def _reader_states(self, batch: Batch) -> Tensor:
        if batch.steps != self.config.shape.steps:
            raise ValueError(f"the batch is packed for {batch.steps}, the model has {self.config.shape.steps}")
        view = _planned(_with_empty(batch.reader_sees), batch.reader_positions, batch.reader_positions)
        return self.read(batch.reader_ids, batch.reader_places, [view] * len(self.reader))

    def _foretell_blocks(self, batch: Batch, reader_brd: Tensor) -> Tensor:
        """`foretell` [n, V] of the n blocks that are learnt, at the last token before each."""
        return self.foretell(_rows(reader_brd, batch.asked))

    def _writer_states(self, batch: Batch, reader_brd: Tensor, next_nv: Tensor | None,
                       at: Tensor | None = None) -> Tensor:  # fmt: skip
        """States [B, W, D], or, of a writer that does not attend, those of the steps `at` [n] alone, as one row."""

        def some(x_bs: Tensor) -> Tensor:
            return x_bs if at is None else _rows(x_bs, at)[None]

        first_b1 = reader_brd.shape[1] * torch.arange(len(reader_brd), device=reader_brd.device)[:, None]
        context_bs = some(batch.context + first_b1)  # among the states of all rows
        context_bsd = F.embedding(context_bs, self.context(reader_brd).flatten(0, 1))
        hints_bsd = None
        if self.foretold:
            assert next_nv is not None
            # The state before a block that is learnt is one that was asked; its rank among these is its row of next_nv.
            which_bs = ((batch.aux_targets != NOTHING).flatten().cumsum(0) - 1)[context_bs]
            hints_bsd = self.foretold(self.foretold.sums(next_nv), which_bs, some(batch.nodes), batch.n_begun,
                                      sum(batch.n_children))  # fmt: skip
        return self.write(some(batch.writer_ids), some(batch.writer_places), some(batch.suffixes), some(batch.recalled),
                          context_bsd, self._writer_views(batch, reader_brd), hints_bsd)  # fmt: skip

    def _writer_views(self, batch: Batch, reader_brd: Tensor) -> list[View]:
        own = _with_empty(batch.sees_writer), batch.writer_positions, batch.writer_positions
        if self.config.shape.writer_attention == "none":  # nobody looks
            return [View(*own)] * len(self.writer)
        views = [_planned(*own)] * len(self.writer)
        if self.has_memory:
            k_memory, v_memory = self.memory(reader_brd, batch.reader_places)
            ranges = torch.stack([batch.sees_reader, batch.sees_writer + reader_brd.shape[1]], 2)
            k_position = torch.cat([batch.reader_positions, batch.writer_positions], 1)
            views[0] = _planned(
                ranges, batch.writer_positions, k_position,
                lambda k, v: (torch.cat([k_memory, k], 2), torch.cat([v_memory, v], 2)),
            )  # fmt: skip
        return views

    def forward(self, batch: Batch) -> Losses:
        """Losses of a packed batch: every block of every row in one pass."""
        reader_brd = self._reader_states(batch)
        next_nv = self._foretell_blocks(batch, reader_brd)
        written = batch.written
        if self.config.shape.writer_attention == "none":  # no step sees another: padding need not be computed
            writer_nd = self._writer_states(batch, reader_brd, next_nv, written)[0]
        else:
            writer_nd = _rows(self._writer_states(batch, reader_brd, next_nv), written)
        # not cross_entropy: on a GPU, autocast would leave it in bfloat16
        logits = self.head(writer_nd)
        units = F.nll_loss(log_softmax(logits), _rows(batch.targets, written), reduction="sum")
        aux = F.nll_loss(next_nv, _rows(batch.aux_targets, batch.asked), reduction="sum")
        return Losses(units, batch.n_units, aux, batch.n_asked)

    def log_probs(self, batch: Batch) -> Tensor:
        """Log-probability of every supervised unit [n_units], float32 or better, row by row."""
        written = batch.written
        states, targets = (_rows(x, written) for x in (self.states(batch)[1], batch.targets))
        return log_softmax(self.head(states)).gather(-1, targets[:, None])[:, 0]

    def n_parameters(self) -> dict[str, int]:
        """Counts of parameters: `tables` (embeddings, head included), `reader`, `writer`, `total`."""
        tables = sum(p.numel() for p in self.tables())
        reader = sum(p.numel() for m in (self.reader, self.reader_norm) for p in m.parameters())
        total = sum(p.numel() for p in self.parameters())
        return {"tables": tables, "reader": reader, "writer": total - tables - reader, "total": total}

    def flops(self, n_tokens: int, n_steps: int, context: int, n_blocks: int = 0) -> int:
        """Floating-point operations of a forward pass (two a multiply-add; three times this with backward).

        `n_tokens` are read and `n_steps` written, each seeing `context` reader keys, in `n_blocks`, which matter if the
        model foretells. Not counted: norms, tables, what a first step is foretold, and the keys of a step's own block,
        which are few.
        """
        shape, d = self.config.shape, self.config.shape.d_model
        key_value = 2 * d * d * shape.n_kv_heads // shape.n_heads
        attention, seen = 2 * d * d + key_value, 2 * d * context
        per_token = d * d + shape.reader_layers * (attention + seen + 3 * d * shape.reader_ff)
        per_step = d * self.config.n_head + shape.writer_layers * 3 * d * shape.writer_ff
        if shape.writer_attention != "none":
            per_step += shape.writer_layers * attention
        if self.has_memory:
            per_token, per_step = per_token + key_value, per_step + seen
        per_block = d * self.config.vocab_size if shape.foretell else 0
        return 2 * (n_tokens * per_token + n_steps * per_step + n_blocks * per_block)

    def cache_bytes(self, n_tokens: int) -> int:
        """Bytes of cached keys and values for a context of `n_tokens`, in the dtype of the weights."""
        shape = self.config.shape
        layers = shape.reader_layers + self.has_memory
        width = 2 * shape.n_kv_heads * (shape.d_model // shape.n_heads)
        return n_tokens * layers * width * self.unit_embedding.weight.element_size()


def _rows(x_bl: Tensor, at: Tensor) -> Tensor:
    """Elements `at` [n] of x [B, L, ...], counted over all rows: [n, ...]."""
    return x_bl.flatten(0, 1).index_select(0, at)


def _with_empty(sees: Tensor) -> Tensor:
    """Ranges [B, L, 2, 2] of one range [B, L, 2] and an empty one."""
    return torch.stack([sees, torch.zeros_like(sees)], 2)


def _planned(ranges: Tensor, q_position: Tensor, k_position: Tensor,
             extend: Callable[[Tensor, Tensor], KeysValues] = lambda k, v: (k, v)) -> View:  # fmt: skip
    """A view whose tile plan is built once and serves all layers and heads."""
    plan = TilePlan.build(ranges, k_position.shape[1])
    return View(ranges, q_position, k_position, extend, plan)
