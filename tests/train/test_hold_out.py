"""Holding documents out."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.strategies import hold_out
from tidal.cli import UserError
from tidal.prepare.documents import Document


def plain(*sizes: int) -> list[Document]:
    return [Document("", f"{i} word\n" * (size // 7 + 1), str(i)) for i, size in enumerate(sizes)]


def share(documents: list[Document], fraction: float = 0.05, **options: int) -> float:
    training, validation = hold_out(documents, fraction, **options)
    assert training
    assert validation
    together = sorted(document.completion for document in training + validation)
    if not validation[0].source.endswith("(tail)"):
        assert together == sorted(document.completion for document in documents)
        assert [d for d in documents if d in training] == training
    else:
        cut = next(d for d in documents if validation[0].source == f"{d.source} (tail)")
        kept = next(d for d in training if d.source == cut.source)
        assert kept.completion + validation[0].completion == cut.completion
        assert len(training) == len(documents)
    return sum(map(len, validation)) / sum(map(len, documents))


def test_hold_out_of_many_documents() -> None:
    documents = plain(*(100 + 37 * i % 900 for i in range(1000)))
    assert 0.04 < share(documents) < 0.055
    assert hold_out(documents) == hold_out(iter(documents))
    chosen = [{d.source for d in hold_out(documents, seed=seed)[1]} for seed in range(3)]
    assert len(chosen[0] & chosen[1]) < len(chosen[0]) / 2
    assert len({int(source) // 100 for source in chosen[0]}) > 5  # from everywhere
    assert share(documents, cap=2000) * sum(map(len, documents)) <= 2000


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    "sizes",
    [
        (10_000_000, 500, 500),
        (500, 1_000_000),
        (100_000, 100_000),
        (10_000,),
        (300_000, 10, 200_000, 90),
        (20_000,) * 9,
    ],
    ids=str,
)
def test_hold_out_is_sensible_whatever_dominates(sizes: tuple[int, ...], seed: int) -> None:
    assert 0.04 < share(plain(*sizes), seed=seed) < 0.12


def test_hold_out_respects_the_cap_with_huge_documents() -> None:
    documents = plain(*(3_000_000 for _ in range(4)))
    assert sum(map(len, hold_out(documents)[1])) < 1_600_000


def test_hold_out_cuts_at_the_best_boundary() -> None:
    for end in ("\n\n", "\r\n\r\n", "\n", "\r\n", " "):
        text = f"{'word' * 20}{end}" * 200
        _, (tail,) = hold_out([Document("", text, "f")])
        assert tail.completion.startswith("word"), end
        assert len(tail) % (80 + len(end)) == 0
    mixed = ("word word\n" * 10 + "\n") * 100
    assert hold_out([Document("", mixed, "f")])[1][0].completion.startswith("word word\n" * 10 + "\n")
    assert len(hold_out([Document("", "字" * 100_000, "f")])[1][0]) == 5000


def test_hold_out_never_cuts_a_document_with_a_prompt() -> None:
    documents = [Document("p" * 99, "c", "a:1"), Document("p", "c", "a:2")]
    assert hold_out(documents) == (documents[:1], documents[1:])
    for few in ([], documents[:1], plain(0)[:0], [Document("", "x", "f")]):
        with pytest.raises(UserError, match="too little data"):
            hold_out(few)
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="must lie between 0 and 1"):
            hold_out(documents, fraction)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.text(alphabet="ab \n\r", min_size=1, max_size=60), min_size=1, max_size=8, unique=True),
    st.floats(0.01, 0.99),
    st.integers(0, 9),
    st.integers(1, 100),
)
@example(["ab"], 0.99, 0, 100)
def test_hold_out_loses_nothing(bodies: list[str], fraction: float, seed: int, cap: int) -> None:
    documents = [Document("", body, str(i)) for i, body in enumerate(bodies)]
    if sum(map(len, documents)) > 1:
        assert 0 < share(documents, fraction, seed=seed, cap=cap) < 1


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("n", "copies"), [(40, 3), (3, 200), (1, 1), (1, 3), (2, 2)])
def test_no_copy_of_what_is_held_out_is_learnt(n: int, copies: int, seed: int) -> None:
    """Nor of a document whose tail is, however often it comes; all that differs is learnt or held out as ever."""
    different = plain(*(1000 + 99 * i for i in range(n)))
    documents = [Document(d.completion[:i], d.completion[i:], d.source) for i in range(copies) for d in different]
    training, held_out = hold_out(documents, 0.1, seed)
    learnt, kept = ({d.prompt + d.completion for d in some} for some in (training, held_out))
    if held_out[0].source.endswith("(tail)"):
        (head,) = learnt - {d.completion for d in different}
        assert head + held_out[0].completion in {d.completion for d in different}
        assert len(learnt) == n
        assert sum(d.prompt + d.completion == head for d in training) == 1
    else:
        assert not learnt & kept
        assert len(held_out) == len(kept)
        assert learnt | kept == {d.completion for d in different}
        assert len(training) == copies * len(learnt)


def test_without_copies_the_division_is_what_it_was() -> None:
    """When runs began that may still be resumed."""
    documents = plain(*(100 + 37 * i % 90 for i in range(60)))
    chosen = [[int(d.source) for d in hold_out(documents, 0.1, seed)[1]] for seed in (0, 1)]
    assert chosen == [[3, 18, 23, 24, 37, 52], [7, 8, 30, 36, 47, 50]]
