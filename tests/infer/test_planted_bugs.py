"""The law checks must catch each of these bugs, planted one at a time; without a bug they all pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.doctor.bugs_model import (
    first_is_recalled,
    positions_lost,
    recalled_from_other_documents,
    recalled_from_the_future,
)
from tests.doctor.plant import Plant, both, builder, in_packing, replacing
from tests.infer.bugs import (
    aux_targets_shifted,
    context_after_own_token,
    context_of_another_row,
    document_start_ignored,
    eob_dropped,
    eob_first,
    eos_anywhere,
    grammar_ignored,
    in_decoding,
    logits_tempered_in_place,
    moved_from_second_block,
    no_cap,
    no_long_characters,
    not_masked,
    not_turned_round_when_read_back,
    one_generator_for_all,
    place_from_the_wrong_end,
    place_without_offset,
    position_from_padded_length,
    position_off_by_one,
    prompt_read_as_one_block,
    read_back_in_characters,
    reader_sees_next_token,
    room_ignored,
    sees_own_reader_tokens,
    sees_previous_block,
    sees_step_ahead,
    slot_off_by_one,
    spells_the_alphabet_in_bytes,
    suffixes_forwards,
    targets_shifted,
    turned_round_twice,
    written_forwards_in_decoding,
)
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
    document_of,
    table_for,
)
from tests.strategies import tiny, tiny_copy, tokenizers
from tests.test_streams import check_tabled, check_targets_are_text, check_twin
from tidal import recall, streams
from tidal.blocks import BlockTable, Passage, passage
from tidal.config import Steps
from tidal.infer import decoder as decoding
from tidal.infer import engine
from tidal.infer.grammar import Grammar
from tidal.model import TidalTransformer
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
        table = table_for(model, tokenizer)
        check(model, table, rows(table))

    return run


def on_documents(model: TidalTransformer, tokenizer: MixedTokenizer) -> None:
    texts = [(PROMPT, TEXT), ("", "the fox"), ("god", " said")]
    check_decoded_side_by_side(model, tokenizer, [document_of(tokenizer, *text) for text in texts], capacity=2)


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


# -------------------------------------------------------------------------------------------- the table

BUGS: dict[str, tuple[Plant, str]] = {  # bug: how to plant it, the checks that must notice
    "block turned round twice": (turned_round_twice, "tabled, targets"),
    "block written forwards in decoding only": (written_forwards_in_decoding, "decoded, side by side"),
    "block not turned round when read back": (not_turned_round_when_read_back, "targets, engine"),
    "block read back in characters": (replacing(MixedTokenizer, "retokenize", read_back_in_characters), "engine"),
    "prompt read as one block": (replacing(decoding.Decoder, "read", prompt_read_as_one_block), "engine"),
    "positions off by one from the second block on": (in_packing(position_off_by_one), "twin, tabled, naive, decoded"),
    "positions off by one, in both": (
        both(in_packing(position_off_by_one),
             builder(read=lambda i, t: {"position": moved_from_second_block(t.position)})),
        "tabled, naive"),
    "place from the wrong end": (place_from_the_wrong_end, "tabled"),
    "place offset forgotten by the writer": (builder(place_without_offset), "twin, tabled"),
    "writer sees its block's first reader token": (
        in_packing(sees_own_reader_tokens), "twin, tabled, naive, decoded, future"),
    "context is the state after its block's first token": (
        in_packing(context_after_own_token), "twin, tabled, naive, decoded"),
    "own-block range leaks into the previous block": (in_packing(sees_previous_block), "twin, tabled, naive, decoded"),
    "writer sees one step ahead": (in_packing(sees_step_ahead), "twin, tabled, naive, decoded, rest of block"),
    "reader sees one token into the next block": (
        in_packing(reader_sees_next_token), "twin, tabled, naive, decoded, future"),
    "distance from the padded length": (
        in_packing(position_from_padded_length), "twin, tabled, future, mates, naive, row, decoded"),
    "document start ignored": (in_packing(document_start_ignored), "twin, tabled, mates, row"),
    "targets shifted": (in_packing(targets_shifted), "twin, tabled, targets, naive, decoded"),
    "auxiliary targets shifted": (in_packing(aux_targets_shifted), "twin, tabled"),
    "<eob> dropped": (eob_dropped, "twin, tabled, targets, naive, decoded"),
    "suffixes from the wrong side in decoding only": (
        in_decoding(suffixes_forwards), "decoded, side by side, engine"),
    "what is recalled comes from other documents": (
        replacing(streams, "recalled", recalled_from_other_documents), "twin, tabled"),
    "what is recalled comes from the future": (
        replacing(streams, "recalled", recalled_from_the_future), "twin, tabled"),
    "the first of equal blocks is recalled": (
        replacing(recall.Recollection, "read", first_is_recalled), "twin, tabled"),
    "stale block slots visible": (
        in_decoding(lambda self, written, s: {"sees_writer": (s.sees_writer[0], min(s.sees_writer[1] + 1, 9))}),
        "decoded, side by side, engine"),
    "reader causal inside blocks in decoding only": (
        in_decoding(read=lambda i, t: {"sees": (t.sees[0], i + 1)}), "decoded, side by side, engine"),
    "place counted from one in decoding only": (
        in_decoding(lambda self, written, s: {"place": s.place + 1}), "decoded, engine, generation"),
    "cache slot off by one": (
        replacing(decoding.KeyValueCache, "put", slot_off_by_one), "decoded, side by side, engine"),
    "context of another row": (
        replacing(decoding.Decoder, "step", context_of_another_row), "side by side, engine, generation"),
    "positions lost when the cache grows": (replacing(decoding.Decoder, "_reserve", positions_lost), "side by side"),
    "padded columns are 0, not -inf": (replacing(TidalTransformer, "head", not_masked), "naive, unwritable"),
    "grammar: <eob> first": (replacing(Grammar, "allowed", eob_first), "walks"),
    "grammar: <eos> anywhere": (replacing(Grammar, "allowed", eos_anywhere), "walks"),
    "grammar: no cap": (replacing(Grammar, "allowed", no_cap), "walks"),
    "grammar: room for the bytes of a character ignored": (replacing(Grammar, "_can_complete", room_ignored), "walks"),
    "grammar: alphabet spelled in bytes": (replacing(Grammar, "_finishes", spells_the_alphabet_in_bytes), "walks"),
    "grammar: no characters of four bytes": (replacing(Grammar, "_finishes", no_long_characters), "admits"),
    "grammar ignored": (replacing(engine, "choose", grammar_ignored), "generation"),
    "log-probability of tempered logits": (replacing(engine, "choose", logits_tempered_in_place), "generation"),
    "one generator for all rows": (one_generator_for_all, "generation"),
}  # fmt: skip


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
