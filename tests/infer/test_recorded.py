"""Steps that are recorded and replayed. Without a GPU, torch.fx records in place of a CUDA graph: it, too, keeps the
operations of one step with the tensors that they touched, runs them again on what is put into its inputs, and refuses
to wait for a value."""

from __future__ import annotations

import argparse
import gc
import importlib
import math
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks import decoding
from benchmarks.baselines import cached
from benchmarks.baselines.causal import CausalConfig, CausalTransformer, coder_of
from tests.infer.test_engine import PROMPTS, same
from tests.strategies import random_model, tiny, tiny_copy, tokenizers
from tidal.config import Shape
from tidal.infer import recorded, sampling
from tidal.infer.completion import Limits
from tidal.infer.decoder import Decoder
from tidal.infer.engine import Engine, generate, stream
from tidal.model import TidalTransformer

FUSED = Shape(d_model=64, n_heads=2, n_kv_heads=1, reader_layers=1, writer_layers=2, reader_ff=32,
              writer_ff=32, suffix_rows=64, foretell=True, recall=True)  # fmt: skip
"""heads of 32, which the fused kernels have"""


class Recorder:
    """Stands in for `recorded.record`; counts recordings, replays and the operations that were recorded."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0
        self.operations: set[str] = set()

    def __call__(self, function: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        graph = make_fx(function)()
        self.recordings += 1
        self.operations |= {str(node.target).rpartition(".")[0].rpartition(".")[2] for node in graph.graph.nodes}

        def replay() -> Tensor:
            self.replays += 1
            out: Tensor = graph()
            return out

        return replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Recording without a GPU."""
    made = Recorder()
    monkeypatch.setattr(recorded, "record", made)
    monkeypatch.setattr(recorded, "check", lambda device: None)
    monkeypatch.setenv("TIDAL_ATTENTION_BACKEND", "reference")
    return made


GROWING = [*PROMPTS, "the light and the land " * 80]  # the last one joins when others have left


def check_steps(model: TidalTransformer, prompts: list[str] = GROWING, *, tolerance: float = 1e-9,
                max_new_units: int = 40) -> None:  # fmt: skip
    """Rows join and leave, caches grow; replayed or not, the same is written."""
    how: dict[str, Any] = {"temperature": 1.0, "batch_size": 4, "max_new_units": max_new_units}
    tokenizer = tokenizers()["english"]
    plain = generate(model, tokenizer, prompts, **how)
    for one, other in zip(plain, generate(model, tokenizer, prompts, cuda_graphs=True, **how), strict=True):
        same(one, other, tolerance)


@pytest.mark.parametrize("shape", ["memory", "block", "none"])
def test_replayed_steps_are_steps(shape: str, recorder: Recorder) -> None:
    check_steps(tiny("english", shape)[0])
    assert recorder.replays > 10 * recorder.recordings > 10, "recorded anew at every step, or never"
    copies = {"lift_fresh_copy", "pin_memory", "nonzero", "_local_scalar_dense", "repeat_interleave", "masked_select"}
    assert not recorder.operations & copies, "from the host or waiting for the device: no CUDA graph may hold that"
    assert ("index_put_" in recorder.operations) == (shape != "none"), "into the caches of a writer that attends"


def test_replayed_steps_with_the_fused_kernel(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decode kernel, in Triton's interpreter, over all that the cache has room for."""
    pytest.importorskip("triton")
    if not importlib.import_module("tidal.kernels.triton_tiles").INTERPRETED.value:
        pytest.skip("Triton does not interpret here; test_cuda_graphs replays the kernel itself")
    monkeypatch.setenv("TIDAL_ATTENTION_BACKEND", "triton")
    model = random_model(tokenizers()["english"], FUSED, torch.float32)
    check_steps(model, ["the cat", ""], tolerance=1e-4, max_new_units=5)
    assert recorder.replays > recorder.recordings
    assert "interval_attention_decode" in recorder.operations


def test_a_recording_of_old_caches_shows(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: caches grow, and the recording stays. It reads and writes what nobody reads now."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "recording", property(lambda self: self.__dict__.get("kept"), keep), raising=False)
        with pytest.raises((AssertionError, RuntimeError)):
            check_steps(tiny("english", "memory")[0])
    assert recorder.replays


def keep(decoder: Decoder, new: recorded.Recorded | None) -> None:
    """Set `recording`, but never back to nothing."""
    if new is not None:
        decoder.__dict__["kept"] = new


def test_a_recording_ends_with_its_stream(recorder: Recorder) -> None:
    """Given up, finished or failed: the decoder and its caches go at once, without the garbage collector."""
    model, tokenizer = tiny_copy("english", "memory")
    decoders: list[weakref.ref[Decoder]] = []
    init = Decoder.__init__

    def watched(self: Decoder, *args: Any, **how: Any) -> None:
        decoders.append(weakref.ref(self))
        init(self, *args, **how)

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Decoder, "__init__", watched)
            events = stream(model, tokenizer, PROMPTS, temperature=1.0, cuda_graphs=True)
            next(events)
            assert recorder.recordings == 1
            del events
            generate(model, tokenizer, PROMPTS[:2], max_new_units=5, cuda_graphs=True)
            with torch.no_grad():
                model.writer_norm.weight.fill_(math.nan)
            with pytest.raises(RuntimeError):
                generate(model, tokenizer, PROMPTS[:2], max_new_units=5, cuda_graphs=True)
        recordings = [decoder.recording for ref in decoders if (decoder := ref())]
        assert len(decoders) == 3
        assert recordings in ([], [None]), "the last one may live on in the error's frames"
    finally:
        gc.enable()


def test_more_rows_are_recorded_anew(recorder: Recorder) -> None:
    model, tokenizer = tiny("english", "none")
    engine, done = Engine(model, tokenizer, cuda_graphs=True), dict[int, Any]()
    for prompt in ("the cat", "a"):
        engine.submit(prompt, limits=Limits(5))
        done.update(engine.step())
    done.update(engine.drain())
    for i, alone in enumerate(generate(model, tokenizer, ["the cat", "a"], max_new_units=5)):
        same(done[i], alone, 1e-9)
    assert recorder.recordings == 2


def test_what_waits_is_not_recorded(recorder: Recorder) -> None:
    """The stand-in refuses what a CUDA graph would."""
    with pytest.raises(RuntimeError):
        recorder(lambda: torch.ones(2) * torch.ones(2).sum().item(), torch.device("cpu"))()
    x = torch.ones(2)
    with pytest.raises(RuntimeError):
        recorded.Recorded(lambda x: x if x.sum() > 1 else -x)(x)


def test_inputs_are_replaced_and_values_kept(recorder: Recorder) -> None:
    total = torch.zeros(2)

    def add(x: Tensor) -> Tensor:
        total.copy_(x)  # written where it lies
        return x + 1

    plus_one = recorded.Recorded(add)
    first, second = plus_one(torch.tensor([1.0, 2.0])), plus_one(torch.tensor([5.0, 6.0]))
    assert (first.tolist(), second.tolist(), total.tolist()) == ([2, 3], [6, 7], [5, 6])
    assert (recorder.recordings, recorder.replays) == (1, 2)


def test_baselines_are_recorded_too(recorder: Recorder) -> None:
    tokenizer = tokenizers()["english"]
    coder = coder_of(tokenizer)
    torch.manual_seed(0)
    config = CausalConfig.of(coder, d_model=16, n_heads=2, n_kv_heads=2, layers=2, d_ff=16)
    model = CausalTransformer(config).double()
    prompts = [coder.encode(prompt) for prompt in ("the cat", "", "a dog sat on the mat")]
    how: dict[str, Any] = {"max_new": 30, "temperature": 1.0}
    for one, other in zip(cached.generate(model, prompts, **how),
                          cached.generate(model, prompts, cuda_graphs=True, **how), strict=True):  # fmt: skip
        assert one.ids == other.ids
        assert np.abs(np.array(one.log_probs) - np.array(other.log_probs)).max() < 1e-9
    assert recorder.replays > 3 * recorder.recordings > 0


@pytest.mark.parametrize("which", range(3), ids=["tidal", "byte", "token"])
def test_the_benchmark_is_fair_to_recorded_steps(which: int, recorder: Recorder,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Every model has recorded a step when the clock starts, and none records again while it runs; layers are counted
    as without recording."""
    tokenizer = tokenizers()["english"]
    args = argparse.Namespace(d_model=16, layers=3, writer_ff=0, suffix_rows=0, writer_attention="memory",
                              models=decoding.MODELS, device=torch.device("cpu"))  # fmt: skip
    runner = decoding.build(args, tokenizer)[which]
    (prompt, new), second = decoding.cut("the light and the other fox saw land, " * 9, tokenizer, 2, 20, 8)
    texts = [(prompt, new), second, (prompt, new + new), (prompt, new + new + new)]  # rows end one after another
    counts = [decoding.check(runner, texts, graphs)[1] for graphs in (False, True)]
    assert counts[0] == counts[1] > 0
    recorder.recordings, at_choices = 0, list[int]()

    def choose(*args: Any) -> Tensor:
        at_choices.append(recorder.recordings)
        return sampling.choose(*args)

    monkeypatch.setattr(runner.module, "choose", choose)
    decoding.lead(runner, texts, True)
    assert at_choices[0] == at_choices[-1] == 1


def test_a_graph_is_captured_on_a_stream_of_its_device() -> None:
    """And not on the one that PyTorch makes for all graphs, on the device of the first."""
    with mock.patch.multiple(torch.cuda, device=mock.MagicMock(), current_stream=mock.Mock(), Stream=mock.Mock(),
                             stream=mock.MagicMock(), CUDAGraph=mock.Mock(), graph=mock.MagicMock()):  # fmt: skip
        replay = recorded.record(lambda: torch.ones(2), torch.device("cuda:1"))
        torch.cuda.device.assert_called_once_with(torch.device("cuda:1"))  # type: ignore[attr-defined]
        side = torch.cuda.Stream.return_value  # type: ignore[attr-defined]
        torch.cuda.stream.assert_called_once_with(side)  # type: ignore[attr-defined]
        torch.cuda.graph.assert_called_once_with(torch.cuda.CUDAGraph.return_value, stream=side)  # type: ignore[attr-defined]
        assert replay().tolist() == [1, 1]
        torch.cuda.CUDAGraph.return_value.replay.assert_called_once_with()  # type: ignore[attr-defined]


def test_no_graphs_without_cuda() -> None:
    model, tokenizer = tiny("english", "memory")
    with pytest.raises(ValueError, match=r"^CUDA graphs need a CUDA device, the model is on cpu; leave them out$"):
        generate(model, tokenizer, ["the"], cuda_graphs=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs() -> None:
    """The same on a GPU, with the real thing."""
    model = random_model(tokenizers()["english"], FUSED, torch.float32).to("cuda")
    check_steps(model, tolerance=1e-4)
