"""Interval attention: every query sees at most two half-open ranges of keys.

api.py        the public function: checks, choice of backend
plan.py       TilePlan: which tiles of the score matrix are empty, partial or full
reference.py  dense and readable, the oracle
cpu.py        tiled, memory linear in the number of tokens
cpu_rows.py   rows of a cache one by one, where they lie
triton_*.py   fused kernels: forward, backward, decoding, and the plan on the device
operators.py  what torch sees of them
aot.py        compiles them without a GPU
picture.py    python -m tidal.kernels.picture draws who sees whom, tile by tile

Names are imported on first use, so that commands in here answer before torch is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidal.lazy import exports

if TYPE_CHECKING:
    from tidal.kernels.api import BACKENDS as BACKENDS
    from tidal.kernels.api import alibi_slopes as alibi_slopes
    from tidal.kernels.api import available_backends as available_backends
    from tidal.kernels.api import interval_attention as interval_attention
    from tidal.kernels.api import prepare as prepare
    from tidal.kernels.plan import TilePlan as TilePlan

__getattr__, __dir__ = exports(__name__, {
    "BACKENDS": "tidal.kernels.api",
    "TilePlan": "tidal.kernels.plan",
    "alibi_slopes": "tidal.kernels.api",
    "available_backends": "tidal.kernels.api",
    "interval_attention": "tidal.kernels.api",
    "prepare": "tidal.kernels.api",
})
