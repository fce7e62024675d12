"""The law checks must catch each of these bugs, planted one at a time; without a bug they all pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import Tensor

from tests.doctor.mutants import MUTANTS
from tests.doctor.plant import Plant, builder, replacing
from tests.infer.test_grammar import check_admits, check_never_unwritable, check_walks
from tests.laws import (
    check_decoded,
    check_decoded_side_by_side,
    check_engine_writes,
    check_future,
    check_generation,
    check_mates,
    check_packed_is_naive,
    check_rest_of_block,
    check_row_is_documents,
)
from tests.strategies import tiny, tiny_copy, tokenizers
from tests.test_streams import check_tabled, check_targets_are_text, check_twin
from tidal.blocks import BlockTable, Passage, passage
from tidal.config import Steps
from tidal.infer.grammar import Grammar
from tidal.model import TidalTransformer
from tidal.streams import DocumentBuilder, WriterStep
from tidal.tokenizer import MixedTokenizer

# ------------------------------------------------------------------------------------------------ checks

PROMPT, TEXT = "the light and", " the dogs with the 12 + 7 = é👍\n"


def rows(table: BlockTable, offset: int = 0) -> list[list[Passage]]:
    return [[passage(table, PROMPT, TEXT, place_offset=offset), passage(table, "", "the fox", place_offset=offset)],
            [passage(table, "god", " said", ends=False, place_offset=offset)]]  # fmt: skip


def on_streams(check: Callable[..., None], *extra: float) -> Callable[[], None]:
    def run() -> None:
        table = BlockTable(tokenizers()["english"])
        check(rows(table, 3), table, *extra)

    return run


def on_models(check: Callable[..., object], *what: Any, shapes: Sequence[str] = ("memory", "memory deep"),
              **how: Any) -> Callable[[], None]:  # fmt: skip
    def run() -> None:
        for shape in shapes:
            check(*tiny("english", shape), *what, **how)

    return run


def on_rows(check: Callable[..., None]) -> Callable[[], None]:
    def run() -> None:
        model, tokenizer = tiny("english", "memory")
        table = BlockTable(tokenizer)
        check(model, table, rows(table))

    return run


def on_documents(model: TidalTransformer, tokenizer: MixedTokenizer) -> None:
    texts = [(PROMPT, TEXT), ("", "the fox"), ("god", " said")]
    check_decoded_side_by_side(model, tokenizer, texts, capacity=2)


def walks() -> None:
    for seed in range(40):
        for name in ("english", "bytes"):
            check_walks(tokenizers()[name], seed, byte_bias=9.0 * (seed % 2))
            check_walks(tokenizers()[name], seed, byte_bias=20.0, end_bias=-20.0)
            check_walks(tokenizers()[name], seed, favourite=tokenizers()[name].eob_id)


CHECKS: dict[str, Callable[[], None]] = {
    "twin": on_streams(check_twin, Steps(0.375, 2, recall=True)),
    "tabled": on_streams(check_tabled, Steps(0.375, 2, recall=True)),
    "targets": on_streams(check_targets_are_text),
    "future": on_models(check_future, PROMPT, TEXT, " fox"),
    "rest of block": on_models(check_rest_of_block, PROMPT, " l", "midn", "ight"),
    "mates": on_rows(check_mates),
    "naive": on_models(check_packed_is_naive, PROMPT, TEXT),
    "row": on_rows(check_row_is_documents),
    "decoded": on_models(check_decoded, PROMPT, TEXT),
    "side by side": on_models(on_documents),
    "engine": on_models(check_engine_writes, [(PROMPT, TEXT), ("", "the fox"), ("god", " said")]),
    "generation": on_models(check_generation, [PROMPT, "", "the"], 30, shapes=("none", "memory"), temperature=2.0),
    "walks": walks,
    "admits": lambda: check_admits(tokenizers()["bytes"], PROMPT + TEXT),
    "unwritable": lambda: check_never_unwritable(*tiny_copy("english", "memory")),
}
CAUGHT = (AssertionError, ValueError, RuntimeError, IndexError)


@pytest.mark.parametrize("check", CHECKS)
def test_without_a_bug_the_check_passes(check: str) -> None:
    CHECKS[check]()


# ------------------------------------------------------------------------- bugs that the doctor is not tested with


def place_without_offset(self: DocumentBuilder, written: Sequence[int], step: WriterStep) -> dict[str, Any]:
    return {"place": len(written)}


def eos_anywhere(allowed: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def bugged(self: Grammar, written: Sequence[int]) -> Tensor:
        mask = allowed(self, written).clone()
        mask[self.tokenizer.eos_id] = True
        return mask

    return bugged


def room_ignored(can_complete: Callable[..., bool]) -> Callable[..., bool]:
    return lambda self, tail, room: can_complete(self, tail, 3)


def spells_the_alphabet_in_bytes(finishes: Callable[..., bool]) -> Callable[..., bool]:
    def bugged(self: Grammar, spelling: bytes) -> bool:
        return finishes(self, spelling) or spelling in self._alphabet

    return bugged


def no_long_characters(finishes: Callable[..., bool]) -> Callable[..., bool]:
    return lambda self, spelling: len(spelling) < 4 and finishes(self, spelling)


OWN: dict[str, tuple[Plant, str]] = {  # bug: how to plant it, the checks that must notice
    "place offset forgotten by the writer": (builder(place_without_offset), "twin, tabled"),
    "grammar: <eos> anywhere": (replacing(Grammar, "allowed", eos_anywhere), "walks"),
    "grammar: room for the bytes of a character ignored": (replacing(Grammar, "_can_complete", room_ignored), "walks"),
    "grammar: alphabet spelled in bytes": (replacing(Grammar, "_finishes", spells_the_alphabet_in_bytes), "walks"),
    "grammar: no characters of four bytes": (replacing(Grammar, "_finishes", no_long_characters), "admits"),
}

# -------------------------------------------------------------------------------------------- the table

OF_THE_DOCTOR = {  # a bug of tests/doctor/mutants.py: the checks that must notice
    "blocks are turned round twice": "tabled, targets, naive",
    "blocks are not turned round when read back": "targets, engine, side by side",
    "write_units gives reading order": "decoded",
    "written blocks are read back in characters": "engine, side by side",
    "padding of the head is 0, not -inf": "naive, unwritable",
    "an empty block may be written": "walks",
    "the grammar forgets the block cap": "walks",
    "the grammar holds only for greedy decoding": "generation",
    "a writer step sees the next one": "twin, tabled, naive, decoded, rest of block",
    "a token sees the first one of the next block": "twin, tabled, naive, decoded, future",
    "a writer step sees its block's first token": "twin, tabled, naive, decoded, future",
    "the context is the state after the block's first token": "twin, tabled, naive, decoded",
    "positions off by one from the second block on": "twin, tabled, naive, decoded",
    "positions off by one, in training and decoding": "tabled, naive",
    "positions from the padded length": "twin, tabled, future, mates, naive, row, decoded",
    "places from the wrong end, of multi-byte characters only": "tabled, naive",
    "the writer's place counts from 1, in decoding only": "decoded, engine, generation",
    "what is recalled is what comes next": "twin, tabled",
    "suffixes from the wrong side, in decoding only": "decoded, side by side, engine",
    "targets shifted by one": "twin, tabled, targets, naive, decoded",
    "<eob> is never a target": "twin, tabled, targets, naive, decoded",
    "auxiliary targets shifted by one": "twin, tabled",
    "packed documents see those before them": "twin, tabled, mates, row",
    "a step sees the last one of the block before": "twin, tabled, naive, decoded",
    "what is recalled comes from the documents before": "twin, tabled",
    "cache slots off by one": "decoded, side by side, engine",
    "the first of equal blocks is recalled in decoding": "twin, tabled",
    "stale slots of the block before are seen": "decoded, side by side, engine",
    "the reader is causal inside blocks, in decoding only": "decoded, side by side, engine",
    "a prompt is read as one block": "engine",
    "log-probabilities of tempered logits": "generation",
    "the context of another row of the batch": "side by side, engine, generation",
    "positions are lost when a cache grows": "side by side",
    "one random generator for a batch": "generation",
}
PLANTS = {mutant.name: mutant.plant for mutant in MUTANTS}
BUGS = {**{name: (PLANTS[name], checks) for name, checks in OF_THE_DOCTOR.items()}, **OWN}


def notices(check: str) -> bool:
    try:
        CHECKS[check]()
    except CAUGHT:
        return True
    return False


@pytest.mark.parametrize("bug", BUGS)
def test_the_bug_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, checks = BUGS[bug]
    plant(monkeypatch)
    assert [check for check in checks.split(", ") if not notices(check)] == [], "these did not notice"
