"""What reader and writer are made of: a transformer layer, and what its queries see.

Shape suffixes: b rows, l queries, k keys, h heads, d width (of a head in q, k, v), r of what turns a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from tidal.config import TidalConfig
from tidal.kernels import TilePlan, alibi_slopes, interval_attention
from tidal.linear import Linear
from tidal.places import turned

KeysValues = tuple[Tensor, Tensor]


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
    """Of these keys and values, one for each row of queries, where a cache has others, too."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        """Attention of queries [B, H, L, D] over these keys and values."""
        return interval_attention(q, k, v, self.ranges, self.q_position, self.k_position, slopes, plan=self.plan,
                                  rows=self.rows)  # fmt: skip


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

    def keys_values(self, x_bkd: Tensor, turns_bkr: Tensor | None = None) -> KeysValues:
        """Keys and values [B, H_kv, K, D] of normalized states, the keys turned."""
        kv = self.key_value(x_bkd).unflatten(-1, (2, self.n_kv_heads, self.d_head))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        # under autocast products are bfloat16, norms are not
        return turned(self.norm_key(k.to(x_bkd.dtype)), turns_bkr).to(v.dtype), v

    def forward(self, x_bld: Tensor, view: View, turns_blr: Tensor | None = None) -> Tensor:
        if self.attends:
            h = self.norm_attention(x_bld)
            q_bhld = self.query(h).to(h.dtype).unflatten(-1, (self.n_heads, self.d_head)).transpose(1, 2)
            k_bhkd, v_bhkd = view.extend(*self.keys_values(h, turns_blr))
            q_bhld = turned(self.norm_query(q_bhld), turns_blr).to(v_bhkd.dtype)
            a_bhld = view.attend(q_bhld, k_bhkd, v_bhkd, self.slopes)
            x_bld = x_bld + self.out(a_bhld.transpose(1, 2).flatten(2))
        mlp_bld: Tensor = self.mlp(self.norm_mlp(x_bld))
        return x_bld + mlp_bld
