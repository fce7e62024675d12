"""Law 2, one builder: `pack` is the fold of `DocumentBuilder`, and both are what DESIGN section 3 says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.strategies import differing, passages, remembered, rows_of_passages, tokenizer_names, tokenizers
from tests.tokenizer.strategies import hostile_text
from tidal import streams
from tidal.blocks import BOS_BLOCK, NOTHING, BlockTable, Passage, passage, suffix_hashes
from tidal.config import LAYOUT, PLAIN_STEPS, Steps, TidalConfig
from tidal.layers import sinusoids
from tidal.streams import Batch
from tidal.tokenizer import NO_PLACE, ROOT, MixedTokenizer, Spelling

Row = dict[str, list[Any]]
READER = ("reader_ids", "reader_positions", "reader_places", "reader_sees", "aux_targets")
DTYPES = {"reader_positions": np.float32, "writer_positions": np.float32, "reader_sees": np.int32,
          "sees_reader": np.int32, "sees_writer": np.int32}  # fmt: skip


def batch_of(rows: Sequence[Row], n_bytes: int, layout: Steps, spelling: Spelling) -> Batch:
    """Rows of lists, padded by hand."""
    n_reader = max(len(row["reader_ids"]) for row in rows)
    n_writer = max(len(row["targets"]) for row in rows)
    fields = {}
    for name in rows[0]:
        width = n_reader if name in READER else n_writer
        missing = NOTHING if name in ("aux_targets", "suffixes", "recalled", "nodes", "targets") else 0
        inner = {"suffixes": (3,), "recalled": (3,)}.get(name, (2,) if "sees" in name else ())
        values = np.full((len(rows), width, *inner), missing, DTYPES.get(name, np.int64))
        for i, row in enumerate(rows):
            values[i, : len(row[name])] = np.array(row[name]).reshape(-1, *inner)
        fields[name] = torch.from_numpy(values)
    n_children = tuple(sum(len(children_of(spelling, node)) for node in row["nodes"] if node > ROOT) for row in rows)
    return Batch(**fields, n_bytes=n_bytes, n_children=n_children, steps=layout)


def children_of(spelling: Spelling, node: int) -> range:
    """Indices of what may follow at a node."""
    return range(spelling.first_child[node], spelling.first_child[node + 1])


def blocks_of(p: Passage, table: BlockTable) -> list[tuple[str, bool]]:
    """(text, supervised) of all blocks after `<bos>`; the text of the end of the document is empty."""
    assert p.blocks[0] == BOS_BLOCK
    return [(table.texts[index], rank >= p.supervise_from and rank not in p.read_only)
            for rank, index in enumerate(p.blocks) if rank]  # fmt: skip


def fold(rows: Sequence[Sequence[Passage]], table: BlockTable, layout: Steps) -> Batch:
    """The definition: `DocumentBuilder`, block by block."""
    tokenizer, n_bytes, done = table.tokenizer, 0, []
    for row in rows:
        tokens: list[streams.ReaderToken] = []
        steps: list[streams.WriterStep] = []
        targets: list[int] = []
        aux_targets: dict[int, int] = {}
        for p in row:
            builder = streams.DocumentBuilder(tokenizer, steps=layout, place_offset=p.place_offset,
                                              position_scale=p.position_scale, reader_start=len(tokens),
                                              writer_start=len(steps))  # fmt: skip
            tokens += builder.opening
            for rank, (text, supervised) in enumerate(blocks_of(p, table)):
                builder.place_offset = p.stray_offset if rank < p.n_stray else p.place_offset
                block = tokenizer.encode_block(text) if text else None
                if supervised:
                    mine = [*block.units[::-1], tokenizer.eob_id] if block else [tokenizer.eos_id]
                    targets += mine
                    steps += builder.write(mine)
                    aux_targets[len(tokens) - 1] = block.tokens[-1] if block else tokenizer.eos_id
                    n_bytes += len(text.encode())
                if block:
                    tokens += builder.read(block)
        done.append({
            "reader_ids": [t.id for t in tokens],
            "reader_positions": [t.position for t in tokens],
            "reader_places": [t.place for t in tokens],
            "reader_sees": [t.sees for t in tokens],
            "aux_targets": [aux_targets.get(i, NOTHING) for i in range(len(tokens))],
            "writer_ids": [s.id for s in steps],
            "writer_positions": [s.position for s in steps],
            "writer_places": [s.place for s in steps],
            "suffixes": [s.suffixes for s in steps],
            "recalled": [s.recalled for s in steps],
            "nodes": [s.node for s in steps],
            "context": [s.context for s in steps],
            "sees_reader": [s.sees_reader for s in steps],
            "sees_writer": [s.sees_writer for s in steps],
            "targets": targets,
        })  # fmt: skip
    return batch_of(done, n_bytes, layout, tokenizer.spelling)


def units_of(text: str, tokenizer: MixedTokenizer) -> list[int]:
    """Units in reading order, from nothing but the names of the ids."""
    characters = {tokenizer.id_bytes[i].decode(): i for i in range(258, tokenizer.n_writable)}
    return [unit for c in text for unit in ([characters[c]] if c in characters else [2 + b for b in c.encode()])]


def tabled(rows: Sequence[Sequence[Passage]], table: BlockTable, layout: Steps) -> Batch:
    """DESIGN section 3 written out a second time, straight from the table and the text."""
    tokenizer, n_bytes, done = table.tokenizer, 0, []
    for row in rows:
        out: Row = {f.name: [] for f in dataclasses.fields(Batch) if f.type == "torch.Tensor"}
        for p in row:
            start, own = len(out["reader_ids"]), len(out["targets"])
            blocks = [("", False), *blocks_of(p, table)]
            ids = [list(tokenizer.encode_block(text).tokens) if text else [] for text, _ in blocks]
            ids[0] = [tokenizer.bos_id]
            scripts = [[*reversed(units_of(text, tokenizer)), tokenizer.eob_id] for text, _ in blocks]
            for j, (text, supervised) in enumerate(blocks):
                n_j = sum(map(len, ids[:j]))  # reader tokens of the document before block j
                offset = p.stray_offset if 1 <= j <= p.n_stray else p.place_offset
                units = units_of(text, tokenizer)
                if supervised:
                    n_bytes += len(text.encode())
                    targets = [*reversed(units), tokenizer.eob_id] if text else [tokenizer.eos_id]
                    out["aux_targets"][-1] = ids[j][-1] if text else tokenizer.eos_id
                    for t, target in enumerate(targets):
                        out["writer_ids"].append(targets[t - 1] if t else tokenizer.bob_id)
                        out["writer_positions"].append(p.position_scale * (n_j + layout.stride * t))
                        out["writer_places"].append(t + offset)
                        out["suffixes"].append(suffix_hashes(targets[:t], tokenizer.digit_units))
                        told = remembered(scripts[:j], targets[:t]) if layout.recall else [NOTHING] * 3
                        out["recalled"].append(told)
                        out["nodes"].append(tokenizer.spelling.nodes.get(tuple(targets[:t]), -1))
                        out["context"].append(start + n_j - 1)
                        out["sees_reader"].append((start, start + n_j))
                        first = max(0, t + 1 - layout.window) if layout.window else 0
                        out["sees_writer"].append((own + first, own + t + 1))
                        out["targets"].append(target)
                    own += len(targets)
                for i, token in enumerate(ids[j]):
                    n_later = sum(map(n_units_of(tokenizer), ids[j][i + 1 :]))
                    out["reader_ids"].append(token)
                    out["reader_positions"].append(p.position_scale * (n_j + i))
                    place = n_later + offset if placed(tokenizer.id_bytes[token]) else NO_PLACE
                    out["reader_places"].append(place)
                    out["reader_sees"].append((start, start + n_j + len(ids[j])))
                    out["aux_targets"].append(NOTHING)
        done.append(out)
    return batch_of(done, n_bytes, layout, tokenizer.spelling)


def placed(data: bytes) -> bool:
    """Whether a token holds a letter, a digit or a part of a character that is not ASCII."""
    return not data.isascii() or any(map(str.isalnum, data.decode()))


def n_units_of(tokenizer: MixedTokenizer) -> Callable[[int], int]:
    """How many units a token stands for: a byte is one, a piece has its characters."""
    return lambda token: 1 if token < 258 else len(tokenizer.id_bytes[token].decode())


def check_twin(rows: Sequence[Sequence[Passage]], table: BlockTable, layout: Steps = PLAIN_STEPS) -> None:
    """The vectorized twin equals the fold, field by field."""
    assert differing(streams.pack(rows, table, steps=layout), fold(rows, table, layout)) == []


def check_tabled(rows: Sequence[Sequence[Passage]], table: BlockTable, layout: Steps = PLAIN_STEPS) -> None:
    """The twin and the fold are what the design says."""
    expected = tabled(rows, table, layout)
    assert differing(streams.pack(rows, table, steps=layout), expected) == []
    assert differing(fold(rows, table, layout), expected) == []


def check_targets_are_text(rows: Sequence[Sequence[Passage]], table: BlockTable) -> None:
    """What the writer is to write, block by block turned round, is the supervised text and its end."""
    tokenizer, batch = table.tokenizer, streams.pack(rows, table)
    for row, targets in zip(rows, batch.targets.tolist(), strict=True):
        written: list[str | None] = []
        units: list[int] = []
        for target in (t for t in targets if t != NOTHING):
            if target == tokenizer.eob_id:
                written.append(tokenizer.unreverse(units))
                units = []
            elif target == tokenizer.eos_id:
                assert not units, "<eos> inside a block"
                written.append(None)
            else:
                units.append(target)
        assert not units, f"a block of a row has no <eob>: {units}"
        assert written == [text or None for p in row for text, supervised in blocks_of(p, table) if supervised]


RECALLING = Steps(recall=True)


@settings(max_examples=120)
@given(st.data(), tokenizer_names,
       st.builds(Steps, st.sampled_from((0.0, 1.0, 0.375)), st.sampled_from((0, 1, 3)), st.booleans()))  # fmt: skip
def test_rows_of_documents(data: st.DataObject, name: str, layout: Steps) -> None:
    table = BlockTable(tokenizers()[name])
    rows = data.draw(rows_of_passages(table))
    check_twin(rows, table, layout)
    check_tabled(rows, table, layout)
    check_targets_are_text(rows, table)


@settings(max_examples=40)
@given(tokenizer_names, hostile_text(), hostile_text())
@example("english", "", "")
@example("digits", "", "0\n")
@example("bytes", "\ufffd", "")
def test_a_document_is_supervised_from_its_prompt_on(name: str, prompt: str, completion: str) -> None:
    table = BlockTable(tokenizer := tokenizers()[name])
    whole = passage(table, prompt, completion)
    texts = [table.texts[index] for index in whole.blocks]
    before, after = tokenizer.split(prompt), tokenizer.split(completion)
    assert texts == ["", *before, *after, ""]
    assert whole.supervise_from == 1 + len(before)
    batch = streams.pack([[whole]], table)
    assert batch.n_bytes == len(completion.encode())
    assert batch.n_units == sum(len(tokenizer.write_units(block)) + 1 for block in after) + 1
    check_twin([[whole]], table)
    check_tabled([[whole]], table)


def test_rows_without_steps_or_documents() -> None:
    table = BlockTable(tokenizers()["english"])
    prompt_only = passage(table, "the light", "", ends=False)
    for rows in ([[prompt_only]], [[], [prompt_only]], [[prompt_only], [passage(table, "", "dogs")], []]):
        check_twin(rows, table)
        check_tabled(rows, table)


@settings(max_examples=25)
@given(st.data(), tokenizer_names)
def test_rows_do_not_depend_on_each_other(data: st.DataObject, name: str) -> None:
    """Law 3 for the streams: a row alone is the beginning of the same row in a batch, bit for bit."""
    table = BlockTable(tokenizers()[name])
    rows = data.draw(rows_of_passages(table))
    together = streams.pack(rows, table, steps=RECALLING)
    for i, row in enumerate(rows):
        alone = streams.pack([row], table, steps=RECALLING)
        for field in dataclasses.fields(Batch):
            mine = getattr(alone, field.name)
            if isinstance(mine, torch.Tensor):
                assert torch.equal(getattr(together, field.name)[i, : mine.shape[1]], mine[0]), field.name


@settings(max_examples=25)
@given(st.data(), tokenizer_names)
def test_a_document_in_a_row_is_the_document_alone_moved(data: st.DataObject, name: str) -> None:
    table = BlockTable(tokenizers()[name])
    first, second = data.draw(passages(table)), data.draw(passages(table))
    row, alone = (streams.pack([some], table, steps=RECALLING) for some in ([first, second], [second]))
    before = streams.pack([[first]], table)
    n_reader, n_writer = before.reader_ids.shape[1], before.targets.shape[1]
    moved = {"reader_sees": n_reader, "context": n_reader, "sees_reader": n_reader, "sees_writer": n_writer}
    for field in dataclasses.fields(Batch):
        mine = getattr(alone, field.name)
        if isinstance(mine, torch.Tensor):
            there = getattr(row, field.name)[:, n_reader if field.name in READER else n_writer :]
            assert torch.equal(there, mine + moved.get(field.name, 0)), field.name


def test_a_batch_moves_to_a_device_whole() -> None:
    table = BlockTable(tokenizers()["english"])
    batch = streams.pack([[passage(table, "the", " light")]], table)
    moved = batch.to("meta")
    assert all(getattr(moved, f.name).is_meta for f in dataclasses.fields(Batch)
               if isinstance(getattr(batch, f.name), torch.Tensor))  # fmt: skip
    for counted in ("n_units", "n_asked", "n_begun", "n_bytes", "n_children"):
        assert getattr(moved, counted) == getattr(batch, counted)


def test_the_example_of_the_design() -> None:
    """`54663 + 132 = 54795`: the writer's inputs and targets as they are drawn in DESIGN."""
    tokenizer = tokenizers()["digits"]
    table = BlockTable(tokenizer)
    batch = streams.pack([[passage(table, "54663 + 132 =", " 54795\n", ends=False)]], table)
    names = [tokenizer.piece_name(unit) for unit in batch.writer_ids[0].tolist()]
    assert names == ["<bob>", "5", "9", "7", "4", "5", "\u2581", "<bob>", "<0x0A>"]
    names = [tokenizer.piece_name(unit) for unit in batch.targets[0].tolist()]
    assert names == ["5", "9", "7", "4", "5", "\u2581", "<eob>", "<0x0A>", "<eob>"]
    assert batch.writer_places[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    n_before = 1 + 5 + 2 + 4 + 1  # <bos> 5 4 6 6 3 | ␣ + | ␣ 1 3 2 | ' ='
    assert batch.writer_positions[0].tolist() == [n_before] * 7 + [n_before + 6] * 2


def test_layout_three_feeds_these_numbers() -> None:
    """Old weights load only while this holds. When it must change, raise `tidal.config.LAYOUT` and write it anew."""
    assert LAYOUT == 3
    table = BlockTable(tokenizers()["digits"])
    batch = streams.pack([[passage(table, "12 + 3 =", "", place_offset=4)]], table)
    assert batch.reader_places.tolist() == [[-1, 5, 4, -1, -1, -1, 4, -1]]  # <bos> 1 2 ' ' + ' ' 3 ' ='
    digits = [unit == 50 for unit in range(300)]
    assert [suffix_hashes(written, digits) for written in ([7], [7, 8, 9], [7, 50, 9, 10], [299, 0, 1, 2, 3, 4])] == [
        (3933692053, -1, -1), (1016355341, 2483421998, 2460225051), (-1, 2405974839, -1),
        (4146945224, 124798331, 3641800109),
    ]  # fmt: skip
    expected = [-0.95105666, -0.80836105, 0.81199962, 0.21814327, 0.30901656, -0.588687, 0.58365798, 0.97591674]
    assert np.abs(sinusoids(200, 8)[7].numpy() - expected).max() < 1e-4


def test_another_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="streams of layout 2, this version of Tidal builds layout 3"):
        TidalConfig(400, 353, 384, 32, "f", layout=2)
