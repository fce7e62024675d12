"""The page of a trace shows all of it safely, and the same numbers as the text."""

from __future__ import annotations

import html
import itertools
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.strategies import short_text, tiny, tiny_copy
from tests.tokenizer.strategies import HOSTILE
from tidal.infer.trace import Trace, trace, visible
from tidal.infer.trace_page import render_html, write_html
from tidal.infer.trace_text import percent, render_text


def sample(prompt: str, **how: Any) -> Trace:
    return trace(*tiny("english", "memory"), prompt, **{"temperature": 1.0, "max_new_units": 30, **how})


class Reader(HTMLParser):
    """Collects the tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


TAGS = {"html", "head", "meta", "title", "style", "body", "header", "h1", "p", "main", "section", "pre", "span", "b",
        "i", "dl", "dt", "dd", "ul", "ol", "li", "a", "small", "s", "div", "h2", "details", "summary", "table", "thead",
        "tbody", "tr", "th", "td"}  # fmt: skip
ATTRIBUTES = {"lang", "charset", "name", "content", "http-equiv", "aria-label", "aria-labelledby", "dir", "class", "id",
              "style", "href", "open", "tabindex", "role", "scope"}  # fmt: skip


@settings(max_examples=12)
@given(st.sampled_from(HOSTILE) | short_text(), st.integers(0, 9))
@example("<script>alert(1)</script>", 0)
@example("\"'><img src=x onerror=alert(1)> &amp; </pre></style> {css} http://x.y @import url(//x)", 0)
@example("\u2581 👩‍👩‍👧 \0\x1b[2J\u202e\r\n", 0)
def test_the_page_is_safe_and_needs_nothing_else(prompt: str, seed: int) -> None:
    traced = sample(prompt, seed=seed, max_new_units=12)
    page = render_html(traced)
    page.encode()
    read = Reader(page)
    assert read.tags <= TAGS
    assert {name for name, _ in read.attributes} <= ATTRIBUTES
    for name, value in read.attributes:
        assert value is None or not re.search(r"[<>]|:\s*//|javascript", value)
        if name == "style":
            assert re.fullmatch(r"--p:[01]?\.?\d*", value or "")
        if name == "href":
            assert re.fullmatch(r"#b\d+", value or "")
    css = "".join(re.findall(r"<style>(.*?)</style>", page, re.DOTALL))
    assert not re.search(r"@import|url\(|//", css)
    assert not re.search("[\0-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202f]", page)
    assert not re.search("[\0-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202f]", render_text(traced))
    assert not re.search("<[^a-z/!]", page)  # such as <0.01%
    text = "".join(read.texts)
    assert all(visible(char) in text for char in prompt if char != " ")


def test_print_cuts_no_columns() -> None:
    """What scrolls on a screen would be cut off on paper, and browsers print no backgrounds unless told."""
    rules = render_html(sample("the light")).partition("@media print")[2].partition("</style>")[0]
    assert ".wide { overflow: visible }" in rules
    assert ".chip, .strip li, .bar { print-color-adjust: exact }" in rules
    assert "td, th { white-space: normal" in rules


def test_the_page_of_a_harmless_prompt_names_no_address() -> None:
    page = render_html(sample("the light"))
    assert not re.search(r"https?:|src=|@import|url\(|<script|<link", page)


def test_both_forms_tell_the_same_numbers() -> None:
    traced = sample("the light and", seed=4, max_new_units=40)
    text, page = render_text(traced), html.unescape(render_html(traced))
    for form in (text, page):
        for block in traced.blocks:
            assert visible(block.text) in form
            assert f"{block.log_prob:.6g} nats" in form
        for step in itertools.chain(traced.dropped, *(block.steps for block in traced.blocks)):
            assert percent(step.probability) in form
            assert f"rank {step.rank}" in form
            for other in step.runners_up:
                assert other.name in form
                assert percent(other.probability) in form
        assert f"{traced.log_prob:.6g} nats" in form
        assert f"{traced.bits_per_byte:.4g}" in form
        assert f"{traced.units} in {len(traced.blocks)}" in form
    rows = [line.split() for line in text.splitlines() if re.match(r"  \d", line)]
    steps = [*itertools.chain(*(block.steps for block in traced.blocks)), *traced.dropped]
    assert [(r[0], r[4], r[5]) for r in rows] == [(f"{s.t}", s.name, percent(s.probability)) for s in steps]


def test_a_block_cut_short_is_shown_as_dropped() -> None:
    traced = next(t for i in range(99) if (t := sample("the", max_new_units=6, seed=i)).dropped)
    assert traced.stop_reason == "length"
    assert traced.units + len(traced.dropped) == traced.settings["max_new_units"]
    for form in (render_text(traced), render_html(traced)):
        assert "Unfinished block, dropped" in form
        assert f"and {len(traced.dropped)} dropped" in form
    ended = next(t for seed in range(99) if (t := sample("the", seed=seed)).stop_reason == "eos")
    for form in (render_text(ended), render_html(ended)):
        assert "End of the document" in form
        assert "Unfinished" not in form


def test_nothing_written_is_shown() -> None:
    model, tokenizer = tiny_copy("english", "none")
    with torch.no_grad():
        model.unit_embedding.weight.zero_()  # every unit equally likely: the first that is allowed is <eos>
    traced = trace(model, tokenizer, "")
    assert (traced.completion, traced.stop_reason, traced.units) == ("", "eos", 1)
    assert traced.blocks[0].steps[0].rank == 1
    assert math.isnan(traced.bits_per_byte)
    for form in (render_text(traced), render_html(traced)):
        assert "no text" in form
        assert "nan" not in form


def test_a_long_prompt_is_shown_by_its_end() -> None:
    traced = trace(*tiny("english", "memory"), "the light and " * 80 + "fox", max_new_units=3)
    for form in (render_text(traced), render_html(traced)):
        assert "earlier" in form
        assert len(form) < 100_000


def test_the_page_is_written_in_one_piece(tmp_path: Path) -> None:
    traced = sample("the")
    path = tmp_path / "out.html"
    path.write_text("old")
    write_html(traced, path)
    assert path.read_text(encoding="utf-8") == render_html(traced)
    assert [p.name for p in tmp_path.iterdir()] == ["out.html"]
    with pytest.raises(OSError, match="No such file"):
        write_html(traced, tmp_path / "missing" / "out.html")
