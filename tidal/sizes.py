"""`python -m tidal.sizes`: what the named sizes of models cost, in parameters, work and memory. Nothing is trained.

Per byte of English text; see `ENGLISH`. Shapes and counts come from the model itself, on torch's meta device.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tidal.cli import main, parse
from tidal.train.presets import SIZES

if TYPE_CHECKING:
    import torch

    from tidal.config import Shape, Train
    from tidal.model import TidalTransformer

DESCRIPTION = "What the sizes of --model-size cost: parameters, work, memory, and where they fit. Prints Markdown."

ENGLISH = {"tokens": 0.324, "steps": 1.224, "blocks": 0.224}
"""Reader tokens, writer steps and blocks per byte: the last 200 KB of the King James Bible, vocabulary 2,048 trained on
the rest. A vocabulary of 8,192 reads 0.285 tokens a byte, so the larger sizes cost a little less than is said here."""
N_WRITABLE, N_HEAD = 353, 384  # the same tokenizer's
FLOAT = 4  # bytes: training is float32
DEVICES = {"24 GB laptop": 16e9, "24 GB GPU": 22e9, "80 GB GPU": 76e9, "141 GB H200": 135e9}
"""Bytes that a process may use there: a laptop needs some for itself, and GPUs for kernels and fragments."""


@dataclass(frozen=True)
class Cost:
    """Of one size. Work in floating-point operations, two for a multiply-add; memory in bytes."""

    name: str
    parameters: int
    tables: int
    """of the parameters: embeddings, which cost memory and hardly any work"""
    training: float
    """FLOPs per byte of text, forward and backward (three times forward)"""
    update: float
    """FLOPs per byte of text of Muon, at `rows` rows a step"""
    reading: float
    """FLOPs per byte of a prompt, seeing half a row"""
    writing: float
    """FLOPs per byte of new text: written, then read"""
    weights: int
    gradients: int
    moments: int
    row: int
    """kept for the backward pass by one row"""
    rows: int
    """in a batch"""
    cache: int
    """keys and values of 1,000 characters of context"""

    @property
    def fixed(self) -> int:
        """Memory of training that does not depend on the batch."""
        return self.weights + self.gradients + self.moments

    def rows_at_once(self, n_bytes: float) -> int:
        """How many rows of a batch can be computed at once in so much memory."""
        return max(0, min(self.rows, int((n_bytes - self.fixed) // self.row)))


@dataclass(frozen=True)
class Sizes:
    """Settings of `python -m tidal.sizes`."""

    json: bool = False
    """Print one JSON object."""


def run(argv: list[str]) -> None:
    """Print the tables."""
    settings = parse(Sizes, argv, "tidal.sizes", DESCRIPTION)
    costs = [cost(name, size) for name, size in SIZES.items()]
    print(json.dumps({"sizes": [asdict(c) for c in costs]}) if settings.json else markdown(costs))


def cost(name: str, settings: Train) -> Cost:
    """What a size costs."""
    model, tokens = meta_model(settings), settings.text.reader_budget
    parameters = model.n_parameters()
    per_byte = {key: round(1e6 * value) for key, value in ENGLISH.items()}  # in a megabyte, as counts are whole
    forward = model.flops(per_byte["tokens"], per_byte["steps"], tokens // 2, per_byte["blocks"])
    asked = 0 if settings.model.foretell else aux_flops(model, per_byte["blocks"])  # else done already
    n_bytes = tokens / ENGLISH["tokens"]  # of a row
    steps, blocks = round(n_bytes * ENGLISH["steps"]), round(n_bytes * ENGLISH["blocks"])
    return Cost(
        name, parameters["total"], parameters["tables"],
        training=3 * (forward + asked) / 1e6,
        update=update_flops(model) / (n_bytes * settings.rows),
        reading=model.flops(per_byte["tokens"], 0, tokens // 2) / 1e6,
        writing=forward / 1e6,
        weights=FLOAT * parameters["total"], gradients=FLOAT * parameters["total"],
        moments=FLOAT * sum(p.numel() * (1 if is_matrix(model, p) else 2) for p in model.parameters()),
        row=activation_bytes(settings.model, tokens, steps, blocks, model.config.vocab_size),
        rows=settings.rows, cache=model.cache_bytes(round(1000 * ENGLISH["tokens"])),
    )  # fmt: skip


def meta_model(settings: Train) -> TidalTransformer:
    """The model without memory for its weights."""
    from tidal.config import TidalConfig
    from tidal.device import shapes_only
    from tidal.model import TidalTransformer

    with shapes_only():
        return TidalTransformer(TidalConfig(settings.text.vocab_size, N_WRITABLE, N_HEAD, 32, "", settings.model))


def is_matrix(model: TidalTransformer, p: torch.Tensor) -> bool:
    """Whether Muon learns this parameter, with one moment; AdamW, which has two, learns the others."""
    return p.ndim == 2 and not any(p is table for table in model.tables())


def aux_flops(model: TidalTransformer, n_blocks: int) -> int:
    """Of the auxiliary loss, forward: the scores of all tokens, once a block."""
    return 2 * n_blocks * model.config.shape.d_model * model.config.vocab_size


def update_flops(model: TidalTransformer) -> int:
    """Of Muon in one step: for every matrix five Newton-Schulz iterations X ← aX + (bA + cA²)X with A = XXᵀ."""
    sides = (sorted(p.shape) for p in model.parameters() if is_matrix(model, p))
    return sum(5 * (2 * m * m * n + 2 * m**3 + 2 * m * m * n) for m, n in sides)


def activation_bytes(shape: Shape, tokens: int, steps: int, blocks: int, vocab: int) -> int:
    """What one row keeps for the backward pass: `tokens` read, `steps` written, `blocks` of which the next is asked.

    Floats that a layer keeps of each element, d the width, k the width of the keys, f that of the MLP:

        input, norm, query (raw, normed)       4d        keys and values, raw and normed         4k
        attention, as it comes and laid out    2d        scales of norms, logsumexp    h + h_kv + 2
        norm, output, input and norm of MLP    4d        gate, value, silu(gate), product        4f

    Measured, not only counted: tests compare it with what autograd saves. Lower with `--precision bf16`
    (products in two bytes) and with `--checkpoint-activations` (one input a layer).
    """
    d, k = shape.d_model, shape.d_model // shape.n_heads * shape.n_kv_heads
    scales = shape.n_heads + shape.n_kv_heads + 2
    attends = shape.writer_attention != "none"
    read, wrote = (10 * d + 4 * k + 4 * f + scales for f in (shape.reader_ff, shape.writer_ff))
    if not attends:
        wrote = 3 * d + 4 * shape.writer_ff + 1
    memory = k if shape.writer_attention == "memory" else 0
    floats = tokens * (shape.reader_layers * read + 4 * d + 5 * memory)
    floats += steps * (shape.writer_layers * wrote + (5 if shape.suffix_rows else 3) * d + memory + N_HEAD)
    floats += blocks * (d + vocab) + 16 * (tokens + steps)  # positions, ranges, hashes
    return FLOAT * floats


def markdown(costs: list[Cost]) -> str:
    """The tables of docs/training.md."""
    shapes = [_shape(c, SIZES[c.name]) for c in costs]
    memory = [[f"`{c.name}`", *(_bytes(n) for n in (c.weights, c.gradients, c.moments, c.row, c.fixed + c.rows * c.row,
                                                    c.cache))] for c in costs]  # fmt: skip
    work = [[f"`{c.name}`", *(f"{n / 1e6:,.3g}" if n < 1e8 else f"{n / 1e6:,.0f}" for n in
                               (c.training, c.update, c.reading, c.writing))] for c in costs]  # fmt: skip
    fits = [[f"`{c.name}`", *(_fit(c, n) for n in DEVICES.values())] for c in costs]
    return "\n\n".join([
        _table(["size", "parameters", "in tables", "width", "heads (keys)", "layers", "vocabulary", "tokens in a row",
                "rows"], shapes),
        _table(["MFLOPs per byte", "training", "its updates", "reading", "writing"], work),
        _table(["size", "weights", "gradients", "moments", "a row", "training, whole batch",
                "1,000 characters of context"], memory),
        _table(["size", *DEVICES], fits),
    ])  # fmt: skip


def _shape(c: Cost, s: Train) -> list[str]:
    m = s.model
    return [f"`{c.name}`", _count(c.parameters), _count(c.tables), f"{m.d_model:,}", f"{m.n_heads} ({m.n_kv_heads})",
            f"{m.reader_layers} + {m.writer_layers}", f"{s.text.vocab_size:,}", f"{s.text.reader_budget:,}",
            f"{s.rows}"]  # fmt: skip


def _fit(c: Cost, n_bytes: float) -> str:
    n = c.rows_at_once(n_bytes)
    at_once = f"{n} row{'s' * (n > 1)} at once" if n else "writing only"
    return f"all {n} rows" if n == c.rows else at_once


def _count(n: float) -> str:
    """Three digits: 3.28M."""
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n / 1e3:.3g}k"


def _bytes(n: float) -> str:
    return f"{n / 1e9:.3g} GB" if n >= 1e9 else f"{n / 1e6:.3g} MB"


def _table(head: list[str], rows: list[Any]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main(run, "tidal.sizes")
