"""What the reader expects of the next block's last token, told to the writer unit by unit."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tidal.config import TidalConfig
from tidal.tokenizer import ROOT, Spelling
from tidal.tokenizer.spelling import Ints


class Foretold(nn.Module):
    """Which unit comes next, as the reader expects it: its distribution over the next block's last token, summed over
    the tokens that end with what is written so far.

        written: d      P('nd') = .1   P('and') = .3   P('d') = .1      next: n .4 / .5 = .8, <eob> .1 / .5 = .2

    In the order of their reversed spelling (`Spelling`), the tokens that end with what is written are neighbours, and
    so are those that go on with each unit: each sum is a difference of two running sums. These are kept to twice the
    digits of what they add up; next to all the others, rare tokens would lose theirs.

    A unit of share q is fed with weight log(1 + q / FLOOR) / log(1 + 1 / FLOOR), from 0 to 1, without gradient: the
    reader learns to foretell from the auxiliary loss alone. What that is worth: docs/design.md.
    """

    FLOOR = 1e-3
    order: Tensor
    """[T] the spelled tokens"""
    nodes: Tensor
    """[..., 4] of each node its children `from, to` and its tokens `from, to` in that order; the last has none"""
    children_of_all: Tensor
    """[..., 3] of each child its unit and its tokens `from, to`"""

    def __init__(self, config: TidalConfig, spelling: Spelling | None) -> None:
        super().__init__()
        self.spelling = spelling
        self.embedding = nn.Embedding(config.n_head, config.shape.d_model)
        arrays: dict[str, Ints | None] = dict.fromkeys(("order", "nodes", "children_of_all"))
        if spelling:
            first, none = spelling.first_child, np.zeros((1, 4), np.int64)  # the last row is NO_NODE, -1
            nodes = np.stack([first[:-1], first[1:], spelling.node_from, spelling.node_to], 1)
            children = np.stack([spelling.child_unit, spelling.child_from, spelling.child_to], 1)
            arrays = {"order": spelling.order, "nodes": np.concatenate([nodes, none]), "children_of_all": children}
        for name, array in arrays.items():
            self.register_buffer(name, None if array is None else torch.from_numpy(array), persistent=False)
        self.n_first = int(spelling.n_children[ROOT]) if spelling else 0
        """How many units a token may end with."""
        self.n_most = int(spelling.n_children.max()) if spelling else 0
        """Children of the node that has most, in practice these."""

    @property
    def n_sums(self) -> tuple[int, int]:
        """K and 1 + T of `sums`. Raises RuntimeError without a spelling."""
        if self.spelling is None:
            raise RuntimeError("this model foretells: make it with the spelling of its tokenizer")
        return 1 + (self.embedding.weight.dtype == torch.float64), 1 + self.order.shape[0]

    @torch.no_grad()
    def sums(self, next_nv: Tensor) -> Tensor:
        """Running sums float64 [n, K, 1 + T] of the T spelled tokens' probabilities, of log-probabilities [n, V].

        K is 1; in float64 it is 2, the second being what the roundings of the first have left out (Dekker 1971).
        """
        n_kinds, _ = self.n_sums
        p_nt = F.pad(next_nv.index_select(1, self.order).exp_(), (1, 0))
        sums_nt = p_nt.cumsum(-1, dtype=torch.float64)
        if n_kinds == 1:
            return sums_nt[:, None]
        rest_nt = p_nt - F.pad(sums_nt.diff(), (1, 0))
        return torch.stack([sums_nt, rest_nt.cumsum(-1)], 1)

    def forward(self, sums_nkt: Tensor, which: Tensor, nodes: Tensor, n_begun: int | None = None,
                n_children: int | None = None) -> Tensor:  # fmt: skip
        """Hints [..., D] for steps at `nodes` [...], of row `which` [...] of the sums; zeros where there is no node.

        A first step may go on with any unit that a token ends with, a hundred or (Chinese) a thousand: that is a matrix
        product. Later steps have a few to choose from, which are gathered one by one. `n_begun` and `n_children` count
        the first steps and the choices of the later ones; where they are not given, a GPU is waited for.
        """
        table, node, row = self.embedding.weight, nodes.flatten(), which.flatten()
        from_child, to_child, *_ = (of := self.nodes[node]).unbind(1)
        begun = node == ROOT
        n_own = torch.where(begun, 0, to_child - from_child)
        begins = n_own.cumsum(0) - n_own
        step = torch.repeat_interleave(n_own, output_size=n_children)
        child = from_child[step] + torch.arange(len(step), device=step.device) - begins[step]
        units = self.children_of_all[child]
        of_node = _between(sums_nkt, row, of[:, 2:])
        weights = self._weights(_between(sums_nkt, row[step], units[:, 1:]), of_node[step]).to(table.dtype)
        hints = F.embedding_bag(units[:, 0], table, begins, mode="sum", per_sample_weights=weights)
        if n_begun := int(begun.sum()) if n_begun is None else n_begun:
            first = begun.nonzero_static(size=n_begun)[:, 0]
            units, its_row = self.children_of_all[: self.n_first], row[first][:, None]
            weights = self._weights(_between(sums_nkt, its_row, units[:, 1:]), sums_nkt[its_row, :, -1].sum(-1))
            hints = hints.index_add(0, first, (weights.to(table.dtype) @ table[units[:, 0]]).to(hints.dtype))
        return hints.view(*nodes.shape, table.shape[1])

    def fixed(self, sums_nkt: Tensor, which: Tensor, nodes: Tensor) -> Tensor:
        """The same, in shapes that do not depend on the nodes and without waiting for the device, to be recorded: each
        step looks at as many children as any node has, and a matrix product runs over all units."""
        table, of, row = self.embedding.weight, self.nodes[nodes.reshape(-1, 1)], which.reshape(-1, 1)
        child = of[..., 0] + torch.arange(self.n_most, device=of.device)
        units = self.children_of_all[child.clamp(max=len(self.children_of_all) - 1)]
        weights = self._weights(_between(sums_nkt, row, units[..., 1:]), _between(sums_nkt, row, of[..., 2:]))
        told = torch.where(child < of[..., 1], weights, 0).to(table.dtype)
        spread = told.new_zeros(len(told), len(table)).scatter_add_(1, units[..., 0], told)
        return (spread @ table).view(*nodes.shape, table.shape[1])

    def _weights(self, of_child: Tensor, of_node: Tensor) -> Tensor:
        share = of_child / (of_node + 1e-6)
        return (share / self.FLOOR).log1p() / math.log1p(1 / self.FLOOR)


def _between(sums_nkt: Tensor, row: Tensor, tokens: Tensor) -> Tensor:
    """What the tokens `from, to` [..., 2] add up to in these rows [...]."""
    return (sums_nkt[row, :, tokens[..., 1]] - sums_nkt[row, :, tokens[..., 0]]).sum(-1)
