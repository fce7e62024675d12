"""Checks 17 and 18: operators, and the same answer twice."""

from __future__ import annotations

import itertools
from functools import partial

import torch
from torch import Tensor

from tidal.doctor.oracle import attend
from tidal.doctor.patient import Patient
from tidal.doctor.registry import EXACT, ORACLE, TRAINED, check
from tidal.doctor.report import Meter, Where
from tidal.infer.engine import generate
from tidal.infer.score import score
from tidal.kernels import TilePlan, available_backends, interval_attention
from tidal.kernels.api import BACKENDS

CASES = ((9, 14, "random"), (24, 40, "streams"), (130, 140, "random"), (96, 260, "streams"), (2, 4100, "random"))
"""queries, keys, kind of ranges"""
EXACTLY = ((torch.float64, 1e-11),)
FUSED = ((torch.float32, 1e-4), (torch.bfloat16, 6e-2))
"""dtypes, and the largest difference as a share of the largest value"""
FUSED_ON = "cuda"
"""also where Triton's interpreter is on, since it would take minutes; tests ask for cpu"""


@check(17, "kernels agree", "a fused kernel computes something else than the reference, or its gradients do")
def kernels(patient: Patient, meter: Meter) -> None:
    """Every backend that runs here against the definition, head by head in float64: output and all gradients.

    Ranges are random (empty, adjacent, overlapping, ragged) and those of streams; sizes are small, and large enough
    for tiles, and for rows of a cache to be left where they are. Fused kernels have no float64: they are measured in
    float32, and in bfloat16, in which they do more than round.
    """
    shape = patient.model.config.shape
    heads = shape.n_heads, shape.n_kv_heads, shape.d_model // shape.n_heads
    for name in available_backends():
        fused = "cuda" in (BACKENDS[name].devices or ())
        device = FUSED_ON if fused else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            meter.note(f"{name} needs a GPU")
            continue
        for (dtype, limit), case in itertools.product(FUSED if fused else EXACTLY, CASES):
            try:
                _agrees(meter, name, device, dtype, limit, heads, case)
            except ValueError as error:  # it says loudly that it cannot do this shape: then nothing uses it
                meter.note(f"{name}: {error}")
                break


def _agrees(meter: Meter, name: str, device: str, dtype: torch.dtype, limit: float, heads: tuple[int, int, int],
            case: tuple[int, int, str]) -> None:  # fmt: skip
    inputs, ranges, (at_q, at_k), cotangent = _attention_case(heads, *case)
    precise = torch.promote_types(dtype, torch.float32)
    inputs, cotangent = [x.to(t) for x, t in zip(inputs, [dtype] * 3 + [precise], strict=True)], cotangent.to(dtype)
    exact = [x.double().requires_grad_() for x in inputs]
    wanted = _gradients(_defined(exact, ranges, at_q, at_k), exact, cotangent.double())
    q, k, v, slopes = moved = [x.to(device).requires_grad_() for x in inputs]
    ranges, at_q, at_k = ranges.to(device), at_q.to(device), at_k.to(device)
    if not BACKENDS[name].learns_slopes:
        slopes, moved = slopes.detach(), moved[:3]
    attend = partial(interval_attention, ranges=ranges, q_position=at_q, k_position=at_k, slopes=slopes,
                     backend=name, plan=TilePlan.build(ranges, case[1]))  # fmt: skip
    got = _gradients(attend(q, k, v), moved, cotangent.to(device))
    with torch.inference_mode():  # the same keys and values, in the rows of a cache
        got.append(attend(q, k.flip(0), v.flip(0), rows=[1, 0]))
    at = Where(layer=f"{name}, {str(dtype).removeprefix('torch.')}, {case[0]} queries, {case[1]} keys, {case[2]}")
    names = ("output", "dq", "dk", "dv", "dslopes")[: len(got) - 1]
    for what, a, b in zip([*names, "output, rows of a cache"], [*wanted[: len(names)], wanted[0]], got, strict=True):
        scale = max(1.0, a.abs().max().item())
        meter.close(what, a / scale, b.cpu().double() / scale, limit, at, (ORACLE, name))


def _attention_case(heads: tuple[int, int, int], n_queries: int, n_keys: int,
                    kind: str) -> tuple[list[Tensor], Tensor, tuple[Tensor, Tensor], Tensor]:  # fmt: skip
    g, (n_heads, n_kv_heads, d_head), rows = torch.Generator().manual_seed(n_queries), heads, 2

    def normal(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64, generator=g)

    if kind == "random":
        ranges = torch.randint(0, n_keys + 1, (rows, n_queries, 2, 2), generator=g)
        ranges[1].clamp_(max=n_keys - n_keys // 4)
        ranges[:, ::5, 1, 0] = ranges[:, ::5, 0, 1]  # adjacent
        ranges[:, -1] = 0  # a query without keys
    else:
        n_memory, step = n_keys - n_queries, torch.arange(n_queries)
        ranges = torch.zeros(rows, n_queries, 2, 2, dtype=torch.int64)
        ranges[:, :, 0, 1] = step // 3 * 3 * n_memory // n_queries
        ranges[:, :, 1, 0], ranges[:, :, 1, 1] = n_memory + step // 3 * 3, n_memory + step + 1
    positions = [torch.rand(rows, n, generator=g) * 30 for n in (n_queries, n_keys)]
    inputs = [normal(rows, n_heads, n_queries, d_head), normal(rows, n_kv_heads, n_keys, d_head),
              normal(rows, n_kv_heads, n_keys, d_head), torch.rand(n_heads, dtype=torch.float64, generator=g)]
    return (inputs, ranges.to(torch.int32), (positions[0], positions[1]),
            normal(rows, n_heads, n_queries, d_head))  # fmt: skip


def _defined(inputs: list[Tensor], ranges: Tensor, at_q: Tensor, at_k: Tensor) -> Tensor:
    """Interval attention, one row and head after the other."""
    q, k, v, slopes = inputs
    group, index, rows = q.shape[1] // k.shape[1], torch.arange(k.shape[2]), []
    for b, spans in enumerate(ranges.long()):
        sees = ((index >= spans[..., 0, None]) & (index < spans[..., 1, None])).any(1)
        distance = (at_q[b, :, None].double() - at_k[b, None, :].double()).abs()
        rows.append(torch.stack([attend(q[b, h], k[b, h // group], v[b, h // group], sees, distance, slopes[h])
                                 for h in range(q.shape[1])]))  # fmt: skip
    return torch.stack(rows)


def _gradients(out: Tensor, inputs: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    # a product, since torch imports sympy to look at the shape of a cotangent
    return [out.detach(), *torch.autograd.grad((out * cotangent).sum(), inputs)]


@check(18, "the same twice", "dropout or training mode is left on, or something is random that should not be")
def deterministic(patient: Patient, meter: Meter) -> None:
    """Two evaluations are equal bit for bit; training mode changes nothing; scoring and generation put the model into
    evaluation mode, and back.
    """
    document, model, tokenizer = patient.documents[0], patient.exact, patient.tokenizer
    batch, sides = patient.pack([[document]]), ("once", "again")
    with torch.inference_mode():
        once, again = model.log_probs(batch), model.log_probs(batch)
    meter.same("log-probabilities", once, again, partial(patient.where, document), sides)
    modes: list[bool] = []
    handle = model.writer[0].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    model.train()
    try:
        meter.close("log-probabilities in training mode", once, model.log_probs(batch), EXACT,
                    partial(patient.where, document), ("evaluation", TRAINED))  # fmt: skip
        meter.close("the loss in training mode", -once.sum(), model(batch).units, EXACT * max(1, len(once)),
                    Where(document.text), ("evaluation", TRAINED))  # fmt: skip
        modes.clear()
        outputs: list[list[object]] = []
        for n in range(2):
            torch.manual_seed(n)  # nobody's business
            done = generate(model, tokenizer, [document.prompt], max_new_units=8, temperature=1.0, seed=5)[0]
            outputs.append([*done.blocks, *done.log_probs, *score(model, tokenizer, document.text[:20], "decode")])
        meter.same("generated text", outputs[0], outputs[1], Where(document.prompt), sides)
        meter.same("training mode while generating", [False] * len(modes), modes, Where(), (ORACLE, "model"))
        meter.same("training mode afterwards", True, model.training, Where(), ("before", "after"))
    finally:
        handle.remove()
        model.eval()
