"""The split rules by example, their caps, and that no text is slow."""

from __future__ import annotations

import hashlib
import sys
import unicodedata

import pytest

from tidal.tokenizer import split as rules

from . import laws


@pytest.mark.parametrize(
    "blocks",
    [
        ["54663", " +", " 132", " =", " 54795", "\n"],
        ["a", "  ", " b"],
        ["\n\n ", " foo"],
        ["\n", "foo"],
        ["  "],
        ["a", "\t", "b", "\u00a0", "c", " \n"],
        ["Don't", " rock’n’roll", " '", "tis", "'"],
        ["R", "2", "D", "2", " x²"],
        ["__", "init", "__", "(", "self", "):"],
        ["3", ".", "14", " ...", " (", "x", ")."],
        ["cafe\u0301", " नमस्ते", " हिन्दी", " می\u200cخواهم"],
        ["x", " 👩\u200d👩\u200d👧", "1", "\ufe0f\u20e3"],
        ["<", "bob", ">"],
        [" ٣٤", " ๑๒๓"],
        [],
    ],
)
def test_examples(blocks: list[str]) -> None:
    assert laws.tokenizer("mixed").split("".join(blocks)) == blocks


def test_long_runs_are_cut_from_the_left() -> None:
    split = laws.tokenizer("mixed").split
    assert split("7" * 40) == ["7" * 32, "7" * 8]
    assert split(" " + "7" * 40) == [" " + "7" * 31, "7" * 9]
    assert split("\u2581" * 12) == ["\u2581" * 10, "\u2581" * 2]  # three byte units each
    assert laws.tokenizer("cap4").split("running\U0010ffff𠮷") == ["runn", "ing", "\U0010ffff", "𠮷"]


def test_unspaced_scripts_are_cut_along_tokens() -> None:
    tokenizer = laws.tokenizer("mixed")
    blocks = tokenizer.split("cat 你好世界，你好ภาษา𠮷𠮷")
    assert blocks[0] == "cat"
    assert " 你好" in blocks or " 你" in blocks  # the leading space stays with the first
    assert blocks[-2:] == ["𠮷", "𠮷"]  # outside the alphabet: each by itself
    assert all(not (set("你好世界") & set(b) and set("，ภาษา") & set(b)) for b in blocks)
    run = "你好中国"
    pieces = [tokenizer.id_bytes[i].decode() for i in tokenizer.encode_block(run).tokens]
    assert tokenizer.split(run) == pieces


def test_rules_one_hold_these_scripts_unspaced() -> None:
    """Trained models read blocks cut by these rules. When this must change, raise `RULES_VERSION` and write it anew."""
    assert rules.RULES_VERSION == 1
    unspaced = [code for code in range(sys.maxunicode + 1) if rules.UNSPACED.match(chr(code))]
    assert len(unspaced) == 171131
    assert hashlib.sha256(repr(unspaced).encode()).hexdigest()[:16] == "b43b57219523c75e"


def test_combining_marks_lie_where_the_pattern_looks_for_them() -> None:
    listed = rules._combining_marks()
    ranges = [(ord(listed[at]), ord(listed[at + 2])) for at in range(0, len(listed), 3)]
    found = {code for first, last in ranges for code in range(first, last + 1)}
    assert found == {c for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c))[0] == "M"}


@pytest.mark.parametrize(
    "pattern", ["a", "a'", "a\u0301", "\u0301", "\n", " ", "  \n", "-_", "1", "中a", "\u2581", "\0"]
)
def test_no_run_is_slow(pattern: str) -> None:
    """A quadratic rule would need hours, and pytest's timeout would end it."""
    text = pattern * 200_000
    assert "".join(laws.tokenizer("mixed").split(text)) == text
