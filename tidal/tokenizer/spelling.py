"""How tokens are spelled backwards: the trie that the writer walks down while it writes a token.

    tokens in the order of their units, last first:     0 a   1 sea   2 ta   3 d   4 nd   5 and

    node: written so far     tokens [from, to)     children
    nothing (ROOT)           0, 6                  a, d
    a                        0, 3                  <eob> (the token 'a' ends here), e, t
    a e                      1, 2                  s
    d                        3, 6                  <eob>, n
    d n                      4, 6                  <eob>, a

A node is what has been written; the tokens that end with it stand side by side, and so do those of each of its
children.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
ROOT: Final = 0
NO_NODE: Final = -1
"""What has been written ends no token."""


class Spelling:
    """The trie of the tokens' units, last first. A token that ends at a node makes `<eob>` a child of it.

    `order` [n] are ids of tokens, sorted by their spelling. Node m has the tokens `order[node_from[m] : node_to[m]]`,
    and the children `first_child[m]` to `first_child[m + 1]`, each a unit and a range of tokens again.
    """

    def __init__(self, spelled: Sequence[tuple[int, tuple[int, ...]]], eob_id: int, eos_id: int) -> None:
        """`spelled` are ids of tokens and the units that write them, last first."""
        pairs = sorted((units, token) for token, units in spelled)
        self.order: Ints = np.array([token for _, token in pairs], np.int64)
        ranges: dict[tuple[int, ...], list[int]] = {(): [0, len(pairs)]}
        ending: dict[tuple[int, ...], int] = {}
        for i, (units, _) in enumerate(pairs):
            ending[units] = ending.get(units, 0) + 1
            for end in range(1, len(units) + 1):
                ranges.setdefault(units[:end], [i, i])[1] = i + 1
        self.nodes = {units: node for node, units in enumerate(ranges)}
        """Units written → node."""
        children: list[list[tuple[int, int, int]]] = [[] for _ in ranges]
        for units, (start, end) in ranges.items():
            if units:
                children[self.nodes[units[:-1]]].append((units[-1], start, end))
            if units in ending and units != (eos_id,):  # what ends here is sorted before what goes on
                children[self.nodes[units]].append((eob_id, start, start + ending[units]))
        flat = np.array([child for mine in children for child in mine], np.int64).reshape(-1, 3)
        self.child_unit, self.child_from, self.child_to = flat.T.copy()
        self.first_child: Ints = np.cumsum([0, *map(len, children)])
        self.n_children: Ints = np.diff(self.first_child)
        self.node_from, self.node_to = np.array(list(ranges.values()), np.int64).T.copy()

    def along(self, written: Sequence[int]) -> list[int]:
        """For every t from 0 to len(written): the node of the first t units."""
        node, nodes = tuple(written), self.nodes
        return [nodes.get(node[:t], NO_NODE) for t in range(len(node) + 1)]

    def node(self, written: Sequence[int]) -> int:
        """The last entry of `along`."""
        return self.nodes.get(tuple(written), NO_NODE)
