"""The triton backend as torch sees it: operators, torch.compile, and when it is chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import functorch.compile
import pytest
import torch
from attention_cases import Case
from triton_cases import DEVICE, NAMES, SMALL, fused, triton_case

from tidal.config import Shape, TidalConfig
from tidal.kernels import TilePlan, interval_attention, triton_attention, triton_plan
from tidal.kernels.api import BACKEND_VARIABLE, BACKENDS, choose_backend
from tidal.kernels.triton_plan import interval_plan
from tidal.model import TidalTransformer, _planned

OPS = torch.ops.tidal


def test_opcheck() -> None:
    case = triton_case(0, "blocks", n_heads=1, q_tiles=0.6, k_tiles=0.7)
    geometry = case.ranges, case.q_position, case.k_position
    tile = SMALL.forward.m  # on a GPU, too: the compiler takes minutes for 64 in float32
    torch.library.opcheck(OPS.interval_plan.default, (*geometry, [tile, tile, 0, tile, tile, 1]))
    rows, rows_order, *columns = interval_plan(*geometry, [tile, tile, 0, tile, tile, 1])
    tiles = [tile, tile, 4, 1] * 3
    for atomic in (False, True):
        case.slopes.requires_grad_(not atomic)
        arguments = (*case.inputs(), rows, rows_order, [rows, rows_order, *columns], 0.5, tiles, atomic)
        torch.library.opcheck(OPS.interval_attention_triton.default, arguments)
        out, lse = OPS.interval_attention_triton(*arguments)
        saved = (case.weight, *(x.detach() for x in case.inputs()), out.detach(), lse.detach(), arguments[9])
        torch.library.opcheck(
            OPS.interval_attention_triton_backward.default, (*saved, 0.5, tiles, atomic, not atomic)
        )


def out_and_gradients(case: Case, attend) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    out = attend(*case.inputs())
    gradients = torch.autograd.grad(out, (case.q, case.k, case.v, case.slopes), case.weight)
    return dict(zip(NAMES, (out.detach(), *gradients), strict=True))


@pytest.mark.parametrize("given_plan", [True, False])
def test_compile_without_graph_breaks_or_recompiling(given_plan: bool) -> None:
    """Forward and backward; then other ranges, positions and lengths within the same padded shape."""
    torch.compiler.reset()

    def attend(*inputs: torch.Tensor, plan: TilePlan | None) -> torch.Tensor:
        return interval_attention(*inputs, backend="triton", plan=plan)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, structure in ((0, "blocks"), (1, "streams"), (2, "random")):
            case = triton_case(seed, structure, q_tiles=1.2, k_tiles=2.3)
            case.ranges[:, -5 - seed :] = 0  # padding
            plan = TilePlan.build(case.ranges, case.k.shape[2]) if given_plan else None
            wanted = fused(case, plan)
            for name, value in out_and_gradients(case, lambda *x, plan=plan: compiled(*x, plan=plan)).items():
                assert torch.equal(value, wanted[name]), name


def test_layers_of_a_compiled_graph_share_one_plan() -> None:
    torch.compiler.reset()
    case = triton_case(3, "blocks", q_tiles=1.2, k_tiles=1.2, n_kv_heads=2)
    calls: list[str] = []

    def count(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> object:
        calls.extend(str(node.target) for node in graph.graph.nodes if "interval" in str(node.target))
        return functorch.compile.make_boxed_func(graph)

    def two_layers(*inputs: torch.Tensor) -> torch.Tensor:
        once = interval_attention(*inputs, backend="triton")
        return interval_attention(once, *inputs[1:], backend="triton")

    partition = functorch.compile.min_cut_rematerialization_partition  # as torch.compile by default
    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=count, partition_fn=partition)
    out_and_gradients(case, torch.compile(two_layers, fullgraph=True, backend=backend))
    assert sum("attention_triton.default" in call for call in calls) == 2
    assert sum("interval_plan" in call for call in calls) == 1, calls


def test_layers_compiled_one_by_one_share_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with --compile: rows and columns once for two reader layers, and every step anew."""
    torch.compiler.reset()
    shape = Shape(d_model=32, n_heads=1, n_kv_heads=1, reader_layers=2, writer_layers=1, reader_ff=16, writer_ff=16,
                  writer_attention="none")  # fmt: skip
    model = TidalTransformer(TidalConfig(40, 20, 64, 8, "", shape)).to(DEVICE)
    plans: list[str] = []
    for name in ("rows_kernel", "columns_kernel"):
        monkeypatch.setattr(triton_plan, name, Launches(getattr(triton_plan, name), name, plans))
    monkeypatch.setenv(BACKEND_VARIABLE, "triton")
    for layer in model.reader:
        layer.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step, length in enumerate((20, 27)):
            ids = torch.arange(length, device=DEVICE)[None]
            ranges = torch.stack([torch.zeros_like(ids), ids + 1, *[torch.zeros_like(ids)] * 2], -1).int()
            view = _planned(ranges.view(1, length, 2, 2), ids.float(), ids.float())
            states = model.read(ids, 0 * ids, [view] * 2)
            states.sum().backward()
            assert plans.count("columns_kernel") == 1 + step
            assert len(plans) == 2 * (1 + step)  # rows of up to two shapes are planned by one launch
    torch.compiler.reset()
    plain = TidalTransformer(model.config).to(DEVICE)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain.read(ids, 0 * ids, [view] * 2), states, rtol=0, atol=1e-5)


class Launches:
    """A kernel that notes when it is launched."""

    def __init__(self, kernel: Any, name: str, log: list[str]) -> None:
        self.kernel, self.name, self.log = kernel, name, log

    def __getitem__(self, grid: Any) -> Any:
        self.log.append(self.name)
        return self.kernel[grid]


def test_what_was_asked_for_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    case = triton_case(4, "causal", q_tiles=1.0, k_tiles=1.0)
    with pytest.raises(ValueError, match=r"^backend='triton': has no kernel for torch.float64 with head dimension 32$"):
        interval_attention(*case.to(torch.float64).inputs(), backend="triton")
    narrow = replace(case, q=case.q[..., :24], k=case.k[..., :24], v=case.v[..., :24])
    with pytest.raises(ValueError, match=r"has no kernel for torch\.float32 with head dimension 24"):
        interval_attention(*narrow.inputs(), backend="triton")
    monkeypatch.setitem(BACKENDS, "triton", replace(BACKENDS["triton"], devices=("tpu",)))
    with pytest.raises(ValueError, match=f"^backend='triton': runs on tpu, the tensors are on {DEVICE}$"):
        interval_attention(*case.inputs(), backend="triton")


def test_choice_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)

    gpu = torch.device("cuda")
    assert choose_backend(gpu, torch.bfloat16, 64, None) == "triton"
    assert choose_backend(gpu, torch.float64, 64, None) == "reference"
    assert choose_backend(gpu, torch.float32, 48, None) == "reference"
    assert choose_backend(torch.device("cpu"), torch.float32, 64, None) == "cpu"


def test_tiles_can_be_given() -> None:
    case = triton_case(5, "blocks", q_tiles=1.0, k_tiles=1.5)
    wanted = fused(case)["out"]
    tile = triton_attention.Tile(32, 16, 4, 1)
    out = triton_attention.attend(*case.inputs(), case.q.shape[-1] ** -0.5, None, triton_attention.Config(*[tile] * 5))
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-5)


def test_compiling_is_not_imported_before_it_is_asked_for() -> None:
    """torch._dynamo takes longer to import than all of torch (tests/infer/test_load.py); its mark on a function is put
    there without it."""
    def function() -> None: ...

    marked = vars(torch._dynamo.assume_constant_result(function))
    assert marked.items() <= vars(triton_attention.architecture).items()
    assert marked
