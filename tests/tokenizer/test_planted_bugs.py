"""Each law must notice the bugs it is there for: plant one, see the check fail."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable

import pytest

from tidal.tokenizer import Block, MixedTokenizer, mixed, split

from . import laws

Patch = pytest.MonkeyPatch
Plant = Callable[[MixedTokenizer, Patch], None]


def remake(change: Callable[[Block], Block]) -> Plant:
    """A bug in how blocks are made: `change` what comes out."""

    def plant(t: MixedTokenizer, patch: Patch) -> None:
        make = t._make_block
        patch.setattr(t, "_make_block", lambda text: change(make(text)))

    return plant


def pattern(old: str, new: str) -> Plant:
    """A bug in the pattern of the split rules."""

    def plant(t: MixedTokenizer, patch: Patch) -> None:
        broken = split._block_pattern().pattern.replace(old, new)
        assert broken != split._block_pattern().pattern
        found = re.compile(broken).findall
        patch.setattr(mixed, "find_blocks", found)
        patch.setattr(laws, "find_blocks", found)

    return plant


def method(name: str, make: Callable[[MixedTokenizer], Callable[..., object]]) -> Plant:
    return lambda t, patch: patch.setattr(t, name, make(t))


def forget_a_character(t: MixedTokenizer, patch: Patch) -> None:
    patch.delitem(t._unit_of, "a")


def mark_is_a_space(t: MixedTokenizer, patch: Patch) -> None:
    make = t._make_block
    patch.setattr(t, "_make_block", lambda text: make(text.replace("\u2581", " ")))


def cache_ignores_space(t: MixedTokenizer, patch: Patch) -> None:
    encode, seen = t.encode_block, {}
    patch.setattr(t, "encode_block", lambda text: seen.setdefault(text.strip(" "), encode(text)))


def cut_to_fit_with(cap_error: int) -> Plant:
    def broken(block: str, widths: Iterable[int], cap: int) -> list[str]:
        return split.cut_to_fit(block, widths, cap + cap_error)

    return lambda t, patch: patch.setattr(mixed, "cut_to_fit", broken)


def last_piece_is_lost(t: MixedTokenizer, patch: Patch) -> None:
    def broken(block: str, widths: Iterable[int], cap: int) -> list[str]:
        pieces = split.cut_to_fit(block, widths, cap)
        return pieces[:-1] if len(pieces) > 1 else pieces

    patch.setattr(mixed, "cut_to_fit", broken)


TEXT = "the cat, the cat don't  care\n R2D2 54663 + snake_case \u2581é\U0010ffff Привет 你好 ภาษา "
TEXT += " ".join(["x" * 70, "é" * 40, "running" * 10, "\u2581" * 20, "the"])

BUGS: dict[str, tuple[Callable[[MixedTokenizer, str], None], Plant]] = {
    "underscores fall between the rules": (laws.check_split, pattern("|_+", "")),
    "leading spaces fall between the rules": (laws.check_split, pattern(r"|\s+", "|\n+")),
    "the last piece of a long block is lost": (laws.check_split, last_piece_is_lost),
    "a literal U+2581 becomes a space": (laws.check_ids, mark_is_a_space),
    "the cache forgets the leading space": (laws.check_ids, cache_ignores_space),
    "encode tokenizes the text whole": (
        laws.check_ids,
        method("encode", lambda t: lambda text: list(t.encode_block(text).tokens)),
    ),
    "a control id among the tokens": (
        laws.check_ids,
        method("encode", lambda t: lambda text: [t.bos_id, *MixedTokenizer.encode(t, text)]),
    ),
    "written in reading order": (
        laws.check_writer,
        method("write_units", lambda t: lambda text: list(t.encode_block(text).units)),
    ),
    "turned round before it is spelled": (
        laws.check_writer,
        method("write_units", lambda t: lambda text: list(t.encode_block(text[::-1]).units)),
    ),
    "not turned round when read": (
        laws.check_writer,
        method("unreverse", lambda t: t.decode),
    ),
    "read back character by character": (
        laws.check_writer,
        method(
            "retokenize",
            lambda t: lambda units: Block(t.unreverse(units), tuple(units[::-1]), tuple(units[::-1]), ()),
        ),
    ),
    "read back as part of another text": (
        laws.check_writer,
        method("retokenize", lambda t: lambda units: t.encode_block(" " + t.unreverse(units))),
    ),
    "one unit over the cap": (laws.check_cap, cut_to_fit_with(1)),
    "the cap counts characters": (laws.check_cap, method("_width", lambda t: lambda char: 1)),
    "a token among the units": (
        laws.check_cap,
        remake(lambda b: Block(b.text, b.tokens, b.tokens, b.places)),
    ),
    "a character of the alphabet in bytes": (laws.check_canonical, forget_a_character),
    "tokens in bytes": (
        laws.check_canonical,
        method("_piece_ids", lambda t: lambda text: [2 + byte for byte in text.encode()]),
    ),
    "places one too high": (
        laws.check_places,
        remake(lambda b: Block(b.text, b.tokens, b.units, tuple(p + 1 for p in b.places))),
    ),
    "places counted from the front": (
        laws.check_places,
        remake(lambda b: Block(b.text, b.tokens, b.units, b.places[::-1])),
    ),
    "spaces have places": (
        laws.check_places,
        remake(lambda b: Block(b.text, b.tokens, b.units, tuple(max(p, 0) for p in b.places))),
    ),
    "places counted in tokens": (
        laws.check_places,
        remake(lambda b: Block(b.text, b.tokens, b.units, tuple(range(len(b.tokens)))[::-1])),
    ),
    "the ASCII shortcut ends words at apostrophes": (laws.check_rules, pattern("&(-@", "@")),
    "two spaces before a word both go with it": (laws.check_rules, pattern("| ?(?:", "| *(?:")),
    "numbers stick to words": (laws.check_rules, pattern(r"[^\W\d_]+", r"[^\W_]+")),
}


def test_the_text_is_lawful_without_bugs() -> None:
    for law in laws.TEXT_LAWS:
        law(laws.tokenizer("mixed"), TEXT)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_found(bug: str, monkeypatch: Patch) -> None:
    law, plant = BUGS[bug]
    tokenizer = copy.deepcopy(laws.tokenizer("mixed"))
    plant(tokenizer, monkeypatch)
    with pytest.raises((AssertionError, ValueError)):  # bytes in the wrong order may not even be text
        law(tokenizer, TEXT)


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("bob_id", 2), ("n_head", 300), ("n_writable", 400), ("vocab_size", 601), ("eob_id", 1)],
)
def test_planted_layout_bug_is_found(attribute: str, value: int) -> None:
    tokenizer = copy.deepcopy(laws.tokenizer("mixed"))
    setattr(tokenizer, attribute, value)
    with pytest.raises(AssertionError):
        laws.check_layout(tokenizer)


def test_planted_digit_bug_is_found() -> None:
    tokenizer = copy.deepcopy(laws.tokenizer("mixed"))
    tokenizer.digit_units[2 + ord("7")] = False
    with pytest.raises(AssertionError):
        laws.check_layout(tokenizer)
