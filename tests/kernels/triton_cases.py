"""Masks that models use, and the comparison of the triton backend with float64, on a GPU or in the interpreter.

Lengths are given in tiles, so that the same tests serve both: a tile has 16 queries or keys in the interpreter, and
64 or 128 on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from attention_cases import Case, out_and_gradients
from torch import Tensor

from tidal.kernels import TilePlan, triton_attention
from tidal.kernels.reference import visible_keys
from tidal.kernels.triton_attention import Config, Tile
from tidal.kernels.triton_tiles import INTERPRETED

DEVICE = "cpu" if INTERPRETED.value else "cuda"
TILE = 16 if INTERPRETED.value else 128
SMALL = Config(*[Tile(16, 16, 4, 1)] * 5)
if INTERPRETED.value:
    triton_attention.INTERPRETER = SMALL

STRUCTURES = ("random", "causal", "prefix", "blocks", "streams", "packed", "touching", "one_key", "positions")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""relative to the largest value; what a wrong kernel gets wrong is far larger"""
NAMES = ("out", "dq", "dk", "dv", "dslopes")


def structured(structure: str, n_batch: int, n_queries: int, n_keys: int, g: torch.Generator) -> tuple[Tensor, ...]:
    """ranges [B, Lq, 2, 2], q_position [B, Lq], k_position [B, Lk], on the CPU."""
    ranges = torch.zeros(n_batch, n_queries, 2, 2, dtype=torch.int64)
    i = torch.arange(n_queries) + max(0, n_keys - n_queries)  # queries are the last keys
    q_position, k_position = i.float().expand(n_batch, -1).clone(), torch.arange(n_keys).float().expand(n_batch, -1)
    ranges[:, :, 0, 1] = (i + 1).clamp(max=n_keys)
    if structure == "random":
        ranges = torch.randint(0, n_keys + 1, (n_batch, n_queries, 2, 2), generator=g)
        q_position = torch.rand(n_batch, n_queries, generator=g) * 20
        k_position = torch.rand(n_batch, n_keys, generator=g) * 20
    elif structure == "positions":  # causal, but anything may stand anywhere: no tile lies in the past
        k_position = torch.rand(n_batch, n_keys, generator=g) * n_keys
    elif structure == "prefix":
        ranges[:, :, 0, 1].clamp_(min=n_keys * 2 // 3)
    elif structure == "blocks":
        ranges[:, :, 0, 1] = (i // 5 * 5 + 5).clamp(max=n_keys)
    elif structure == "packed":  # two documents, a third row's end is padding without keys
        start = torch.where(i < n_keys // 2, 0, n_keys // 2)
        ranges[:, :, 0, 0] = start
        q_position, k_position = (i - start).float().expand(n_batch, -1), k_position % max(1, n_keys // 2)
        ranges[-1, n_queries * 3 // 4 :] = 0
    elif structure == "streams":  # keys = [memory ; own], blocks of five steps
        n_memory = max(0, n_keys - n_queries)
        step = torch.arange(n_queries)
        block = step // 5 * 5
        ranges[:, :, 0, 1] = (block * n_memory // n_queries).clamp(max=n_keys)
        ranges[:, :, 1, 0] = (n_memory + block).clamp(max=n_keys)
        ranges[:, :, 1, 1] = (n_memory + step + 1).clamp(max=n_keys)
        q_position = ranges[:, :, 0, 1].float()
        k_position = torch.cat([torch.arange(n_memory).float().expand(n_batch, -1), q_position], 1)[:, :n_keys]
    elif structure == "touching":  # in turn: touching, overlapping, nested, in reverse, empty one, both empty
        kind, a, b, c = i % 6, n_keys // 4, n_keys // 2, n_keys
        first = torch.tensor([[0, b], [0, b + 1], [0, c], [b, c], [c, a], [a, a]])
        second = torch.tensor([[b, c], [a, c], [a, b], [0, a], [0, c], [c, 0]])
        ranges = torch.stack([first[kind], second[kind]], 1).expand(n_batch, -1, -1, -1).clone()
        ranges[0, : n_queries // 2] = torch.stack([first[0], second[0]])  # a run of equal queries has full tiles
    elif structure == "one_key":
        ranges[:, :, 0, 0] = (ranges[:, :, 0, 1] - 1).clamp(min=0)
    return ranges.to(torch.int32), q_position.contiguous(), k_position.contiguous()


def triton_case(
    seed: int,
    structure: str,
    dtype: torch.dtype = torch.float32,
    n_batch: int = 1,
    n_heads: int = 2,
    n_kv_heads: int = 1,
    q_tiles: float = 2.3,
    k_tiles: float = 3.3,
    head_dim: int = 32,
) -> Case:
    """A case on the device under test. Tensors lie in memory as the model's do, [B, L, H, D]."""
    g = torch.Generator().manual_seed(seed)
    n_queries, n_keys = max(1, round(q_tiles * TILE)), max(1, round(k_tiles * TILE))
    ranges, q_position, k_position = structured(structure, n_batch, n_queries, n_keys, g)

    def normal(n: int, length: int) -> Tensor:
        x = torch.randn(n_batch, length, n, head_dim, generator=g).to(DEVICE, dtype)
        return x.transpose(1, 2).requires_grad_()

    slopes = torch.rand(n_heads, generator=g).to(DEVICE) * 16 / TILE
    return Case(
        normal(n_heads, n_queries), normal(n_kv_heads, n_keys), normal(n_kv_heads, n_keys), ranges.to(DEVICE),
        q_position.to(DEVICE), k_position.to(DEVICE), slopes.requires_grad_(), normal(n_heads, n_queries).detach(),
    )  # fmt: skip


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is full of NaN, and of the largest integers."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1, device=DEVICE).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def exact(case: Case) -> dict[str, Tensor]:
    """The reference in float64 on the same, rounded, inputs."""
    case = case.to(torch.float64)
    return out_and_gradients(case, "reference")


def slope_terms(case: Case) -> Tensor:
    """Σ |dscore · distance| of every head: dslopes is a sum that may cancel, and errs in proportion to its terms."""
    case = case.to(torch.float64)
    group = case.q.shape[1] // case.k.shape[1]
    k, v = (x.detach().repeat_interleave(group, 1) for x in (case.k, case.v))
    distance = (case.q_position[:, None, :, None] - case.k_position[:, None, None, :]).abs().double()
    score = case.q.detach() @ k.mT * case.q.shape[-1] ** -0.5 - case.slopes.detach()[:, None, None] * distance
    visible = visible_keys(case.ranges, k.shape[2])[:, None]
    weight = score.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num()
    dweight = case.weight @ v.mT
    dscore = weight * (dweight - (weight * dweight).sum(-1, keepdim=True))
    return (dscore * distance).abs().sum((0, 2, 3))


def fused(case: Case, plan: TilePlan | None = None) -> dict[str, Tensor]:
    """The triton backend, in memory full of NaN."""
    with poisoned():
        return out_and_gradients(case, "triton", plan)


def worst_excess(case: Case) -> tuple[float, str]:
    """The largest error relative to what the dtype allows (at most 1 is right), and of what."""
    got, wanted = fused(case), exact(case)
    scales = {name: wanted[name].abs().max() for name in NAMES if wanted[name].numel()}
    if "dslopes" in scales:
        scales["dslopes"] = slope_terms(case).max()
    errors = {
        name: float((got[name].double() - wanted[name]).abs().max() / scale.clamp(min=1.0)) / TOLERANCE[case.q.dtype]
        for name, scale in scales.items()
    }
    return max((math.inf if math.isnan(error) else error, name) for name, error in errors.items())
