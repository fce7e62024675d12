"""Output cannot be garbage, and what is degenerate is named."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks import fuzz
from tests.strategies import tiny_copy
from tidal.infer.completion import degenerate
from tidal.infer.engine import generate
from tidal.infer.grammar import Grammar


def test_what_is_degenerate() -> None:
    named: list[tuple[list[str], str | None]] = [
        ([], "empty"), ([" ", "\n"], "empty"), (["a"] * 3, None), (["a"] * 4, "repeats"), ([" "] * 4, "repeats"),
        (["a"] * 4 + ["b"], None), ([*"ab"] * 4, "repeats"), ([*"abc"] * 4, "repeats"), ([*"abcbabc"], None),
        ([*"abcd"] * 4, None), ([*"bcdef"] + ["a"] * 5, "repeats"), ([*"bcdefg"] + ["a"] * 4, None),
        ([*"defghijk"] + [*"ab"] * 4, "repeats"), ([*"defghijklm"] + [*"ab"] * 4, None)]  # fmt: skip
    for blocks, name in named:
        assert degenerate(blocks) == name


def test_degenerate_output_is_named() -> None:
    model, tokenizer = tiny_copy("english", "memory")
    with torch.no_grad():
        model.unit_embedding.weight.zero_()  # all units alike: the first allowed one, <eos>, ends it
    assert generate(model, tokenizer, ["a"])[0].degenerate == "empty"
    a, tokens = tokenizer.write_units("a")[0], {"repeats": 0, "fine": 0}
    with torch.no_grad():
        model.writer_norm.weight.zero_()
        model.head_mask[:] = -math.inf
        model.head_mask[[a, tokenizer.eob_id]] = torch.tensor([0.0, 1.0], dtype=model.head_mask.dtype)
    for limit in (3, 4, 9):
        completion = generate(model, tokenizer, [""], max_new_blocks=limit)[0]
        assert completion.completion == "a" * limit
        tokens["repeats" if completion.degenerate == "repeats" else "fine"] += 1
    assert tokens == {"repeats": 2, "fine": 1}


def test_output_cannot_be_garbage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The first of the ten thousand of `python -m benchmarks.fuzz`."""
    monkeypatch.setattr("sys.argv", ["fuzz", "--count", "150"])
    fuzz.main()
    found = json.loads(capsys.readouterr().out)
    assert found["generations"] == 150
    assert {"processor", "torch", "date"} <= set(found)


def test_garbage_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters of the alphabet that are spelt in bytes read the same, but no text is trained so."""
    monkeypatch.setattr("sys.argv", ["fuzz", "--count", "150"])
    finishes = Grammar._finishes

    def in_bytes_too(self: Grammar, spelling: bytes) -> bool:
        self._alphabet = frozenset()
        return finishes(self, spelling)

    monkeypatch.setattr(Grammar, "_finishes", in_bytes_too)
    with pytest.raises(AssertionError, match="is not the spelling"):
        fuzz.main()
