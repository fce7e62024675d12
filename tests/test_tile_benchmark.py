"""The benchmark of tiles without a GPU: candidates are checked, ranked and saved, kernel by kernel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import attention_problems, attention_tiles
from benchmarks.attention_problems import Problem, problem
from tests.test_attention_problems import FORM, nan_gradient, wrong_output
from tidal.kernels import triton_attention
from tidal.kernels.triton_attention import TILES, Config, Tile
from tidal.kernels.triton_decode import Launch
from tidal.kernels.triton_tiles import INTERPRETED


@pytest.mark.skipif(not INTERPRETED.value, reason="Triton does not interpret here")
def test_tiles_are_ranked_and_the_wrong_ones_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tile_of, out, saved = attention_tiles.attention_with, tmp_path / "tiles.json", []

    def planted(p: Problem, kernel: str, tile: Tile) -> attention_problems.Attend:
        if (kernel, tile[:2]) == ("dkdv", (32, 16)):
            saved.append(json.loads(out.read_text()))
            raise RuntimeError("out of resources\nmore of it")
        attend = tile_of(p, kernel, tile)
        if (kernel, tile[:2]) == ("dkdv", (16, 32)):
            return nan_gradient(attend)
        return wrong_output(attend, 1.1) if (kernel, tile[:2]) == ("forward", (16, 32)) else attend

    monkeypatch.setattr(attention_tiles, "attention_with", planted)
    attention_tiles.main(["--tiny", "--kernels", "forward", "dkdv", "decode", "--out", str(out)])
    printed = capsys.readouterr().out.splitlines()
    line = json.loads(printed[-1])
    assert line == json.loads(out.read_text())
    forward, dkdv, decode = line["results"]
    assert saved[0]["results"] == [forward]
    in_use = "{}×{}, 4 warps, 1 stages (now)".format(*triton_attention.INTERPRETER.forward[:2])
    assert set(forward["times"]) == {in_use, "32×16, 4 warps, 1 stages"}
    assert forward["failed"]["16×32, 4 warps, 1 stages"].startswith("wrong result: errors {'out': 0.")
    assert (forward["of"], dkdv["of"]) == ("forward_ms", "backward_ms")
    assert set(dkdv["times"]) == {in_use}
    assert dkdv["fastest"] == list(triton_attention.INTERPRETER.dkdv)
    assert dkdv["failed"] == {
        "16×32, 4 warps, 1 stages": "wrong result: errors {'dk': nan}",
        "32×16, 4 warps, 1 stages": "RuntimeError: out of resources",
    }
    in_use = "128 keys, 8 a core, 4 warps, 3 stages (now)"
    assert decode["of"] == "decode_ms"
    assert set(decode["times"]) == {
        in_use,
        "16 keys, 1 a core, 4 warps, 1 stages",
        "32 keys, 4 a core, 4 warps, 1 stages",
    }
    assert len(printed) == 10
    assert all(t > 0 for result in line["results"] for t in result["times"].values())


@pytest.mark.skipif(not INTERPRETED.value, reason="Triton does not interpret here")
def test_tiles_of_learned_slopes_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[list[int]] = []
    real = triton_attention.attend_fused

    def spy(*inputs: Any) -> Any:
        launched.append(inputs[-2])
        return real(*inputs)

    monkeypatch.setattr(triton_attention, "attend_fused", spy)
    p = problem("causal", 20, 1, 32, FORM)
    attention_tiles.attention_with(p, "dq_slopes", Tile(16, 64, 4, 1))(p.q, p.k, p.v)
    assert launched[0][4:8] == [16, 64, 4, 1]


@pytest.mark.skipif(not INTERPRETED.value, reason="Triton does not interpret here")
def test_tiles_without_time_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    attention_tiles.main(["--tiny", "--budget-s", "0"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["left_out"] == [f"{kernel} D 32" for kernel in attention_tiles.KERNELS]


def test_tiles_need_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            attention_tiles.main([])
        assert "no GPU here; TRITON_INTERPRET=1 and --tiny show that the benchmark works" in capsys.readouterr().err
    for kernel in attention_tiles.KERNELS:
        of_decoding = (Launch(16, 4, 3), 1), (Launch(64, 4, 3), 0)
        of_training = (Tile(16, 128, 8, 3), 1), (Tile(64, 64, 8, 3), 0)
        for in_use, n in of_decoding if kernel == "decode" else of_training:
            tiles = attention_tiles.candidates(kernel, 64, in_use)
            assert tiles[0] == in_use
            assert len(set(tiles)) == len(tiles) == n + {"dq": 18, "dq_slopes": 18, "decode": 24}.get(kernel, 20)


def test_tiles_that_cannot_be_launched_are_not_compiled() -> None:
    """Those of three stages or more in use fit; those that were seen to want more than a block may have do not."""
    for (itemsize, head_dim, arch), tiles in TILES.items():
        for kernel, tile in zip(Config._fields, tiles, strict=True):
            assert itemsize == 4 or arch != 90 or attention_tiles.may_fit(kernel, Tile(*tile), head_dim)
    for kernel, tile in (  # at D 128, compiled by triton 3.6 for sm_90: 281 to 339 KB of shared memory, up to 48 s
        ("dkdv", (128, 128, 4, 4)), ("dkdv", (128, 128, 8, 4)), ("dkdv", (128, 64, 4, 4)),
        ("forward", (128, 128, 4, 4)), ("forward", (128, 128, 8, 4)), ("forward", (64, 128, 4, 4)),
    ):  # fmt: skip
        assert not attention_tiles.may_fit(kernel, Tile(*tile), 128)
        assert Tile(*tile) not in attention_tiles.candidates(kernel, 128, Tile(32, 32, 8, 3))
    assert len(attention_tiles.candidates("dkdv", 128, Tile(16, 128, 8, 3))) > 8
