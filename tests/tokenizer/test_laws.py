"""Law 1 and its companions on hostile text, with every kind of vocabulary."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from hypothesis import given, settings

from tidal.tokenizer import MixedTokenizer

from . import laws
from .strategies import HOSTILE, hostile_text

Law = Callable[[MixedTokenizer, str], None]


@pytest.mark.parametrize("law", laws.TEXT_LAWS)
@pytest.mark.parametrize("name", laws.NAMES)
def test_law(law: Law, name: str) -> None:
    @settings(max_examples=60, deadline=None)
    @given(hostile_text())
    def holds(text: str) -> None:
        law(laws.tokenizer(name), text)

    holds()


@pytest.mark.parametrize("law", laws.TEXT_LAWS)
@pytest.mark.parametrize("name", laws.NAMES)
def test_law_on_the_hostile_list(law: Law, name: str) -> None:
    for text in HOSTILE:
        law(laws.tokenizer(name), text)
    law(laws.tokenizer(name), "".join(HOSTILE))
    law(laws.tokenizer(name), " ".join(HOSTILE))


def test_every_code_point() -> None:
    tokenizer = laws.tokenizer("empty")
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]))
    assert "".join(tokenizer.split(text)) == text
    sample = text[::37]  # 37 divides no plane, row or block size
    laws.check_ids(tokenizer, sample)
    laws.check_cap(tokenizer, sample)
    laws.check_rules(tokenizer, text)


@pytest.mark.parametrize("name", laws.NAMES)
def test_id_layout(name: str) -> None:
    laws.check_layout(laws.tokenizer(name))
