"""The boundary gap: what it costs a model that a prompt ends inside a block.

    text      … the men of Jude| |a and         | nearest boundary, | a random character inside a block
    boundary  … the men of        →  Judea and …
    inside    … the men of Jud    →  ea and …    from the same start, to the same end
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tidal.blocks import BlockTable, passage
from tidal.infer.score import unit_log_probs
from tidal.model import TidalTransformer
from tidal.tokenizer import MixedTokenizer

Floats = npt.NDArray[np.float64]
Charge = Callable[[Sequence[tuple[str, str]]], tuple[Floats, Floats]]
"""Prompts and their continuations → losses in nats [n], and how many units, or tokens, they are of [n]."""


@dataclass(frozen=True)
class CutPair:
    """Two places to cut `text[start:end]`: inside a block, and at the boundary of blocks nearest to it."""

    text: str
    start: int
    boundary: int
    inside: int
    end: int


def cut_pairs(tokenizer: MixedTokenizer, texts: Sequence[str], *, count: int, context_chars: int,
              continuation_chars: int, seed: int = 0) -> list[CutPair]:  # fmt: skip
    """Up to `count` different random places inside blocks, each with its nearest boundary (the left one of two).

    Both have at most `context_chars` characters (but at least a block) before them, from the beginning of a block,
    and at least `continuation_chars` after them, up to the end of a block. Raises ValueError where no place is left.
    """
    bounds = [np.cumsum([0, *map(len, tokenizer.split(text))]) for text in texts]
    places = []
    for i, b in enumerate(bounds):
        within = np.setdiff1d(np.arange(1, int(b[-1])), b)
        nearest = _nearest(b, within)
        enough = (nearest > 0) & (np.maximum(within, nearest) + continuation_chars <= b[-1])
        places.append(np.stack([np.full(len(within), i), within, nearest], 1)[enough])
    everywhere = np.concatenate([np.zeros((0, 3), np.int64), *places])
    if not len(everywhere):
        raise ValueError(f"no text has a block to cut with {continuation_chars} characters after it")
    rng = np.random.default_rng(seed)
    pairs = []
    for i, inside, boundary in rng.permutation(everywhere)[:count].tolist():
        b = bounds[i]
        first, last = sorted((inside, boundary))
        start = min(b[np.searchsorted(b, last - context_chars)], b[b < first][-1])
        end = b[np.searchsorted(b, last + continuation_chars)]
        pairs.append(CutPair(texts[i], int(start), boundary, inside, int(end)))
    return pairs


def boundary_gap(model: TidalTransformer, tokenizer: MixedTokenizer, texts: Sequence[str], *, count: int = 200,
                 context_chars: int = 400, continuation_chars: int = 80, seed: int = 0) -> dict[str, Any]:  # fmt: skip
    """Mean loss (nats) of the true continuation after prompts cut inside a block and at a boundary nearby.

    Per unit (`<eob>` included) and per UTF-8 byte, which is fairer, since a cut adds units; `gap` is inside less
    boundary, paired, `error` the standard error of its mean. Every continuation counts the same.
    """
    model.config.check_tokenizer(tokenizer.fingerprint)
    pairs = cut_pairs(tokenizer, texts, count=count, context_chars=context_chars,
                      continuation_chars=continuation_chars, seed=seed)  # fmt: skip
    return gap_between(pairs, lambda cuts: continuation_nats(model, tokenizer, cuts))


def gap_between(pairs: Sequence[CutPair], charge: Charge) -> dict[str, Any]:
    """The figures of `boundary_gap` for any model, of which `charge` gives the losses after these cuts."""
    per_unit, per_byte = {}, {}
    for kind in ("boundary", "inside"):
        cuts = [(p.text[p.start : (at := getattr(p, kind))], p.text[at : p.end]) for p in pairs]
        nats, n_units = charge(cuts)
        per_unit[kind] = nats / n_units
        per_byte[kind] = nats / np.array([len(after.encode()) for _, after in cuts])
    return {"cuts": len(pairs), **_figures(per_unit, "unit"), **_figures(per_byte, "byte")}


def continuation_nats(model: TidalTransformer, tokenizer: MixedTokenizer,
                      cuts: Sequence[tuple[str, str]]) -> tuple[Floats, Floats]:  # fmt: skip
    """Losses [n] of continuations after their prompts, split as the decoder does, and their numbers of units [n]."""
    table = BlockTable(tokenizer)
    passages = [passage(table, before, after, ends=False) for before, after in cuts]
    found = unit_log_probs(model, passages, table)
    return np.array([-log_probs.sum() for log_probs in found]), np.array([float(len(log_probs)) for log_probs in found])


def _nearest(bounds: npt.NDArray[np.int64], at: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The nearest of `bounds` (ascending) to each of `at`, which lie between the first and the last of them."""
    right = np.searchsorted(bounds, at).clip(1)
    left = bounds[right - 1]
    nearest: npt.NDArray[np.int64] = np.where(at - left <= bounds[right] - at, left, bounds[right])
    return nearest


def _figures(means: dict[str, Floats], unit: str) -> dict[str, float]:
    gap = means["inside"] - means["boundary"]
    error = gap.std(ddof=1) / math.sqrt(len(gap)) if len(gap) > 1 else math.nan
    return {
        f"boundary_nats_per_{unit}": float(means["boundary"].mean()),
        f"inside_nats_per_{unit}": float(means["inside"].mean()),
        f"gap_per_{unit}": float(gap.mean()),
        f"error_per_{unit}": float(error),
    }
