"""What the attention benchmarks measure: rivals are told the same, and wrong results are refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.errors import TritonError

from benchmarks import attention_problems
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


@pytest.mark.skipif(not INTERPRETED.value, reason="Triton's interpreter is off")
def test_the_fused_kernels_pass_the_check() -> None:
    p = problem("two-stream", 40, 1, 32, FORM)
    attention_problems.build_plan(p, "triton")
    both = ready(p, ["tidal-atomic"], "triton")
    assert 0 < both.error < 1e-5
    assert list(both.runs) == ["tidal", "tidal-atomic"], both.failed
    assert 0 < ready(p, [], "triton", backward=False).error < 1e-5
