"""Text that has broken tokenizers before."""

from __future__ import annotations

from hypothesis import strategies as st

from tidal.doctor import texts

HOSTILE = (
    *texts.HOSTILE,
    *texts.CONTROLS,
    *("\u2003", "\u2581the", " \u2581 ", "\u202e", "\ufeff", "e\u0301", "カタカナ", "བོད་", "㐀", "नमस्ते"),
    *("the", " running", "'tis", "+", " = ", "..."),
)


def any_char() -> st.SearchStrategy[str]:
    """Any code point but surrogates, planes and blocks alike."""
    return st.characters(exclude_categories=["Cs"])


def hostile_text(min_size: int = 0, max_size: int = 8) -> st.SearchStrategy[str]:
    """Text of `min_size` to `max_size` fragments: hostile literals, arbitrary characters, plain words."""
    fragment = st.one_of(
        st.sampled_from(HOSTILE),
        st.text(any_char(), min_size=1, max_size=6),
        st.text(" \nab'_1.", min_size=1, max_size=8),
    )
    return st.lists(fragment, min_size=min_size, max_size=max_size).map("".join)
