"""`load`: what was written comes back; what does not fit is refused in one line (law 7)."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.strategies import SHAPES, tiny, tiny_copy, tokenizers
from tidal.checkpoint import write_checkpoint
from tidal.cli import UserError
from tidal.infer.load import load, load_with_trainer
from tidal.infer.score import score
from tidal.model import TidalTransformer
from tidal.tokenizer import MixedTokenizer

Change = Callable[[dict[str, Any]], object]


def write(run: Path, model: TidalTransformer, tokenizer: MixedTokenizer, config: Change = lambda values: None,
          tensors: Change = lambda values: None) -> Path:  # fmt: skip
    """A checkpoint that verifies, with changes to its config and weights."""
    values, weights = model.config.to_dict(), dict(model.state_dict())
    config(values)
    tensors(weights)
    return write_checkpoint(run, 5, tensors=weights, config=values, trainer={"step": 5}, tokenizer=tokenizer)


def refused(path: Path) -> str:
    with pytest.raises(UserError) as raised:
        load(path)
    assert len(str(raised.value).splitlines()) == 1
    assert str(path) in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_was_written_comes_back(shape: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, tokenizer = tiny("english", shape, dtype)
    folder = write(tmp_path / "run", model, tokenizer)
    for path in (folder, tmp_path / "run", str(tmp_path / "run")):
        again, its_tokenizer = load(path, dtype=dtype)
        assert its_tokenizer.fingerprint == tokenizer.fingerprint
        assert again.config == model.config
        assert not again.training
        text = "the light, 12 今\n"
        assert (score(again, its_tokenizer, text) == score(model, tokenizer, text)).all()
        assert {p.dtype for p in again.parameters()} == {dtype}
    assert load_with_trainer(folder)[2] == {"step": 5}


def test_float64_weights_are_not_rounded(tmp_path: Path) -> None:
    model, tokenizer = tiny_copy("english", "memory")  # float64
    with torch.no_grad():
        model.unit_embedding.weight += 1e-10
    folder = write(tmp_path / "run", model, tokenizer)
    assert load(folder, dtype=torch.float64)[0].unit_embedding.weight.equal(model.unit_embedding.weight)
    assert load(folder)[0].unit_embedding.weight.equal(model.unit_embedding.weight.float())


@pytest.mark.parametrize("dtype", ["bfloat16", torch.complex64, torch.int8])
def test_a_dtype_that_is_none_is_refused(dtype: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"dtype is {dtype!r}; it must be torch.float32, .* or torch.float64$"):
        load(write(tmp_path / "run", *tiny("english", "memory")), dtype=dtype)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    model, _ = tiny("english", "none")
    complaint = refused(write(tmp_path, model, tokenizers()["chinese"]))
    for tokenizer in (tokenizers()["english"], tokenizers()["chinese"]):
        assert tokenizer.fingerprint[:16] in complaint, "names both sides"


@pytest.mark.parametrize(("name", "change"), [
    ("reader_norm.weight", lambda w: w.pop("reader_norm.weight")),
    ("stowaway", lambda w: w.update(stowaway=torch.zeros(2))),
    ("context.weight", lambda w: w.update({"context.weight": torch.zeros(3, 3)})),
    *(("reader_norm.weight has 16 values that are not finite",
       lambda w, x=x: w.update({"reader_norm.weight": torch.full((16,), x)})) for x in (math.nan, -math.inf)),
])  # fmt: skip
def test_weights_that_do_not_fit_are_refused(name: str, change: Change, tmp_path: Path) -> None:
    assert name in refused(write(tmp_path, *tiny("english", "none"), tensors=change))


@pytest.mark.parametrize(("name", "change"), [
    ("rope", lambda c: c.update(rope=True)),
    ("rope", lambda c: c["shape"].update(rope=True)),
    ("n_head", lambda c: c.pop("n_head")),
    ("qk_norm", lambda c: c["shape"].pop("qk_norm")),
    ("d_model", lambda c: c["shape"].update(d_model=15)),
    ("Shape", lambda c: c.update(shape=None)),
    ("cannot be loaded", lambda c: c["shape"].update(d_model="wide")),
    ("n_writable", lambda c: c.update(n_writable=c["n_writable"] + 1)),
    ("vocab_size", lambda c: c.update(vocab_size=c["vocab_size"] - 1)),
    ("vocab_size", lambda c: c.update(vocab_size="many")),
    *((n, lambda c, n=n: c["shape"].update({n: 1.5})) for n in ("reader_layers", "step_window", "n_heads")),
    ("max_block_units is 1.5, which is no int", lambda c: c.update(max_block_units=1.5)),
    ("n_head", lambda c: c.update(n_head=c["n_head"] + 64)),
    ("max_block_units", lambda c: c.update(max_block_units=c["max_block_units"] + 1)),
])  # fmt: skip
def test_a_config_that_does_not_fit_is_refused(name: str, change: Change, tmp_path: Path) -> None:
    assert name in refused(write(tmp_path, *tiny("english", "none"), config=change))


def test_damage_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, *tiny("english", "none"))
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "model.safetensors" in refused(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    assert "config.json" in refused(folder)


def test_nothing_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path / "none")
    refused(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no runs found"):
        load()


@pytest.mark.parametrize("device", ["cuda:99", "meta", "tpu", torch.device("cuda:99")])
def test_a_device_that_is_not_there_is_refused(device: str | torch.device, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^device '{device}' cannot be used \(.*\); try --device cpu$"):
        load(tmp_path, device=device)


def test_of_several_processes_each_names_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command has each process take its own GPU; whoever calls `load` under torchrun may name it."""
    for name, value in {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"^device 'cuda:99' cannot be used"):
        load(tmp_path, device="cuda:99")


def test_a_device_is_found(tmp_path: Path) -> None:
    model, _ = load(write(tmp_path, *tiny("english", "memory")), device="auto")
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("sizes", [{"reader_layers": 2**30}, {"d_model": 2**30, "reader_ff": 2**30},
                                   {"suffix_rows": 2**30}, {"place_jitter": 2**30}, {"d_model": 2**40}])  # fmt: skip
def test_absurd_sizes_cost_no_memory(tmp_path: Path, sizes: dict[str, int]) -> None:
    model, tokenizer = tiny("english", "memory")
    complaint = refused(write(tmp_path, model, tokenizer, lambda values: values["shape"].update(sizes)))
    assert "weights do not fit its config.json" in complaint or "places" in complaint or "2^31" in complaint


def test_no_memory_for_the_model_is_no_misfit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, *tiny("english", "none"))

    def made(*arguments: Any) -> TidalTransformer:
        if torch.empty(0).device.type != "meta":
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return TidalTransformer(*arguments)

    monkeypatch.setattr("tidal.infer.load.TidalTransformer", made)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        load(folder)


@pytest.mark.parametrize("shape", ["memory", "none"])
def test_loading_and_generating_import_no_compiler(shape: str, tmp_path: Path) -> None:
    """torch._dynamo, which tensors without memory and operators may fetch, takes longer to import than torch."""
    folder = write(tmp_path / "run", *tiny("english", shape, torch.float32))
    program = f"""if True:
        import sys, tidal
        model, tokenizer = tidal.load({str(folder)!r})
        tidal.generate(model, tokenizer, ["the light " * 90], max_new_units=9)
        sys.exit("torch._dynamo" in sys.modules)"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_width_that_the_file_does_not_have_costs_no_memory(tmp_path: Path) -> None:
    """Tables of places are made for it before anything is compared."""
    def wider(values: dict[str, Any]) -> None:
        values["shape"]["d_model"] *= 10**9

    assert "d_model is 16000000000" in refused(write(tmp_path, *tiny("english", "memory"), config=wider))
