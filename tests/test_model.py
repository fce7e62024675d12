"""The model's own accounts: parameters, work, caches, gradients, plans; and the settings it is built from."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.strategies import SHAPES, config_of, random_model, tiny, tokenizers
from tidal import model as model_module
from tidal import streams
from tidal.blocks import NOTHING, BlockTable, passage
from tidal.config import MOST_PLACES, Shape, TidalConfig
from tidal.infer.decoder import Decoder
from tidal.kernels import TilePlan
from tidal.model import TidalTransformer
from tidal.streams import Batch
from tidal.tokenizer import NO_PLACE

TEXT = "the light with the dogs, 12 + 34 = 46\n今é"

shapes = pytest.mark.parametrize("shape", SHAPES)


def batch_for(model: TidalTransformer, *texts: str) -> Batch:
    table = BlockTable(tokenizers()["english"])
    rows = [[passage(table, "", text), passage(table, text[:9], text[9:])] for text in texts]
    return streams.pack(rows, table, steps=model.config.shape.steps)


# ---------------------------------------------------------------------------------------------- settings


@shapes
def test_a_config_survives_json(shape: str) -> None:
    config = config_of(tokenizers()["english"], SHAPES[shape])
    assert TidalConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_and_missing_keys_are_refused() -> None:
    values = config_of(tokenizers()["english"], Shape()).to_dict()
    for key in values:
        with pytest.raises(ValueError, match=rf"lacks the keys .*'{key}'"):
            TidalConfig.from_dict({k: v for k, v in values.items() if k != key})
    for key in values["shape"]:
        less = {k: v for k, v in values["shape"].items() if k != key}
        with pytest.raises(ValueError, match=rf"Shape lacks the keys .*'{key}'"):
            TidalConfig.from_dict({**values, "shape": less})
    with pytest.raises(ValueError, match=r"TidalConfig has unknown keys .*'rope'"):
        TidalConfig.from_dict({**values, "rope": 1})
    with pytest.raises(ValueError, match=r"Shape has unknown keys .*'rope'"):
        TidalConfig.from_dict({**values, "shape": {**values["shape"], "rope": 1}})
    for broken in (None, 3, [1]):
        with pytest.raises(ValueError, match=r"Shape is .*; it must be an object"):
            TidalConfig.from_dict({**values, "shape": broken})


@pytest.mark.parametrize("wrong", [
    {"rotary_places": "no"}, {"foretell": 0}, {"d_model": True}, {"n_heads": 4.0}, {"step_stride": "0"},
    {"writer_attention": None},
])  # fmt: skip
def test_values_of_another_type_are_refused(wrong: dict[str, Any]) -> None:
    """A string is true: places would turn queries, all weights load, and the model write garbage."""
    values = config_of(tokenizers()["english"], Shape()).to_dict()
    with pytest.raises(ValueError, match=rf"Shape: {next(iter(wrong))} is .*, which is no "):
        TidalConfig.from_dict({**values, "shape": {**values["shape"], **wrong}})
    for wrong in ({"vocab_size": "400"}, {"fingerprint": None}):
        with pytest.raises(ValueError, match=rf"TidalConfig: {next(iter(wrong))} is .*, which is no "):
            TidalConfig.from_dict({**values, **wrong})


@pytest.mark.parametrize("bad", [
    {"d_model": 0}, {"d_model": 30, "n_heads": 4}, {"n_heads": 4, "n_kv_heads": 3}, {"n_heads": 0}, {"n_kv_heads": 0},
    {"reader_layers": -1}, {"writer_layers": 0}, {"reader_ff": 0}, {"writer_ff": 0}, {"suffix_rows": -1},
    {"writer_attention": "all"}, {"query_gain": -1}, {"place_jitter": -1}, {"step_stride": -0.5},
    {"step_stride": float("nan")}, {"query_gain": float("inf")}, {"reader_ff": 10**30}, {"step_window": 2**31},
    {"d_model": "32"}, {"n_heads": None},
])  # fmt: skip
def test_shapes_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Shape(**bad)


def test_a_config_may_not_ask_for_any_number_of_places() -> None:
    """They are computed when the model is built, in memory that no file has to hold."""
    assert TidalConfig(400, 353, 384, MOST_PLACES - 1, "f").n_places == MOST_PLACES
    with pytest.raises(ValueError, match=f"make {MOST_PLACES + 1} places, more than {MOST_PLACES}"):
        TidalConfig(400, 353, 384, MOST_PLACES - 1, "f", Shape(place_jitter=1))


def test_attention_begins_as_sharp_as_asked() -> None:
    model = TidalTransformer.of(tokenizers()["english"], Shape(query_gain=2.0))
    gains = {name: weight for name, weight in model.named_parameters() if "norm_query" in name}
    assert len(gains) == 4
    assert all((gain == 2.0).all() for gain in gains.values())


# ---------------------------------------------------------------------------------------------- accounts


@shapes
def test_parameters_add_up(shape: str) -> None:
    model, _ = tiny("english", shape)
    counts = model.n_parameters()
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["tables"] + counts["reader"] + counts["writer"] == counts["total"]
    config, chosen = model.config, model.config.shape
    rows = config.vocab_size + (1 + chosen.foretell) * config.n_head
    rows += 2 * (chosen.suffix_rows + 1) if chosen.suffix_rows else 0
    rows += 3 * (config.n_head + 1) if chosen.recall else 0
    assert counts["tables"] == rows * chosen.d_model == sum(t.numel() for t in model.tables())
    assert len({id(t) for t in model.tables()}) == 2 + (chosen.suffix_rows > 0) + chosen.foretell + chosen.recall


@shapes
def test_flops_are_those_that_torch_counts(shape: str) -> None:
    model, _ = tiny("english", shape)
    table = BlockTable(tokenizers()["english"])
    batch = streams.pack([[passage(table, "", TEXT)]], table, steps=model.config.shape.steps)
    n_tokens, n_steps = batch.reader_ids.shape[1], batch.targets.shape[1]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.head(model.states(batch)[1])
    own = sum(layer.attends for layer in model.writer) * 4 * model.config.shape.d_model * n_steps**2
    n_blocks = int((batch.aux_targets >= 0).sum())
    first = 2 * n_blocks * model.foretold.n_first * model.config.shape.d_model if model.foretold else 0
    assert counter.get_total_flops() == model.flops(n_tokens, n_steps, n_tokens, n_blocks) + own + first


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cache_bytes_are_those_that_the_decoder_allocates(shape: str, dtype: torch.dtype) -> None:
    model, tokenizer = tiny("english", shape, dtype)

    @torch.inference_mode()
    def allocated(capacity: int, n_rows: int = 1) -> int:
        decoder = Decoder(model, tokenizer, n_rows, capacity)
        return sum(cache.data.nbytes for cache in (*decoder.reader_caches, *decoder.writer_caches))

    for n in (1, 7):
        assert allocated(20 + n) - allocated(20) == model.cache_bytes(n)
        assert allocated(20 + n, 3) - allocated(20, 3) == 3 * model.cache_bytes(n)


@shapes
def test_writer_plans_stay_within_their_blocks(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between blocks there are no scores: a tile's slices are the hull of its own steps' blocks, and the memory."""
    model, tokenizer = tiny("english", shape)
    table = BlockTable(tokenizer)
    batch = streams.pack([[passage(table, "", TEXT * 9)]], table, steps=model.config.shape.steps)
    plans: list[tuple[TilePlan, torch.Tensor]] = []
    build = TilePlan.build

    def spy(ranges: torch.Tensor, n_keys: int) -> TilePlan:
        plans.append((build(ranges, n_keys), ranges))
        return plans[-1][0]

    monkeypatch.setattr(model_module.TilePlan, "build", staticmethod(spy))
    with torch.no_grad():
        model.states(batch)
    n_steps, n_reader, longest = batch.targets.shape[1], batch.reader_ids.shape[1], tokenizer.max_block_units + 1
    n_memory, scored = (n_reader if model.has_memory else 0), 0
    assert n_steps > 200
    for plan, ranges in plans[1:]:
        memory = n_memory if plan.shape[2] > n_steps else 0
        for tile, slices in enumerate(plan.slices.tolist()):
            mine = slice(tile * plan.tile_q, min((tile + 1) * plan.tile_q, n_steps))
            own = batch.sees_writer[0, mine] + memory
            for start, end, _ in slices:
                if start < end and start >= memory:
                    assert own[:, 0].min() <= start < end <= own[:, 1].max()
                    assert end - start <= plan.tile_q + longest
                    scored += 1
                elif start < end:
                    seen = batch.sees_reader[0, mine]
                    assert (start, end) == (seen[:, 0].min(), seen[:, 1].max()), "memory and block in one slice"
        assert plan.shape[1] == ranges.shape[1] == n_steps
    assert scored or shape == "none"


# ------------------------------------------------------------------------------------------------ losses


@shapes
def test_losses_are_sums_of_log_probabilities(shape: str) -> None:
    model, _ = tiny("english", shape)
    batch = batch_for(model, "fox and god", TEXT)  # padding in between
    with torch.no_grad():
        losses, reader = model(batch), model.states(batch)[0]
        log_probs = model.log_probs(batch)
    assert losses.n_units == len(log_probs) == batch.n_units == int((batch.targets != NOTHING).sum())
    torch.testing.assert_close(losses.units, -log_probs.sum(), rtol=1e-12, atol=1e-9)
    asked = batch.aux_targets != NOTHING
    all_logits = reader @ model.token_embedding.weight.T
    loss = -all_logits.log_softmax(-1)[asked].gather(1, batch.aux_targets[asked][:, None]).sum()
    assert losses.n_aux == int(asked.sum())
    torch.testing.assert_close(losses.aux, loss, rtol=1e-12, atol=1e-9)


@shapes
def test_gradients_reach_every_parameter(shape: str) -> None:
    model = random_model(tokenizers()["english"], SHAPES[shape]).train()
    model(batch_for(model, TEXT, "fox and god")).units.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert torch.isfinite(weight.grad).all(), name
        assert weight.grad.abs().sum() > 0, name
    if SHAPES[shape].suffix_rows:
        assert not model.suffix_embedding.weight.grad[0].any(), "the row of no suffix learns"
    unseen = [tokenizers()["english"].n_writable + 3, model.config.n_head - 1]
    assert not model.unit_embedding.weight.grad[unseen].any(), "a padded column learns"


def test_gradients_are_those_of_finite_differences() -> None:
    model = random_model(tokenizers()["english"], SHAPES["memory"])
    batch = batch_for(model, "the fox, 12")
    loss = model(batch).units
    loss.backward()
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        if name == "suffix_embedding.weight":
            direction[0] = 0
        expected = float((weight.grad * direction).sum())
        sides = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                weight += step * direction
                sides.append(float(model(batch).units))
        with torch.no_grad():
            weight += 1e-6 * direction
        assert (sides[0] - sides[1]) / 2e-6 == pytest.approx(expected, rel=1e-4, abs=1e-4), name


@shapes
def test_a_new_model_knows_nothing(shape: str) -> None:
    """Near uniform over the units that exist: the first loss is about log(n_writable)."""
    torch.manual_seed(0)
    model = TidalTransformer(config_of(tokenizers()["english"], SHAPES[shape]), tokenizers()["english"].spelling)
    with torch.no_grad():
        losses = model(batch_for(model, TEXT))
    uniform = float(torch.tensor(float(model.config.n_writable)).log())
    assert uniform - 0.5 < float(losses.units) / losses.n_units < uniform + 1.5


def test_a_new_model_begins_with_votes_and_quiet_layers() -> None:
    """What is recalled or foretold speaks for itself, nothing recalled says nothing, and layers add little."""
    model = TidalTransformer.of(tokenizers()["english"], SHAPES["none"])
    units, recalled = model.unit_embedding.weight, model.recall_embedding.weight.view(3, -1, 16)
    assert not recalled[:, 0].any()
    torch.testing.assert_close(recalled[:, 1:], (units / math.sqrt(3)).expand(3, -1, -1))
    assert model.foretold
    assert torch.equal(model.foretold.embedding.weight, units)
    for layer in (*model.reader, *model.writer):
        ratio = layer.mlp.up.weight.std() / layer.mlp.down.weight.std()
        assert ratio.item() == pytest.approx(math.sqrt(2 * 5), rel=0.2)


def test_losses_are_float32_or_better_of_logits_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU's autocast hands them over. On a CPU autocast itself would turn them into float32."""
    model = tiny("english", "memory")[0]
    batch, head = batch_for(model, TEXT), model.head
    monkeypatch.setattr(model, "head", lambda states: head(states).bfloat16())
    with torch.no_grad():
        units, wanted = model(batch).units, -model.log_probs(batch).sum()
    assert units.dtype == torch.float32
    torch.testing.assert_close(units, wanted)


def test_suffixes_that_were_never_met_add_nothing() -> None:
    with_table = TidalTransformer(config_of(tokenizers()["english"], SHAPES["memory"])).double()
    without = TidalTransformer(
        config_of(tokenizers()["english"], dataclasses.replace(SHAPES["memory"], suffix_rows=0))
    ).double()
    weights = with_table.state_dict()
    assert not weights.pop("suffix_embedding.weight").any()
    without.load_state_dict(weights)
    with torch.no_grad():
        assert torch.equal(with_table.log_probs(batch_for(with_table, TEXT)),
                           without.log_probs(batch_for(without, TEXT)))  # fmt: skip


def test_every_place_that_training_can_draw_has_a_row() -> None:
    shape, tokenizer = SHAPES["memory deep"], tokenizers()["english"]
    model, table = tiny("english", "memory deep")[0], BlockTable(tokenizer)
    longest = "w" * tokenizer.max_block_units
    batch = streams.pack([[passage(table, "", longest, place_offset=shape.place_jitter)]], table, steps=shape.steps)
    assert int(batch.writer_places.max()) == model.config.n_places - 1
    assert batch.reader_places[0, 0] == NO_PLACE
    assert not model.place_table[NO_PLACE].any()
    assert model.place_table[model.config.n_places - 1].norm() > 1
    with torch.no_grad():
        assert torch.isfinite(model.log_probs(batch)).all()


@pytest.mark.parametrize("text", ["12 + 345 = 357\n", "the fox said", "9 dogs, 10 foxes 今"])
def test_of_rotary_places_only_differences_matter(text: str) -> None:
    tokenizer = tokenizers()["english"]
    table = BlockTable(tokenizer)
    for rotary in (True, False):
        shape = dataclasses.replace(SHAPES["memory"], rotary_places=rotary, place_jitter=4)
        model = random_model(tokenizer, shape)
        with torch.inference_mode():
            here, there = (model.log_probs(streams.pack([[passage(table, "", text, place_offset=o)]], table))
                           for o in (0, 4))  # fmt: skip
        assert torch.allclose(here, there, rtol=0, atol=1e-6) == rotary


def test_a_batch_for_another_model_is_refused() -> None:
    """Packed for other distances, windows or without what is recalled, it would train, and decoding would differ."""
    model, tokenizer = tiny("english", "none")
    table = BlockTable(tokenizer)
    batch = streams.pack([[passage(table, "", TEXT)]], table)
    with pytest.raises(ValueError, match=r"packed for Steps\(.*recall=False\), the model has Steps\(.*recall=True\)"):
        model(batch)


def test_the_head_is_a_distribution_over_units_only() -> None:
    model, tokenizer = tiny("english", "memory")
    with torch.no_grad():
        logits = model.head(torch.randn(5, 16, dtype=torch.float64))
    assert logits.shape == (5, tokenizer.n_head)
    assert (logits[:, tokenizer.n_writable :] == -torch.inf).all()
    assert torch.isfinite(logits[:, : tokenizer.n_writable]).all()
    assert "head_mask" not in model.state_dict()
    loss = F.cross_entropy(logits, torch.tensor([0, 1, 2, 300, tokenizer.n_writable - 1]))
    assert torch.isfinite(loss)
