"""Texts to examine a model with: hostile strings, a built-in list, what a run was trained on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tidal.cli import UserError
from tidal.doctor.patient import Document, Patient
from tidal.prepare.again import held_out_again, training_of
from tidal.tokenizer import MixedTokenizer
from tidal.train.recipes.addition import random_problem
from tidal.train.recipes.characters import held_out, library_words, questions

HOSTILE: tuple[str, ...] = (
    "\0", "\t", "\r\n", "\n\n  ", " ", "   ", "\u00a0", "\u2028", "\x1c", "\x85",  # white space of all kinds
    "\u2581", "\u2581the \u2581 \u2581", "\ufffd", "\u2585", "\u2047",  # marks that sentencepiece uses itself
    "👩‍👩‍👧‍👦", "👍🏽", "1\ufe0f\u20e3", "🏴\U000e0067\U000e007f", "\ufe0f", "\u200b",
    "\u202eabc", "\ufeffbom",  # sequences, invisible characters
    "e\u0301 é", "\u0301", "o\u0302\u0323", "Å", "ﬁ", "ſ", "İ", "ß", "½", "²", "Ⅷ",  # what normalization changes
    "你好世界", " 中文 text", "ありがとう", "ｶﾞ", "ภาษาไทย", "ပြည်", "𠮷",  # no spaces between words
    "हिन्दी में", "می\u200cخواهم", "한국어", "привет, мир", "עִבְרִית",
    "0", " 132", "54663", "1" * 40, "٣٤", "๑๒", "𝟘", "3.14", "-7",
    " don't", "rock’n’roll", "__init__", "snake_case", "x" * 70, "é" * 40, "-" * 50, "()[]", "\\", '"',
    "\U0003ffff", "\U00040000", "\U0010ffff", "\uffff", "abba", "ab", "  two  spaces ", "trailing ", "\nleading",
)  # fmt: skip
"""Text that has broken tokenizers before."""

CONTROLS: tuple[str, ...] = ("<bob>", "<eob>", "<bos>", "<eos>", "<pad>", "<s>", "</s>", "<unk>", "<0x41>", "<0x0A>",
                             "<|endoftext|>", "<|im_start|>", "[INST]", "[CLS]", "\u2581<eob>\u2581")  # fmt: skip
"""What control ids are called, here and elsewhere."""

BUILT_IN: tuple[Document, ...] = (
    Document("", "Once upon a time, a fox met 12 dogs; they didn't care.\n"),
    Document("54663 + 132 =", " 54795\n"),
    Document("the light and", " the darkness: naïve café, 3.14\n"),
    Document("def f(x):\n", "    return '👍é你好' + x_1\n"),
    Document("", "abba noon"),
    Document("the cat sat on the mat", ", the cat saw the mat, the hat sat.\n"),  # what is recalled matters
)
"""Used where there is no data; the laws hold for any text."""

LONG, LONG_IF_QUICK, MOST_LONG = 1200, 600, 8192
"""Tokens, at least and at most, of a long prompt: the decoder's caches begin with room for 256."""


def long_prompt(patient: Patient) -> Document:
    """A sentence behind a prompt so long that what ends at a length has ended: longer, too, than training's rows."""
    text, wanted = " ".join(document.text for document in BUILT_IN), LONG_IF_QUICK if patient.quick else LONG
    if patient.feed is not None:
        wanted = min(max(wanted, 1 + patient.feed.batch.reader_ids.shape[1]), MOST_LONG)
    n_tokens = sum(len(patient.tokenizer.encode_block(block).tokens) for block in patient.tokenizer.split(text))
    return Document(text * math.ceil(wanted / n_tokens), " the cat sat.\n")


def window(tokenizer: MixedTokenizer, document: Document, units: int) -> Document:
    """A document cut at the ends of blocks: prompt and completion of at most about `units` each."""
    prompt, _ = _cut(tokenizer, document.prompt, units, from_end=True)
    completion, whole = _cut(tokenizer, document.completion, units)
    return Document(prompt, completion, document.ends and whole)


def prompts(tokenizer: MixedTokenizer, documents: Sequence[Document], count: int, units: int) -> list[Document]:
    """`count` prompts with what follows them: the documents' own, or places in text that has none, in turn."""
    found = [window(tokenizer, document, units)
             for document in itertools.islice((d for d in documents if d.prompt), count)]  # fmt: skip
    plain, rng = [document for document in documents if not document.prompt], np.random.default_rng(0)
    splits: dict[int, list[str]] = {}
    for n in range(count - len(found) if plain else 0):
        which = n % len(plain)
        if which not in splits:  # a text may be millions of characters long: a stretch of it is enough
            start = int(rng.integers(0, max(1, len(plain[which].text) - 40_000)))
            splits[which] = tokenizer.split(plain[which].text[start : start + 40_000])
        blocks = splits[which]
        at = int(rng.integers(0, max(1, len(blocks) - units // 3)))
        half = at + min(units // 6, len(blocks) // 2)
        found.append(Document("".join(blocks[at:half]), "".join(blocks[half : half + units // 3]), False))
    return found


def of_run(trainer: Mapping[str, Any]) -> tuple[list[Document], str]:
    """Documents like those a run was trained on, held out where possible, and a word on where they come from, of its
    trainer.json; none where the data are gone or cannot be read any more. Raises UserError for settings that cannot be
    read.
    """
    if not trainer.get("settings"):
        return [], ""
    try:
        own = training_of(trainer)
        if not own.addition.operations or max(own.addition.digits, own.addition.terms, own.addition.problems) > 4000:
            raise ValueError(f"no such problems: {own.addition}")
    except ValueError as error:
        raise UserError(f"the run's settings cannot be read: {error}; give --data") from error
    rng = np.random.default_rng(2**31)
    if own.recipe == "addition":
        sums = own.addition
        kinds = [(sums.operations[n % len(sums.operations)], sums.digits - n % min(2, sums.digits)) for n in range(64)]
        problems = [random_problem(rng, sums, operation, digits) for operation, digits in kinds]
        return [Document(*problem) for problem in problems], f"new problems of up to {sums.digits} digits"
    if own.recipe == "characters":
        asked = questions([word for word in library_words() if held_out(word)], 8, rng)
        several = (question for one_of_each in zip(*asked.values(), strict=True) for question in one_of_each)
        return [Document(q.prompt, q.answer) for q in several], "questions about words that were held out"
    try:
        documents, source = held_out_again(own.text, own.seed, trainer.get("data"))
    except UserError as error:  # the model is as it was, whatever has become of its data
        return [], f"a built-in list (the run's data cannot be used: {error})"
    return [Document(d.prompt, d.completion) for d in documents], source


def _cut(tokenizer: MixedTokenizer, text: str, units: int, from_end: bool = False) -> tuple[str, bool]:
    """The blocks of one end of a text that come to at most `units` units (at least one block); whether it is all."""
    longest = text[-40 * units :] if from_end else text[: 40 * units]
    blocks = tokenizer.split(longest)
    kept: list[str] = []
    for block in reversed(blocks) if from_end else blocks:
        units -= len(tokenizer.write_units(block)) + 1
        if kept and units < 0:
            break
        kept.append(block)
    joined = "".join(reversed(kept) if from_end else kept)
    return joined, len(joined) == len(text)
