"""Text -> sentencepiece model.

The trainer is given distinct blocks with their counts instead of running text. So its time depends on the number
of distinct blocks, it learns no piece that crosses a block, and sees exactly what it will be asked to tokenize.
"""

from __future__ import annotations

import io
import itertools
import string
from collections import Counter
from collections.abc import Iterable, Iterator

import sentencepiece

from tidal.tokenizer.split import by_script, find_blocks, utf8

SPACE_MARK = "\u2581"
"""How sentencepiece writes a space inside its pieces. A literal one is spelled in bytes, never shown to it."""

N_FIXED = 260
"""Ids that every vocabulary has: `<eob>`, `<eos>`, 256 bytes, `<bob>`, `<bos>`."""

_PRINTABLE = frozenset(string.printable) - frozenset("\t\n\r\v\f")
_MIN_VOCAB = 288
_MAX_VOCAB = 10**9  # the trainer counts in int32, up to a tenth more than this, and never ends where that wraps
_WINDOW = 1 << 20
_MAX_SENTENCE = 256  # characters; longer blocks are rare, and the trainer's memory grows with them


def may_be_unit(char: str) -> bool:
    """Whether the writable alphabet may hold `char`; all others are spelled in UTF-8 byte units.

    Left out: control characters below U+0080 (one byte as it is, and poison to the trainer's line format),
    sentencepiece's own marks for space and unknown, U+FFFD (its mark for invalid input), lone surrogates, and
    planes 4 to 16 (unassigned, private or variation selectors).
    """
    code = ord(char)
    if code < 0x80:
        return char in _PRINTABLE
    return code < 0x40000 and not 0xD800 <= code < 0xE000 and code not in (0x2581, 0x2585, 0xFFFD)


def train_model(
    texts: Iterable[str], vocab_size: int, max_block_units: int, character_coverage: float, max_bytes: int
) -> bytes:
    """Serialized sentencepiece unigram model, a deterministic function of the block counts of `texts`.

    ValueError for a vocabulary without room for an alphabet, settings out of range, lone surrogates, and where
    sentencepiece gives up.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be an iterable of strings, not one string")
    if vocab_size < _MIN_VOCAB:
        raise ValueError(f"vocab_size must be at least {_MIN_VOCAB} ({N_FIXED} are fixed), not {vocab_size}")
    if vocab_size > _MAX_VOCAB:
        raise ValueError(f"vocab_size must be at most {_MAX_VOCAB}, not {vocab_size}")
    if not 0.0 < character_coverage <= 1.0:
        raise ValueError(f"character_coverage must lie in (0, 1], not {character_coverage}")
    if max_bytes <= 0:
        raise ValueError(f"max_bytes must be positive, not {max_bytes}")
    blocks: Counter[str] = Counter()
    for window in _leading(texts, max_bytes):
        blocks.update(find_blocks(window))
    alphabet = _choose_alphabet(blocks, vocab_size - N_FIXED, character_coverage)

    # Each character once by itself: the trainer drops required characters that it never saw.
    sentences = Counter(alphabet)
    for block, count in blocks.items():
        for sentence in _sentences(block, frozenset(alphabet), min(max_block_units, _MAX_SENTENCE)):
            sentences[sentence] += count
    ordered = sorted(sentences.items(), key=lambda item: (-item[1], item[0]))
    # A list: what a signal raised in a generator's code would come out as a RuntimeError of sentencepiece.
    lines = [f"{sentence}\t{count}" for sentence, count in ordered]

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            input_format="tsv",
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size - N_FIXED + 257,  # what it counts itself: <unk>, 256 bytes, and the pieces
            hard_vocab_limit=False,
            required_chars="".join(alphabet).replace(" ", SPACE_MARK),
            character_coverage=1.0,  # the alphabet is already chosen
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation
            split_by_unicode_script=False,  # blocks are split already, and a combining mark is a script of its own
            split_digits=True,
            byte_fallback=True,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=4,  # a constant, not the machine's: sums of floats depend on it
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"sentencepiece can train no tokenizer of {vocab_size} ids on these texts: {error}") from error
    return model.getvalue()


def _leading(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """The first `max_bytes` UTF-8 bytes of `texts`, in windows small enough to hold their list of blocks."""
    left = max_bytes
    for text in texts:
        for start in range(0, len(text), _WINDOW):
            data = utf8(text[start : start + _WINDOW], offset=start)
            yield data[:left].decode(errors="ignore")
            left -= len(data)
            if left <= 0:
                return


def _choose_alphabet(blocks: Counter[str], room: int, coverage: float) -> list[str]:
    """Characters of the writable alphabet, in code point order.

    All of printable ASCII, then the most frequent others until `coverage` of the text is spelled in
    characters; beyond ASCII at most half of the `room`, so that longer pieces have the other half.
    """
    counts: Counter[str] = Counter(dict.fromkeys(_PRINTABLE, 0))
    for block, count in blocks.items():
        for char in block:
            counts[char] += count
    usable = sorted(filter(may_be_unit, counts), key=lambda c: (c not in _PRINTABLE, -counts[c], c))
    total = covered = sum(counts[char] for char in usable)
    while usable[-1] not in _PRINTABLE and covered - counts[usable[-1]] >= coverage * total:
        covered -= counts[usable.pop()]
    return sorted(usable[: min(room, max(len(_PRINTABLE), room // 2))])


def _sentences(block: str, alphabet: frozenset[str], longest: int) -> Iterator[str]:
    """Parts of a block that sentencepiece will be asked to tokenize: one script, only characters it knows."""
    for run in by_script(block):
        for known, chars in itertools.groupby(run, alphabet.__contains__):
            if known:
                part = "".join(chars)
                yield from (part[start : start + longest] for start in range(0, len(part), longest))
