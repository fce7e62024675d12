"""TilePlan: what a tile of queries has to look at, worked out once per batch for all layers and heads.

      keys →   0       4       8      12          tile_q = 2, one batch row
query 0        x x . . . . . . . x . . .          range 0 = [0, 2)   range 1 = [9, 10)
      1        x x x . . . . . . x x . .          range 0 = [0, 3)   range 1 = [9, 11)
tile 0         [0, 3) partial    [9, 11) partial          columns 3 … 8 are never touched
      2        x x x x . . . . . . . x .
      3        x x x x . . . . . . . x .
tile 1         [0, 4) full       [11, 12) full            no mask needed
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

DEFAULT_TILE_Q = 64


@dataclass(frozen=True, eq=False)
class TilePlan:
    """Key slices per tile of queries.

    Belongs to the ranges it was built from and the positions it is first used with: build anew when any of these
    is changed in place. Pass the same position tensors in every layer, or nothing is remembered between layers.
    """

    slices: Tensor
    """int32 [n_tiles, 2, 3]: (start, end, full) of the one or two disjoint key slices of a tile. They are the hulls of
    range 0 and of range 1 over the tile's queries in all batch rows, merged where they touch. Empty: (0, 0, 1).
    full = 1 if every query of the tile sees every key of the slice in every batch row.
    On other devices than the CPU there are none: the kernels make their own tables there (triton_plan.py), and keep
    them in `memo`."""
    tile_q: int
    """queries per tile; the last tile may be shorter"""
    shape: tuple[int, int, int]
    """(B, Lq, Lk) it was built for"""
    memo: dict[str, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)
    """what a backend derived from the ranges and positions of this batch, kept for the next layer"""

    @staticmethod
    def build(ranges: Tensor, n_keys: int, *, tile_q: int = DEFAULT_TILE_Q) -> "TilePlan":
        """Plan for a batch.

        Args:
            ranges: int32 [B, Lq, 2, 2], two half-open ranges [start, end) per query.
            n_keys: Lk.
            tile_q: queries per tile.

        Raises:
            ValueError: tile_q below one, or a range that is not empty reaches outside [0, n_keys]. Ranges are not
                checked in a compiled graph, nor on a GPU, since the answer would have to be waited for; such ones are
                cut to the keys there.
        """
        if tile_q < 1:
            raise ValueError(f"tile_q is {tile_q}; it must be at least 1")
        n_batch, n_queries = ranges.shape[:2]
        shape, n_tiles = (n_batch, n_queries, n_keys), -(-n_queries // tile_q)
        if ranges.device.type != "cpu":
            return TilePlan(ranges.new_zeros(0, 2, 3), tile_q, shape)
        if n_batch == 0 or n_tiles == 0:
            return TilePlan(ranges.new_zeros(n_tiles, 2, 3), tile_q, shape)
        # The last tile is filled up with copies of the last query, which change no hull.
        index_nq = torch.arange(n_tiles * tile_q, device=ranges.device).clamp_(max=n_queries - 1)
        start_bnqr, end_bnqr = ranges[:, index_nq].view(n_batch, n_tiles, tile_q, 2, 2).unbind(-1)
        seen_bnqr = start_bnqr < end_bnqr
        start_nr = torch.where(seen_bnqr, start_bnqr, n_keys).amin(dim=(0, 2))
        end_nr = torch.where(seen_bnqr, end_bnqr, 0).amax(dim=(0, 2))
        if not torch.compiler.is_compiling():
            lowest, highest = int(start_nr.min()), int(end_nr.max())
            if lowest < 0 or highest > n_keys:
                raise ValueError(f"ranges must lie in [0, {n_keys}] (the keys), got [{lowest}, {highest})")
        start_nr, end_nr = start_nr.clamp(min=0), end_nr.clamp(max=n_keys)
        empty_nr = start_nr >= end_nr
        touch_n = ~empty_nr.any(1) & (start_nr.amax(1) <= end_nr.amin(1))
        start_n0 = torch.where(touch_n, start_nr.amin(1), start_nr[:, 0])
        end_n0 = torch.where(touch_n, end_nr.amax(1), end_nr[:, 0])
        unused_nr = empty_nr | torch.stack((torch.zeros_like(touch_n), touch_n), 1)
        start_nr = torch.stack((start_n0, start_nr[:, 1]), 1).masked_fill(unused_nr, 0)
        end_nr = torch.stack((end_n0, end_nr[:, 1]), 1).masked_fill(unused_nr, 0)
        # [b, n, q, range, slice]: does this range alone cover that slice?
        slice_start, slice_end = start_nr[:, None, None], end_nr[:, None, None]
        covers = (start_bnqr[..., None] <= slice_start) & (end_bnqr[..., None] >= slice_end)
        full_nr = covers.any(dim=3).all(dim=2).all(dim=0) | (start_nr >= end_nr)
        slices = torch.stack((start_nr, end_nr, full_nr.to(start_nr.dtype)), dim=-1)
        return TilePlan(slices.to(torch.int32), tile_q, shape)
