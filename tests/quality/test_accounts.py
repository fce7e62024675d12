"""What is charged: every byte, once, for everybody; and all learn from the same text."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import contestants
from benchmarks.baselines import causal
from benchmarks.baselines.causal import CausalTransformer, Document
from benchmarks.contestants import BaselineRunner, Runner, Texts, TidalRunner, Window, runner
from benchmarks.entries import KINDS, entries_of
from benchmarks.quality import Budget, Point, Racer, Racing, race
from tests.quality.tiny import CPU, TINY, entry
from tidal.blocks import NOTHING
from tidal.evaluate.boundary import boundary_gap, cut_pairs
from tidal.infer.score import bits_per_byte
from tidal.train.presets import PRESETS


def uniform(r: Runner) -> None:
    """Make every unit or id that may be written equally likely."""
    with torch.no_grad():
        (r.model.unit_embedding if isinstance(r, TidalRunner) else r.model.embedding).weight.zero_()


def test_uniform_models_by_hand(texts: Texts) -> None:
    """n units of log2(alphabet) bits each, over the bytes of the files."""
    n_bytes = sum(len(text.encode()) for text in texts.held_out)
    blocks: list[str] = []
    for e in entries_of(KINDS, TINY):
        r = runner(e, texts, 0, CPU)
        uniform(r)
        tokenizer = r.recipe.tokenizer
        blocks = [block for text in texts.held_out for block in tokenizer.split(text)]
        n_units, alphabet = {
            "tidal": (sum(len(tokenizer.write_units(b)) + 1 for b in blocks) + 3, tokenizer.n_writable),
            "token": (sum(len(tokenizer.encode_block(b).tokens) for b in blocks) + 3, tokenizer.vocab_size - 3),
            "byte": (n_bytes + 3, 257),
        }[e.kind]
        expected = n_units * math.log2(alphabet) / n_bytes
        assert r.bits_per_byte(48) == pytest.approx(expected, rel=1e-6)
        assert r.bits_per_byte(20) == pytest.approx(expected, rel=1e-6)  # shorter windows charge the same


def test_every_byte_is_charged_once(trio: dict[str, Runner], texts: Texts) -> None:
    for r in trio.values():
        for context in (20, 48, 10_000):
            found = texts.windows(r.recipe, context)
            assert "".join(t for w in found for t in w.completion) == "".join(texts.held_out)
            assert [w.ends for w in found].count(True) == len(texts.held_out)
            batch = r.batch_of(found)
            assert sum(r.check_charges(batch.targets, found)) == texts.held_out_bytes
    one, two, three = ([w.completion for w in texts.windows(r.recipe, 48)] for r in trio.values())
    assert one == two == three  # and so are windows and contexts


def test_tidal_is_charged_as_the_package_does(trio: dict[str, Runner], texts: Texts) -> None:
    r = trio["tidal"]
    assert isinstance(r, TidalRunner)
    rows = [[w.passage] for w in texts.windows(r.recipe, 48)]
    expected, _, n_bytes = bits_per_byte(r.model, rows, r.recipe.table)
    assert n_bytes == texts.held_out_bytes
    assert r.bits_per_byte(48) == pytest.approx(expected, rel=1e-6)


def without_eos(r: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def batch_of(some: list[Window]):  # type: ignore[no-untyped-def]
        batch = type(r).batch_of(r, some)
        eos = r.recipe.tokenizer.eos_id if r.entry.kind != "byte" else 257
        return dataclasses.replace(batch, targets=torch.where(batch.targets == eos, NOTHING, batch.targets))

    monkeypatch.setattr(r, "batch_of", batch_of)


def without_first(r: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first thing that a window is charged for, for free."""

    def batch_of(some: list[Window]):  # type: ignore[no-untyped-def]
        batch = type(r).batch_of(r, some)
        targets = batch.targets.clone()
        first = (targets != NOTHING).int().argmax(1)
        targets[torch.arange(len(targets)), first] = NOTHING
        return dataclasses.replace(batch, targets=targets)

    monkeypatch.setattr(r, "batch_of", batch_of)


def without_one(r: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """An `<eob>` in the middle, or a token or byte."""

    def batch_of(some: list[Window]):  # type: ignore[no-untyped-def]
        batch = type(r).batch_of(r, some)
        targets = batch.targets.clone()
        of_tidal = r.entry.kind == "tidal"
        chosen = targets[0] == r.recipe.tokenizer.eob_id if of_tidal else targets[0] != NOTHING
        targets[0, chosen.nonzero()[len(chosen.nonzero()) // 2]] = NOTHING
        return dataclasses.replace(batch, targets=targets)

    monkeypatch.setattr(r, "batch_of", batch_of)


def forgetting_the_context_is_not_charged(r: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """What overlaps is charged twice."""

    def batch_of(some: list[Window]):  # type: ignore[no-untyped-def]
        whole = [Window(dataclasses.replace(w.passage, supervise_from=1), (), w.prompt + w.completion, w.ends)
                 for w in some]  # fmt: skip
        return type(r).batch_of(r, whole)

    monkeypatch.setattr(r, "batch_of", batch_of)


@pytest.mark.parametrize("bug", [without_eos, without_first, without_one, forgetting_the_context_is_not_charged])
@pytest.mark.parametrize("kind", KINDS)
def test_planted_bugs_in_the_accounts(kind: str, bug: Callable[[Runner, pytest.MonkeyPatch], None],
                                      trio: dict[str, Runner], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    bug(trio[kind], monkeypatch)
    with pytest.raises(RuntimeError, match="what is charged is not"):
        trio[kind].bits_per_byte(48)


def test_planted_bug_windows_that_drop_text(trio: dict[str, Runner], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = contestants.windows
    monkeypatch.setattr(contestants, "windows", lambda *a, **k: whole(*a, **k)[:-1])
    with pytest.raises(RuntimeError, match="do not add up"):
        trio["byte"].bits_per_byte(48)


def test_planted_bug_log_probabilities_left_out(trio: dict[str, Runner], monkeypatch: pytest.MonkeyPatch) -> None:
    r = trio["token"]
    whole = r.model.log_probs
    monkeypatch.setattr(r.model, "log_probs", lambda batch: whole(batch)[1:])
    with pytest.raises(RuntimeError, match="not one for each target"):
        r.bits_per_byte(48)


def test_all_learn_the_same_text_in_the_same_order(texts: Texts) -> None:
    tidal, token, byte = (runner(entry(kind + no_cuts), texts, 0, CPU) for kind, no_cuts in
                          (("tidal", ":cut-probability=0"), ("token", ""), ("byte", "")))  # fmt: skip
    assert isinstance(token, BaselineRunner)
    assert isinstance(byte, BaselineRunner)
    for step in range(0, 40, 7):
        for i, row in enumerate(tidal.recipe.batch(step).targets):
            at = tidal.recipe._row(2 * step + i)
            read = [r.spelled([*d.completion, *[r.coder.eos_id] * d.ends]) for r in (token, byte) for d in r.rows[at]]
            half = len(read) // 2
            assert read[:half] == read[half:]
            assert tidal.spelled(row[row >= 0].tolist()) == (
                b"".join(text for text, _ in read[:half]), sum(ends for _, ends in read[:half]))  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_figure_and_the_rate_ends_at_zero(kind: str, texts: Texts) -> None:
    r, rates = runner(entry(kind), texts, 0, CPU), list[float]()
    before = r.bits_per_byte(48)
    step = r.step
    r.step = lambda rate: (rates.append(rate), step(rate))[1]  # type: ignore[method-assign,func-returns-value]
    racer, budget = Racer(r, 1e9), Budget("steps", 12)
    while budget.spent(racer) < 1:
        r.timed_step(budget.spent(racer))
    assert r.bits_per_byte(48) < before - 0.5
    assert r.n_steps == 12
    lr = PRESETS["text"].optim.lr
    assert rates[:3] == [lr / 2, lr, lr]
    assert rates[6:] == pytest.approx([lr * left / 6 for left in range(6, 0, -1)])  # decay_fraction is a half
    assert 0 < sum(r.step_seconds) == pytest.approx(r.seconds)
    assert 0 < sum(r.step_cpu_seconds) == pytest.approx(r.cpu_seconds)


@pytest.mark.parametrize(("clock", "step_ms"), [("wall", 2000), ("cpu", 500)])
def test_times_of_steps_are_on_the_clock_of_the_race(
    clock: Literal["wall", "cpu"], step_ms: float, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    wall, cpu = itertools.count(0.0, 2.0), itertools.count(0.0, 0.5)
    times = SimpleNamespace(perf_counter=lambda: next(wall), process_time=lambda: next(cpu))
    monkeypatch.setattr(contestants, "time", times)
    points: list[Point] = []
    race([entry("token")], texts, 0, Budget("steps", 2), Racing(device="cpu", clock=clock), points.append)
    assert [p["step_ms"] for p in points] == [step_ms]


def test_budgets() -> None:
    class Ran:
        seconds, cpu_seconds, n_steps = 3.0, 4.0, 5

    racer = Racer(Ran(), 2e12)  # type: ignore[arg-type]
    assert Budget("seconds", 6).spent(racer) == 0.5
    assert Budget("seconds", 8).spent(racer, "cpu") == 0.5
    assert Budget("steps", 10).spent(racer) == 0.5
    assert Budget("teraflops", 20).spent(racer) == 0.5


def test_work_by_hand(texts: Texts) -> None:
    """A token transformer: three times a forward pass, whose attention counts the pairs that are seen."""
    r = runner(entry("token"), texts, 0, CPU)
    assert isinstance(r, BaselineRunner)
    d, ff, vocabulary, muon, passes, n = 16, 24, r.coder.vocab_size, 0.0, 0.0, contestants.COUNTED
    for step in range(n):
        batch = r._packed([r.rows[r.recipe._row(i)] for i in range(2 * step, 2 * step + 2)])
        per_layer = d * d + d * 2 * 8 + d * d + 3 * d * ff  # query, key and value of one of two heads, out, MLP
        pairs = int((batch.sees[..., 1] - batch.sees[..., 0]).sum())
        passes += 3 * 2 * (batch.ids.numel() * 2 * per_layer + int((batch.targets >= 0).sum()) * d * vocabulary
                           + 2 * 2 * d * pairs)  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        r.step(0.0)
        for _ in range(n):
            r.optimizer.parts[0].step()
    with FlopCounterMode(display=False) as once:
        r.step(0.0)
    muon = (counter.get_total_flops() - once.get_total_flops()) / n
    r.n_steps = 0
    assert r.flops_per_step() == pytest.approx(passes / n + muon, rel=1e-6)
    assert 0 < muon < passes / n


def test_boundary_gap(trio: dict[str, Runner], texts: Texts) -> None:
    """Tidal's is the package's own; the token transformer's is computed here, cut by cut; bytes have no blocks."""
    tidal, token, byte = trio.values()
    assert isinstance(tidal, TidalRunner)
    expected = boundary_gap(tidal.model, tidal.recipe.tokenizer, texts.held_out, count=20)
    assert tidal.boundary_gap(20) == pytest.approx(expected, rel=1e-5, abs=1e-6)

    tokenizer, model = token.recipe.tokenizer, token.model
    assert isinstance(model, CausalTransformer)
    for kind in ("inside", "boundary"):
        means = []
        for p in cut_pairs(tokenizer, texts.held_out, count=20, context_chars=400, continuation_chars=80):
            parts = p.text[p.start : (at := getattr(p, kind))], p.text[at : p.end]
            before, after = ([i for b in tokenizer.split(t) for i in tokenizer.encode_block(b).tokens] for t in parts)
            batch = causal.pack([[Document(before, after, ends=False)]], causal.coder_of(tokenizer))
            with torch.inference_mode():
                means.append(-model.log_probs(batch).double().sum().item() / len(parts[1].encode()))
        assert token.boundary_gap(20)[f"{kind}_nats_per_byte"] == pytest.approx(sum(means) / len(means), rel=1e-5)

    uniform(byte := copy.deepcopy(byte))
    found = byte.boundary_gap(20)
    assert (found["gap_per_unit"], found["gap_per_byte"]) == (pytest.approx(0, abs=1e-6),) * 2
    assert found["inside_nats_per_unit"] == pytest.approx(math.log(257), rel=1e-6)
