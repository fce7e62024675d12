"""Laws 3 to 5: causal coordinates, packed = naive, trained = decoded. Each law is a function `check_…`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import SHAPES, TOKENIZERS, passages, remembered, shape_names, short_text, tiny, tokenizer_names
from tests.test_streams import READER
from tidal import streams
from tidal.blocks import BOS_BLOCK, EOS_BLOCK, NOTHING, BlockTable, Passage, passage, suffix_hashes
from tidal.infer import decoder as decoding
from tidal.infer import engine, score
from tidal.infer.engine import Completion
from tidal.kernels import cpu
from tidal.model import Layer, SwiGLU, TidalTransformer
from tidal.streams import Batch
from tidal.tokenizer import NO_PLACE, MixedTokenizer

EXACT = 1e-9  # in float64
CAUSAL = 1e-12

Document = tuple[list[str], list[str | None]]
"""Blocks of the prompt; blocks to be written, None for the end of the document."""


def document_of(tokenizer: MixedTokenizer, prompt: str, completion: str) -> Document:
    return tokenizer.split(prompt), [*tokenizer.split(completion), None]


def passage_of(table: BlockTable, document: Document) -> Passage:
    prompt, blocks = document
    ends = [EOS_BLOCK] if None in blocks else []
    texts = table.indices([*prompt, *(text for text in blocks if text is not None)])
    return Passage(np.array([BOS_BLOCK, *texts, *ends], np.int32), 1 + len(prompt))


def table_for(model: TidalTransformer, tokenizer: MixedTokenizer) -> BlockTable:
    return BlockTable(tokenizer, suffixes=model.config.shape.suffix_rows > 0)


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


# ------------------------------------------------------------------------------ the model a second time


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotated(x_ld: Tensor, table: Tensor, places: Tensor) -> Tensor:
    """Every pair of the first half of a head, turned by the angle of its place; by nothing where there is no place."""
    n, out = table.shape[1] // 2, x_ld.clone()
    for j in range(n):
        sin, cos = table[places, j], table[places, n + j]
        out[:, j] = cos * x_ld[:, j] - sin * x_ld[:, n + j]
        out[:, n + j] = sin * x_ld[:, j] + cos * x_ld[:, n + j]
    return out


def dense_layer(layer: Layer, x_ld: Tensor, memory_md: Tensor, sees_lk: Tensor, distance_lk: Tensor,
                table: Tensor | None, places: Tensor) -> Tensor:  # fmt: skip
    """One layer, head by head, with a dense softmax; keys are `memory` and then the elements themselves."""
    if layer.attends:
        h = norm(x_ld, layer.norm_attention.weight)
        keys, heads = torch.cat([memory_md, h]), []
        weight_q = layer.query.weight.view(layer.n_heads, layer.d_head, -1)
        weight_kv = layer.key_value.weight.view(2, layer.n_kv_heads, layer.d_head, -1)
        for i in range(layer.n_heads):
            group = i // (layer.n_heads // layer.n_kv_heads)
            q, k, v = h @ weight_q[i].T, keys @ weight_kv[0, group].T, keys @ weight_kv[1, group].T
            if isinstance(layer.norm_query, torch.nn.RMSNorm):
                q, k = norm(q, layer.norm_query.weight), norm(k, layer.norm_key.weight)
            if table is not None:
                q, k = rotated(q, table, places[len(memory_md) :]), rotated(k, table, places)
            scores = q @ k.T / layer.d_head**0.5 - layer.slopes[i] * distance_lk
            heads.append(scores.masked_fill(~sees_lk, -torch.inf).softmax(-1) @ v)
        x_ld = x_ld + torch.cat(heads, -1) @ layer.out.weight.T
    return x_ld + mlp(layer.mlp, norm(x_ld, layer.norm_mlp.weight))


def hint(model: TidalTransformer, tokenizer: MixedTokenizer, state: Tensor, written: list[int]) -> Tensor:
    """By going through all tokens, and asking of each whether it ends with what is written, and what comes next."""
    expected = (state @ model.token_embedding.weight.T).softmax(-1)
    next_units, total = torch.zeros(model.config.n_head, dtype=torch.float64), 0.0
    for token in range(tokenizer.vocab_size):
        if token == tokenizer.eos_id:
            spelled = [token]
        elif token in (tokenizer.eob_id, tokenizer.bob_id, tokenizer.bos_id) or 2 <= token < 258:
            continue
        else:
            spelled = [*tokenizer.write_units(tokenizer.id_bytes[token].decode()), tokenizer.eob_id]
        if spelled[: len(written)] == written and len(spelled) > len(written):
            next_units[spelled[len(written)]] += expected[token]
            total += float(expected[token])
    weights = torch.log1p(next_units / (total + 1e-6) / 1e-3) / math.log1p(1e3)
    assert model.foretold is not None
    return weights @ model.foretold.embedding.weight


def mlp(module: SwiGLU, x: Tensor) -> Tensor:
    gate, value = (x @ module.up.weight.T).chunk(2, -1)
    return (F.silu(gate) * value) @ module.down.weight.T


@torch.inference_mode()
def dense_log_probs(model: TidalTransformer, tokenizer: MixedTokenizer, before: Sequence[str],
                    text: str | None) -> Tensor:  # fmt: skip
    """Log-probabilities of one block after others: everything recomputed from the definition, nothing packed."""
    shape, none = model.config.shape, torch.zeros(0, model.config.shape.d_model, dtype=torch.float64)
    tokens = [(tokenizer.bos_id, NO_PLACE, 0)]  # id, place, block
    for j, block in enumerate(map(tokenizer.encode_block, before), 1):
        tokens += [(token, place, j) for token, place in zip(block.tokens, block.places, strict=True)]
    ids, places, block_of = torch.tensor(tokens).unbind(1)
    index = torch.arange(len(tokens))
    table = model.place_table if shape.rotary_places else None
    x = model.token_embedding.weight[ids] + (0 if shape.rotary_places else model.place_table[places])
    sees = block_of[None, :] <= block_of[:, None]
    for layer in model.reader:
        x = dense_layer(layer, x, none, sees, (index[:, None] - index[None, :]).abs().double(), table, places)
    states = norm(x, model.reader_norm.weight)

    targets = [*tokenizer.encode_block(text).units[::-1], tokenizer.eob_id] if text else [tokenizer.eos_id]
    steps = torch.arange(len(targets))
    x = model.unit_embedding.weight[torch.tensor([tokenizer.bob_id, *targets[:-1]])]
    x = x + (0 if shape.rotary_places else model.place_table[steps])
    context = states[-1] @ model.context.weight.T
    if shape.suffix_rows:
        for t in range(len(targets)):
            hashes = suffix_hashes(targets[:t], tokenizer.digit_units.tolist())
            rows = [1 + h % shape.suffix_rows for h in hashes if h != NOTHING]
            gain, added = model.suffix_embedding.weight[rows].sum(0).split(shape.d_model)
            x[t] += added + gain * context
    x = x + context
    if shape.recall:
        scripts = [[], *([*tokenizer.encode_block(block).units[::-1], tokenizer.eob_id] for block in before)]
        for t in range(len(targets)):
            for order, unit in enumerate(remembered(scripts, targets[:t])):
                x[t] += model.recall_embedding.weight[order * (model.config.n_head + 1) + 1 + unit]
    if shape.foretell:
        x = x + torch.stack([hint(model, tokenizer, states[-1], targets[:t]) for t in range(len(targets))])
    position = len(tokens) + shape.step_stride * steps.double()
    ahead = steps[:, None] - steps[None, :]
    sees, distance = (ahead >= 0) & (ahead < (shape.step_window or 99)), (position[:, None] - position[None, :]).abs()
    for i, layer in enumerate(model.writer):
        if i == 0 and shape.writer_attention == "memory":
            to_memory = (position[:, None] - index[None, :]).abs()
            everything = torch.ones_like(to_memory, dtype=torch.bool)
            x = dense_layer(layer, x, states, torch.cat([everything, sees], 1), torch.cat([to_memory, distance], 1),
                            table, torch.cat([places, steps]))  # fmt: skip
        else:
            x = dense_layer(layer, x, none, sees, distance, table, steps)
    logits = norm(x, model.writer_norm.weight) @ model.unit_embedding.weight[: tokenizer.n_writable].T
    return logits.log_softmax(-1)[steps, torch.tensor(targets)]


# ---------------------------------------------------------------------------- law 3, causal coordinates


def check_future(model: TidalTransformer, tokenizer: MixedTokenizer, before: str, one: str, other: str) -> None:
    """What is fed and predicted up to a block does not depend on what comes after it."""
    table = table_for(model, tokenizer)
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
    table = table_for(model, tokenizer)
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
        if isinstance(a, Tensor) and field.name not in ("targets", "next_tokens"):
            n = n_reader if field.name in READER else n_writer
            assert torch.equal(a[:, :n], b[:, :n]), field.name


def check_mates(model: TidalTransformer, table: BlockTable, rows: Sequence[Sequence[Passage]]) -> None:
    """Neither other rows nor other documents of the row nor the padding, whatever it holds, have any influence."""
    batch, reader, log_probs = packed_states(model, table, rows)
    generator = torch.Generator().manual_seed(0)
    n_reader, n_writer, changed = [], [], {f.name: getattr(batch, f.name) for f in dataclasses.fields(Batch)}
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
        filled = changed[name].clone()
        for i, n in enumerate(n_reader if name in READER else n_writer):
            filled[i, n:] = torch.randint(limit, filled[i, n:].shape, generator=generator).to(filled.dtype)
        changed[name] = filled
    with torch.inference_mode():
        again = model.log_probs(Batch(**changed))
    assert_close(again, packed_log_probs(model, table, rows), CAUSAL)


@settings(max_examples=40)
@given(tokenizer_names, shape_names, short_text(), short_text(), short_text())
@example("english", "memory deep", "the light", "", " and the dogs were with the fox")
def test_the_future_has_no_influence(name: str, shape: str, before: str, one: str, other: str) -> None:
    check_future(*tiny(name, shape), before, one, other)


@settings(max_examples=40)
@given(tokenizer_names, shape_names, short_text(), short_text(), short_text(), st.text("t1é今", max_size=3))
@example("english", "memory", "the ", "l", "midn", "ight")
@example("digits", "memory deep", "1 + 1 =", " ", "123", "7")
def test_the_rest_of_the_block_has_no_influence(name: str, shape: str, before: str, one: str, other: str,
                                                tail: str) -> None:  # fmt: skip
    model, tokenizer = tiny(name, shape)
    tail = (tail or "a")[-1 if tokenizer.max_block_units == 4 else -3 :]
    check_rest_of_block(model, tokenizer, before, one[-4:], other[-4:], tail)


@settings(max_examples=40)
@given(st.data(), tokenizer_names, st.sampled_from(("memory deep", "memory", "block", "none")))
def test_mates_have_no_influence(data: st.DataObject, name: str, shape: str) -> None:
    model, tokenizer = tiny(name, shape)
    table = table_for(model, tokenizer)
    document = passages(table).map(lambda p: dataclasses.replace(p, place_offset=0, position_scale=1.0))
    rows = data.draw(st.lists(st.lists(document, min_size=1, max_size=2), min_size=1, max_size=3))
    check_mates(model, table, rows)


# ------------------------------------------------------------------------------- law 4, packed = naive


def check_packed_is_naive(model: TidalTransformer, tokenizer: MixedTokenizer, prompt: str, completion: str) -> None:
    """One packed pass = one forward per block = the definition, written out densely."""
    text, offset = prompt + completion, len(prompt)
    packed = score.score(model, tokenizer, text, supervise_from=offset)
    assert_close(packed, score.score(model, tokenizer, text, "naive", supervise_from=offset), EXACT)
    before, blocks = document_of(tokenizer, prompt, completion)
    dense = []
    for block in blocks:
        dense.append(dense_log_probs(model, tokenizer, before, block))
        before = [*before, block] if block else before
    assert_close(packed, torch.cat(dense), EXACT)


def check_row_is_documents(model: TidalTransformer, table: BlockTable, rows: Sequence[Sequence[Passage]]) -> None:
    """Documents packed into rows have the log-probabilities that each has alone, in float64."""
    alone = [packed_log_probs(model, table, [[p]]) for row in rows for p in row]
    assert_close(packed_log_probs(model, table, rows), torch.cat(alone), EXACT)


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=12)
@given(tokenizer_names, short_text(), short_text())
@example("english", "", "the light with the dogs\n")
@example("digits", "54663 + 132 =", " 54795\n")
@example("chinese", "今天天气", "很好，\0👍")
@example("bytes", "\ufffd", "")
def test_packed_is_naive(shape: str, name: str, prompt: str, completion: str) -> None:
    check_packed_is_naive(*tiny(name, shape), prompt, completion)


@settings(max_examples=30)
@given(st.data(), tokenizer_names, shape_names)
def test_a_row_is_its_documents(data: st.DataObject, name: str, shape: str) -> None:
    model, tokenizer = tiny(name, shape)
    table = table_for(model, tokenizer)
    document = passages(table).map(lambda p: dataclasses.replace(p, place_offset=0, position_scale=1.0))
    check_row_is_documents(model, table, data.draw(st.lists(st.lists(document, min_size=1), min_size=1, max_size=2)))


@pytest.mark.parametrize("shape", SHAPES)
def test_both_paths_of_the_kernel(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws hold tile by tile as well; short texts take the dense path otherwise."""
    model, tokenizer = tiny("english", shape)
    table = table_for(model, tokenizer)
    text = "the light and the night with the dogs, 'tis lazy. " * 4
    rows = [[passage(table, "", text), passage(table, text[:50], text[50:99])], [passage(table, "", "fox")]]
    dense = packed_log_probs(model, table, rows)
    monkeypatch.setattr(cpu, "DENSE_LIMIT", 0)
    assert_close(packed_log_probs(model, table, rows), dense, EXACT)
    check_row_is_documents(model, table, rows)
    check_packed_is_naive(model, tokenizer, text[:40], text[40:99])
    check_decoded(model, tokenizer, text[:40], text[40:60])


# ----------------------------------------------------------------------------- law 5, trained = decoded


def check_decoded(model: TidalTransformer, tokenizer: MixedTokenizer, prompt: str, completion: str,
                  tolerance: float = EXACT) -> None:  # fmt: skip
    """The cached decoder, forced, agrees with the packed pass on every unit."""
    text, offset = prompt + completion, len(prompt)
    packed = score.score(model, tokenizer, text, supervise_from=offset)
    assert_close(score.score(model, tokenizer, text, "decode", supervise_from=offset), packed, tolerance)


@torch.inference_mode()
def forced(model: TidalTransformer, tokenizer: MixedTokenizer, documents: Sequence[Document],
           capacity: int) -> list[list[Tensor]]:  # fmt: skip
    """Documents written side by side in one decoder; each goes on at its own pace, as in generation."""
    decoder = decoding.Decoder(model, tokenizer, len(documents), capacity)
    prompted = [i for i, (prompt, _) in enumerate(documents) if prompt]
    if prompted:
        decoder.read(prompted, [[tokenizer.encode_block(text) for text in documents[i][0]] for i in prompted])
    waiting = [list(blocks) for _, blocks in documents]
    written: list[list[int]] = [[] for _ in documents]
    log_probs: list[list[Tensor]] = [[] for _ in documents]
    while active := [i for i, blocks in enumerate(waiting) if blocks]:
        logits = decoder.step(active, [written[i] for i in active])
        finished = []
        for i, row in zip(active, logits, strict=True):
            text = waiting[i][0]
            targets = [*tokenizer.write_units(text), tokenizer.eob_id] if text else [tokenizer.eos_id]
            written[i] = [*written[i], targets[len(written[i])]]
            log_probs[i].append(row.log_softmax(-1)[written[i][-1]])
            if len(written[i]) == len(targets):
                finished.append(i)
        read = [(i, text) for i in finished if (text := waiting[i].pop(0))]
        for i in finished:
            written[i] = []
        if read:
            decoder.read([i for i, _ in read], [[tokenizer.encode_block(text)] for _, text in read])
    return log_probs


def check_decoded_side_by_side(model: TidalTransformer, tokenizer: MixedTokenizer, documents: Sequence[Document],
                               capacity: int = 256, tolerance: float = EXACT) -> None:  # fmt: skip
    """In any batch, and however small the caches begin."""
    table = table_for(model, tokenizer)
    for document, log_probs in zip(documents, forced(model, tokenizer, documents, capacity), strict=True):
        packed = packed_log_probs(model, table, [[passage_of(table, document)]])
        assert_close(torch.stack(log_probs), packed, tolerance)


def check_generation(model: TidalTransformer, tokenizer: MixedTokenizer, prompts: Sequence[str],
                     max_new_units: int = 24, **how: float | int) -> list[Completion]:  # fmt: skip
    """What was generated has the log-probability that training would give it, and is the same in any batch."""
    done = engine.generate(model, tokenizer, prompts, max_new_units=max_new_units, **how)
    table = table_for(model, tokenizer)
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


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=8)
@given(tokenizer_names, short_text(), short_text())
@example("english", "", "the light with the dogs\n")
@example("digits", "54663 + 132 =", " 54795\n")
@example("bytes", "\ufffd", "")
def test_trained_is_decoded(shape: str, name: str, prompt: str, completion: str) -> None:
    check_decoded(*tiny(name, shape), prompt, completion)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_trained_is_decoded_in_float32(name: str, shape: str) -> None:
    model, tokenizer = tiny(name, shape, torch.float32)
    check_decoded(model, tokenizer, "the light ", "12 + 34 = 今天é, dogs\r\n", tolerance=1e-4)


@settings(max_examples=25)
@given(tokenizer_names, shape_names, st.lists(st.tuples(short_text(), short_text()), min_size=1, max_size=4),
       st.sampled_from((1, 7, 256)))  # fmt: skip
@example("english", "memory deep", [("", "the light"), ("and the fox,", ""), ("", "dogs and god"), ("'", "a")], 1)
def test_decoded_side_by_side(name: str, shape: str, texts: list[tuple[str, str]], capacity: int) -> None:
    model, tokenizer = tiny(name, shape)
    check_decoded_side_by_side(model, tokenizer, [document_of(tokenizer, *text) for text in texts], capacity)


@settings(max_examples=20)
@given(tokenizer_names, shape_names, st.lists(short_text(), min_size=1, max_size=3),
       st.sampled_from(({}, {"temperature": 1.0}, {"temperature": 1.5, "top_k": 40, "seed": 3},
                        {"temperature": 0.7, "top_p": 0.8, "seed": 1}, {"temperature": 100.0})),
       st.sampled_from((1, 5, 24)))  # fmt: skip
@example("english", "memory", ["the", "", "and the light"], {"temperature": 1.0, "seed": 7}, 24)
def test_generation(name: str, shape: str, prompts: list[str], how: dict[str, float], units: int) -> None:
    check_generation(*tiny(name, shape), prompts, units, **how)


@settings(max_examples=15)
@given(tokenizer_names, shape_names, st.lists(st.tuples(short_text(), short_text()), min_size=1, max_size=3))
@example("english", "memory", [("the light", " and the night\n"), ("", ""), ("fox", "")])
@example("chinese", "block", [("今天", "天气很好"), ("", "明天👍去公园")])
def test_the_engine_writes_any_text(name: str, shape: str, texts: list[tuple[str, str]]) -> None:
    check_engine_writes(*tiny(name, shape), texts)


def test_generation_meets_all_that_it_may() -> None:
    """So that the test above is not empty: several blocks, both ends, byte units."""
    done = [c for name in TOKENIZERS
            for c in check_generation(*tiny(name, "memory"), ["", "the ", "1 +"], 60, temperature=1.0)]  # fmt: skip
    assert {c.stop_reason for c in done} == {"eos", "length"}
    assert max(len(c.blocks) for c in done) > 3
    assert not "".join(c.text for c in done).isascii()


def test_no_prompts() -> None:
    assert engine.generate(*tiny("english", "memory"), []) == []


def test_score_of_parts() -> None:
    """Offsets and refusals; the text of a prompt is not scored."""
    model, tokenizer = tiny("english", "memory")
    whole = score.score(model, tokenizer, "the light")
    assert len(whole) == len(tokenizer.split("the light")) + len("the light") + 1
    assert (whole < 0).all()
    assert_close(score.score(model, tokenizer, "the light", supervise_from=3), whole[4:], EXACT)
    assert len(score.score(model, tokenizer, "the", supervise_from=3)) == 1
    assert len(score.score(model, tokenizer, "")) == 1
    with pytest.raises(ValueError, match="choose packed, naive or decode"):
        score.score(model, tokenizer, "the", "padded")  # type: ignore[arg-type]
    for offset in (-1, 4):
        with pytest.raises(ValueError, match="3 characters"):
            score.score(model, tokenizer, "the", supervise_from=offset)
    for how in ("packed", "naive", "decode"):
        with pytest.raises(ValueError, match="surrogate"):
            score.score(model, tokenizer, "\ud800", how)


def test_bits_per_byte_charge_every_unit() -> None:
    model, tokenizer = tiny("english", "memory")
    table = table_for(model, tokenizer)
    rows = [[passage(table, "", "the light é")], [passage(table, "the", " dogs"), passage(table, "", "fox")]]
    nats = -sum(packed_log_probs(model, table, [[p]]).sum().item() for row in rows for p in row)
    bits, n_units, n_bytes = score.bits_per_byte(model, rows, table, rows_per_batch=1)
    assert n_bytes == len("the light é".encode()) + len(" dogs") + len("fox")
    assert n_units == sum(streams.pack([row], table).n_units for row in rows)
    assert bits == pytest.approx(nats / np.log(2) / n_bytes, abs=1e-12)
    assert np.isnan(score.bits_per_byte(model, [[passage(table, "the", "", ends=False)]], table)[0])
