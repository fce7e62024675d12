"""Variants are honest, and do what they say."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks.contestants import Texts, TidalRunner, Window, runner
from benchmarks.switches import ForwardTable, SwitchedRecipe, Switches
from tests.quality.tiny import CPU, entry
from tests.strategies import tokenizers
from tidal.blocks import NOTHING, BlockTable, passage
from tidal.streams import pack
from tidal.tokenizer import NO_PLACE

SWITCHED = [Switches(), Switches(write_order="forward"), Switches(reading="causal"), Switches(reading="tokens"),
            Switches(places="off"), Switches(suffix_orders="0"), Switches(suffix_gains="off"),
            Switches(block_rule="token"), Switches(block_rule="pair"), Switches(block_rule="many"),
            Switches(head="own"), Switches(matrices="adamw")]  # fmt: skip


def names_of(switches: Switches) -> str:
    changed = {k: v for k, v in dataclasses.asdict(switches).items() if v != getattr(Switches(), k)}
    return ",".join(f"{k}={v}" for k, v in changed.items())


@pytest.mark.parametrize("switches", SWITCHED, ids=names_of)
def test_variants_are_honest(switches: Switches, texts: Texts) -> None:
    """All bytes are charged, and no log-probability depends on a unit, or a block, that is written after it."""
    r = runner(entry("tidal:" + names_of(switches)), texts, 0, CPU)
    assert isinstance(r, TidalRunner)
    r.step(1e-3)
    assert r.bits_per_byte(48) > 0
    assert leak(r) < 1e-9


def test_a_forward_writer_is_told_what_is_foretold_of_first_letters(texts: Texts) -> None:
    r = runner(entry("tidal:write-order=forward"), texts, 0, CPU)
    assert isinstance(r, TidalRunner)
    assert r.model.foretold is not None
    spelling, table = r.recipe.tokenizer.spelling, r.recipe.table
    assert r.model.foretold.spelling is spelling
    block = int(table.indices(["the"])[0])
    nodes = table.nodes.view()[table.target_start.view()[block] : table.target_start.view()[block + 1]].tolist()
    assert nodes == spelling.along(r.recipe.tokenizer.write_units("the")[::-1])
    assert nodes[1] == spelling.node(r.recipe.tokenizer.write_units("t")) != NOTHING


def test_without_gains_only_what_is_added_is_learnt(texts: Texts) -> None:
    learnt = []
    for spec in ("tidal", "tidal:suffix-gains=off"):
        r = runner(entry(spec), texts, 0, CPU)
        for _ in range(3):
            r.step(1e-2)
        assert isinstance(r, TidalRunner)
        learnt.append([bool(half.any()) for half in r.model.suffix_embedding.weight.chunk(2, 1)])
    assert learnt == [[True, True], [False, True]]


def test_boundary_dropout_can_be_otherwise(texts: Texts) -> None:
    """Long blocks cut as often as short ones; beginnings learnt, too."""
    shares, cuts = {}, {}
    for spec in ("cut-probability=0.1", "cuts=blocks,cut-probability=0.1", "beginnings=learnt,cut-probability=0.1"):
        r = runner(entry(f"tidal:{spec}"), texts, 0, CPU)
        whole = passage(r.recipe.table, "", " a" * 2000 + " abcdefgh" * 2000)
        cuts[spec] = cut = r.recipe.cut(whole, np.random.default_rng(0))
        text = [r.recipe.table.texts[i] for i in cut.blocks]
        whole_again = [text[i] + text[i + 1] for i in cut.read_only]
        shares[spec] = [whole_again.count(block) / 2000 for block in (" a", " abcdefgh")]
    by_place, by_block, learnt = shares
    assert shares[by_place] == pytest.approx([0.1, 1 - 0.9**8], abs=0.05)
    assert shares[by_block] == pytest.approx([0.1, 0.1], abs=0.03)
    assert cuts[learnt].blocks.tolist() == cuts[by_place].blocks.tolist()
    assert cuts[by_place].read_only
    assert not cuts[learnt].read_only


def leak(r: TidalRunner) -> float:
    """The largest difference of log-probabilities of two texts where their targets are still the same."""
    r.model.double().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in r.model.named_parameters():
            weight.add_(torch.randn(weight.shape, dtype=weight.dtype) * 0.3 * ("norm" not in name))
    start, worst = "the sea came in and\nthe man went", 0.0
    for one, other in ((start, start[:-4] + "sent"), (start, start[:-1] + "d"),
                       (start + " out", start + " in, and the"), (start, start[:20] + "no man")):  # fmt: skip
        targets, log_probs = [], []
        for text in (one, other):
            p = passage(r.recipe.table, "", text)
            batch = r.batch_of([Window(p, (), (text,), True)])
            targets.append(batch.targets[0].tolist())
            log_probs.append(r.model.log_probs(batch))
        same = next(i for i, (x, y) in enumerate(zip(*targets, strict=False)) if x != y)
        worst = max(worst, (log_probs[0][:same] - log_probs[1][:same]).abs().max().item())
    return worst


def test_planted_bug_a_reader_that_sees_what_comes(texts: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    on_batch = Switches.on_batch

    def sees_all(self: Switches, batch):  # type: ignore[no-untyped-def]
        batch = on_batch(self, batch)
        sees = batch.reader_sees.clone()
        sees[..., 1] = sees[..., 1].max()
        return dataclasses.replace(batch, reader_sees=sees)

    monkeypatch.setattr(Switches, "on_batch", sees_all)
    r = runner(entry("tidal"), texts, 0, CPU)
    assert isinstance(r, TidalRunner)
    assert leak(r) > 1e-6


def test_switches_do_what_they_say(texts: Texts) -> None:
    tokenizer = tokenizers()["english"]
    text = "the land, 12 ☃ within\n the night"
    back, forth = BlockTable(tokenizer), ForwardTable(tokenizer)
    one, other = (pack([[passage(table, "", text)]], table) for table in (back, forth))
    turned, block = [], list[int]()
    for unit in other.targets[0].tolist():
        turned += [*block[::-1], unit] if unit in (tokenizer.eob_id, tokenizer.eos_id) else []
        block = [] if unit == tokenizer.eob_id else [*block, unit]
    assert turned == one.targets[0].tolist() != other.targets[0].tolist()
    assert torch.equal(other.writer_places, one.writer_places)  # the number of the step
    assert torch.equal(other.reader_ids, one.reader_ids)
    for entry_text in (" 12", "the", "☃"):
        block_of = tokenizer.encode_block(entry_text)
        places = forth._entry(entry_text)[2]
        widths = [len(tokenizer.encode_block(tokenizer.id_bytes[t].decode()).units) if entry_text != "☃" else 1
                  for t in block_of.tokens]  # fmt: skip
        wanted = [sum(widths[:i]) for i in range(len(widths))]
        assert list(places) == [n if old != NO_PLACE else old for n, old in zip(wanted, block_of.places, strict=True)]
        assert max(places) == sum(widths[:-1])

    assert Switches().on_batch(one) is one
    causal = Switches(reading="tokens").on_batch(one)
    assert causal.reader_sees[0, :, 1].tolist() == list(range(1, one.reader_ids.shape[1] + 1))
    inside = [*one.reader_ids[0, 1:].tolist(), tokenizer.eos_id]
    at_ends = one.aux_targets[0].tolist()
    assert causal.aux_targets[0].tolist() == [b if b != NOTHING else a for a, b in zip(inside, at_ends, strict=True)]
    assert NOTHING in at_ends
    assert not Switches(places="off").on_batch(one).writer_places.any()
    whole = Switches(suffix_orders="0").on_batch(one).suffixes
    assert torch.equal(whole[..., 0], one.suffixes[..., 0])
    assert (whole[..., 1:] == NOTHING).all()
    assert not (one.suffixes[..., 1:] == NOTHING).all()


@pytest.mark.parametrize(("rule", "expected"), [
    ("word", ["the", " sea", " came", "\n", "the", " man"]),
    ("pair", ["the sea", " came\n", "the man"]),
    ("many", ["the sea came\n", "the man"]),
])  # fmt: skip
def test_block_rules(rule: str, expected: list[str], texts: Texts) -> None:
    variant = entry(f"tidal:block-rule={rule}")
    recipe = SwitchedRecipe(texts.settings(variant.train), variant.switches)
    p = passage(recipe.table, "", "the sea came\nthe man")
    assert [recipe.table.texts[i] for i in recipe.regrouped(p).blocks[1:-1]] == expected
    p = dataclasses.replace(p, supervise_from=3)  # what is charged stays the same
    other = recipe.regrouped(p)
    assert "".join(recipe.table.texts[i] for i in other.blocks[other.supervise_from :]) == " came\nthe man"
