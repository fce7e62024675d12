"""What a writer is told of the document's own past, by hand; test_streams.py holds it against a search."""

from __future__ import annotations

from tidal.recall import Recollection

EOB = 0


def recollection(*blocks: str) -> Recollection:
    found = Recollection()
    for block in blocks:
        found.read(units(block), EOB)
    return found


def units(written: str) -> list[int]:
    return [ord(c) for c in reversed(written)]


def told(found: Recollection, written: str) -> str:
    """What follows the end of a word that is written from behind: `|` its beginning, `-` nothing known."""
    return "".join("-" if unit < 0 else "|" if unit == EOB else chr(unit) for unit in found.recall(units(written)))


def test_what_followed_the_last_time() -> None:
    found = recollection("Traversable", ".", "stable", ".")
    assert told(found, "able") == "tt-"  # of two the later one, which came after `.`, not after `stable` `.`
    assert told(found, "sable") == "r--"  # the earlier one did not
    assert told(found, "stable") == "||-"
    assert told(found, "x") == "---"


def test_nothing_written_is_recalled_by_the_blocks_before_only() -> None:
    found = recollection("a", "b", "c", "a", "b")
    assert told(found, "") == "-cc"
    assert told(recollection("a", "b", "c", "x", "b"), "") == "-c-"
    assert told(recollection(), "") == "---"


def test_the_beginning_of_the_document_counts_as_a_block() -> None:
    assert told(recollection("a", "b"), "") == "---"  # nothing has followed b
    found = recollection("a", "a", "b")  # <bos> a a b
    assert told(found, "a") == "|--"
    assert told(recollection("a", "b", "a"), "") == "-b-"  # after a came b, but after <bos>


def test_a_copy_grows_on_its_own() -> None:
    one = recollection("the", " sea")
    other = one.copy()
    other.read(units(" tea"), EOB)
    assert told(one, "ea")[0] == "s"
    assert told(other, "ea")[0] == "t"
    assert told(recollection("a", "b", "c", "a", "b").copy(), "") == "-cc", "it stands where the other stood"


def test_numbers_are_recalled_too() -> None:
    assert told(recollection("x1984", "="), "84")[0] == "9"
