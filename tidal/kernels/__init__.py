"""Interval attention: every query sees at most two half-open ranges of keys.

api.py        the public function: checks, choice of backend
plan.py       TilePlan: which tiles of the score matrix are empty, partial or full
reference.py  dense and readable, the oracle
cpu.py        tiled, memory linear in the number of tokens
"""

from tidal.kernels.api import BACKENDS, alibi_slopes, available_backends, interval_attention
from tidal.kernels.plan import TilePlan

__all__ = ["BACKENDS", "TilePlan", "alibi_slopes", "available_backends", "interval_attention"]
