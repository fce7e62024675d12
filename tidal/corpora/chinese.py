"""Chinese: poems and sayings, manual pages, and the help of an office suite, without their markup."""

from __future__ import annotations

import dataclasses
import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

from tidal.cli import UserError
from tidal.corpora import archives, roff
from tidal.corpora.documents import Document, file_name, held_out_by_hash, tidy

LEAST_HAN = 0.2
"""A page with a smaller share of Han characters is not translated, and left out."""
LONG = 30
"""UTF-8 bytes from which on a line (a paragraph) that another page already had is a repetition."""
NOTICE = re.compile(r"^(\[?中文版维护人\]?|跋)$.*", re.MULTILINE | re.DOTALL)
"""In manual pages: who translated it and when, to the end."""
KEPT = "\0"
"""Stands for a space in program text, where spaces must not be merged."""
MARKUP = re.compile(r"\x1b\[[0-9;]*m?|^.*[\u2500-\u257f].*$", re.MULTILINE)
"""In sayings: colours of a terminal, and lines of tables drawn in characters."""


def fortunes(archive: Path) -> Iterator[Document]:
    """`fortunes-zh`: a document for each book or author that sayings are ascribed to, and for each other poem.

    The ascription is the last line, `-- AUTHOR《BOOK》chapter`, or a heading such as 《詩經‧ 國風‧ …》.

    A saying that quotes a verse of one before it is left out.
    """
    seen: set[str] = set()
    for path, data in sorted(archives.files(archive), reverse=True):  # whole poems first, then what quotes them
        if not (match := re.fullmatch(r"usr/share/games/fortunes/(\w+)", path)):
            continue
        sayings: dict[str, list[str]] = {}
        for saying in re.split(r"(?m)^%.*$", MARKUP.sub("", archives.text(data, path, archive))):
            saying = tidy(saying).strip()
            verses = {line.strip() for line in saying.split("\n") if not re.match(r"\s*--|作者", line)}
            verses = {verse for verse in verses if len(verse.encode()) >= LONG}
            if saying and not verses & seen:
                sayings.setdefault(_ascription(saying), []).append(saying)
            seen |= verses
        for number, (key, group) in enumerate(sayings.items(), start=1):
            name = f"fortunes-{match[1]}-{number:04}"
            yield Document(name, tidy("\n\n".join(group)), held_out_by_hash(key))


def _ascription(saying: str) -> str:
    """The book or author, or where there is none the first two lines: a poem's title and poet."""
    first, last = saying.split("\n")[0], saying.split("\n")[-1]
    if match := re.match(r"\s*-- *(.*)", last):
        return re.split("[》，]", match[1])[0].lstrip("《")
    return first.split("‧")[0].lstrip("《") if "‧" in first else "\n".join(saying.split("\n")[:2])


def manual_pages(archive: Path) -> Iterator[Document]:
    """`manpages-zh`, in simplified characters (the traditional ones are the same pages, converted by a program).

    Left out are pages that are mostly not translated, and the few in the dialect `mdoc`.
    """
    for path, data in archives.files(archive):
        if match := re.fullmatch(r"usr/share/man/zh_CN/man\w+/(.+)\.gz", path):
            try:
                data = gzip.decompress(data)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise UserError(f"{path} in {archive} is damaged: {error}; fetch it again") from error
            page = archives.text(data, path, archive)
            text = tidy(NOTICE.sub("", roff.plain(page) or ""))
            if han_share(text) >= LEAST_HAN:
                yield Document(file_name(f"man-{match[1]}"), text, held_out_by_hash(match[1]))


def without_repetition(pages: Iterable[Document]) -> Iterator[Document]:
    """Leave out long lines that a page before had, and pages of which less than half remains.

    Pages share notices and whole paragraphs; a held-out page must not ask for what was learnt word by word.
    """
    seen: set[str] = set()
    for page in pages:
        lines = page.text.split("\n")
        new = [line for line in lines if len(line.encode()) < LONG or line.strip() not in seen]
        seen.update(line.strip() for line in lines)
        text = tidy("\n".join(new))
        if 2 * len(text) >= len(page.text):
            yield dataclasses.replace(page, text=text)


def han_share(text: str) -> float:
    """Share of Han characters in those that are not white space."""
    return len(re.findall(r"[\u3400-\u9fff]", text)) / max(1, len(re.findall(r"\S", text)))


def help_pages(archive: Path) -> Iterator[Document]:
    """`libreoffice-help-zh-cn`: what a page shows, its menus, links to other pages and hidden variants left out."""
    for path, data in archives.files(archive):
        if match := re.fullmatch(r"usr/share/libreoffice/help/zh-CN/text/(.+)\.html", path):
            text = tidy(help_text(archives.text(data, path, archive)))
            if han_share(text) >= LEAST_HAN and not re.search(r"[\x80-\x9f]", text):  # no characters torn apart
                yield Document(file_name(f"help-{match[1]}"), text, held_out_by_hash(match[1]))


def help_text(page: str) -> str:
    """What a page of LibreOffice's help shows: paragraphs are lines, cells of a table are parted by tabs."""
    parser = _HelpPage()
    parser.feed(page[page.find('<div id="DisplayArea"') :].partition('<div id="SearchFrame"')[0])
    parser.close()
    lines = "".join(parser.parts).replace("\xa0", " ").split("\n")
    lines = [re.sub(r" *\t *", "\t", re.sub(" +", " ", line)).strip() for line in lines]
    return "\n".join(line.replace(KEPT, " ") for line in lines if line)


class _HelpPage(HTMLParser):
    """Collects the text of a page's display area."""

    VOID = frozenset({"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"})
    BLOCK = frozenset({"p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "tr", "ul", "ol", "li", "table", "pre", "br"})
    SKIPPED = frozenset({"script", "style", "noscript", "button", "nav", "video", "audio", "object"})
    SKIPPED_CLASSES = frozenset({"howtoget", "relatedtopics", "icontable"})
    """How to open a dialog, titles of related pages, names of icons: the same on many pages."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, bool]] = []  # tags not yet closed, and whether what is in them is shown
        self.parts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        shown = self.open[-1][1] if self.open else given.get("id") == "DisplayArea"
        if tag in self.SKIPPED or self.SKIPPED_CLASSES & set((given.get("class") or "").split()):
            shown = False
        elif "hidden" in given and not (given.get("id") or "").startswith("default"):
            shown = False  # of a text that differs between programs or systems, only the default is shown
        if tag in self.BLOCK:
            self._break(tag)
        if tag not in self.VOID:
            self.open.append((tag, shown))

    def handle_endtag(self, tag: str) -> None:
        if any(tag == open_tag for open_tag, _ in self.open):
            if tag in self.BLOCK:
                self._break(tag)
            elif tag in ("td", "th") and self.open[-1][1]:
                self.parts.append("\t")
            while self.open.pop()[0] != tag:  # browsers close what is inside as well
                pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1][1]:
            literal = any(tag == "pre" for tag, _ in self.open)
            self.parts.append(data.expandtabs(4).replace(" ", KEPT) if literal else re.sub(r"\s+", " ", data))

    def _break(self, tag: str) -> None:
        if self.open and self.open[-1][1]:
            in_cell = any(open_tag in ("td", "th") for open_tag, _ in self.open) and tag not in ("tr", "table")
            self.parts.append(" " if in_cell else "\n")
