"""Plain text of manual pages: the requests of `man` and the escapes of roff are undone; `mdoc` is not known."""

from __future__ import annotations

import re
from collections.abc import Iterator

HAN = "\u3000-\u303f\u3400-\u9fff\uf900-\ufaff\uff00-\uffef"
"""Characters between which Chinese has no spaces: Han, and the punctuation as wide as they are."""
NAMED = {
    "bu": "•", "em": "—", "en": "–", "hy": "-", "co": "©", "rg": "®", "tm": "™", "aq": "'", "dq": '"', "cq": "’",
    "oq": "‘", "lq": "“", "rq": "”", "mu": "×", "di": "÷", "de": "°", "+-": "±", "<=": "≤", ">=": "≥", "!=": "≠",
    "==": "≡", "ha": "^", "ti": "~", "rs": "\\", "ga": "`", "aa": "´", "->": "→", "<-": "←", "ua": "↑", "da": "↓",
    "ss": "ß", "'e": "é", "'a": "á", "`e": "è", "`a": "à", ":a": "ä", ":o": "ö", ":u": "ü", "/o": "ø", "oa": "å",
    "Fo": "«", "Fc": "»", "or": "|", "ul": "_", "sl": "/", "mi": "−", "pl": "+", "eq": "=", "lB": "[", "rB": "]",
    "lC": "{", "rC": "}", "la": "⟨", "ra": "⟩", "Po": "£", "Eu": "€", "sc": "§", "pc": "·", "md": "⋅", "sq": "□",
    "12": "½", "14": "¼", "34": "¾", "ba": "|", "br": "│", "cu": "∪", "ca": "∩", "if": "∞", "at": "@", "sh": "#",
}  # fmt: skip
"""Characters that roff writes as \\(xx or \\[xx]."""
STRINGS = {'L"': "“", 'R"': "”", "C`": "", "C'": "", "--": "—", "PI": "π", "lq": "“", "rq": "”", "R": "®", "Tm": "™"}
"""What the preambles of pages define as \\*x, \\*(xx or \\*[xx]; anything else becomes nothing."""
ESCAPE = re.compile(
    r"""\\(?:
      (?P<comment>["\#].*) | \*(?P<string>\(..|\[[^]]*\]|.) | (?:\((?P<two>..)|\[(?P<long>[^]]*)\])
      | [fFmMgkn][+-]?(?:\(..|\[[^]]*\]|.) | s(?:[+-]?\(..|[+-]?\[[^]]*\]|[+-]?\d|'[^']*') | [bADhHlLNoRSvwxXZ]'[^']*'
      | (?P<space>[ ~0t]) | (?P<same>[-.'`_"]) | (?P<slash>[e\\]) | (?P<other>.) | $
    )""",
    re.VERBOSE,
)
JOINING = ("BR", "BI", "IB", "IR", "RB", "RI")
"""Fonts in turn: the arguments follow each other without spaces."""
INLINE = ("B", "I", "SM", "SB", "R", "UR", "MT", "URL", "q")
HEADING = ("SH", "SS", "SUB")
TIGHT = ("br", "TQ", "RS", "RE", "PD", "in", "ti")
BREAK = ("PP", "P", "LP", "Pp", "sp", "Sp", "IP", "TP", "HP", "bp", "ce", *TIGHT)
"""Requests that end a paragraph; after the tight ones no line is left blank."""
LITERAL = {"nf": "fi", "EX": "EE", "Vb": "Ve", "CS": "CE", "DS": "DE"}
"""Requests from which, and to which, lines are kept as they are."""
SKIPPED = {"de": "..", "ig": "..", "TS": ".TE", "EQ": ".EN", "am": ".."}
"""Requests that begin what is no text (definitions of macros, comments, tables, formulas), and its last line."""


def plain(page: str) -> str | None:
    """The text of a manual page, a paragraph on each line; None unless it is written with `man` requests."""
    lines = page.splitlines()
    start = next((i for i, line in enumerate(lines) if re.match(r"\.\s*TH\b", line)), None)
    if start is None:
        return None
    out: list[str] = []
    paragraph = ""
    literal: str | None = None  # the request that ends literal lines
    for name, text in _lines(lines[start + 1 :]):
        if name == literal:
            literal = None
        elif not name:
            if literal is not None or not text.strip():
                out += [paragraph, text.rstrip()] if paragraph else [text.rstrip()]
                paragraph = ""
            else:
                paragraph = _join(paragraph, text.strip())
        elif name in LITERAL or name in HEADING or name in BREAK:
            if paragraph:
                out.append(paragraph)
            paragraph = ""
            if name in LITERAL:
                literal = LITERAL[name]
            elif name in HEADING:
                out += ["", text]
                literal = None
            elif name not in TIGHT and literal is None:
                out.append("")
            if name == "IP":
                paragraph = text.strip()
    return "\n".join([*out, paragraph])


def _lines(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Each line as a request's name ("" for text) and the text in it; what is no text is left out."""
    until, depth = "", 0
    for line in lines:
        if until:
            until = "" if line.replace(" ", "").startswith(until) else until
            continue
        if depth:  # in a conditional's braces
            depth += line.count(r"\{") - line.count(r"\}")
            continue
        if not line.startswith((".", "'")):
            yield "", unescape(line)
            continue
        request = re.match(r"[.']\s*([^\s\\\"]*)\s?(.*)", line)
        assert request is not None  # every part may be empty
        name, rest = request[1], request[2]
        if name in SKIPPED:
            until = SKIPPED[name]
        elif name in ("if", "ie", "el", "while"):
            depth = max(0, line.count(r"\{") - line.count(r"\}"))
        elif name in INLINE or name in JOINING:
            if arguments := _arguments(rest):  # without any, the font is that of the next line
                yield "", ("" if name in JOINING else " ").join(arguments)
        elif name == "IP":
            yield name, next(iter(_arguments(rest)), "")
        elif name in HEADING:
            yield name, " ".join(_arguments(rest))
        elif name:
            yield name, ""


def _arguments(rest: str) -> list[str]:
    """The arguments of a request: words, or between double quotes, where two of them stand for one."""
    found = re.findall(r'"((?:[^"]|"")*)"?|((?:\\.|[^\s"\\])(?:\\.|[^\s\\])*)', re.sub(r'\\["#].*', "", rest))
    return [unescape(quoted.replace('""', '"') or word) for quoted, word in found]


def unescape(text: str) -> str:
    """Text without roff's escapes."""
    return ESCAPE.sub(_character, text)


def _character(escape: re.Match[str]) -> str:
    if (string := escape["string"]) is not None:
        return STRINGS.get(string[1:].rstrip("]") if string[0] in "([" and len(string) > 1 else string, "")
    if (named := escape["two"] or escape["long"]) is not None:
        if re.fullmatch(r"u[0-9A-F]{4,6}", named) and (code := int(named[1:], 16)) <= 0x10FFFF:
            return "" if 0xD800 <= code < 0xE000 else chr(code)  # half a character is none
        return NAMED.get(named, "")
    if escape["space"] is not None:
        return " "
    if escape["slash"] is not None:
        return "\\"
    return escape["same"] or ""


def _join(before: str, line: str) -> str:
    """A paragraph and its next line, with a space between them unless both sides are Chinese."""
    if not before or not line:
        return before + line
    return before + ("" if re.search(f"[{HAN}]$", before) and re.match(f"[{HAN}]", line) else " ") + line
