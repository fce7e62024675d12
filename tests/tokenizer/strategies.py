"""Text that has broken tokenizers before."""

from __future__ import annotations

from hypothesis import strategies as st

HOSTILE = (
    *("\0", "\t", "\r\n", "\n\n  ", "   ", " ", "\u00a0", "\u2003", "\u2028", "\x1c", "\x85"),  # white space
    *("\u2581", "\u2581the", " \u2581 ", "\u2585", "\ufffd", "\u2047"),  # marks that sentencepiece uses itself
    *("<bob>", "<eob>", "<eos>", "<s>", "</s>", "<unk>", "<0x41>", "<|endoftext|>"),  # control ids as text
    *(
        "👩‍👩‍👧‍👦",
        "👍🏽",
        "1\ufe0f\u20e3",
        "🏴\U000e0067\U000e007f",
        "\ufe0f",
        "\u200b",
        "\u202e",
        "\ufeff",
    ),  # sequences
    *("e\u0301", "\u0301", "o\u0302\u0323", "Å", "ﬁ", "ſ", "İ", "ß", "½", "²", "Ⅷ"),  # normalization, casing
    *("你好世界", " 中文", "ありがとう", "カタカナ", "ｶﾞ", "ภาษาไทย", "ပြည်", "བོད་", "㐀", "𠮷"),  # no spaces
    *("हिन्दी में", "नमस्ते", "می\u200cخواهم", "한국어", "привет мир", "עִבְרִית"),
    *("0", " 132", "54663", "1" * 40, "٣٤", "๑๒", "𝟘", "3.14"),
    *("the", " running", " don't", "'tis", "rock’n’roll", "__init__", "snake_case", "x" * 70, "é" * 20),
    *("+", " = ", "...", "-" * 50, "()[]", '"', "\\", "\U0003ffff", "\U00040000", "\U0010ffff", "\uffff"),
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
