"""The layout and the model a second time, from the definition: slow, dense, nothing packed, nothing cached.

Written from docs/design.md and the table of the streams, and on purpose sharing no code with `tidal.blocks`,
`tidal.streams`, `tidal.infer` and `tidal.kernels`, which are what it judges. Of the tokenizer it takes the table of
ids, the blocks of a text and the tokens of a block; of the model its weights.

    reader  token i of block j   position i            place: units after it in its block   sees blocks up to j
    writer  step t of block j    position n_j + δ·t    place t                              sees tokens before block j,
                                                                                            steps up to t of its block

Shape letters: i, j reader tokens, s, t writer steps, k keys, h heads, d width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tidal.config import Shape
from tidal.layers import Layer, SwiGLU
from tidal.model import TidalTransformer
from tidal.tokenizer import MixedTokenizer

FIRST_BYTE, FIRST_CHAR = 2, 258
_64_BITS = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Token:
    """One element of the reader stream."""

    id: int
    position: float
    place: int
    block: int
    """0 for `<bos>`"""


@dataclass(frozen=True, slots=True)
class Step:
    """One element of the writer stream."""

    id: int
    position: float
    place: int
    block: int
    t: int
    n_memory: int
    """tokens before its block: what it sees; the last of them is its context"""
    target: int
    suffixes: tuple[int, int, int]
    recalled: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """A document as the model must be fed it."""

    blocks: tuple[str, ...]
    """text of every block; "" for `<bos>` and for the block that writes `<eos>`"""
    tokens: tuple[Token, ...]
    steps: tuple[Step, ...]
    spelled: tuple[tuple[int, tuple[int, ...]], ...]
    """every token that can be foretold, and how it is written: its units, last first, and `<eob>`"""
    window: int
    """how many steps of its block a step sees; 0: all up to itself"""

    @property
    def has_long_block(self) -> bool:
        """Whether some block has two tokens, so that both directions inside it can be looked at."""
        return any(a.block == b.block for a, b in pairwise(self.tokens))

    def reader_sees(self) -> Tensor:
        """bool [I, J]"""
        block = torch.tensor([token.block for token in self.tokens])
        return block[None, :] <= block[:, None]

    def memory_sees(self) -> Tensor:
        """bool [S, J]: reader tokens that writer steps see"""
        n_memory = torch.tensor([step.n_memory for step in self.steps])
        return torch.arange(len(self.tokens))[None, :] < n_memory[:, None]

    def writer_sees(self) -> Tensor:
        """bool [S, T]: writer steps that writer steps see"""
        block = torch.tensor([step.block for step in self.steps])
        t = torch.tensor([step.t for step in self.steps])
        return (block[None, :] == block[:, None]) & within(t, self.window)


def within(t: Tensor, window: int) -> Tensor:
    """bool [S, T]: the steps of a block that each of these may see, itself and so many in all."""
    ahead = t[:, None] - t[None, :]
    return (ahead >= 0) & (ahead < window) if window else ahead >= 0


class Oracle:
    """What must be fed for one tokenizer and shape."""

    def __init__(self, tokenizer: MixedTokenizer, shape: Shape) -> None:
        self.tokenizer, self.shape = tokenizer, shape
        self.alphabet = {tokenizer.id_bytes[u].decode(): u for u in range(FIRST_CHAR, tokenizer.n_writable)}
        ids = [i for i in range(FIRST_CHAR, tokenizer.vocab_size) if tokenizer.id_bytes[i]]
        self._scripts: dict[str, list[int]] = {}
        self.spelled = ((tokenizer.eos_id, (tokenizer.eos_id,)), *(
            (i, tuple(self.script([tokenizer.id_bytes[i].decode()], False))) for i in ids))  # fmt: skip

    def spell(self, text: str) -> list[int]:
        """Units in reading order: a character of the alphabet is one, any other its UTF-8 bytes."""
        return [u for c in text for u in ([self.alphabet[c]] if c in self.alphabet else
                                          [FIRST_BYTE + byte for byte in c.encode()])]  # fmt: skip

    def script(self, blocks: Sequence[str], ends: bool) -> list[int]:
        """All that a writer must write for these blocks: each last unit first, then `<eob>`; `<eos>` at the end."""
        units = [u for block in blocks for u in (*self.spell(block)[::-1], self.tokenizer.eob_id)]
        return [*units, self.tokenizer.eos_id] if ends else units

    def width(self, token: int) -> int:
        """How many units a token stands for."""
        return 1 if token < self.tokenizer.n_writable else len(self.tokenizer.id_bytes[token].decode())

    def is_digit(self, unit: int) -> bool:
        """Whether a unit is a decimal digit."""
        return self.tokenizer.id_bytes[unit].decode(errors="replace").isdecimal()

    def lay_out(self, prompt: Sequence[str], completion: Sequence[str], ends: bool) -> Layout:
        """Blocks that are only read, blocks that are read and written, and perhaps the end of the document."""
        tokens = [Token(self.tokenizer.bos_id, 0.0, -1, 0)]
        steps: list[Step] = []
        blocks = ["", *prompt, *completion, *[""] * ends]
        for j, text in enumerate(blocks[1:], 1):
            n_before = len(tokens)
            if j > len(prompt):
                targets = self.script([text], False) if text else [self.tokenizer.eos_id]
                for t, target in enumerate(targets):
                    fed = targets[t - 1] if t else self.tokenizer.bob_id
                    position = float(np.float32(n_before + self.shape.step_stride * t))  # as tabled: float32
                    steps.append(Step(fed, position, t, j, t, n_before, target,
                                      self.suffixes(targets[:t]), self.recalled(blocks[:j], targets[:t])))  # fmt: skip
            if text:
                ids = self.tokenizer.encode_block(text).tokens
                for k, token in enumerate(ids):
                    after = sum(map(self.width, ids[k + 1 :]))
                    spoken = any(chr(byte).isalnum() or byte > 127 for byte in self.tokenizer.id_bytes[token])
                    tokens.append(Token(token, float(n_before + k), after if spoken else -1, j))
        return Layout(tuple(blocks), tuple(tokens), tuple(steps), self.spelled, self.shape.step_window)

    def suffixes(self, written: Sequence[int]) -> tuple[int, int, int]:
        """Names of all units written in the block, of the last two, of the last three; -1: too short, or a digit."""
        return tuple(self._name(written[-n:] if n else written, n) for n in (0, 2, 3))  # type: ignore[return-value]

    def recalled(self, before: Sequence[str], written: Sequence[int]) -> tuple[int, ...]:
        """What followed these units the last time, in any block, in one after the same block, after the same two."""
        found = [-1, -1, -1]
        for i in range(1, len(before)) if self.shape.recall else ():
            if before[i] not in self._scripts:
                self._scripts[before[i]] = self.script([before[i]], False)
            script = self._scripts[before[i]]
            for order in range(0 if written else 1, 1 + min(2, i)):
                if script[: len(written)] == [*written] and before[i - order : i] == before[len(before) - order :]:
                    found[order] = script[len(written)]
        return tuple(found)

    def _name(self, units: Sequence[int], order: int) -> int:
        if not units or len(units) < order or any(map(self.is_digit, units)):
            return -1
        code = 0xCBF29CE484222325 + order * 0x9E3779B97F4A7C15
        for unit in units:
            code = (code ^ (unit + 1)) * 0x9E3779B97F4A7C15 & _64_BITS
        return code >> 32


def closed_form_slopes(n_heads: int, dtype: torch.dtype) -> Tensor:
    """Slopes of ALiBi (Press, Smith & Lewis 2022): geometric from 2^(-8/n); for other n as in the authors' code.

    float64 [n_heads], rounded as in a model of this dtype.
    """
    whole = 1 << (n_heads.bit_length() - 1)
    slopes = [2 ** (-8 * h / whole) for h in range(1, whole + 1)]
    slopes += [2 ** (-4 * h / whole) for h in range(1, 2 * whole, 2)][: n_heads - whole]
    return torch.tensor(slopes, dtype=torch.float32).to(dtype).double()


def place_encodings(n: int, d: int) -> Tensor:
    """float64 [n, d]: sines, then cosines, of wavelengths from 2.5 to 200 places."""
    half = (d + 1) // 2
    waves = torch.tensor([2.5 * 80 ** (k / max(1, half - 1)) for k in range(half)], dtype=torch.float64)
    angles = torch.arange(n, dtype=torch.float64)[:, None] * (2 * math.pi / waves)
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :d]


# ------------------------------------------------------------------------------------ the model, densely


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm."""
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def attend(q: Tensor, k: Tensor, v: Tensor, sees: Tensor, distance: Tensor, slope: Tensor) -> Tensor:
    """One head, [L, d] and [K, d]: hidden keys have no weight, a query without keys gives 0."""
    score = (q @ k.T / q.shape[-1] ** 0.5 - slope * distance).masked_fill(~sees, -math.inf)
    weight = (score - score.amax(-1, keepdim=True).clamp(min=-1e300)).exp()
    out: Tensor = weight @ v / weight.sum(-1, keepdim=True).clamp(min=1e-300)
    return out


def rotate(x: Tensor, turns: Tensor | None) -> Tensor:
    """The first half of x [L, d] as complex numbers, turned; or x as it is."""
    if turns is None:
        return x
    half = turns.shape[1] // 2
    by = torch.complex(turns[:, half:], turns[:, :half])
    spun = torch.complex(x[:, :half], x[:, half : 2 * half]) * by
    return torch.cat([spun.real, spun.imag, x[:, 2 * half :]], 1)


def dense_layer(layer: Layer, x: Tensor, memory: Tensor, sees: Tensor, distance: Tensor, slopes: Tensor,
                turns: Tensor | None) -> Tensor:  # fmt: skip
    """One layer, head by head; keys are those of `memory` [M, d] and then of the elements x [L, d] themselves; `turns`
    [M + L, r] of all these."""
    if layer.attends:
        h = norm(x, layer.norm_attention.weight)
        keys, heads = torch.cat([memory, h]), []
        weight_q = layer.query.weight.view(layer.n_heads, layer.d_head, -1)
        weight_kv = layer.key_value.weight.view(2, layer.n_kv_heads, layer.d_head, -1)
        for i, slope in enumerate(slopes):
            group = i // (layer.n_heads // layer.n_kv_heads)
            q, k, v = h @ weight_q[i].T, keys @ weight_kv[0, group].T, keys @ weight_kv[1, group].T
            if isinstance(layer.norm_query, torch.nn.RMSNorm) and isinstance(layer.norm_key, torch.nn.RMSNorm):
                q, k = norm(q, layer.norm_query.weight), norm(k, layer.norm_key.weight)
            q, k = rotate(q, None if turns is None else turns[len(memory) :]), rotate(k, turns)
            heads.append(attend(q, k, v, sees, distance, slope))
        x = x + torch.cat(heads, -1) @ layer.out.weight.T
    return x + swiglu(layer.mlp, norm(x, layer.norm_mlp.weight))


def swiglu(mlp: SwiGLU, x: Tensor) -> Tensor:
    """The gated feed-forward network, written out."""
    gate, value = (x @ mlp.up.weight.T).chunk(2, -1)
    return (F.silu(gate) * value) @ mlp.down.weight.T


def expected_units(model: TidalTransformer, state: Tensor, layout: Layout, written: Sequence[int]) -> Tensor:
    """What the writer is told [1 + len(written), d] of the units that come next, token by token: the probability of
    each that ends with what is written so far is a vote for its next unit.
    """
    assert model.foretold is not None
    probability, floor = (state @ model.token_embedding.weight.T).softmax(-1).tolist(), 1e-3
    live, votes = list(layout.spelled), torch.zeros(1 + len(written), model.config.n_head, dtype=torch.float64)
    for t in range(1 + len(written)):
        live = [(token, units) for token, units in live if units[:t] == tuple(written[:t]) and len(units) > t]
        for token, units in live:
            votes[t, units[t]] += probability[token]
    share = votes / (votes.sum(-1, keepdim=True) + 1e-6)
    return (1 + share / floor).log() / math.log(1 + 1 / floor) @ model.foretold.embedding.weight


def dense_block(model: TidalTransformer, layout: Layout, block: int,
                dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Log-probabilities [steps] of one block, everything before it read from scratch, and what every layer gave. They
    have gradients where these are wanted.

    The model must be float64 on the CPU; `dtype` is what it was rounded to before. Names are those of a
    `Tape`: "reader.0", …, "writer_norm"; [elements, width].
    """
    shape, config = model.config.shape, model.config
    tokens = [token for token in layout.tokens if token.block < block]
    steps = [step for step in layout.steps if step.block == block]
    nothing = torch.zeros(0, shape.d_model, dtype=torch.float64)
    seen: dict[str, Tensor] = {}
    slopes = closed_form_slopes(shape.n_heads, dtype)

    position = torch.tensor([token.position for token in tokens], dtype=torch.float64)
    block_of = torch.tensor([token.block for token in tokens])
    x = model.token_embedding.weight[[token.id for token in tokens]]
    read, fed = (model.place_table[[e.place for e in elements]] for elements in (tokens, steps))
    turns = (read, fed) if shape.rotary_places else (None, None)
    x = x if shape.rotary_places else x + read
    sees, distance = block_of[None, :] <= block_of[:, None], (position[:, None] - position[None, :]).abs()
    for i, layer in enumerate(model.reader):
        assert isinstance(layer, Layer)
        seen[f"reader.{i}"] = x = dense_layer(layer, x, nothing, sees, distance, slopes, turns[0])
    seen["reader_norm"] = states = norm(x, model.reader_norm.weight)

    x = model.unit_embedding.weight[[step.id for step in steps]] + (0 if shape.rotary_places else fed)
    seen["context"] = told = (states[-1] @ model.context.weight.T).expand_as(x)
    if shape.suffix_rows:
        rows = [[1 + h % shape.suffix_rows for h in step.suffixes if h >= 0] for step in steps]
        looked_up = F.embedding(torch.tensor([*chain(*rows)], dtype=torch.long), model.suffix_embedding.weight,
                                sparse=True)  # fmt: skip
        parts: Sequence[Tensor] = torch.split(looked_up, [len(some) for some in rows])
        table = torch.stack([part.sum(0) for part in parts])
        x, told = x + table[:, shape.d_model :], told + told * table[:, : shape.d_model]
    x = x + told
    if shape.recall:
        tables = model.recall_embedding.weight.view(3, -1, shape.d_model)
        x = x + torch.stack([tables[[0, 1, 2], [1 + unit for unit in step.recalled]].sum(0) for step in steps])
    if shape.foretell:
        seen["hints"] = expected_units(model, states[-1], layout, [step.id for step in steps[1:]])
        x = x + seen["hints"]
    here = torch.tensor([step.position for step in steps], dtype=torch.float64)
    order = torch.arange(len(steps))
    sees, distance = within(order, shape.step_window), (here[:, None] - here[None, :]).abs()
    for i, layer in enumerate(model.writer):
        assert isinstance(layer, Layer)
        if i == 0 and shape.writer_attention == "memory":
            both_sees = torch.cat([torch.ones(len(steps), len(tokens), dtype=torch.bool), sees], 1)
            both_distance = torch.cat([(here[:, None] - position[None, :]).abs(), distance], 1)
            both = torch.cat([read, fed]) if shape.rotary_places else None
            x = dense_layer(layer, x, states, both_sees, both_distance, slopes, both)
        else:
            x = dense_layer(layer, x, nothing, sees, distance, slopes, turns[1])
        seen[f"writer.{i}"] = x
    seen["writer_norm"] = final = norm(x, model.writer_norm.weight)
    logits = final @ model.unit_embedding.weight[: config.n_writable].T
    targets = torch.tensor([step.target for step in steps])
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0], seen
