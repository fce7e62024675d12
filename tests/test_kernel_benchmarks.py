"""The attention benchmarks without a GPU: they run, they refuse wrong results, and the rivals compute the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.errors import TritonError

from benchmarks import attention, attention_cpu, attention_problems
from benchmarks.attention_problems import FLEX_BLOCK, MASKS, Form, Problem, decode_problem, problem, ready
from tidal.kernels.reference import alibi_bias, visible_keys
from tidal.kernels.triton_tiles import INTERPRETED

FORM = Form(heads=4, kv_heads=2, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("mask", MASKS)
def test_what_rivals_are_told_is_what_the_ranges_say(mask: str) -> None:
    """FlexAttention's mask and score functions, and the count of operations, against the dense definition."""
    p = problem(mask, 128, 2, 32, FORM)
    n_keys = p.k.shape[2]
    assert p.ranges.amin() >= 0
    assert p.ranges.amax() <= n_keys
    visible = visible_keys(p.ranges, n_keys)
    assert visible.any(2).all()  # no rival need know what to do without keys
    assert p.flops == 4 * 4 * 32 * visible.sum()
    check_what_rivals_are_told(p)


def test_rivals_are_told_of_decoding_without_a_look_up_a_key() -> None:
    p = decode_problem(3, 40, 2, 32, FORM)
    assert p.ranges[:, :, 0, 1].tolist() == [[8, 9, 10], [38, 39, 40]]
    check_what_rivals_are_told(p)
    assert "k_position" not in p.bias.__code__.co_freevars


@pytest.mark.parametrize("mask", MASKS)
def test_rivals_are_told_of_it_in_their_best_form(mask: str) -> None:
    """Blocks without a remainder, and no absolute value where no visible key stands behind its query."""
    p = problem(mask, 1024, 1, 32, FORM)
    assert p.q.shape[2] % FLEX_BLOCK == p.k.shape[2] % FLEX_BLOCK == 0
    i, j = torch.cartesian_prod(torch.arange(p.q.shape[2])[::37], torch.arange(p.k.shape[2])[::41]).unbind(1)
    behind = p.k_position[0, j] > p.q_position[0, i] if mask == "two-stream" else j > i
    bias = p.bias(torch.zeros(len(i)), 0, torch.tensor(1), i, j)
    assert behind.any()
    assert ((bias > 0) == (behind & (mask != "block-causal"))).all()


def check_what_rivals_are_told(p: Problem) -> None:
    n_queries, n_keys = p.q.shape[2], p.k.shape[2]
    visible = visible_keys(p.ranges, n_keys)
    b, i, j = torch.arange(2)[:, None, None], torch.arange(n_queries)[:, None], torch.arange(n_keys)
    assert p.sees(b, 0, i, j).expand_as(visible).equal(visible)
    for h in range(4):
        bias = p.bias(torch.zeros(2, n_queries, n_keys), b, torch.tensor(h), i, j)
        wanted = alibi_bias(p.q_position, p.k_position, p.slopes)[:, h]
        torch.testing.assert_close(bias[visible], wanted[visible], rtol=0, atol=1e-5)


def test_two_streams_are_laid_out_like_the_writers() -> None:
    p = problem("two-stream", 300, 1, 32, FORM)
    n_reader = 300 - p.q.shape[2]
    (reader_start, before), (own, end) = (r.long().unbind(-1) for r in p.ranges[0].unbind(1))
    assert reader_start.eq(0).all()
    assert before.diff().ge(0).all()
    assert end.equal(n_reader + 1 + torch.arange(p.q.shape[2]))
    assert own.le(end - 1).all()
    assert set((end - own).tolist()) <= set(range(1, 9))
    assert (own.diff() > 0).equal(own[1:] == end[1:] - 1)  # a block begins at its own first step
    assert p.q_position[0].equal(before.float())
    assert p.k_position[0].equal(torch.cat([torch.arange(n_reader).float(), before.float()]))


# -------------------------------------------------------------------------------------------- refusals


def wrong_output(attend: Callable[..., Tensor], factor: float = 1.001) -> Callable[..., Tensor]:
    return lambda q, k, v, *rest, **more: attend(q, k, v, *rest, **more) * factor


def wrong_gradient(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v, *rest, **more: attend(q, k + 0.01 * (k - k.detach()), v, *rest, **more)


def nan_for_one_key(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> Tensor:
        bad = torch.zeros_like(v)
        bad[0, 0, 3, 5] = float("nan")
        return attend(q, k, v + bad.requires_grad_(), *rest, **more)

    return run


def nan_gradient(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of the keys alone: neither the first nor the last error that is looked at."""

    def run(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> Tensor:
        k = k.view_as(k)
        k.register_hook(lambda gradient: gradient * float("nan"))
        return attend(q, k, v, *rest, **more)

    return run


def range_ignored(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v, ranges, *rest, **more: attend(
        q, k, v, ranges * torch.tensor([[1], [0]], dtype=torch.int32), *rest, **more
    )


@pytest.mark.parametrize("bug", [wrong_output, wrong_gradient, nan_for_one_key, nan_gradient, range_ignored])
def test_a_wrong_result_is_not_timed(bug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem("two-stream", 64, 1, 32, FORM)
    fine = ready(p, ["sdpa"], "cpu")
    assert list(fine.runs) == ["tidal", "sdpa"]
    assert 0 < fine.error < 1e-5
    attend = attention_problems.interval_attention

    def patched(*args: Any, backend: str | None = None, **more: Any) -> Tensor:
        how = attend if backend == "reference" else bug(attend)
        return how(*args, backend=backend, **({} if how is not attend else more))

    monkeypatch.setattr(attention_problems, "interval_attention", patched)
    with pytest.raises(SystemExit, match=r"tidal, two-stream, .*not timing a wrong result"):
        ready(p, [], "cpu")


def test_a_rival_that_is_wrong_or_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem("causal", 64, 1, 32, FORM)
    sdpa = attention_problems.sdpa

    def wrong(p: Problem) -> attention_problems.Attend:
        right = sdpa(p)
        return lambda q, k, v: right(q, k, v) * 1.01

    def fails(p: Problem, mode: str | None = None) -> attention_problems.Attend:
        raise TritonError("too much\nof it") if mode else torch.OutOfMemoryError("too much")

    monkeypatch.setattr(attention_problems, "sdpa", wrong)
    monkeypatch.setattr(attention_problems, "flex_attention", fails)
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # not installed
    entrants = ready(p, ["sdpa", "flex", "flex-max-autotune", "flash-attention-2"], "cpu")
    assert list(entrants.runs) == ["tidal"]
    assert entrants.failed.pop("sdpa").startswith("wrong result: errors {'out': 0.0")
    assert entrants.failed.pop("flash-attention-2").startswith("ModuleNotFoundError: ")
    assert entrants.failed == {"flex": "OutOfMemoryError: too much", "flex-max-autotune": "TritonError: too much"}


@pytest.mark.parametrize("reason", [AttributeError("a name of another version"), OSError("no space left"),
                                    subprocess.CalledProcessError(1, "gcc")])  # fmt: skip
def test_a_rival_of_another_version_is_reported(reason: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(p: Problem) -> attention_problems.Attend:
        raise reason

    monkeypatch.setattr(attention_problems, "sdpa", fails)
    entrants = ready(problem("causal", 64, 1, 32, FORM), ["sdpa"], "cpu")
    assert entrants.failed == {"sdpa": f"{type(reason).__name__}: {reason}"}


# ----------------------------------------------------------------------------------------- the commands


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


@pytest.mark.skipif(not INTERPRETED.value, reason="Triton's interpreter is off")
def test_the_fused_kernels_pass_the_check() -> None:
    p = problem("two-stream", 40, 1, 32, FORM)
    attention_problems.build_plan(p, "triton")
    both = ready(p, ["tidal-atomic"], "triton")
    assert 0 < both.error < 1e-5
    assert list(both.runs) == ["tidal", "tidal-atomic"], both.failed
    assert 0 < ready(p, [], "triton", backward=False).error < 1e-5


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
