"""Generation with a baseline and a KV cache.

    generate(model, [coder.encode("prompt")], max_new=64)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines.causal import CausalTransformer
from tidal.device import upload
from tidal.infer import recorded, sampling
from tidal.infer.sampling import Sampling
from tidal.kernels import TilePlan
from tidal.kernels.cpu import DENSE_LIMIT
from tidal.layers import KeysValues, View, log_softmax

PREFILL_TOKENS = 1 << 16  # read at once, to bound the memory it takes


class CachedDecoder:
    """Rows of different lengths decoded side by side. To be used without gradients.

    Slot i of a row holds its id number i, <bos> included. What lies behind a row's end is never seen and is
    overwritten before it could be, so that padding needs no mask. There is room for `capacity` ids a row, or for the
    longest prompt. `cuda_graphs` as in Tidal's.
    """

    def __init__(self, model: CausalTransformer, prompts: Sequence[Sequence[int]], capacity: int,
                 cuda_graphs: bool = False) -> None:  # fmt: skip
        config, weight = model.config, model.embedding.weight
        self.model, self.device = model, weight.device
        self.cuda_graphs = cuda_graphs
        if cuda_graphs:
            recorded.check(self.device)
        self.recording: recorded.Recorded | None = None
        self.lengths = [1 + len(p) for p in prompts]
        size = (config.layers, 2, len(prompts), config.n_kv_heads, max(capacity, *self.lengths, 1),
                config.d_model // config.n_heads)  # fmt: skip
        self.data = torch.zeros(size, dtype=weight.dtype, device=self.device)
        self.places = torch.arange(size[4], dtype=torch.float32, device=self.device)
        self.logits = self._prefill(prompts)
        """[rows, V] for the id that follows each prompt"""
        if cuda_graphs:  # recorded before the first choice, as in Tidal's decoder; what it writes is overwritten
            self.step([config.bos_id] * len(prompts))
            self.lengths = [length - 1 for length in self.lengths]

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        width, n = max(self.lengths), len(prompts)
        ids = torch.zeros(n, width, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : 1 + len(prompt)] = torch.tensor([self.model.config.bos_id, *prompt])
        ids = ids.to(self.device)
        ends = torch.arange(1, width + 1, dtype=torch.int32, device=self.device)
        at_once, last = max(1, PREFILL_TOKENS // width), []
        for first in range(0, n, at_once):
            rows = slice(first, min(n, first + at_once))
            some = rows.stop - first
            sees = torch.zeros(some, width, 2, 2, dtype=torch.int32, device=self.device)
            sees[:, :, 0, 1] = ends
            position = self.places[:width].expand(some, -1)
            plan = TilePlan.build(sees, width)

            def view(cache: Tensor, rows: slice = rows, sees: Tensor = sees, position: Tensor = position,
                     plan: TilePlan = plan) -> View:  # fmt: skip
                def extend(k: Tensor, v: Tensor) -> KeysValues:
                    cache[0, rows, :, :width], cache[1, rows, :, :width] = k, v
                    return k, v

                return View(sees, position, position, extend, plan)

            states = self.model.run(ids[rows], [view(cache) for cache in self.data])
            ends_here = upload(self.lengths[rows], self.device) - 1
            last.append(states[torch.arange(some, device=self.device), ends_here])
        return self.model.head(torch.cat(last))

    def step(self, ids: Sequence[int]) -> Tensor:
        """Append an id to every row; logits [rows, V] for what follows."""
        low, end = min(self.lengths), max(self.lengths) + 1
        data = upload(list(zip(ids, self.lengths, strict=True)), self.device)
        if self.cuda_graphs:
            everything = functools.partial(self._step, self.data.shape[4], None)
            self.recording = self.recording or recorded.Recorded(everything)
            logits = self.recording(data)
        else:
            logits = self._step(end, low if low == end - 1 else None, data)
        self.lengths = [length + 1 for length in self.lengths]
        return logits

    def _step(self, end: int, slot: int | None, data: Tensor) -> Tensor:
        """A step on the device: ids and lengths [rows, 2]; `slot` is the length, where rows have only one."""
        n = len(data)
        sees = F.pad(data[:, 1:] + 1, (1, 2)).to(torch.int32).view(n, 1, 2, 2)
        k_position = self.places[:end].expand(n, -1)
        rows: Any = slice(None) if slot is not None else torch.arange(n, device=self.device)
        slots: Any = slot if slot is not None else data[:, 1]
        q_position = self.places[data[:, 1]][:, None]
        plan = None
        if self.device.type == "cpu":
            plan = (TilePlan.build(sees, end) if end > DENSE_LIMIT
                    else TilePlan(sees[0, :0, 0], 1, (n, 1, end)))  # one dense tile: what layers share is kept in it

        def view(cache: Tensor) -> View:
            def extend(k: Tensor, v: Tensor) -> KeysValues:
                cache[0, rows, :, slots], cache[1, rows, :, slots] = k[:, :, 0], v[:, :, 0]
                return cache[0, :, :, :end], cache[1, :, :, :end]

            return View(sees, q_position, k_position, extend, plan)

        return self.model.head(self.model.run(data[:, :1], [view(cache) for cache in self.data])[:, 0])

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""
        self.recording = None
        self.data = self.data.index_select(2, upload(rows, self.device, torch.int64))
        self.lengths = [self.lengths[row] for row in rows]


@dataclass
class Written:
    """What was written after one prompt, `<eos>` included, with its log-probabilities."""

    ids: list[int]
    log_probs: list[float]


def choose(logits: Tensor, allowed: Tensor, settings: Sequence[Sampling], generators: Sequence[Any]) -> Tensor:
    """As Tidal's; but where all rows take the likeliest, without a mask in float64, which nothing here needs."""
    if not any(how.temperature for how in settings):
        return logits.argmax(-1)
    return sampling.choose(logits, allowed, settings, generators)


@torch.inference_mode()
def generate(model: CausalTransformer, prompts: Sequence[Sequence[int]], *, max_new: int = 256,
             temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int | Sequence[Any] = 0,
             batch_size: int = 64, cuda_graphs: bool = False) -> list[Written]:  # fmt: skip
    """Continue every prompt (ids without `<bos>`) until `<eos>` or `max_new` ids; greedy at temperature 0.

    Prompt number i samples from a generator seeded with (seed, i), or with its own seed where `seed` is a sequence,
    as in `tidal.generate`.
    """
    was_training = model.training
    model.eval()
    how = Sampling(temperature, top_k, top_p)
    seeds = [[seed, i] for i in range(len(prompts))] if isinstance(seed, int) else seed
    done = [Written([], []) for _ in prompts]
    for first in range(0, len(prompts), batch_size):
        last = min(first + batch_size, len(prompts))
        rows = list(range(first, last))
        generators = {i: np.random.default_rng(seeds[i]) for i in rows}
        longest = max(len(prompts[i]) for i in rows)
        decoder = CachedDecoder(model, [prompts[i] for i in rows], 1 + longest + max_new, cuda_graphs)
        logits, active = decoder.logits, set(rows)
        allowed = torch.ones(len(rows), model.config.vocab_size, dtype=torch.bool, device=logits.device)
        while True:
            chosen = torch.as_tensor(choose(logits, allowed[: len(rows)], [how] * len(rows),
                                            [generators[i] for i in rows]), device=logits.device)  # fmt: skip
            own = log_softmax(logits).gather(-1, chosen[:, None])[:, 0]
            found, log_probs = torch.stack([chosen.double(), own.double()]).tolist()  # the host waits once for both
            ids = [int(unit) for unit in found]
            for i, unit, log_prob in zip(rows, ids, log_probs, strict=True):
                if i in active:
                    done[i].ids.append(unit)
                    done[i].log_probs.append(log_prob)
                    if unit == model.config.eos_id or len(done[i].ids) >= max_new:
                        active.remove(i)
            if not active:
                decoder.recording = None  # which knows the decoder, and its caches
                break
            if not cuda_graphs and 2 * len(active) <= len(rows):  # to record anew takes longer than idle rows do
                kept = [at for at, i in enumerate(rows) if i in active]
                decoder.select(kept)
                rows, ids = [rows[at] for at in kept], [ids[at] for at in kept]
            logits = decoder.step(ids)
    model.train(was_training)
    return done
