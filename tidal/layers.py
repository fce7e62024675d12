"""What reader and writer are made of: products, places and a transformer layer, and what its queries see.

Shape suffixes: b rows, l queries, k keys, h heads, d width (of a head in q, k, v), r of rotary places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tidal.config import TidalConfig
from tidal.kernels import TilePlan, alibi_slopes, interval_attention

KeysValues = tuple[Tensor, Tensor]

FEW_ROWS = 256
FEWER_ROWS = 8  # which are turned first, if they lie the other way round, as what another such product gives does
LARGE = 2**16  # elements of a weight that is not expected to lie in a core's own cache


@dataclass(frozen=True)
class View:
    """What the queries of a pass see: positions, ranges over the keys, and how those keys come together.

    `extend` turns the keys and values of the queries' own elements into those attended to: as they are, behind
    the keys of a memory, or stored in a cache.
    """

    ranges: Tensor
    """int32 [B, L, 2, 2]"""
    q_position: Tensor
    """float32 [B, L]"""
    k_position: Tensor
    """float32 [B, K]"""
    extend: Callable[[Tensor, Tensor], KeysValues] = lambda k, v: (k, v)
    plan: TilePlan | None = None
    rows: Sequence[int] | None = None
    """Which row of the keys and values each row of queries attends to, where a cache holds more rows; None: its own."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        """Attention of queries [B, H, L, D] over these keys and values."""
        return interval_attention(q, k, v, self.ranges, self.q_position, self.k_position, slopes, plan=self.plan,
                                  rows=self.rows)  # fmt: skip


class Linear(nn.Linear):
    """A linear layer without bias, multiplied as `product` does."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I] times the transpose of weight [O, I], plus bias [O]: [..., O], with any strides.

    BLAS libraries copy the right-hand matrix into an order of their own before they multiply, which pays when many
    rows share it. With few rows of float32 on a CPU the weight is therefore put on the left: W xᵀ, transposed, takes
    a third to nine tenths of the time (docs/decoding.md). Not where gradients are wanted: training has many rows.
    """
    if x.is_cpu and x.dtype == torch.float32 and weight.numel() >= LARGE and not torch.is_grad_enabled():
        n_rows = x.numel() // x.shape[-1]
        if 1 < n_rows <= FEW_ROWS:
            rows = x.reshape(n_rows, -1)
            if n_rows <= FEWER_ROWS:
                rows = rows.contiguous()
            y = torch.mm(weight, rows.t()).t().view(*x.shape[:-1], len(weight))
            return y if bias is None else y + bias
    return F.linear(x, weight, bias)


def filled(n_rows: int) -> int:
    """The number of rows, from this one on, with which a weight is multiplied soonest on a CPU.

    MKL multiplies 16 rows at a time, and those that are left in eights, fours, twos and ones, each of which takes about
    as long as the others and a third of what 16 do: 15 rows cost twice as much as 16 (docs/decoding.md).
    """
    if n_rows <= 6:
        return 4 if n_rows == 3 else n_rows
    return n_rows + -n_rows % 8


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities of logits [..., V], float32 or better: bfloat16 would leave them two or three digits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


class SwiGLU(nn.Module):
    """Gated feed-forward (Shazeer 2020, "GLU variants improve transformer")."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up = Linear(d_model, 2 * d_ff)
        self.down = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        down: Tensor = self.down(F.silu(gate) * value)
        return down


def sinusoids(n: int, d: int) -> Tensor:
    """Fixed encodings [n, d] of places, after Vaswani et al. 2017, with wavelengths from 2.5 to 200 places.

    Fixed, because a learnt table drifts: pairs of places that never meet in training (all numbers being short)
    come to look alike, and longer numbers fail (docs/design.md).
    """
    frequencies = 2 * math.pi / torch.logspace(math.log10(2.5), math.log10(200), (d + 1) // 2, dtype=torch.float64)
    angles = torch.arange(n)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :d].float()


def rotate(x_bhld: Tensor, rotary_blr: Tensor | None) -> Tensor:
    """Rotate the first R of each head's D elements, in pairs, by sines and cosines (Su et al. 2021, "RoFormer").

    The product of two such vectors depends on the difference of their places only. Where sine and cosine are 0,
    there is no place, and the product is that of the other elements.
    """
    if rotary_blr is None:
        return x_bhld
    sin, cos = rotary_blr[:, None].to(x_bhld.dtype).chunk(2, -1)
    n = sin.shape[-1]
    a, b, rest = torch.split(x_bhld, [n, n, x_bhld.shape[-1] - 2 * n], -1)  # whose gradients are put together at once
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)


class Layer(nn.Module):
    """One pre-norm transformer layer, for reader and writer alike; `attends=False` leaves the MLP only."""

    slopes: Tensor

    def __init__(self, config: TidalConfig, d_ff: int, attends: bool = True) -> None:
        super().__init__()
        shape = config.shape
        self.n_heads, self.n_kv_heads = shape.n_heads, shape.n_kv_heads
        self.d_head, self.attends = shape.d_model // shape.n_heads, attends
        if attends:
            self.norm_attention = nn.RMSNorm(shape.d_model, eps=1e-6)
            self.query = Linear(shape.d_model, self.n_heads * self.d_head)
            self.key_value = Linear(shape.d_model, 2 * self.n_kv_heads * self.d_head)
            self.out = Linear(self.n_heads * self.d_head, shape.d_model)
            norms = nn.RMSNorm if shape.qk_norm else nn.Identity
            self.norm_query, self.norm_key = norms(self.d_head, eps=1e-6), norms(self.d_head, eps=1e-6)
            for gain in self.norm_query.parameters():
                nn.init.constant_(gain, shape.query_gain)
            self.register_buffer("slopes", alibi_slopes(self.n_heads), persistent=False)
        self.norm_mlp = nn.RMSNorm(shape.d_model, eps=1e-6)
        self.mlp = SwiGLU(shape.d_model, d_ff)

    def keys_values(self, x_bkd: Tensor, rotary_bkr: Tensor | None = None) -> KeysValues:
        """Keys and values [B, H_kv, K, D] of normalized states, the keys rotated."""
        kv = self.key_value(x_bkd).unflatten(-1, (2, self.n_kv_heads, self.d_head))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        # under autocast products are bfloat16, norms are not
        return rotate(self.norm_key(k.to(x_bkd.dtype)), rotary_bkr).to(v.dtype), v

    def forward(self, x_bld: Tensor, view: View, rotary_blr: Tensor | None = None) -> Tensor:
        if self.attends:
            h = self.norm_attention(x_bld)
            q_blhd = self.norm_query(self.query(h).to(h.dtype).unflatten(-1, (self.n_heads, self.d_head)))
            k_bhkd, v_bhkd = view.extend(*self.keys_values(h, rotary_blr))
            q_bhld = rotate(q_blhd.transpose(1, 2), rotary_blr).to(v_bhkd.dtype)
            a_bhld = view.attend(q_bhld, k_bhkd, v_bhkd, self.slopes)
            x_bld = x_bld + self.out(a_bhld.transpose(1, 2).flatten(2))
        mlp_bld: Tensor = self.mlp(self.norm_mlp(x_bld))
        return x_bld + mlp_bld
