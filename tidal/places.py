"""Places of digits and letters: moving them, and how they are told to a model."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor

from tidal.tokenizer import NO_PLACE

Places = TypeVar("Places")


def moved(places: Places, by: Any) -> Places:
    """Places (an int, or int64 of any shape) moved by an offset; where there is none, there is none."""
    some: Any = places
    return some + by * (some != NO_PLACE)  # type: ignore[no-any-return]


def sinusoids(n: int, d: int) -> Tensor:
    """Fixed encodings [n, d] of places, after Vaswani et al. 2017, with wavelengths from 2.5 to 200 places.

    Fixed, because a learnt table drifts: pairs of places that never meet in training (all numbers being short)
    come to look alike, and longer numbers fail (docs/design.md).
    """
    turns = 2 * math.pi / torch.logspace(math.log10(2.5), math.log10(200), (d + 1) // 2, dtype=torch.float64)
    angles = torch.arange(n)[:, None] * turns
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :d].float()


def turned(x_bhld: Tensor, turns_blr: Tensor | None) -> Tensor:
    """Rotate the first R of each head's D elements, in pairs, by sines and cosines (Su et al. 2021, "RoFormer").

    The product of two such vectors depends on the difference of their places only. Where sine and cosine are 0,
    there is no place, and the product is that of the other elements.
    """
    if turns_blr is None:
        return x_bhld
    sin, cos = turns_blr[:, None].to(x_bhld.dtype).chunk(2, -1)
    n = sin.shape[-1]
    a, b, rest = torch.split(x_bhld, [n, n, x_bhld.shape[-1] - 2 * n], -1)  # whose gradients are put together at once
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)
