"""The log-probability of a text, computed in three ways that must agree (laws 4 and 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tidal.blocks import BOS_BLOCK, EOS_BLOCK, BlockTable, Passage, passage
from tidal.infer.decoder import Decoder, evaluating
from tidal.infer.sampling import NOT_FINITE, as_int
from tidal.layers import log_softmax
from tidal.model import TidalTransformer
from tidal.streams import pack
from tidal.tokenizer import MixedTokenizer


@torch.inference_mode()
def score(model: TidalTransformer, tokenizer: MixedTokenizer, text: str,
          how: Literal["packed", "naive", "decode"] = "packed", *,
          supervise_from: int = 0) -> npt.NDArray[np.float64]:  # fmt: skip
    """Log-probability (nats) of every supervised unit in the order of writing, `<eob>` and `<eos>` included.

    `packed`: one training pass over the whole document. `naive`: one forward per block, its context re-read from
    scratch. `decode`: the cached step-by-step decoder, forced. The first `supervise_from` characters are a
    prompt and not scored. Raises ValueError on lone surrogates, an unknown `how` or an offset outside the text;
    RuntimeError where the weights give logits that are NaN or infinite.
    """
    if how not in ("packed", "naive", "decode"):
        raise ValueError(f"how is {how!r}; choose packed, naive or decode")
    if not isinstance(text, str):
        raise ValueError(f"text is {text!r}; it must be a str")
    if not 0 <= (supervise_from := as_int("supervise_from", supervise_from)) <= len(text):
        raise ValueError(f"supervise_from is {supervise_from}; the text has {len(text)} characters")
    model.config.check_tokenizer(tokenizer.fingerprint)
    table = BlockTable(tokenizer)
    whole = passage(table, text[:supervise_from], text[supervise_from:])
    with evaluating(model):
        if how == "packed":
            log_probs = _packed(model, table, [whole])
        elif how == "naive":
            parts = [Passage(whole.blocks[: i + 1], i) for i in range(whole.supervise_from, len(whole.blocks))]
            log_probs = torch.cat([_packed(model, table, [part]) for part in parts])
        else:
            log_probs = _decoded(model, tokenizer, table, whole)
    if log_probs.isnan().any():
        raise RuntimeError(NOT_FINITE)
    return log_probs.double().cpu().numpy()


def _packed(model: TidalTransformer, table: BlockTable, passages: Sequence[Passage]) -> Tensor:
    """Each in a row of its own."""
    batch = pack([[p] for p in passages], table, steps=model.config.shape.steps)
    return model.log_probs(batch.to(model.device))


def _decoded(model: TidalTransformer, tokenizer: MixedTokenizer, table: BlockTable, one: Passage) -> Tensor:
    decoder = Decoder(model, tokenizer, 1)
    log_probs = []
    for i, index in enumerate(one.blocks.tolist()):
        if index == BOS_BLOCK:
            continue  # read when the document was opened
        block = tokenizer.encode_block(table.texts[index]) if index != EOS_BLOCK else None
        written: list[int] = []
        if i >= one.supervise_from:
            for unit in [*tokenizer.write_units(block.text), tokenizer.eob_id] if block else [tokenizer.eos_id]:
                log_probs.append(log_softmax(decoder.step([0], [written])[0])[unit])
                written.append(unit)
        if block:
            decoder.read([0], [[block]])
    return torch.stack(log_probs)


@torch.inference_mode()
def unit_log_probs(model: TidalTransformer, passages: Sequence[Passage], table: BlockTable,
                   batch_tokens: int = 8192) -> list[npt.NDArray[np.float64]]:  # fmt: skip
    """Log-probabilities (nats) of the supervised units of each passage, [n_units] in the order of writing, each passage
    a document of its own.

    Passages of like length are computed together, as many as have `batch_tokens` reader tokens with their padding, or
    one.
    """
    sizes = [int(table.n_tokens(p.blocks).sum()) for p in passages]
    waiting = sorted(range(len(passages)), key=sizes.__getitem__)
    order: list[int] = []
    found: list[Tensor] = []  # fetched together: after each batch the host would wait for the device
    with evaluating(model):
        while waiting:
            n = max(1, batch_tokens // sizes[waiting[-1]])
            some, waiting = waiting[-n:], waiting[:-n]
            found.append(_packed(model, table, [passages[i] for i in some]).double())
            order += some
    n_units = [int(table.n_targets(passages[i].blocks[passages[i].supervised]).sum()) for i in order]
    pieces = np.split(torch.cat(found).cpu().numpy(), np.cumsum(n_units)[:-1]) if found else []
    of_passage = dict(zip(order, pieces, strict=True))
    return [of_passage[i] for i in range(len(passages))]


@torch.inference_mode()
def bits_per_byte(model: TidalTransformer, rows: Sequence[Sequence[Passage]], table: BlockTable,
                  rows_per_batch: int = 8) -> tuple[float, int, int]:  # fmt: skip
    """(bits per byte, units, bytes) of the supervised blocks of packed rows; every unit is charged.

    NaN where there are no bytes. An upper bound: only the one segmentation that `split` gives is counted.
    """
    nats, n_units, n_bytes = torch.zeros((), dtype=torch.float64, device=model.device), 0, 0
    with evaluating(model):
        for first in range(0, len(rows), rows_per_batch):
            batch = pack(rows[first : first + rows_per_batch], table, steps=model.config.shape.steps)
            nats -= model.log_probs(batch.to(model.device)).double().sum()
            n_units, n_bytes = n_units + batch.n_units, n_bytes + batch.n_bytes
    return nats.item() / math.log(2) / n_bytes if n_bytes else math.nan, n_units, n_bytes
