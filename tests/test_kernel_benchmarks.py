"""The attention benchmarks without a GPU: they run, what fails loses nothing else, and goals are judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.errors import TritonError

from benchmarks import attention, attention_cpu, attention_problems
from benchmarks.attention_problems import Problem, problem
from tests.test_attention_problems import FORM


def test_attention_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "results.json"
    attention.main(["--device", "cpu", "--tiny", "--masks", "causal", "two-stream", "--out", str(out)])
    printed = capsys.readouterr().out.splitlines()
    line = json.loads(printed[-1])
    assert line == json.loads(out.read_text())
    assert [path.name for path in out.parent.iterdir()] == ["results.json"]
    assert (line["benchmark"], line["dtype"], line["heads"]) == ("attention", "float32", 4)
    assert line["device"]
    assert line["torch"] == torch.__version__
    assert line["date"] > "2025"
    assert [(r["mask"], r["keys"]) for r in line["results"]] == [
        (mask, keys) for keys in (96, 192) for mask in ("causal", "two-stream")
    ]
    for result in line["results"]:
        assert set(result["times"]) == {"tidal", "sdpa"}
        assert result["failed"] == {}
        assert 0 < result["tidal_error"] < 1e-5
        for times in result["times"].values():
            assert times["forward_share"] == pytest.approx(times["forward_tflops"] / line["roofline_tflops"], rel=1e-3)
            assert min(times.values()) > 0
    assert len(line["plans"]) == 4
    for result in line["plans"]:
        assert set(result["times"]) == {"tidal", "create_block_mask"}
        assert all(set(t) == {"plan_ms", "plan_device_ms"} and min(t.values()) > 0 for t in result["times"].values())
    assert [(s["mask"], s["keys"], s["head_dim"]) for s in line["plan_shares"]] == [
        (r["mask"], r["keys"], 32) for r in line["results"]
    ]
    assert sum("of the attention of one layer" in text for text in printed[:-1]) == 4
    assert [(r["queries"], r["keys"]) for r in line["decode"]] == [(1, 96), (5, 96)]
    assert not any(g["worst"] for g in line["goals"])  # FlexAttention was not asked, and the plan's are at 8192 keys
    assert sum("not measured" in text for text in printed[:-1]) == 8
    assert line["not_asked"] == [
        "tidal-atomic", "flex", "flex-max-autotune", "flash-attention-2", "create_block_mask-compiled"
    ]  # fmt: skip
    assert line["failed"] == {}
    assert line["left_out"] == []
    assert sum("sdpa" in text for text in printed[:-1]) == 4


def test_block_masks_are_built_compiled_where_that_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    flags = ["--device", "cpu", "--tiny", "--masks", "causal", "--rivals"]
    for rivals in ([], ["create_block_mask-compiled"]):
        attention.main([*flags, *rivals])
        (plan, _) = json.loads(capsys.readouterr().out.splitlines()[-1])["plans"]
        assert set(plan["times"]) == {"tidal", "create_block_mask", *rivals}


def test_what_fails_loses_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, ready, kept = tmp_path / "results.json", attention.ready, []

    def planted(p: Problem, *rest: Any, **more: Any) -> attention_problems.Ready:
        if p.k.shape[2] == 192:
            kept.append(json.loads(out.read_text()))  # what a run that is ended here has already saved
            raise SystemExit("a wrong result")
        return ready(p, *rest, **more)

    def fails(*_: object) -> None:
        raise TritonError("out of resources")

    monkeypatch.setattr(attention, "ready", planted)
    monkeypatch.setattr(attention, "build_plan", fails)
    with pytest.raises(SystemExit) as stop:
        attention.main(["--device", "cpu", "--tiny", "--masks", "causal", "--rivals", "--out", str(out)])
    assert stop.value.code == 1
    line = json.loads(out.read_text())
    assert line == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["failed"] == {
        "plan causal 96 keys": "TritonError: out of resources",
        "attention causal D 32 192 keys": "SystemExit: a wrong result",
        "plan causal 192 keys": "TritonError: out of resources",
    }
    assert [len(line[section]) for section in ("results", "decode", "plans")] == [1, 2, 0]
    assert [len(kept[0][section]) for section in ("results", "decode", "plans")] == [1, 2, 0]


def test_what_the_goals_ask_for_comes_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.json"
    flags = ["--device", "cpu", "--masks", "causal", "block-causal", "two-stream", "--lengths", "2048", "8192",
             "--head-dims", "64", "128", "--decode-queries", "1", "8", "--decode-contexts", "96", "--rivals",
             "--budget-s", "0"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "measure_roofline", lambda *_: 1.0)
        attention.main([*flags, "--out", str(out)])
    found = json.loads(out.read_text())["left_out"]
    assert found == [
        "plan causal 8192 keys", "plan block-causal 8192 keys", "plan two-stream 8192 keys",
        "decode 1 queries 96 keys D 64", "decode 8 queries 96 keys D 64",
        "attention causal D 64 8192 keys", "attention two-stream D 64 8192 keys",
        "decode 1 queries 96 keys D 128", "decode 8 queries 96 keys D 128",
        "attention causal D 128 8192 keys", "attention two-stream D 128 8192 keys",
        "attention block-causal D 64 8192 keys", "attention block-causal D 128 8192 keys",
        "attention causal D 64 2048 keys", "attention causal D 128 2048 keys",
        "attention block-causal D 64 2048 keys", "attention block-causal D 128 2048 keys",
        "attention two-stream D 64 2048 keys", "attention two-stream D 128 2048 keys",
        "plan causal 2048 keys", "plan block-causal 2048 keys", "plan two-stream 2048 keys",
    ]  # fmt: skip
    assert "no time left for: " + ", ".join(found) in capsys.readouterr().out


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_attention_needs_a_gpu(
    device: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        attention.main(["--device", device])
    assert stop.value.code == 2
    assert "no GPU here; --device cpu --tiny shows that the benchmark works" in capsys.readouterr().err


@pytest.mark.parametrize(("device", "wanted"), [("cuda", []), ("cuda:1", [1])])
def test_attention_takes_the_gpu_it_is_told(device: str, wanted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Events and synchronisation are of the current device; the block mask is given its inputs' device."""
    chosen: list[int] = []

    def clock(device: str) -> None:
        assert chosen == wanted
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    monkeypatch.setattr(attention, "Clock", clock)
    with pytest.raises(KeyboardInterrupt):
        attention.main(["--device", device])
    given: list[torch.device] = []
    elsewhere = problem("causal", 8, 1, 32, replace(FORM, device="meta"))
    attention_problems.build_block_mask(elsewhere, lambda *_, device: given.append(device))
    assert given == [elsewhere.q.device]


def test_goals_are_against_a_rivals_best_form() -> None:
    def result(mask: str, **times: tuple[float, float]) -> dict[str, Any]:
        return {"mask": mask, "times": {
            name.replace("_", "-"): {"forward_ms": ahead, "backward_ms": back} for name, (ahead, back) in times.items()
        }}  # fmt: skip

    results = [
        result("causal", tidal=(1, 2), flex=(3, 4), flex_max_autotune=(2, 5), flash_attention_2=(0.5, 3)),
        result("causal", tidal=(1, 2), flex=(4, 4)),
        result("packed", tidal=(2, 2), flex=(3, 3)),
        result("two-stream", tidal=(1, 1), sdpa=(9, 9)),
    ]
    building = {"tidal": 2.0, "create_block_mask": 90.0, "create_block_mask-compiled": 60.0}
    plans = [{"mask": "packed", "keys": 8192, "times": {name: {"plan_ms": t} for name, t in building.items()}}]
    decoded = [{"queries": 1, "times": {"tidal": {"decode_ms": 1.0}, "flex": {"decode_ms": 3.0}}}]
    met = {(g["rival"], g["direction"], g["masks"][0]): (g["worst"], g["median"])
           for g in attention.against_goals(results, plans, decoded)}  # fmt: skip
    assert all(g["worst"] is None for g in attention.against_goals(plans[:0]))
    assert met == {
        ("flex", "forward", "causal"): (2.0, 3.0),
        ("flex", "backward", "causal"): (2.0, 2.0),
        ("flex", "forward", "packed"): (1.5, 1.5),
        ("flex", "backward", "packed"): (1.5, 1.5),
        ("flash-attention-2", "forward", "causal"): (0.5, 0.5),
        ("flash-attention-2", "backward", "causal"): (1.5, 1.5),
        ("flex", "decode", "decode"): (3.0, 3.0),
        ("create_block_mask", "plan", "causal"): (30.0, 30.0),
    }


def test_goals_of_the_plan_are_at_8192_keys() -> None:
    plans = [{"mask": "packed", "keys": keys, "times": {"tidal": {"plan_ms": 1.0}, "create_block_mask": {"plan_ms": t}}}
             for keys, t in ((2048, 2.0), (8192, 90.0), (16384, 1.0))]  # fmt: skip
    (goal,) = (g for g in attention.against_goals(plans) if g["direction"] == "plan")
    assert (goal["rival"], goal["worst"], goal["median"]) == ("create_block_mask", 90.0, 90.0)


def test_the_share_of_the_plan_is_that_of_one_layer_which_uses_it() -> None:
    def result(mask: str, keys: int, d: int) -> dict[str, Any]:
        times = {"tidal": {"forward_ms": 1.0, "backward_ms": 3.0 * d / 64}, "flex": {"forward_ms": 9.0}}
        return {"mask": mask, "keys": keys, "head_dim": d, "times": times}

    measured = ("causal", 8192, 64), ("causal", 8192, 128), ("causal", 96, 64), ("packed", 8192, 64)
    building = {"tidal": {"plan_ms": 0.2}, "create_block_mask": {"plan_ms": 9.0}}
    plans = [{"mask": "causal", "keys": 8192, "times": building}]
    shares = attention.plan_shares([result(*what) for what in measured], plans)
    assert [(s["mask"], s["keys"], s["head_dim"], s["plan_share_of_a_layer"]) for s in shares] == [
        ("causal", 8192, 64, 0.05), ("causal", 8192, 128, 0.0286)
    ]  # fmt: skip


def test_attention_cpu_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.json"
    flags = ["--lengths", "1200", "--heads", "2", "--repeats", "3", "--no-flex", "--out", str(out)]
    attention_cpu.main(flags)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line == json.loads(out.read_text())
    (result,) = line["results"]
    assert (result["keys"], result["queries"]) == (1200, 768)
    for part in ("both", "forward"):
        assert set(result["milliseconds"][part]) == {"tidal", "sdpa"}
        assert result["times_faster"][part]["sdpa"] > 0
    assert 0 < result["tidal_error"] < 1e-5
    assert result["memory_mb"]["sdpa"] > 2 * 768 * 1200 * 4 / 1e6  # at least its bias
    assert result["memory_mb"]["sdpa"] > result["memory_mb"]["tidal"]
