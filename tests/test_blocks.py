"""Tables of blocks, passages, and how they are cut and packed into rows."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import fill_rows, passages, tokenizer_names, tokenizers
from tests.tokenizer.strategies import hostile_text
from tidal import blocks as module
from tidal.blocks import (
    BOS_BLOCK,
    EOS_BLOCK,
    NOTHING,
    BlockTable,
    Growing,
    Passage,
    joined,
    passage,
    share_rows,
    suffix_hashes,
    suffix_hashes_along,
    windows,
)
from tidal.boundary_dropout import cut_at_random


def texts_of(p: Passage, table: BlockTable) -> list[str]:
    return [table.texts[index] for index in p.blocks]


def n_tokens(p: Passage, table: BlockTable) -> int:
    return int(table.n_tokens(p.blocks).sum())


def n_steps(p: Passage, table: BlockTable) -> int:
    return int(table.n_targets(p.blocks[p.supervised]).sum())


# ------------------------------------------------------------------------------------------------- table


@settings(max_examples=80)
@given(tokenizer_names, st.lists(hostile_text(), max_size=4))
def test_a_table_holds_every_block_once(name: str, texts: list[str]) -> None:
    table = BlockTable(tokenizer := tokenizers()[name])
    blocks = [block for text in texts for block in tokenizer.split(text)]
    index = table.indices(blocks)
    assert index.dtype == np.int32
    assert [table.texts[i] for i in index] == blocks
    assert len(table) == len(table.texts) == 2 + len(set(blocks))
    assert table.indices(blocks).tolist() == index.tolist()
    for i, text in zip(index, blocks, strict=True):
        block = tokenizer.encode_block(text)
        read = slice(*table.token_start.view()[[i, i + 1]])
        write = slice(*table.target_start.view()[[i, i + 1]])
        targets = table.targets.view()[write].tolist()
        assert tuple(table.tokens.view()[read]) == block.tokens
        assert tuple(table.places.view()[read]) == block.places
        assert targets == [*tokenizer.write_units(text), tokenizer.eob_id]
        assert table.hashes.view()[write].tolist() == [
            list(suffix_hashes(targets[:t], tokenizer.digit_units)) for t in range(len(targets))
        ]
        assert table.n_bytes.view()[i] == len(text.encode())
        assert table.last_token.view()[i] == block.tokens[-1]


def test_a_block_that_is_refused_leaves_the_table_as_it_was() -> None:
    table = BlockTable(tokenizers()["english"])
    for bad in ("\ud800", ""):
        with pytest.raises(ValueError, match=r"surrogate|at least one character"):
            table.indices(["the", bad])
    assert len(table) == 2
    assert [table.texts[i] for i in table.indices(["fox", "the"])] == ["fox", "the"]


def test_the_two_special_blocks() -> None:
    table = BlockTable(tokenizer := tokenizers()["english"])
    table.indices(["the", " light"])
    table.clear()
    assert len(table) == 2
    both = np.array([BOS_BLOCK, EOS_BLOCK], np.int32)
    assert table.n_tokens(both).tolist() == [1, 0]
    assert table.n_targets(both).tolist() == [0, 1]
    assert table.tokens.view().tolist() == [tokenizer.bos_id]
    assert table.targets.view().tolist() == [tokenizer.eos_id]


def test_steps_are_named_when_a_batch_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    table, other = (BlockTable(tokenizers()["english"]) for _ in range(2))
    with monkeypatch.context() as patch:
        for name in ("suffix_hashes_along", "codes_along"):
            patch.setattr(module, name, None)
        table.indices(["the", " light"])
        patch.setattr(module, "suffix_hashes_along", suffix_hashes_along)
        with pytest.raises(TypeError):  # as if memory ran out: nothing is named by halves
            _ = table.hashes
    for blocks in (["the", " light"], [], [" and", "the"]):
        table.indices(blocks)
        assert len(table.hashes.view()) == len(table.nodes.view()) == len(table.codes.view()) == table.targets.n
    other.indices(["the", " light", " and"])
    for name in ("hashes", "nodes", "codes"):
        assert getattr(table, name).view().tolist() == getattr(other, name).view().tolist()


@given(st.lists(st.lists(st.integers(0, 9), max_size=700), max_size=8))
def test_growing_keeps_all_that_it_was_given(parts: list[list[int]]) -> None:
    growing, pairs = Growing(), Growing(2)
    for part in parts:
        growing.extend(part)
        pairs.extend([(value, -value) for value in part])
    flat = [value for part in parts for value in part]
    assert growing.view().tolist() == flat
    assert pairs.view().tolist() == [[value, -value] for value in flat]


# ------------------------------------------------------------------------------------------------ suffixes


@given(st.lists(st.integers(2, 11), max_size=6), st.lists(st.integers(2, 11), max_size=6))
def test_a_hash_names_a_suffix(one: list[int], other: list[int]) -> None:
    digits = np.zeros(12, np.bool_)
    a, b = suffix_hashes(one, digits), suffix_hashes(other, digits)
    for place, order in enumerate((0, 2, 3)):
        here, there = (written[-order:] if len(written) >= max(order, 1) else None for written in (one, other))
        assert (a[place] == b[place]) == (here == there)
        assert (a[place] == NOTHING) == (here is None)
        assert a[place] < 2**63
    assert len({h for h in a if h != NOTHING}) == sum(h != NOTHING for h in a), "the orders share a hash"


@given(st.lists(st.integers(2, 11), min_size=1, max_size=6))
def test_a_suffix_with_a_digit_has_no_hash(written: list[int]) -> None:
    digits = np.arange(12) >= 9
    for place, order in enumerate((0, 2, 3)):
        suffix = written[-order:]
        known = len(written) >= max(order, 1) and max(suffix) < 9
        assert (suffix_hashes(written, digits)[place] != NOTHING) == known


def test_a_word_and_the_last_units_of_another_have_different_names() -> None:
    """All of them share one table. With seeds a few apart, "whole: a b" and "last two: c b" were one for c = a ^ 2."""
    digits = np.zeros(60, np.bool_)
    named: dict[int, tuple[int, int, int]] = {}
    for a, b in itertools.product(range(60), repeat=2):
        whole, two, _ = suffix_hashes([a, b], digits)
        for order, name in ((0, whole), (2, two), (3, suffix_hashes([a, b, a], digits)[2])):
            assert named.setdefault(name, (order, a, b)) == (order, a, b)


def test_low_bits_of_hashes_are_spread() -> None:
    """Rows of the table are hash modulo its size, also where that is a power of two."""
    digits = np.zeros(300, np.bool_)
    rows = [suffix_hashes([a, b], digits)[0] % 4096 for a in range(200, 264) for b in range(200, 264)]
    assert len(set(rows)) > 4096 * 0.6  # 1 − 1/e of the rows, were they random


# ------------------------------------------------------------------------------------------------ passages


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(ValueError, match="surrogate"):
        passage(BlockTable(tokenizers()["english"]), "", "a\ud800")


# ----------------------------------------------------------------------------------------- windows and rows


def test_a_window_has_less_context_where_its_next_block_is_long() -> None:
    table = BlockTable(tokenizers()["digits"])
    cut = windows(passage(table, "", "1234567 12345 123456"), table, 10, 1000, overlap=7)
    assert [n_tokens(w, table) for w in cut] == [8, 8, 8]
    assert [texts_of(w, table)[w.supervise_from :] for w in cut] == [["123456", "7"], [" 12345"], [" 12345", "6", ""]]


def test_a_prompt_costs_no_writer_steps() -> None:
    table = BlockTable(tokenizers()["digits"])
    whole = passage(table, "123456 123456 123456", " 1\n")
    assert windows(whole, table, 100, 6) == [whole]
    assert list(fill_rows([whole], table, 100, 6)) == [[whole]]


def test_what_is_learnt_sees_the_end_of_a_long_prompt() -> None:
    """As when decoding, but for what has no room: all that fits beside the completion, or half a window."""
    table = BlockTable(tokenizers()["digits"])
    numbers = [f" {n}" for n in range(10, 60)]  # three tokens each
    for completion, n_windows, n_seen in ((numbers[:1], 1, 8), (numbers[:4], 1, 5), (numbers[:9], 2, 5)):
        cut = windows(passage(table, "".join(numbers), "".join(completion), ends=False), table, 30, 1000)
        assert len(cut) == n_windows
        assert texts_of(cut[0], table)[1 : cut[0].supervise_from] == numbers[-n_seen:]
        learnt = [text for w in cut for text in texts_of(w, table)[w.supervise_from :]]
        assert learnt == completion
    whole = passage(table, "".join(numbers[:3]), "".join(numbers), ends=False)  # a short prompt is never cut
    assert texts_of(windows(whole, table, 30, 1000)[0], table)[1:4] == numbers[:3]


@settings(max_examples=150)
@given(st.data(), tokenizer_names, st.integers(2, 40), st.integers(1, 60), st.integers(0, 12))
def test_windows(data: st.DataObject, name: str, reader_budget: int, writer_budget: int, overlap: int) -> None:
    table = BlockTable(tokenizers()[name])
    whole = data.draw(passages(table, max_size=10, dropout=False))
    cut = windows(whole, table, reader_budget, writer_budget, overlap)
    supervised = [block for w in cut for block in w.blocks[w.supervise_from :].tolist()]
    assert supervised == whole.blocks[whole.supervise_from :].tolist(), "each block once, in order"
    body = whole.blocks.tolist()
    for window in cut:
        blocks = window.blocks.tolist()
        assert blocks[0] == BOS_BLOCK
        assert BOS_BLOCK not in blocks[1:]
        assert window.blocks.dtype == np.int32
        assert window.place_offset == whole.place_offset
        assert any(blocks[1:] == body[i : i + len(blocks) - 1] for i in range(1, len(body) + 1)), "not contiguous"
        if len(cut) > 1:
            assert window.supervise_from < len(blocks), "a window without supervised blocks"
    if n_tokens(whole, table) <= reader_budget and n_steps(whole, table) <= writer_budget:
        assert cut == [whole]
        return
    for window in cut:  # only a block that is over a budget on its own may be in a window over it
        last = Passage(window.blocks[[0, -1]])
        assert n_tokens(window, table) <= max(reader_budget, n_tokens(last, table))
        assert n_steps(window, table) <= max(writer_budget, n_steps(last, table))


def test_windows_are_cut_before_blocks_are() -> None:
    table = BlockTable(tokenizers()["english"])
    cut = cut_at_random(passage(table, "", "the light"), table, np.random.default_rng(0), 1)
    with pytest.raises(ValueError, match=r"blocks \(1, 3\) .* read only"):
        windows(cut, table, 2, 2)
    stray = dataclasses.replace(passage(table, "", "the light"), n_stray=1, stray_offset=5)
    with pytest.raises(ValueError, match="1 are strays"):
        windows(stray, table, 2, 2)


@settings(max_examples=60)
@given(hostile_text(max_size=16), st.integers(20, 40), st.integers(0, 8))
def test_windows_of_text_join_to_it_and_overlap_as_asked(text: str, reader_budget: int, overlap: int) -> None:
    table = BlockTable(tokenizers()["chinese"])
    cut = windows(passage(table, "", text), table, reader_budget, 1000, overlap)
    assert "".join(table.texts[block] for w in cut for block in w.blocks[w.supervise_from :]) == text
    for window in cut:
        context = window.blocks[1 : window.supervise_from]
        assert table.n_tokens(context).sum() <= overlap


@settings(max_examples=60)
@given(hostile_text(max_size=16), st.integers(20, 40), st.integers(1, 8), st.integers(0, 16))
def test_windows_that_overlap_are_cut_as_if_nothing_were_prompt(text: str, budget: int, overlap: int,
                                                                n_prompt: int) -> None:  # fmt: skip
    """And those without anything to learn are left out: the end of a long prompt gets no window of its own."""
    table = BlockTable(tokenizers()["chinese"])
    split = tokenizers()["chinese"].split(text)
    whole = windows(joined(table, [], split), table, budget, 1000, overlap)
    cut = windows(joined(table, split[:n_prompt], split[n_prompt:]), table, budget, 1000, overlap)
    assert [w.blocks.tolist() for w in cut] == [w.blocks.tolist() for w in whole[-len(cut) :]]


@settings(max_examples=60)
@given(st.data(), tokenizer_names, st.integers(1, 40), st.integers(1, 60))
def test_rows_keep_budgets_and_lose_nothing(data: st.DataObject, name: str, reader_budget: int,
                                            writer_budget: int) -> None:  # fmt: skip
    table = BlockTable(tokenizers()[name])
    many = data.draw(st.lists(passages(table), max_size=6))
    sizes = np.array([(n_tokens(p, table), n_steps(p, table)) for p in many], np.int64).reshape(-1, 2)
    order, starts = share_rows(sizes, reader_budget, writer_budget)
    assert sorted(order.tolist()) == list(range(len(many)))
    rows = np.split(order, starts)
    assert len(rows.pop(0)) == 0
    for row in rows:
        assert len(row) == 1 or (len(row) > 1 and (sizes[row].sum(0) <= (reader_budget, writer_budget)).all())
    by_definition = fill_rows(many, table, reader_budget, writer_budget)
    assert [[id(many[i]) for i in row] for row in rows] == [[id(p) for p in row] for row in by_definition]


def test_of_equally_long_passages_the_first_comes_first() -> None:
    order, _ = share_rows(np.tile([[5, 9], [4, 9]], (50, 1)), 5, 100)
    assert order.tolist() == [*range(0, 100, 2), *range(1, 100, 2)]


@pytest.mark.parametrize("longest", [64, 400, 700])
def test_rows_of_short_documents_are_full(longest: int) -> None:
    """A row that is closed when the next window does not fit is 73 to 91% full in these."""
    rng = np.random.default_rng(0)
    documents = rng.integers(longest // 4, longest, 2000).tolist()
    tokens = np.array([n for whole in documents for n in (*[256] * (whole // 256), whole % 256) if n])
    _, starts = share_rows(np.stack([tokens, 4 * tokens], 1), 256, 2048)
    assert tokens.sum() / (256 * len(starts)) > 0.93
