"""What is examined: a model with its tokenizer, texts, and perhaps the run it came from."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tidal.blocks import BlockTable, Passage, passage
from tidal.doctor.oracle import Layout, Oracle
from tidal.doctor.report import Floats, Where
from tidal.doctor.tape import stand_in
from tidal.infer.decoder import Decoder
from tidal.infer.engine import Completion, generate
from tidal.model import TidalTransformer
from tidal.streams import Batch, pack
from tidal.tokenizer import MixedTokenizer

Precision = Literal["float32", "bf16"]
UNWILLING, WILLING = -8.0, 2.0  # what `lively` adds to the logit of <eos>
FORCED = 60.0  # logit of the unit that a forced model writes; of all others −FORCED


@dataclass(frozen=True, slots=True)
class Document:
    """A text to examine the model with."""

    prompt: str
    completion: str
    ends: bool = True
    """the completion goes to the end of its document"""

    @property
    def text(self) -> str:
        """All of it."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class Feed:
    """What training is about to feed, and what the recipe may do to it."""

    batch: Batch
    prompt_of: Callable[[str], str | None] = lambda text: None
    """Of the text of a document, what is not learnt; None where that is not known."""
    cuts: bool = True
    """Blocks may be cut, and their beginnings read only."""
    strays: bool = True
    """Documents may begin with lines whose places are moved by an offset of their own."""
    stretch: float = math.inf
    """Most that positions are multiplied by."""
    validate: Callable[[TidalTransformer], Mapping[str, float]] | None = None
    """Figures on held-out data, `quality` among them, as training logs them."""


@dataclass
class Patient:
    """One examination's subject, with what several checks need worked out once."""

    model: TidalTransformer
    """as it is used: its own dtype and device"""
    tokenizer: MixedTokenizer
    documents: Sequence[Document]
    """short ones, on which the laws are held"""
    samples: Sequence[Document] = ()
    """of the data the model was trained on, to judge what it writes; empty: it is not judged"""
    quick: bool = False
    trained: bool = False
    checkpoint: Path | None = None
    feed: Feed | None = None
    """what training is about to feed"""
    not_examined: str = ""
    """why there is none, where there should be one"""
    precision: Precision = "float32"
    """of products in training"""
    exact: TidalTransformer = field(init=False)
    """the same in float64 on the CPU, where only bugs make a difference"""

    def __post_init__(self) -> None:
        if not self.trained:
            self.model = with_noise(self.model)
        self.model.eval()
        self.dtype = self.model.unit_embedding.weight.dtype
        self.exact = copy.deepcopy(self.model).to("cpu", torch.float64).requires_grad_().eval()
        self.oracle = Oracle(self.tokenizer, self.model.config.shape)
        self.table = BlockTable(self.tokenizer)
        self.layout = functools.cache(self._layout)
        self.packed = functools.cache(self._packed)
        self.decoded = functools.cache(self._decoded)

    def passage(self, document: Document, place_offset: int = 0) -> Passage:
        """What training makes of a document."""
        return passage(self.table, document.prompt, document.completion, ends=document.ends,
                       place_offset=place_offset)  # fmt: skip

    def pack(self, rows: Sequence[Sequence[Document]]) -> Batch:
        """What training is fed for these rows of documents."""
        return pack([[self.passage(d) for d in row] for row in rows], self.table,
                    steps=self.model.config.shape.steps)  # fmt: skip

    @torch.inference_mode()
    def log_probs(self, rows: Sequence[Sequence[Document]]) -> Tensor:
        """Log-probabilities of all units in one training pass, float64."""
        return self.exact.log_probs(self.pack(rows))

    @torch.inference_mode()
    def rounding(self, document: Document) -> float:
        """How far log-probabilities move, in float64, if every weight is moved up or down by 2^-24 of itself, as
        rounding to float32 might: how well conditioned the model is. The worse of two draws.
        """
        right, moved, generator = self.packed(document), [0.0], torch.Generator().manual_seed(0)
        for _ in range(2 if len(right) else 0):
            model = copy.deepcopy(self.exact)
            for weight in model.parameters():
                weight.mul_(1 + 2.0**-24 * (2 * torch.randint(2, weight.shape, generator=generator) - 1))
            moved.append(float(np.abs(model.log_probs(self.pack([[document]])).numpy() - right).max()))
        return max(moved)

    def where(self, document: Document, unit: int) -> Where:
        """The place of a written unit, counted in the document."""
        layout = self.layout(document)
        if unit >= len(layout.steps):
            return Where(document.text)
        step = layout.steps[unit]
        return Where(document.text, layout.blocks[step.block] or "<eos>", step.t)

    def where_read(self, document: Document, token: int) -> Where:
        """The place of a token, counted in the document."""
        layout = self.layout(document)
        block = layout.blocks[layout.tokens[token].block] if token < len(layout.tokens) else ""
        return Where(document.text, block or "<bos>", token)

    def _layout(self, document: Document) -> Layout:
        return self.oracle.lay_out(self.tokenizer.split(document.prompt), self.tokenizer.split(document.completion),
                                   document.ends)  # fmt: skip

    @torch.inference_mode()
    def _packed(self, document: Document) -> Floats:
        return self.log_probs([[document]]).numpy()

    def _decoded(self, document: Document) -> Floats:
        return self.decode(self.exact, [document])[0]

    @torch.inference_mode()
    def decode(self, model: TidalTransformer, documents: Sequence[Document], capacity: int = 256) -> list[Floats]:
        """Log-probabilities of the units of documents that the cached decoder is made to write side by side.

        As in generation each goes on at its own pace, and a finished block is turned round and re-tokenized.
        """
        decoder, tokenizer = Decoder(model, self.tokenizer, len(documents), capacity), self.tokenizer
        scripts = [[step.target for step in self.layout(document).steps] for document in documents]
        prompts = {i: [tokenizer.encode_block(b) for b in tokenizer.split(d.prompt)]
                   for i, d in enumerate(documents) if d.prompt}  # fmt: skip
        if prompts:
            decoder.read(list(prompts), list(prompts.values()))
        written: list[list[int]] = [[] for _ in documents]
        log_probs: list[list[float]] = [[] for _ in documents]
        while active := [i for i, script in enumerate(scripts) if len(log_probs[i]) < len(script)]:
            logits = decoder.step(active, [written[i] for i in active]).double().log_softmax(-1).cpu()
            finished = {}
            for i, row in zip(active, logits, strict=True):
                unit = scripts[i][len(log_probs[i])]
                log_probs[i].append(row[unit].item())
                if unit == tokenizer.eob_id:
                    finished[i] = [tokenizer.retokenize(written[i])]
                    written[i] = []
                else:
                    written[i].append(unit)
            if finished:
                decoder.read(list(finished), list(finished.values()))
        return [np.array(mine) for mine in log_probs]

    def forced(self, model: TidalTransformer, document: Document, script: Sequence[int], **asked: Any) -> Completion:
        """What the engine makes of a model that has learnt one text by heart: it prefers the units of `script`."""
        return generate(by_heart(model, script, FORCED, -FORCED), self.tokenizer, [document.prompt],
                        **{"max_new_units": len(script), **asked})[0]  # fmt: skip


def by_heart(model: TidalTransformer, script: Sequence[int], known: float, others: float) -> TidalTransformer:
    """A model that gives the logit `known` to the next unit of `script` at each step, whatever it is fed, and `others`
    to the others.
    """
    waiting = iter(script)

    def head(states: Tensor) -> Tensor:
        logits = torch.full((len(states), model.config.n_head), others, dtype=states.dtype)
        logits[:, model.config.n_writable :] = -torch.inf
        logits[:, next(waiting)] = known
        return logits

    return stand_in(model, head=head)


def lively(model: TidalTransformer, willing: float = UNWILLING) -> TidalTransformer:
    """The model, rather willing to end a block, so that what it generates has blocks to look at, whatever its weights.
    `willing` is added to the logit of `<eos>`: the model is unwilling to end the document, or, above zero, willing. The
    laws hold for any head.
    """

    def head(states: Tensor) -> Tensor:
        logits = model.head(states)
        bias = torch.zeros(logits.shape[-1], dtype=logits.dtype)
        bias[0], bias[1] = 2.0, willing  # <eob>, <eos>
        return logits + bias

    return stand_in(model, head=head)


def with_noise(model: TidalTransformer) -> TidalTransformer:
    """A copy in which no tensor is only zeros or only ones, as some are before training: the laws hold for any
    weights, but a table of zeros, or gains of one, could not show what is wrong around it.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if bool((weight == weight.flatten()[0]).all()):
                noise = torch.randn(weight.shape, generator=generator).to(weight)
                weight.add_(noise * (0.3 if weight.ndim == 1 else model.config.shape.d_model**-0.5))
                if name == "suffix_embedding.weight":
                    weight[0] = 0  # "no suffix"
    return model
