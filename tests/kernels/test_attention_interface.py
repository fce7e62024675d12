"""Operator, plan, backend choice, messages, memory."""

import math
import os

import numpy as np
import pytest
import torch
from attention_cases import make_case, out_and_gradients

from tidal.kernels import TilePlan, alibi_slopes, available_backends, cpu, cpu_rows, interval_attention
from tidal.kernels.api import BACKEND_VARIABLE

torch.set_num_threads(1)
NAMES = ("q", "k", "v", "ranges", "q_position", "k_position", "slopes")


@pytest.mark.parametrize("structure", ["random", "streams"])
def test_opcheck(structure: str) -> None:
    case = make_case(0, n_queries=20, n_keys=30, structure=structure)
    plan = TilePlan.build(case.ranges, 30, tile_q=8)
    torch.library.opcheck(torch.ops.tidal.interval_attention_cpu.default, (*case.inputs(), plan.slices, 8, 0.5))


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("given_plan", [True, False])
def test_compile_without_graph_breaks(dense: bool, given_plan: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "DENSE_LIMIT", 2**60 if dense else -1)
    torch.compiler.reset()
    case = make_case(2, n_queries=20, n_keys=30)
    plan = TilePlan.build(case.ranges, 30) if given_plan else None
    wanted = out_and_gradients(case, "cpu", plan)
    compiled = torch.compile(
        lambda *inputs: interval_attention(*inputs, plan=plan), fullgraph=True, backend="aot_eager"
    )
    out = compiled(*case.inputs())
    gradients = torch.autograd.grad(out, (case.q, case.k, case.v, case.slopes), case.weight)
    for name, value in zip(wanted, (out, *gradients), strict=True):
        torch.testing.assert_close(value, wanted[name], rtol=1e-12, atol=1e-12)


def test_one_plan_for_many_layers() -> None:
    case, other = make_case(0), make_case(1)
    plan = TilePlan.build(case.ranges, 17)
    for _ in range(2):
        out = interval_attention(*case.inputs(), plan=plan)
        assert torch.equal(out, interval_attention(*case.inputs()))
    for positions in ((other.q_position, case.k_position), (other.q_position, other.k_position)):
        moved = (*case.inputs()[:4], *positions, case.slopes)  # the memo must notice either
        assert torch.equal(interval_attention(*moved, plan=plan), interval_attention(*moved))
    with torch.inference_mode():
        interval_attention(*case.inputs(), plan=plan)
    out_and_gradients(case, "cpu", plan)


@pytest.mark.parametrize("dense", [True, False])
def test_autocast_changes_nothing(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "DENSE_LIMIT", 2**60 if dense else -1)
    inputs = [x.detach() for x in make_case(0, dtype=torch.float32).inputs()]
    wanted = interval_attention(*inputs, backend="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert interval_attention(*inputs, backend="cpu").equal(wanted)


def test_gradients_may_be_taken_inside_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch advises against it, but few know."""
    monkeypatch.setattr(cpu, "DENSE_LIMIT", -1)
    inputs = make_case(0, dtype=torch.float32).inputs()
    learnt = [x for x in inputs if x.requires_grad]
    out = interval_attention(*inputs, backend="cpu")
    wanted = torch.autograd.grad(out.sum(), learnt, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(out.sum(), learnt)
    assert len(got) == 4
    assert all(map(torch.equal, got, wanted))


def test_a_second_derivative_is_refused() -> None:
    """And not taken for zero."""
    case = make_case(0)
    plan = TilePlan.build(case.ranges, case.k.shape[2])
    out = torch.ops.tidal.interval_attention_cpu(*case.inputs(), plan.slices, 64, 0.5)
    [first] = torch.autograd.grad(out.square().sum(), case.q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"backward.* cannot be differentiated"):
        torch.autograd.grad(first.square().sum(), case.q)


@pytest.mark.parametrize("backend", ["reference", "cpu, in place", "cpu", "triton"])
@pytest.mark.parametrize("queries", [1, 13])
def test_rows_of_a_cache(backend: str, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row i of q attends to row rows[i] of k and v, wherever those lie."""
    name = backend.split(",")[0]
    if name not in available_backends() or (name == "triton" and not os.environ.get("TRITON_INTERPRET")):
        pytest.skip("no Triton here")
    monkeypatch.setattr(cpu_rows, "IN_PLACE", 0 if "in place" in backend else 2**60)
    case = make_case(0, n_batch=3, n_queries=queries, head_dim=32, dtype=torch.float32)
    q, k, _, *others = case.inputs()
    drawn = torch.randn(2, 5, k.shape[1], 2 * k.shape[2], k.shape[3], generator=torch.Generator().manual_seed(0))
    cache = drawn[:, :, :, : k.shape[2]]  # not in one stretch
    still = q.detach()  # in place is only what wants no gradients
    for rows in ([3, 0, 4], [0, 1, 2], [2, 2, 1]):
        wanted = interval_attention(q, *cache[:, rows], *others, backend="reference")
        found = interval_attention(q, *cache, *others, backend=name, rows=rows)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        gradients = [torch.autograd.grad(x.sum(), q)[0] for x in (found, wanted)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
        halves = interval_attention(q.bfloat16(), *cache.bfloat16(), *others, backend=name, rows=rows)
        torch.testing.assert_close(halves, wanted.bfloat16(), rtol=0.05, atol=0.05)
    ranges, *positions, slopes = (x.detach() for x in others)
    half = (x.bfloat16() for x in (still, *cache))
    halves = interval_attention(*half, ranges, *positions, slopes, backend=name, rows=rows)
    torch.testing.assert_close(halves, wanted.detach().bfloat16(), rtol=0.05, atol=0.05)
    plan, (q_at, k_at) = TilePlan.build(ranges, k.shape[2]), positions
    far, (steep, steeper) = q_at * 3, (slopes * 2, slopes * 3)
    for *at, slopes in ((q_at, k_at, steep), (q_at, k_at, steeper), (far, k_at, steeper), (far, k_at * 2, steeper)):
        # what a plan remembers is of these positions and slopes, too
        wanted = interval_attention(still, *cache[:, rows], ranges, *at, slopes, backend="reference")
        found = interval_attention(still, *cache, ranges, *at, slopes, backend=name, rows=rows, plan=plan)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    rows, blind = [3, 0, 4], torch.zeros_like(ranges)
    for seen in (ranges, blind):  # what was remembered without gradients does not cut them off, nor does seeing nothing
        plan, learnt = TilePlan.build(seen, k.shape[2]), slopes.clone().requires_grad_()
        for sloping in (slopes, learnt):
            found = interval_attention(q, *cache, seen, *at, sloping, backend=name, rows=rows, plan=plan)
        wanted = interval_attention(q, *cache[:, rows], seen, *at, learnt, backend="reference")
        pairs = zip(*(torch.autograd.grad(x.sum(), (q, learnt)) for x in (found, wanted)), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for wrong in ([0, 1], [0, 1, 5], [0, 1, -1]):
        with pytest.raises(ValueError, match=r"rows must name 3 of the 5 rows of k.*got"):
            interval_attention(q, *cache, *others, rows=wrong)


def test_rows_in_place_copy_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(0, n_batch=2, n_queries=1, n_keys=4096, head_dim=16, dtype=torch.float32)
    q, k, v, *others = case.inputs()
    for limit, copied in ((0, False), (2**60, True)):
        monkeypatch.setattr(cpu_rows, "IN_PLACE", limit)
        with torch.inference_mode(), torch.profiler.profile(record_shapes=True) as profile:
            interval_attention(q, k, v, *others, rows=[1, 0])
        assert any(event.name == "aten::stack" for event in profile.events()) == copied


@pytest.mark.parametrize("backend", ["triton", "triton-atomic"])
def test_rows_are_decoded_where_they_lie(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is stacked, one upload of the rows' numbers serves all layers, and none is needed for all rows."""
    if backend not in available_backends() or not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("no Triton here")
    from tidal.kernels import triton_decode

    triton_decode.on_device.cache_clear()
    case = make_case(0, n_batch=3, n_queries=2, n_keys=40, head_dim=32, dtype=torch.float32)
    q, k, v, *others = (x.detach() for x in case.inputs())
    for rows, uploads in (([2, 0, 2], 1), ([0, 1, 2], 1), ([1, 0, 2], 2)):
        wanted = interval_attention(q, k[rows], v[rows], *others, backend="reference")
        with torch.inference_mode(), torch.profiler.profile(record_shapes=True) as profile:
            found = [interval_attention(q, k, v, *others, rows=rows, backend=backend) for _ in range(2)]
        torch.testing.assert_close(found[0], wanted, rtol=1e-5, atol=1e-5)
        assert found[1].equal(found[0])
        assert not any(event.name == "aten::stack" for event in profile.events())
        assert triton_decode.on_device.cache_info().misses == uploads


def largest_tensor(length: int) -> int:
    """Elements of the largest tensor that enters any operation, also inside the operator, forward and backward."""
    case = make_case(0, 1, 2, 2, length, 2 * length, 8, torch.float32, structure="streams")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        out_and_gradients(case, "cpu")
    shapes = [shape for event in profile.events() for shape in event.input_shapes or () if shape]
    return max(math.prod(shape) for shape in shapes if all(isinstance(n, int) for n in shape))


def test_memory_grows_linearly(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = largest_tensor(1024), largest_tensor(2048)
    assert large < 2048 * 4096 / 4
    assert large <= 2.1 * small
    monkeypatch.setattr(cpu, "DENSE_LIMIT", 2**60)
    assert largest_tensor(256) >= 2 * 256 * 512  # the measurement does see score matrices


def test_plan_of_the_diagram() -> None:
    ends = [(2, 10), (3, 11), (4, 12), (4, 12)]
    ranges = torch.tensor([[[[0, a], [b - 1, b]] for a, b in ends]], dtype=torch.int32)
    ranges[0, 1, 1, 0] = 9
    slices = TilePlan.build(ranges, 12, tile_q=2).slices
    assert slices.tolist() == [[[0, 3, 0], [9, 11, 0]], [[0, 4, 1], [11, 12, 1]]]
    ranges[0, 2:, 1, 0] = 4  # where range 0 ends
    assert TilePlan.build(ranges, 12, tile_q=2).slices.tolist()[1] == [[0, 12, 0], [0, 0, 1]]


@pytest.mark.parametrize("n_heads", [1, 2, 4, 8, 16, 64])
def test_slopes_power_of_two(n_heads: int) -> None:
    wanted = torch.tensor([(2 ** (-8 / n_heads)) ** (i + 1) for i in range(n_heads)])
    torch.testing.assert_close(alibi_slopes(n_heads), wanted)


def test_slopes_between_powers_of_two() -> None:
    wanted = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    assert alibi_slopes(6).tolist() == wanted
    assert len(alibi_slopes(12)) == len(set(alibi_slopes(12).tolist())) == 12
    with pytest.raises(ValueError, match="n_heads must be at least 1"):
        alibi_slopes(0)


def test_backend_is_never_replaced_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_case(0).inputs()
    assert {"reference", "cpu"} <= set(available_backends())
    with pytest.raises(ValueError, match=r"backend='flash'.*available: reference, cpu"):
        interval_attention(*inputs, backend="flash")
    monkeypatch.setenv(BACKEND_VARIABLE, "nope")
    with pytest.raises(ValueError, match=r"TIDAL_ATTENTION_BACKEND='nope'.*available"):
        interval_attention(*inputs)
    interval_attention(*inputs, backend="cpu")  # the argument comes first
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    assert torch.equal(interval_attention(*inputs), interval_attention(*inputs, backend="reference"))
    on_meta = [x.to("meta") for x in inputs]
    with pytest.raises(ValueError, match="runs on cpu, the tensors are on meta"):
        interval_attention(*on_meta, backend="cpu")


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda x: x[0], r"q and k must be \[B, H, L, D\]"),
        (1, lambda x: x[:, :1, :5], r"v must be \[2, 1, 5, 4\] to fit q"),
        (2, lambda x: x[:, :, :5], r"v must be \[2, 2, 17, 4\] to fit q"),
        (1, lambda x: x.float(), "q, k, v must share a floating point dtype"),
        (3, lambda x: x[:, :5], r"ranges must be \[2, 13, 2, 2\]"),
        (3, lambda x: x.long(), "ranges must be torch.int32, got torch.int64"),
        (4, lambda x: x.double(), "positions must be torch.float32"),
        (5, lambda x: x[:1], r"k_position must be \[2, 17\]"),
        (6, lambda x: x[:3], r"slopes must be \[4\]"),
        (6, lambda x: x.int(), "slopes must be floating point"),
    ],
)
def test_messages(index: int, change, message: str) -> None:  # type: ignore[no-untyped-def]
    inputs = list(make_case(0).inputs())
    inputs[index] = change(inputs[index].detach())
    with pytest.raises(ValueError, match=message) as caught:
        interval_attention(*inputs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("n_queries", [13, 200])
@pytest.mark.parametrize("name", ["q", "k", "v", "slopes"])
def test_forward_mode_is_refused(name: str, n_queries: int) -> None:
    """And not taken for zero: an operator lets no tangent through."""
    case = make_case(0, n_queries=n_queries, n_keys=200)
    inputs = dict(zip(NAMES, (x.detach() for x in case.inputs()), strict=True))

    def out(x: torch.Tensor, backend: str | None) -> torch.Tensor:
        return interval_attention(**{**inputs, name: x}, backend=backend)

    direction = torch.randn_like(inputs[name])
    with pytest.raises(ValueError, match="no forward-mode derivative in backend 'cpu'; backend='reference' has"):
        torch.func.jvp(lambda x: out(x, None), (inputs[name],), (direction,))
    tangent = torch.func.jvp(lambda x: out(x, "reference"), (inputs[name],), (direction,))[1]
    step = 1e-6 * direction
    differences = (out(inputs[name] + step, None) - out(inputs[name] - step, None)) / 2e-6
    torch.testing.assert_close(tangent, differences, rtol=1e-6, atol=1e-6)


def test_what_learns_nothing_is_refused() -> None:
    """At any length: a short row would have given it a gradient, by the way it is computed."""
    case = make_case(0)
    inputs = dict(zip(NAMES, case.inputs(), strict=True))
    for name in ("q_position", "k_position"):
        learnt = inputs[name].clone().requires_grad_()
        with pytest.raises(ValueError, match="positions get no gradient; detach them"):
            interval_attention(**{**inputs, name: learnt})
        with torch.no_grad():
            interval_attention(**{**inputs, name: learnt})
    with pytest.raises(ValueError, match=r"scale is tensor\(0.5.*; it must be a number \(multiply q by a"):
        interval_attention(**inputs, scale=torch.tensor(0.5))  # type: ignore[arg-type]
    wanted = interval_attention(**inputs, scale=0.5)
    assert interval_attention(**inputs, scale=np.float32(0.5)).equal(wanted)  # type: ignore[arg-type]


def test_messages_about_heads_plan_and_ranges() -> None:
    case = make_case(0, n_heads=3, n_kv_heads=2 - 1)
    two = make_case(0, n_heads=4, n_kv_heads=3)
    with pytest.raises(ValueError, match="multiple of key heads, got 4 and 3"):
        interval_attention(*two.inputs())
    with pytest.raises(ValueError, match=r"plan was built for .*\(2, 13, 18\), the tensors have \(2, 13, 17\)"):
        interval_attention(*case.inputs(), plan=TilePlan.build(case.ranges, 18))
    with pytest.raises(ValueError, match=r"plan was built for .*\(1, 13, 17\), the tensors have \(2, 13, 17\)"):
        interval_attention(*case.inputs(), plan=TilePlan.build(case.ranges[:1], 17))
    with pytest.raises(ValueError, match=r"ranges must lie in \[0, 17\].*got \[-1, "):
        TilePlan.build(case.ranges - 1, 17)
    with pytest.raises(ValueError, match="v is on meta, q on cpu"):
        interval_attention(*case.inputs()[:2], case.v.to("meta"), *case.inputs()[3:])
    with pytest.raises(ValueError, match="tile_q is 0; it must be at least 1"):
        TilePlan.build(case.ranges, 17, tile_q=0)
    with pytest.raises(ValueError, match=r"ranges must lie in \[0, 9\]"):
        TilePlan.build(case.ranges, 9)


def test_a_compiled_graph_cuts_ranges_to_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot raise: that would take a value."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    ranges = torch.tensor([[[[-2, 15], [0, 0]]]], dtype=torch.int32)
    assert TilePlan.build(ranges, 12).slices.tolist() == [[[0, 12, 1], [0, 0, 1]]]
    ranges = torch.tensor([[[[-2, 0], [0, 5]]]], dtype=torch.int32)
    assert TilePlan.build(ranges, 12).slices.tolist() == [[[0, 0, 1], [0, 5, 1]]]


@pytest.mark.parametrize("queries", [1, 3])
def test_a_row_ends_at_its_own_end(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows of very different lengths each is multiplied with its own keys, and only queries up to the last that sees
    any; what lies behind is not touched."""
    monkeypatch.setattr(cpu_rows, "IN_PLACE", 0)
    case = make_case(0, n_batch=4, n_queries=queries, n_keys=400, head_dim=16, dtype=torch.float64)
    q, k, v, ranges, *others = case.inputs()
    ends = [400, 7, 1, 0]
    ranges = torch.zeros_like(ranges)
    ranges[:, :, 0, 1] = torch.tensor(ends, dtype=torch.int32)[:, None]
    ranges[0, 1:] = 0  # padding, where a row has fewer queries than others
    with torch.inference_mode():
        wanted = interval_attention(q, k, v, ranges, *others, backend="reference")
        for row, end in enumerate(ends[:3]):
            k[row, :, end:] = v[row, :, end:] = math.nan  # which a product with all keys would spread
        q[0, :, 1:] = q[3] = math.nan
        found = interval_attention(q, k, v, ranges, *others, backend="cpu", rows=range(4))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        if queries == 3:  # one that sees nothing, before others that do
            ranges[1, 1], q[1] = 0, 1.0
            wanted = interval_attention(q[1:2], k[1:2, :, :7], v[1:2, :, :7], ranges[1:2], others[0][1:2],
                                        others[1][1:2, :7], others[2], backend="reference")  # fmt: skip
            found = interval_attention(q, k, v, ranges, *others, backend="cpu", rows=range(4))
            torch.testing.assert_close(found[1:2], wanted, rtol=1e-12, atol=1e-12)
        alike = torch.full_like(ranges[:, :, 0, 1], 400)
        ranges[:, :, 0, 1] = alike
        assert not cpu_rows.in_place(q, k, ranges, range(4), None), "one product serves rows as long as each other"
        assert cpu_rows.in_place(q, k, ranges, [0, 2, 1, 3], None), "unless they would be copied"
