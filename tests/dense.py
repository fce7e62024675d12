"""The model a second time, written out densely: one block at a time, no streams, no tiles, no caches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.strategies import remembered
from tidal.blocks import NOTHING, suffix_hashes
from tidal.model import Layer, SwiGLU, TidalTransformer
from tidal.tokenizer import NO_PLACE, MixedTokenizer


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotated(x_ld: Tensor, table: Tensor, places: Tensor) -> Tensor:
    """Every pair of the first half of a head, turned by the angle of its place; by nothing where there is no place."""
    n, out = table.shape[1] // 2, x_ld.clone()
    for j in range(n):
        sin, cos = table[places, j], table[places, n + j]
        out[:, j] = cos * x_ld[:, j] - sin * x_ld[:, n + j]
        out[:, n + j] = sin * x_ld[:, j] + cos * x_ld[:, n + j]
    return out


def dense_layer(layer: Layer, x_ld: Tensor, memory_md: Tensor, sees_lk: Tensor, distance_lk: Tensor,
                table: Tensor | None, places: Tensor) -> Tensor:  # fmt: skip
    """One layer, head by head, with a dense softmax; keys are `memory` and then the elements themselves."""
    if layer.attends:
        h = norm(x_ld, layer.norm_attention.weight)
        keys, heads = torch.cat([memory_md, h]), []
        weight_q = layer.query.weight.view(layer.n_heads, layer.d_head, -1)
        weight_kv = layer.key_value.weight.view(2, layer.n_kv_heads, layer.d_head, -1)
        for i in range(layer.n_heads):
            group = i // (layer.n_heads // layer.n_kv_heads)
            q, k, v = h @ weight_q[i].T, keys @ weight_kv[0, group].T, keys @ weight_kv[1, group].T
            if isinstance(layer.norm_query, torch.nn.RMSNorm):
                q, k = norm(q, layer.norm_query.weight), norm(k, layer.norm_key.weight)
            if table is not None:
                q, k = rotated(q, table, places[len(memory_md) :]), rotated(k, table, places)
            scores = q @ k.T / layer.d_head**0.5 - layer.slopes[i] * distance_lk
            heads.append(scores.masked_fill(~sees_lk, -torch.inf).softmax(-1) @ v)
        x_ld = x_ld + torch.cat(heads, -1) @ layer.out.weight.T
    return x_ld + mlp(layer.mlp, norm(x_ld, layer.norm_mlp.weight))


def hint(model: TidalTransformer, tokenizer: MixedTokenizer, state: Tensor, written: list[int]) -> Tensor:
    """By going through all tokens, and asking of each whether it ends with what is written, and what comes next."""
    expected = (state @ model.token_embedding.weight.T).softmax(-1)
    next_units, total = torch.zeros(model.config.n_head, dtype=torch.float64), 0.0
    for token in range(tokenizer.vocab_size):
        if token == tokenizer.eos_id:
            spelled = [token]
        elif token in (tokenizer.eob_id, tokenizer.bob_id, tokenizer.bos_id) or 2 <= token < 258:
            continue
        else:
            spelled = [*tokenizer.write_units(tokenizer.id_bytes[token].decode()), tokenizer.eob_id]
        if spelled[: len(written)] == written and len(spelled) > len(written):
            next_units[spelled[len(written)]] += expected[token]
            total += float(expected[token])
    weights = torch.log1p(next_units / (total + 1e-6) / 1e-3) / math.log1p(1e3)
    assert model.foretold is not None
    return weights @ model.foretold.embedding.weight


def mlp(module: SwiGLU, x: Tensor) -> Tensor:
    gate, value = (x @ module.up.weight.T).chunk(2, -1)
    return (F.silu(gate) * value) @ module.down.weight.T


@torch.inference_mode()
def dense_log_probs(model: TidalTransformer, tokenizer: MixedTokenizer, before: Sequence[str],
                    text: str | None) -> Tensor:  # fmt: skip
    """Log-probabilities of one block after others: everything recomputed from the definition, nothing packed."""
    shape, none = model.config.shape, torch.zeros(0, model.config.shape.d_model, dtype=torch.float64)
    tokens = [(tokenizer.bos_id, NO_PLACE, 0)]  # id, place, block
    for j, block in enumerate(map(tokenizer.encode_block, before), 1):
        tokens += [(token, place, j) for token, place in zip(block.tokens, block.places, strict=True)]
    ids, places, block_of = torch.tensor(tokens).unbind(1)
    index = torch.arange(len(tokens))
    table = model.place_table if shape.rotary_places else None
    x = model.token_embedding.weight[ids] + (0 if shape.rotary_places else model.place_table[places])
    sees = block_of[None, :] <= block_of[:, None]
    for layer in model.reader:
        x = dense_layer(layer, x, none, sees, (index[:, None] - index[None, :]).abs().double(), table, places)
    states = norm(x, model.reader_norm.weight)

    targets = [*tokenizer.encode_block(text).units[::-1], tokenizer.eob_id] if text else [tokenizer.eos_id]
    steps = torch.arange(len(targets))
    x = model.unit_embedding.weight[torch.tensor([tokenizer.bob_id, *targets[:-1]])]
    x = x + (0 if shape.rotary_places else model.place_table[steps])
    context = states[-1] @ model.context.weight.T
    if shape.suffix_rows:
        for t in range(len(targets)):
            hashes = suffix_hashes(targets[:t], tokenizer.digit_units.tolist())
            rows = [1 + h % shape.suffix_rows for h in hashes if h != NOTHING]
            gain, added = model.suffix_embedding.weight[rows].sum(0).split(shape.d_model)
            x[t] += added + gain * context
    x = x + context
    if shape.recall:
        scripts = [[], *([*tokenizer.encode_block(block).units[::-1], tokenizer.eob_id] for block in before)]
        for t in range(len(targets)):
            for order, unit in enumerate(remembered(scripts, targets[:t])):
                x[t] += model.recall_embedding.weight[order * (model.config.n_head + 1) + 1 + unit]
    if shape.foretell:
        x = x + torch.stack([hint(model, tokenizer, states[-1], targets[:t]) for t in range(len(targets))])
    position = len(tokens) + shape.step_stride * steps.double()
    ahead = steps[:, None] - steps[None, :]
    sees, distance = (ahead >= 0) & (ahead < (shape.step_window or 99)), (position[:, None] - position[None, :]).abs()
    for i, layer in enumerate(model.writer):
        if i == 0 and shape.writer_attention == "memory":
            to_memory = (position[:, None] - index[None, :]).abs()
            everything = torch.ones_like(to_memory, dtype=torch.bool)
            x = dense_layer(layer, x, states, torch.cat([everything, sees], 1), torch.cat([to_memory, distance], 1),
                            table, torch.cat([places, steps]))  # fmt: skip
        else:
            x = dense_layer(layer, x, none, sees, distance, table, steps)
    logits = norm(x, model.writer_norm.weight) @ model.unit_embedding.weight[: tokenizer.n_writable].T
    return logits.log_softmax(-1)[steps, torch.tensor(targets)]
