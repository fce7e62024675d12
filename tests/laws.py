"""Laws 3 to 5 as functions: causal coordinates, packed = naive, trained = decoded. Whoever breaks one fails a check."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from tests.test_streams import READER
from tidal import streams
from tidal.blocks import BOS_BLOCK, EOS_BLOCK, BlockTable, Passage, passage
from tidal.doctor import patient
from tidal.doctor.oracle import Oracle, dense_block
from tidal.infer import engine, score
from tidal.infer.engine import Completion
from tidal.model import TidalTransformer
from tidal.streams import Batch
from tidal.tokenizer import MixedTokenizer

EXACT = 1e-9  # in float64
CAUSAL = 1e-12

Document = tuple[list[str], list[str | None]]
"""Blocks of the prompt; blocks to be written, None for the end of the document."""


def passage_of(table: BlockTable, document: Document) -> Passage:
    prompt, blocks = document
    ends = [EOS_BLOCK] if None in blocks else []
    texts = table.indices([*prompt, *(text for text in blocks if text is not None)])
    return Passage(np.array([BOS_BLOCK, *texts, *ends], np.int32), 1 + len(prompt))


def assert_close(one: object, other: object, tolerance: float) -> None:
    """The largest difference, not the mean."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (one, other))
    assert a.shape == b.shape
    assert torch.isfinite(a).all()
    worst = (a - b).abs().max().item() if a.numel() else 0.0
    assert worst <= tolerance, f"differ by {worst}"


@torch.inference_mode()
def packed_log_probs(model: TidalTransformer, table: BlockTable, rows: Sequence[Sequence[Passage]]) -> Tensor:
    return model.log_probs(streams.pack(rows, table, steps=model.config.shape.steps))


@torch.inference_mode()
def packed_states(model: TidalTransformer, table: BlockTable, rows: Sequence[Sequence[Passage]],
                  ) -> tuple[Batch, Tensor, Tensor]:  # fmt: skip
    """Batch, reader states [B, R, D], and log-probabilities of all units [B, W, n_writable]."""
    batch = streams.pack(rows, table, steps=model.config.shape.steps)
    reader, writer = model.states(batch)
    return batch, reader, model.head(writer).log_softmax(-1)[..., : model.config.n_writable]


# ---------------------------------------------------------------------------- law 3, causal coordinates


def check_future(model: TidalTransformer, tokenizer: MixedTokenizer, before: str, one: str, other: str) -> None:
    """What is fed and predicted up to a block does not depend on what comes after it."""
    table = BlockTable(tokenizer)
    past = tokenizer.split(before)
    seen = []
    for future in (tokenizer.split(one), tokenizer.split(other)):
        row = passage_of(table, ([], [*past, *future, None]))
        seen.append(packed_states(model, table, [[row]]))
    n_reader = 1 + sum(len(tokenizer.encode_block(block).tokens) for block in past)
    n_writer = sum(len(tokenizer.write_units(block)) + 1 for block in past)
    assert_equal_features(seen[0][0], seen[1][0], n_reader - 1, n_writer)
    assert_close(seen[0][1][:, :n_reader], seen[1][1][:, :n_reader], CAUSAL)
    assert_close(seen[0][2][:, :n_writer], seen[1][2][:, :n_writer], CAUSAL)
    assert_close(seen[0][2][:, n_writer], seen[1][2][:, n_writer], CAUSAL)  # the first step of what differs


def check_rest_of_block(model: TidalTransformer, tokenizer: MixedTokenizer, before: str, one: str, other: str,
                        tail: str) -> None:  # fmt: skip
    """Step t does not depend on what is written after it: blocks that end alike begin alike, written backwards."""
    table = BlockTable(tokenizer)
    blocks = [one + tail, other + tail]
    while (longest := max(blocks, key=lambda b: len(tokenizer.write_units(b)))) and (
        len(tokenizer.write_units(longest)) > tokenizer.max_block_units
    ):
        blocks[blocks.index(longest)] = longest[1:]
    past, n_same = tokenizer.split(before), len(tokenizer.write_units(tail)) + 1
    seen = [packed_states(model, table, [[passage_of(table, (past, [block]))]]) for block in blocks]
    assert_equal_features(seen[0][0], seen[1][0], 0, n_same)
    assert_close(seen[0][2][:, :n_same], seen[1][2][:, :n_same], CAUSAL)


def assert_equal_features(one: Batch, other: Batch, n_reader: int, n_writer: int) -> None:
    """Bit for bit, except for targets: they are what is asked, not what is fed."""
    for field in dataclasses.fields(Batch):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, Tensor) and field.name not in ("targets", "aux_targets"):
            n = n_reader if field.name in READER else n_writer
            assert torch.equal(a[:, :n], b[:, :n]), field.name


def check_mates(model: TidalTransformer, table: BlockTable, rows: Sequence[Sequence[Passage]]) -> None:
    """Neither other rows nor other documents of the row nor the padding, whatever it holds, have any influence."""
    batch, reader, log_probs = packed_states(model, table, rows)
    generator = torch.Generator().manual_seed(0)
    n_reader, n_writer, changed = list[int](), list[int](), dict[str, Tensor]()
    for i, row in enumerate(rows):
        parts = [packed_states(model, table, [[p]]) for p in row]
        n_reader.append(sum(p[0].reader_ids.shape[1] for p in parts))
        n_writer.append(sum(p[0].targets.shape[1] for p in parts))
        assert_close(reader[i, : n_reader[-1]], torch.cat([p[1][0] for p in parts]), CAUSAL)
        assert_close(log_probs[i, : n_writer[-1]], torch.cat([p[2][0] for p in parts]), CAUSAL)
    limits = {"reader_ids": model.config.vocab_size, "writer_ids": model.config.n_head, "context": min(n_reader),
              "reader_places": model.config.n_places, "writer_places": model.config.n_places,
              "reader_positions": 99, "writer_positions": 99}  # fmt: skip
    for name, limit in limits.items():
        filled = getattr(batch, name).clone()
        for i, n in enumerate(n_reader if name in READER else n_writer):
            filled[i, n:] = torch.randint(limit, filled[i, n:].shape, generator=generator).to(filled.dtype)
        changed[name] = filled
    with torch.inference_mode():
        again = model.log_probs(dataclasses.replace(batch, **changed))
    assert_close(again, packed_log_probs(model, table, rows), CAUSAL)


# -------------------------------------------------------------------------------- law 4, packed = naive


def check_packed_is_naive(model: TidalTransformer, tokenizer: MixedTokenizer, prompt: str, completion: str) -> None:
    """One packed pass = one forward per block = the definition, written out densely."""
    text, offset = prompt + completion, len(prompt)
    packed = score.score(model, tokenizer, text, supervise_from=offset)
    assert_close(packed, score.score(model, tokenizer, text, "naive", supervise_from=offset), EXACT)
    read, written = tokenizer.split(prompt), tokenizer.split(completion)
    layout = Oracle(tokenizer, model.config.shape).lay_out(read, written, ends=True)
    blocks = range(1 + len(read), len(layout.blocks))
    with torch.inference_mode():
        dense = [dense_block(model, layout, j, torch.float64)[0] for j in blocks]
    assert_close(packed, torch.cat(dense), EXACT)


def check_row_is_documents(model: TidalTransformer, table: BlockTable, rows: Sequence[Sequence[Passage]]) -> None:
    """Documents packed into rows have the log-probabilities that each has alone, in float64."""
    alone = [packed_log_probs(model, table, [[p]]) for row in rows for p in row]
    assert_close(packed_log_probs(model, table, rows), torch.cat(alone), EXACT)


# ----------------------------------------------------------------------------- law 5, trained = decoded


def check_decoded(model: TidalTransformer, tokenizer: MixedTokenizer, prompt: str, completion: str,
                  tolerance: float = EXACT) -> None:  # fmt: skip
    """The cached decoder, forced, agrees with the packed pass on every unit."""
    text, offset = prompt + completion, len(prompt)
    packed = score.score(model, tokenizer, text, supervise_from=offset)
    assert_close(score.score(model, tokenizer, text, "decode", supervise_from=offset), packed, tolerance)


def check_decoded_side_by_side(model: TidalTransformer, tokenizer: MixedTokenizer, texts: Sequence[tuple[str, str]],
                               capacity: int = 256) -> None:  # fmt: skip
    """In any batch, each at its own pace, and however small the caches begin."""
    table = BlockTable(tokenizer)
    documents = [patient.Document(prompt, completion) for prompt, completion in texts]
    decoded = patient.Patient(model, tokenizer, documents, trained=True).decode(model, documents, capacity)
    for text, log_probs in zip(texts, decoded, strict=True):
        assert_close(log_probs, packed_log_probs(model, table, [[passage(table, *text)]]), EXACT)


def check_generation(model: TidalTransformer, tokenizer: MixedTokenizer, prompts: Sequence[str],
                     max_new_units: int = 24, **how: float | int) -> list[Completion]:  # fmt: skip
    """What was generated has the log-probability that training would give it, and is the same in any batch."""
    done = engine.generate(model, tokenizer, prompts, max_new_units=max_new_units, **how)
    table = BlockTable(tokenizer)
    for prompt, completion in zip(prompts, done, strict=True):
        assert completion.completion == "".join(completion.blocks)
        assert completion.text == prompt + completion.completion
        assert all(completion.blocks), "an empty block"
        ends: list[str | None] = [None] if completion.stop_reason == "eos" else []
        document: Document = tokenizer.split(prompt), [*completion.blocks, *ends]
        trained = packed_log_probs(model, table, [[passage_of(table, document)]])
        assert len(trained) == completion.units <= max_new_units
        assert_close(completion.log_prob, trained.sum(), EXACT)
    for batch_size in (1, 2):
        again = engine.generate(model, tokenizer, prompts, max_new_units=max_new_units, batch_size=batch_size, **how)
        assert [c.blocks for c in again] == [c.blocks for c in done]
        assert_close([c.log_prob for c in again], [c.log_prob for c in done], EXACT)
    return done


def check_engine_writes(model: TidalTransformer, tokenizer: MixedTokenizer, texts: Sequence[tuple[str, str]]) -> None:
    """The engine, made to write given text, writes it, with the log-probability of training.

    Unlike what a random model writes, such text has tokens of several characters.
    """
    scripts = [[unit for block in tokenizer.split(completion) for unit in (*tokenizer.write_units(block),
               tokenizer.eob_id)] + [tokenizer.eos_id] for _, completion in texts]  # fmt: skip
    generators = [np.random.default_rng(i) for i in range(len(texts))]  # which a row is known by
    waiting = {id(g): list(script) for g, script in zip(generators, scripts, strict=True)}

    def puppet(logits: Tensor, allowed: Tensor, _: object, rows: Sequence[object], *__: object) -> list[int]:
        units = [waiting[id(row)].pop(0) for row in rows]
        assert logits.shape == allowed.shape == (len(units), tokenizer.n_head)
        assert allowed[torch.arange(len(units)), units].all(), "the grammar forbids what is to be written"
        return units

    with mock.patch.object(engine, "choose", puppet):
        done = engine.generate(model, tokenizer, [prompt for prompt, _ in texts], max_new_units=10**6,
                               seed=generators)  # type: ignore[arg-type]  # fmt: skip
    for (prompt, completion), script, mine in zip(texts, scripts, done, strict=True):
        assert (mine.prompt, mine.completion, mine.stop_reason) == (prompt, completion, "eos")
        assert mine.blocks == tokenizer.split(completion)
        assert mine.units == len(script)
        trained = score.score(model, tokenizer, prompt + completion, supervise_from=len(prompt))
        assert_close(mine.log_prob, trained.sum(), EXACT)


def check_scores(model: TidalTransformer, tokenizer: MixedTokenizer) -> None:
    """A trained model in float64 scores hard texts alike in all three ways, one value per unit."""
    model.double()
    text = "the sea comes in and the sea goes out and so it goes on day by day "
    for hard, start in (
        ("54663 + 132 = 54795\n", 0),
        ("54663 + 132 = 54795\n", 13),
        (f"{text}😀 今天天气\0 \u2581<bob> {text}", 5),
        ("", 0),
    ):
        packed, naive, decoded = (
            score.score(model, tokenizer, hard, how, supervise_from=start)
            for how in ("packed", "naive", "decode")
        )
        assert packed.dtype == np.float64
        blocks = tokenizer.split(hard[start:])
        assert packed.shape == (sum(len(tokenizer.write_units(b)) + 1 for b in blocks) + 1,)
        assert_close(naive, packed, EXACT)
        assert_close(decoded, packed, EXACT)
