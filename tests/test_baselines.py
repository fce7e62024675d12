"""The models Tidal is compared with are right, and so is the comparison."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import decoding
from benchmarks.baselines import causal
from benchmarks.baselines.cached import CachedDecoder, generate
from benchmarks.baselines.causal import (
    BYTES,
    CausalConfig,
    CausalTransformer,
    Coder,
    Document,
    ngram_hashes,
    pack,
    recalled,
)
from tests.strategies import tokenizers

TEXTS = ["the fox saw the land, 12 + 345 = 357", "", "dogs ☃ with\nthe light", "night"]


def coder_of(name: str) -> Coder:
    return BYTES if name == "bytes" else causal.coder_of(tokenizers()["english"])


def random_model(coder: Coder, dtype: torch.dtype = torch.float64, lookups: bool = False) -> CausalTransformer:
    torch.manual_seed(0)
    config = CausalConfig.of(coder, d_model=16, n_heads=4, n_kv_heads=2, layers=3, d_ff=24, recall=lookups,
                             ngram_rows=97 * lookups)  # fmt: skip
    model = CausalTransformer(config).to(dtype).eval()
    if lookups:
        torch.nn.init.normal_(model.ngram_embedding.weight[1:])
    return model


@pytest.fixture(params=["bytes", "tokens"])
def coder(request: pytest.FixtureRequest) -> Coder:
    return coder_of(request.param)


def test_ids_are_those_of_the_text(coder: Coder) -> None:
    pieces = [bytes([i]) for i in range(256)] if coder is BYTES else tokenizers()["english"].id_bytes
    for text in TEXTS:
        assert b"".join(pieces[i] for i in coder.encode(text)).decode() == text
        assert not {coder.bos_id, coder.eos_id, *coder.never}.intersection(coder.encode(text))


@torch.inference_mode()
def test_loss_by_hand(coder: Coder) -> None:
    model, ids = random_model(coder), coder.encode("the fox")
    expected = []
    for n, target in enumerate([*ids, coder.eos_id]):  # every prefix on its own, the logits of its last position
        logits = CachedDecoder(model, [ids[:n]], 0).logits
        expected.append(logits.log_softmax(-1)[0, target])
    batch = pack([[Document([], ids)]], coder)
    torch.testing.assert_close(model.log_probs(batch), torch.stack(expected), rtol=0, atol=1e-9)
    loss, n = model(batch)
    assert n == len(ids) + 1
    torch.testing.assert_close(loss, -torch.stack(expected).sum(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("lookups", [False, True])
def test_packed_rows_equal_documents_alone(coder: Coder, lookups: bool) -> None:
    model = random_model(coder, lookups=lookups)
    documents = [Document(coder.encode(TEXTS[i - 1]), coder.encode(text), ends=i != 2) for i, text in enumerate(TEXTS)]
    alone = [model.log_probs(pack([[d]], coder, lookups, lookups)) for d in documents]
    assert [len(x) for x in alone] == [len(d.completion) + d.ends for d in documents]
    packed = model.log_probs(pack([documents[:3], documents[3:]], coder, lookups, lookups))
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-9)


def test_what_is_recalled_by_hand() -> None:
    #      <bos> a  b  c  a  b  d  <bos> a  b
    ids = [9, 1, 2, 3, 1, 2, 4, 9, 1, 2]
    told = recalled(np.array(ids), np.array([0, 1, 2, 3, 4, 5, 6, 0, 1, 2], np.float32))
    assert told[:4].tolist() == [[-1, -1, -1]] * 4
    assert told[4].tolist() == [2, -1, -1]  # after a came b; after c a, nothing yet
    assert told[5].tolist() == [3, 3, -1]  # after b, and after a b, came c; after c a b nothing yet
    assert told[6:].tolist() == [[-1, -1, -1]] * 4  # another document
    assert recalled(np.array([9, 1, 1, 1, 1]), np.arange(5, dtype=np.float32)).tolist()[-1] == [1, 1, 1]


def test_hashes_of_ngrams_by_hand() -> None:
    ids, at = np.array([[9, 1, 2, 1, 2, 9, 1, 2]]), np.array([[0, 1, 2, 3, 4, 0, 1, 2]], np.float32)
    two, three = ngram_hashes(ids, at)[0].T
    assert (two == -1).tolist() == [True, False, False, False, False, True, False, False]
    assert (three == -1).tolist() == [True, True, False, False, False, True, True, False]
    named = [tuple(ids[0, i - 1 : i + 1]) for i in range(8) if two[i] >= 0]
    assert len(set(two[two >= 0].tolist())) == len(set(named)) == len(set(zip(named, two[two >= 0], strict=True)))
    assert three[2] == three[7]  # <bos> a b
    assert len({three[2], three[3], three[4]}) == 3
    assert not set(two.tolist()) & set(three.tolist()) - {-1}


@pytest.mark.parametrize("lookups", [False, True])
def test_nothing_leaks_from_later_ids(coder: Coder, lookups: bool) -> None:
    model, ids = random_model(coder, lookups=lookups), coder.encode(TEXTS[0])
    for changed in range(len(ids)):
        other = [*ids[:changed], ids[changed] - 1, *ids[changed + 1 :]]
        one, two = (model.log_probs(pack([[Document([], x)]], coder, lookups, lookups)) for x in (ids, other))
        assert torch.equal(one[:changed], two[:changed])
        assert not torch.equal(one[changed:], two[changed:])


def test_one_gradient_reaches_every_parameter(coder: Coder) -> None:
    model = random_model(coder)
    model(pack([[Document([], coder.encode(TEXTS[0]))]], coder))[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_equals_full_forward_and_batch_equals_alone(coder: Coder, temperature: float) -> None:
    model = random_model(coder)
    prompts = [coder.encode(text) for text in TEXTS * 2]
    seeds = list(range(len(prompts)))
    together = generate(model, prompts, max_new=20, temperature=temperature, seed=seeds, batch_size=7)
    for i, (prompt, written) in enumerate(zip(prompts, together, strict=True)):
        alone = generate(model, [prompt], max_new=20, temperature=temperature, seed=[seeds[i]])[0]
        assert alone.ids == written.ids
        assert alone.log_probs == pytest.approx(written.log_probs, abs=1e-9)
        ended = written.ids[-1] == coder.eos_id
        document = Document(prompt, written.ids[: len(written.ids) - ended], ended)
        full = model.log_probs(pack([[document]], coder)).tolist()
        assert written.log_probs == pytest.approx(full, abs=1e-9)
        assert not set(coder.never).intersection(written.ids)


@torch.inference_mode()
def test_rows_leave(coder: Coder) -> None:
    model = random_model(coder)
    ids = [coder.encode(text)[:6] for text in (TEXTS[0], TEXTS[2])]
    decoder = CachedDecoder(model, [[], ids[1][:2]], 7)
    for n in range(3):
        logits = decoder.step([ids[0][n], ids[1][2 + n]])
    decoder.select([1])
    torch.testing.assert_close(logits[1], CachedDecoder(model, [ids[1][:5]], 0).logits[0], rtol=0, atol=1e-9)
    last = decoder.step([ids[1][5]])
    torch.testing.assert_close(last, CachedDecoder(model, [ids[1]], 0).logits, rtol=0, atol=1e-9)


def test_parameters_and_cache(coder: Coder) -> None:
    model = random_model(coder, torch.float32)
    assert model.n_parameters()["total"] == sum(p.numel() for p in model.parameters())
    assert model.cache_bytes(10) == 10 * 3 * 2 * 2 * 4 * 4  # ids, layers, keys and values, heads, width, bytes
    for total in (20_000, 60_000):
        fitted = CausalTransformer(model.config.with_parameters(total)).n_parameters()["total"]
        assert abs(fitted - total) <= 4 * 3 * 16 * 3  # half a step of the width


@pytest.mark.parametrize("precision", decoding.DTYPES)
def test_benchmark_runs(precision: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    out, text = tmp_path / "decoding.json", tmp_path / "text.txt"
    text.write_text(decoding.english(Path(json.__file__).parent.parent / "asyncio"))  # a part of what it takes itself
    arguments = "--batch 1 3 --context 64 --d-model 32 --layers 3 --new-chars 16 --repeats 1 --suffix-rows 64"
    dtypes, real = list[set[torch.dtype]](), decoding.check
    monkeypatch.setattr(decoding, "check", lambda runner, *rest: dtypes.append(
        {p.dtype for p in runner.model.parameters()}) or real(runner, *rest))  # fmt: skip
    decoding.main([*arguments.split(), "--vocab-size", "500", "--text", str(text), "--out", str(out),
                   "--precision", precision])  # fmt: skip
    assert dtypes == 6 * [{decoding.DTYPES[precision]}]
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["benchmark"], line["precision"]) == ("decoding", precision)
    assert json.loads(out.read_text())["results"] == line["results"]
    assert [(r["batch"], r["context"]) for r in line["results"]] == [(1, 64), (3, 64)]
    sizes = [m["parameters"] for m in line["models"].values()]
    assert max(sizes) / min(sizes) < 1.02
    for result in line["results"]:
        if result["batch"] == 1:  # otherwise rows that have ended keep their place for a while
            assert result["models"]["byte"]["layer_passes_per_char"] == pytest.approx(3, rel=0.1)
        assert all(m["chars_per_second"] > 0 for m in result["models"].values())


def test_the_benchmark_begins_nothing_when_its_time_is_up(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, arguments = tmp_path / "decoding.json", "--batch 1 3 --context 64 --d-model 32 --layers 3 --suffix-rows 64"
    decoding.main([*arguments.split(), "--vocab-size", "500", "--text", __file__, "--out", str(out), "--budget-s", "0"])
    line = json.loads(out.read_text())
    assert (line["results"], line["left_out"]) == ([], ["batch 1 context 64", "batch 3 context 64"])
    assert "no time left for: batch 1 context 64, batch 3 context 64\n" in capsys.readouterr().out


def test_models_of_the_benchmark_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    built, build = list[list[str]](), decoding.build

    def watched(*args: Any) -> list[decoding.Runner]:
        built.append([runner.name for runner in build(*args)])
        raise SystemExit

    monkeypatch.setattr(decoding, "build", watched)
    for asked in ("tidal byte token", "token", "tidal"):
        with pytest.raises(SystemExit):
            decoding.main(["--d-model", "32", "--layers", "3", "--vocab-size", "500", "--text", __file__,
                           "--suffix-rows", "64", "--models", *asked.split()])  # fmt: skip
    assert built == [["tidal", "byte", "token"], ["tidal", "token"], ["tidal"]]


def test_benchmark_checks_what_it_times(coder: Coder, monkeypatch: pytest.MonkeyPatch) -> None:
    """All the rows, in one warm-up; and it times nothing wrong."""
    torch.manual_seed(0)
    runner = decoding.baseline("tidal", coder, random_model(coder).config, torch.device("cpu"))
    texts, asked, lead = [(f"the fox {i}", " saw the land") for i in range(6)], [], decoding.lead

    def watched(runner: decoding.Runner, texts: Any, *rest: Any) -> Any:
        asked.append(list(texts))
        return lead(runner, texts, *rest)

    monkeypatch.setattr(decoding, "lead", watched)
    figures = decoding.measure([runner], texts, "the fox", 2)["models"]["tidal"]
    assert asked == 3 * [texts]
    n = len(coder.encode(" saw the land"))
    assert figures["layer_passes_per_char"] == pytest.approx(3 * n / len(" saw the land"), abs=1e-4)
    full = runner.full
    for wrong in (1e-3, math.nan):
        runner.full = lambda prompt, new, wrong=wrong: full(prompt, new) + wrong  # type: ignore[misc]
        with pytest.raises(SystemExit, match=r"differ by .*; not timing a wrong result"):
            decoding.measure([runner], texts, "the fox", 2)
