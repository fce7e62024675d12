"""`python -m tidal.evaluate addition | bits-per-byte | boundary | characters | samples`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tidal.cli import UserError, check_least, finite, main, note, parse

if TYPE_CHECKING:
    from tidal.config import Text
    from tidal.model import TidalTransformer
    from tidal.prepare.documents import Document
    from tidal.tokenizer import MixedTokenizer

UNKNOWN_CONTEXT = 512  # of windows, where training had no such length
USAGE = """usage: python -m tidal.evaluate {addition,bits-per-byte,boundary,characters,samples} [flags]

  addition        exact match on random sums          --digits N --count M
  bits-per-byte   of documents the model never saw    --data FILE …
  boundary        what a prompt cut inside a block costs    --data FILE …
  characters      exact match on letters of words     --count M
  samples         empty, repeating and endless output       --data FILE …

Without --data, the text is taken that the run held out. All take --checkpoint (none: the newest run) and --json; see
python -m tidal.evaluate addition --help"""


@dataclass(frozen=True)
class Common:
    """Flags of all evaluations."""

    checkpoint: str | None = None
    """A run folder (its best checkpoint) or a checkpoint folder; none: the newest run under runs/."""
    json: bool = False
    """Print one JSON object."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU where there is one."""


@dataclass(frozen=True)
class OnText(Common):
    """Flags of evaluations on text."""

    data: tuple[str, ...] = ()
    """Text files, folders, globs or .jsonl, also gzipped; none: what the run held out."""


@dataclass(frozen=True)
class Sums(Common):
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
class Boundary(OnText):
    """Settings of `python -m tidal.evaluate boundary`."""

    count: int = 200
    """Pairs of cuts."""
    context_chars: int = 400
    """Characters of a prompt."""
    continuation_chars: int = 80
    """Characters of the text that follows it."""
    seed: int = 0
    """Of the cuts."""


@dataclass(frozen=True)
class Characters(Common):
    """Settings of `python -m tidal.evaluate characters`."""

    count: int = 1000
    """How many questions of every task."""
    seed: int = 1234
    """Of the questions."""
    batch_size: int = 256
    """Questions answered side by side."""


@dataclass(frozen=True)
class Samples(OnText):
    """Settings of `python -m tidal.evaluate samples`."""

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
class Bits(OnText):
    """Settings of `python -m tidal.evaluate bits-per-byte`."""

    context: int | None = None
    """Reader tokens in a window, half of them context; none: as in training, or 512 if that was not on text."""


LEAST = {"digits": 1, "count": 1, "batch_size": 1, "prompt_blocks": 1, "context_chars": 1, "continuation_chars": 1,
         "max_new_units": 1, "context": 16, "seed": 0}  # fmt: skip
"""of the settings that have these names"""
MOST = {"digits": 4000, "count": 10**9}
"""Likewise. Digits as in training: of a few more Python makes no text."""


@dataclass(frozen=True)
class Subject:
    """The model that is asked, and what it is asked about."""

    model: TidalTransformer
    tokenizer: MixedTokenizer
    trained_on: Text | None
    """None where it was not trained on text, or nobody knows."""
    documents: list[Document]
    """Where the figure is one of text."""


Figures = tuple[dict[str, Any], list[str]]
"""Figures by their names, and lines to be noted."""


def run(argv: list[str]) -> None:
    """Choose the figure, measure it, report it."""
    if not argv:
        raise UserError(f"nothing to evaluate; choose one of {', '.join(EVALUATIONS)}, or see --help")
    if argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    if argv[0] not in EVALUATIONS:
        raise UserError(f"unknown evaluation {argv[0]!r}; choose one of {', '.join(EVALUATIONS)}")
    kind, description, measure = EVALUATIONS[argv[0]]
    settings = parse(kind, argv[1:], f"tidal.evaluate {argv[0]}", description)
    check_least(settings, **LEAST)
    for name, most in MOST.items():
        if (value := getattr(settings, name, 0)) > most:
            raise UserError(f"--{name} is {value}; it must be at most {most}")
    from tidal import checkpoint  # torch comes with these
    from tidal.device import pick_device, set_threads
    from tidal.infer.load import load_with_trainer
    from tidal.prepare.documents import read_documents
    from tidal.train.memory import memory_for

    given = list(read_documents(settings.data)) if isinstance(settings, OnText) and settings.data else []
    folder = checkpoint.resolve(settings.checkpoint)
    with memory_for("the model; try another --device"):
        model, tokenizer, trainer = load_with_trainer(folder, device=pick_device(settings.device))
    set_threads(model.config.shape.d_model)
    subject, about = Subject(model, tokenizer, _trained_on(trainer), given), list[str]()
    if isinstance(settings, OnText):
        subject, about = _with_text(subject, settings.data, trainer)
    began = time.perf_counter()
    with memory_for(f"the evaluation {argv[0]}; try smaller numbers (see --help), or another --device"):
        figures, lines = measure(settings, subject)
    for line in (f"using {folder}", *about, *lines):
        note(line)
    _report({**figures, "seconds": time.perf_counter() - began}, settings.json)


def _trained_on(trainer: dict[str, Any]) -> Text | None:
    from tidal.prepare.again import training_of

    with contextlib.suppress(ValueError):
        own = training_of(trainer)
        return own.text if own.recipe == "text" else None
    return None


def _with_text(subject: Subject, paths: Sequence[str], trainer: dict[str, Any]) -> tuple[Subject, list[str]]:
    """With what the run held out, where no `paths` are given, and a line on text that is the run's own."""
    from tidal.prepare.again import also_trained_on, held_out_again

    own = subject.trained_on
    if paths:
        if own is None or not (files := also_trained_on(paths, own)):
            return subject, []
        which = files[0] + f" and {len(files) - 1} more" * (len(files) > 1)
        return subject, [f"of the run's own data: {which}; unless it was held out, this is no held-out figure; without "
                         "--data, what was held out is taken"]  # fmt: skip
    if own is None:
        raise UserError("no data: this model was not trained on text; name files, folders or globs with --data")
    documents, source = held_out_again(own, trainer["settings"]["seed"], trainer.get("data"))
    if not documents:
        raise UserError("no data: what the run was trained on is not there; name files, folders or globs with --data")
    return dataclasses.replace(subject, documents=documents), [f"text: {source}"]


def addition(settings: Sums, subject: Subject) -> Figures:
    """Exact match on sums of two operands with exactly `digits` digits."""
    import numpy as np

    from tidal.train.recipes import wrong_answers
    from tidal.train.recipes.addition import answer_of, prompt_of, random_sums

    if settings.digits + 2 > (longest := subject.tokenizer.max_block_units):
        raise UserError(f"--digits is {settings.digits}; this model writes blocks of {longest} units: at most "
                        f"{longest - 2} digits")  # fmt: skip
    sums = random_sums(np.random.default_rng(settings.seed), settings.digits, settings.count)
    problems = [(prompt_of(*s), answer_of(*s)) for s in sums]
    wrong = list(wrong_answers(subject.model, subject.tokenizer, problems, settings.batch_size).values())
    share = (len(sums) - len(wrong)) / len(sums)
    counts = {"wrong": len(wrong), "empty": sum(c.degenerate == "empty" for c in wrong),
              "repeating": sum(c.degenerate == "repeats" for c in wrong),
              "endless": sum(c.stop_reason != "eos" for c in wrong)}  # fmt: skip
    return ({"digits": settings.digits, "count": settings.count, "seed": settings.seed, "exact_match": share, **counts},
            [f"wrong: {c.prompt!r} → {c.completion!r}" for c in wrong[:5]])  # fmt: skip


def bits_per_byte(settings: Bits, subject: Subject) -> Figures:
    """Bits per byte of documents, in windows that overlap by half."""
    from tidal.blocks import BlockTable, passage, windows
    from tidal.infer.score import bits_per_byte as measure

    context, lines = settings.context, list[str]()
    if context is None:
        own = subject.trained_on.reader_budget if subject.trained_on else 0
        context = own if own >= LEAST["context"] else UNKNOWN_CONTEXT
        lines = [f"windows of {context} tokens" + ", as in training; choose others with --context" * (context == own)]
    table = BlockTable(subject.tokenizer)
    whole = (passage(table, d.prompt, d.completion) for d in subject.documents)
    rows = [[w] for p in whole for w in windows(p, table, context, 1 << 40, overlap=context // 2)]
    bits, n_units, n_bytes = measure(subject.model, rows, table)
    if not n_bytes:
        raise UserError("no text to score: every completion is empty; check --data")
    return {"bits_per_byte": bits, "documents": len(subject.documents), "bytes": n_bytes, "units": n_units,
            "context": context}, lines  # fmt: skip


def boundary(settings: Boundary, subject: Subject) -> Figures:
    """Mean loss after prompts cut inside a block against prompts cut at a boundary nearby."""
    from tidal.evaluate.boundary import boundary_gap

    texts = [d.prompt + d.completion for d in subject.documents]
    with _blamed():
        return boundary_gap(subject.model, subject.tokenizer, texts, count=settings.count, seed=settings.seed,
                            context_chars=settings.context_chars,
                            continuation_chars=settings.continuation_chars), []  # fmt: skip


def characters(settings: Characters, subject: Subject) -> Figures:
    """Exact match on spelling, editing and searching held-out words.

    Besides: how many held-out words there are, and how many of these have a token that none of the library's other
    words has, so that the recipe's model can hardly know its letters.
    """
    import numpy as np

    from tidal.train.recipes.characters import LONGEST, exact_match, held_out, library_words, questions

    tokenizer = subject.tokenizer
    if tokenizer.max_block_units < 2 * LONGEST:
        raise UserError(f"answers have up to {2 * LONGEST} units, and the model writes blocks of "
                        f"{tokenizer.max_block_units}; check --checkpoint")  # fmt: skip
    tokens = {word: tokenizer.encode_block(f" {word}").tokens for word in library_words()}  # as prompts hold them
    words = [word for word in tokens if held_out(word)]
    known = {token for word in tokens.keys() - set(words) for token in tokens[word]}
    asked = questions(words, settings.count, np.random.default_rng(settings.seed))
    shares, wrong = exact_match(subject.model, tokenizer, asked, settings.batch_size)
    figures = {
        "questions_per_task": settings.count, "seed": settings.seed, **shares, "held_out_words": len(words),
        "held_out_words_with_unseen_token": sum(not known.issuperset(tokens[word]) for word in words),
        "letters_per_token": sum(map(len, words)) / sum(len(tokens[word]) for word in words),
        "vocabulary": tokenizer.vocab_size,
    }  # fmt: skip
    of_each_task = {question.task: (question, c) for question, c in wrong}.values()
    return figures, [f"wrong: {c.prompt!r} → {c.completion!r}, not {question.answer!r}" for question, c in of_each_task]


def samples(settings: Samples, subject: Subject) -> Figures:
    """What a model writes after prompts from `--data`."""
    from tidal.evaluate.samples import samples as measure

    texts = [d.prompt + d.completion for d in subject.documents]
    with _blamed():
        figures, done = measure(subject.model, subject.tokenizer, texts, count=settings.count, seed=settings.seed,
                                prompt_blocks=settings.prompt_blocks, max_new_units=settings.max_new_units,
                                temperature=settings.temperature)  # fmt: skip
    odd = [c for c in done if c.degenerate][:5]
    return {"count": settings.count, **figures}, [f"{c.degenerate}: {c.prompt!r} → {c.completion!r}" for c in odd]


EVALUATIONS: dict[str, tuple[type[Any], str, Callable[[Any, Subject], Figures]]] = {
    "addition": (Sums, "Exact match on random sums.", addition),
    "bits-per-byte": (Bits, "Bits per byte; every unit is charged.", bits_per_byte),
    "boundary": (Boundary, "The cost of a prompt that ends inside a block.", boundary),
    "characters": (Characters, "Exact match on the letters of words not trained on.", characters),
    "samples": (Samples, "Shares of empty, repeating and endless output.", samples),
}
"""name: its settings, what it is, and what measures it"""


@contextlib.contextmanager
def _blamed() -> Iterator[None]:
    """Turn a ValueError into one line that says what to look at."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{error}; check --data and the other flags") from error


def _report(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(finite(figures), allow_nan=False))
        return
    width = max(14, *map(len, figures))
    for name, value in figures.items():
        form = ".4f" if isinstance(value, float) else "" if name == "seed" else ","
        print(f"{name.replace('_', ' '):<{width}} {value:{form}}")


if __name__ == "__main__":
    main(run, "tidal.evaluate")
