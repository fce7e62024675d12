"""What the reader expects of the next block's last token, told to the writer unit by unit."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tidal.config import TidalConfig
from tidal.tokenizer import ROOT, Spelling


class Foretold(nn.Module):
    """Of the tokens that end with what is written, some go on with each unit, and some end here: their shares of the
    distribution are the expected next units. With tokens in the order of their spelling, each is a stretch of them,
    and its probability a difference of two running sums, kept to twice the digits of what they add up: next to all the
    others, rare stretches would lose theirs.

    A unit of share q is fed with weight log(1 + q / FLOOR) / log(1 + 1 / FLOOR), from 0 to 1, without gradient: the
    reader learns to foretell from the auxiliary loss alone. What that is worth: docs/design.md.
    """

    FLOOR = 1e-3

    def __init__(self, config: TidalConfig, spelling: Spelling | None) -> None:
        super().__init__()
        self.spelling = spelling
        self.embedding = nn.Embedding(config.n_head, config.shape.d_model)
        for name in ("order", "child_unit", "child_from", "child_to", "first_child", "node_from", "node_to"):
            values = torch.from_numpy(getattr(spelling, name)) if spelling else None
            self.register_buffer(name, values, persistent=False)
        self.n_first = int(spelling.first_child[ROOT + 1]) if spelling else 0
        """How many units a token may end with."""

    @property
    def n_sums(self) -> tuple[int, int]:
        """K and 1 + T of `sums`."""
        return 1 + (self.embedding.weight.dtype == torch.float64), 1 + cast(Tensor, self.order).shape[0]

    @torch.no_grad()
    def sums(self, next_nv: Tensor) -> Tensor:
        """Running sums float64 [n, K, 1 + T] of the T spelled tokens' probabilities, of log-probabilities [n, V].

        K is 1; in float64 it is 2, the second being what the roundings of the first have left out (Dekker 1971).
        """
        if self.spelling is None:
            raise RuntimeError("this model foretells: make it with the spelling of its tokenizer")
        p_nt = next_nv.index_select(1, cast(Tensor, self.order)).exp_()
        sums = p_nt.new_zeros(len(p_nt), *self.n_sums, dtype=torch.float64)
        torch.cumsum(p_nt, -1, dtype=torch.float64, out=sums[:, 0, 1:])
        if sums.shape[1] > 1:
            torch.cumsum(p_nt - sums[:, 0].diff(), -1, out=sums[:, 1, 1:])
        return sums

    def forward(self, sums_nkt: Tensor, which: Tensor, nodes: Tensor) -> Tensor:
        """Hints [..., D] for steps at `nodes` [...], of row `which` [...] of the sums; zeros where there is no node.

        A first step may go on with any unit that a token ends with, a hundred or (Chinese) a thousand: that is a matrix
        product. Later steps have a few to choose from, which are gathered one by one.
        """
        buffers = (self.child_unit, self.child_from, self.child_to, self.first_child, self.node_from, self.node_to)
        unit, child_from, child_to, first_child, node_from, node_to = (cast(Tensor, b) for b in buffers)
        table, node, row = self.embedding.weight, nodes.flatten(), which.flatten()
        # NO_NODE, -1, looks something up, too, but has no children to use it
        n_children = torch.where(node <= ROOT, 0, first_child[node + 1] - first_child[node])
        begins = n_children.cumsum(0) - n_children
        step = torch.repeat_interleave(n_children)
        child = first_child[node][step] + torch.arange(len(step), device=step.device) - begins[step]
        of_node = _between(sums_nkt, row, node_from[node], node_to[node])
        of_child = _between(sums_nkt, row[step], child_from[child], child_to[child])
        weights = self._weights(of_child, of_node[step]).to(table.dtype)
        hints = F.embedding_bag(unit[child], table, begins, mode="sum", per_sample_weights=weights)
        first = (node == ROOT).nonzero().squeeze(1)
        if len(first):
            these = slice(0, self.n_first)
            of_first = (sums_nkt[..., child_to[these]] - sums_nkt[..., child_from[these]]).sum(1)
            of_all = sums_nkt[..., -1].sum(1, keepdim=True)
            told_nd = self._weights(of_first, of_all).to(table.dtype) @ table[unit[these]]
            hints = hints.index_add(0, first, told_nd[row[first]].to(hints.dtype))
        return hints.view(*nodes.shape, table.shape[1])

    @torch.no_grad()
    def _weights(self, of_child: Tensor, of_node: Tensor) -> Tensor:
        share = of_child.clamp(min=0) / (of_node + 1e-6)
        return (share / self.FLOOR).log1p() / math.log1p(1 / self.FLOOR)


def _between(sums_nkt: Tensor, row: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """What the tokens [start, end) of these rows add up to."""
    return (sums_nkt[row, :, end] - sums_nkt[row, :, start]).sum(-1)
