"""`python -m tidal.evaluate addition | bits-per-byte | boundary | characters | samples`."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidal.cli import UserError, finite, main, note, parse

if TYPE_CHECKING:
    from tidal.model import TidalTransformer
    from tidal.tokenizer import MixedTokenizer

USAGE = """usage: python -m tidal.evaluate {addition,bits-per-byte,boundary,characters,samples} [flags]

  addition        exact match on random sums          --digits N --count M
  bits-per-byte   of documents the model never saw    --data FILE …
  boundary        what a prompt cut inside a block costs    --data FILE …
  characters      exact match on letters of words     --count M
  samples         empty, repeating and endless output       --data FILE …

All take --checkpoint (none: the newest run) and --json; see python -m tidal.evaluate addition --help"""


@dataclass(frozen=True)
class Asked:
    """What all figures are asked with."""

    checkpoint: str | None = None
    """A run folder (its best checkpoint) or a checkpoint folder; none: the newest run under runs/."""
    json: bool = False
    """Print one JSON object."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU where there is one."""


@dataclass(frozen=True)
class Sums(Asked):
    """Settings of `python -m tidal.evaluate addition`."""

    digits: int = 5
    """Digits of both operands."""
    count: int = 1000
    """How many sums."""
    seed: int = 1234
    """Of the sums."""
    batch_size: int = 256
    """Sums answered side by side."""


@dataclass(frozen=True)
class Boundary(Asked):
    """Settings of `python -m tidal.evaluate boundary`."""

    data: tuple[str, ...] = ()
    """Text files, folders, globs or .jsonl, also gzipped."""
    count: int = 200
    """Pairs of cuts."""
    context_chars: int = 400
    """Characters of a prompt."""
    continuation_chars: int = 80
    """Characters of the text that follows it."""
    seed: int = 0
    """Of the cuts."""


@dataclass(frozen=True)
class Characters(Asked):
    """Settings of `python -m tidal.evaluate characters`."""

    count: int = 1000
    """How many questions of every task."""
    seed: int = 1234
    """Of the questions."""
    batch_size: int = 256
    """Questions answered side by side."""


@dataclass(frozen=True)
class Samples(Asked):
    """Settings of `python -m tidal.evaluate samples`."""

    data: tuple[str, ...] = ()
    """Text files, folders, globs or .jsonl, also gzipped; the prompts are taken from them."""
    count: int = 100
    """Completions."""
    prompt_blocks: int = 16
    """Blocks (about words) of a prompt."""
    max_new_units: int = 256
    """Longest completion, in units."""
    temperature: float = 0.8
    """0 takes the likeliest unit; 1 samples from the model as it is."""
    seed: int = 0
    """Of prompts and samples."""


@dataclass(frozen=True)
class Bits(Asked):
    """Settings of `python -m tidal.evaluate bits-per-byte`."""

    data: tuple[str, ...] = ()
    """Text files, folders, globs or .jsonl, also gzipped."""
    context: int = 512
    """Reader tokens in a window; each has half of them as its context."""


def run(argv: list[str]) -> None:
    """Choose the figure to measure."""
    known = {
        "addition": (addition, Sums, "Exact match on random sums."),
        "bits-per-byte": (bits_per_byte, Bits, "Bits per byte; every unit is charged."),
        "boundary": (boundary, Boundary, "The cost of a prompt that ends inside a block."),
        "characters": (characters, Characters, "Exact match on the letters of words not trained on."),
        "samples": (samples, Samples, "Shares of empty, repeating and endless output."),
    }
    if not argv:
        raise UserError(f"nothing to evaluate; choose one of {', '.join(known)}, or see --help")
    if argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    if argv[0] not in known:
        raise UserError(f"unknown evaluation {argv[0]!r}; choose one of {', '.join(known)}")
    measure, settings, description = known[argv[0]]
    measure(parse(settings, argv[1:], f"tidal.evaluate {argv[0]}", description))  # type: ignore[operator]


def addition(settings: Sums) -> None:
    """Exact match on sums of two operands with exactly `digits` digits."""
    if settings.digits < 1 or settings.count < 1 or settings.batch_size < 1:
        raise UserError("--digits, --count and --batch-size must be at least 1")
    if settings.seed < 0:
        raise UserError(f"--seed is {settings.seed}; it must be at least 0")
    import numpy as np

    from tidal.train.recipes.addition import exact_match, random_sums

    model, tokenizer, folder = _loaded(settings)
    if settings.digits + 2 > tokenizer.max_block_units:
        raise UserError(f"--digits is {settings.digits}; this model writes blocks of {tokenizer.max_block_units} units")
    began = time.perf_counter()
    sums = random_sums(np.random.default_rng(settings.seed), settings.digits, settings.count)
    share, wrong = exact_match(model, tokenizer, sums, settings.batch_size)
    note(f"using {folder}")
    for c in wrong[:5]:
        note(f"wrong: {c.prompt!r} → {c.completion!r}")
    counts = {"wrong": len(wrong), "empty": sum(c.degenerate == "empty" for c in wrong),
              "repeating": sum(c.degenerate == "repeats" for c in wrong),
              "endless": sum(c.stop_reason != "eos" for c in wrong)}  # fmt: skip
    _report({"digits": settings.digits, "count": settings.count, "seed": settings.seed, "exact_match": share, **counts,
             "seconds": time.perf_counter() - began}, settings.json)  # fmt: skip


def bits_per_byte(settings: Bits) -> None:
    """Bits per byte of documents, in windows that overlap by half."""
    if settings.context < 16:
        raise UserError(f"--context is {settings.context}; it must be at least 16")
    from tidal.blocks import BlockTable, passage, windows
    from tidal.infer.score import bits_per_byte as measure
    from tidal.prepare.documents import read_documents

    documents = list(read_documents(settings.data))
    model, tokenizer, folder = _loaded(settings)
    began = time.perf_counter()
    table = BlockTable(tokenizer, suffixes=model.config.shape.suffix_rows > 0)
    whole = (passage(table, d.prompt, d.completion) for d in documents)
    rows = [[w] for p in whole for w in windows(p, table, settings.context, 1 << 40, overlap=settings.context // 2)]
    bits, n_units, n_bytes = measure(model, rows, table)
    if not n_bytes:
        raise UserError("no text to score: every completion is empty; check --data")
    note(f"using {folder}")
    _report({"bits_per_byte": bits, "documents": len(documents), "bytes": n_bytes, "units": n_units,
             "context": settings.context, "seconds": time.perf_counter() - began}, settings.json)  # fmt: skip


def boundary(settings: Boundary) -> None:
    """Mean loss after prompts cut inside a block against prompts cut at a boundary nearby."""
    if settings.seed < 0:
        raise UserError(f"--seed is {settings.seed}; it must be at least 0")
    from tidal.evaluate.boundary import boundary_gap
    from tidal.prepare.documents import read_documents

    texts = [d.prompt + d.completion for d in read_documents(settings.data)]
    model, tokenizer, folder = _loaded(settings)
    try:
        figures = boundary_gap(model, tokenizer, texts, count=settings.count, context_chars=settings.context_chars,
                               continuation_chars=settings.continuation_chars, seed=settings.seed)  # fmt: skip
    except ValueError as error:
        raise UserError(f"{error}; check --data and the other flags") from error
    note(f"using {folder}")
    _report(figures, settings.json)


def characters(settings: Characters) -> None:
    """Exact match on spelling, editing and searching held-out words."""
    if settings.count < 1 or settings.batch_size < 1:
        raise UserError("--count and --batch-size must be at least 1")
    if settings.seed < 0:
        raise UserError(f"--seed is {settings.seed}; it must be at least 0")
    from tidal.evaluate.characters import characters as measure

    model, tokenizer, folder = _loaded(settings)
    began = time.perf_counter()
    try:
        figures, wrong = measure(model, tokenizer, count=settings.count, seed=settings.seed,
                                 batch_size=settings.batch_size)  # fmt: skip
    except ValueError as error:
        raise UserError(f"{error}; see --checkpoint") from error
    note(f"using {folder}")
    for question, c in {question.task: (question, c) for question, c in wrong}.values():
        note(f"wrong: {c.prompt!r} → {c.completion!r}, not {question.answer!r}")
    _report({**figures, "seconds": time.perf_counter() - began}, settings.json)


def samples(settings: Samples) -> None:
    """What a model writes after prompts from `--data`."""
    if settings.count < 1 or settings.prompt_blocks < 1:
        raise UserError("--count and --prompt-blocks must be at least 1")
    if settings.seed < 0:
        raise UserError(f"--seed is {settings.seed}; it must be at least 0")
    from tidal.evaluate.samples import samples as measure
    from tidal.prepare.documents import read_documents

    texts = [d.prompt + d.completion for d in read_documents(settings.data)]
    model, tokenizer, folder = _loaded(settings)
    try:
        figures, done = measure(model, tokenizer, texts, count=settings.count, prompt_blocks=settings.prompt_blocks,
                                max_new_units=settings.max_new_units, temperature=settings.temperature,
                                seed=settings.seed)  # fmt: skip
    except ValueError as error:
        raise UserError(f"{error}; check --data and the other flags") from error
    note(f"using {folder}")
    for c in [c for c in done if c.degenerate][:5]:
        note(f"{c.degenerate}: {c.prompt!r} → {c.completion!r}")
    _report({"count": settings.count, **figures}, settings.json)


def _loaded(settings: Asked) -> tuple[TidalTransformer, MixedTokenizer, Path]:
    """The model that is asked, its tokenizer, and its checkpoint."""
    from tidal import checkpoint
    from tidal.device import pick_device, set_threads
    from tidal.infer.load import load

    folder = checkpoint.resolve(None if settings.checkpoint is None else Path(settings.checkpoint))
    model, tokenizer = load(folder, device=pick_device(settings.device))
    set_threads(model.config.shape.d_model)
    return model, tokenizer, folder


def _report(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(finite(figures), allow_nan=False))
        return
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):<14} {value:.4f}" if isinstance(value, float) else
              f"{name.replace('_', ' '):<14} {value:,}")  # fmt: skip


if __name__ == "__main__":
    main(run, "tidal.evaluate")
