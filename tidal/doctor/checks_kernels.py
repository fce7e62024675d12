"""Checks 17 and 18: operators, and the same answer twice."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from tidal.doctor.oracle import attend
from tidal.doctor.patient import Patient
from tidal.doctor.registry import ORACLE, check
from tidal.doctor.report import Meter, Where
from tidal.infer.engine import generate
from tidal.infer.score import score
from tidal.kernels import TilePlan, available_backends, interval_attention
from tidal.kernels.api import DEVICES, FIXED_SLOPES

CASES = ((9, 14, "random"), (24, 40, "streams"), (130, 140, "random"), (96, 260, "streams"), (2, 4100, "random"))
"""queries, keys, kind of ranges"""


@check(17, "kernels agree", "a fused kernel computes something else than the reference, or its gradients do")
def kernels(patient: Patient, meter: Meter) -> None:
    """Every backend that runs here against the definition, head by head in float64: output and all gradients.

    Ranges are random (empty, adjacent, overlapping, ragged) and those of streams; sizes are small, and large enough
    for tiles, and for rows of a cache to be left where they are. Backends that have no float64 are measured in float32.
    """
    shape = patient.model.config.shape
    heads = shape.n_heads, shape.n_kv_heads, shape.d_model // shape.n_heads
    for name in available_backends():
        device = "cuda" if DEVICES.get(name, ("cpu",))[0] == "cuda" else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            meter.note(f"{name} needs a GPU")
            continue
        for n_queries, n_keys, kind in CASES:
            inputs, ranges, (at_q, at_k), cotangent = _attention_case(heads, n_queries, n_keys, kind)
            wanted = _gradients(_defined(inputs, ranges, at_q, at_k), inputs, cotangent)
            dtype, limit = (torch.float64, 1e-11) if device == "cpu" else (torch.float32, 2e-3)
            moved = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
            q, k, v, slopes = moved
            if name in FIXED_SLOPES:
                slopes, moved = slopes.detach(), moved[:3]
            plan = TilePlan.build(ranges.to(device), n_keys)
            try:
                out = interval_attention(q, k, v, ranges.to(device), at_q.to(device), at_k.to(device), slopes,
                                         backend=name, plan=plan)  # fmt: skip
            except ValueError as error:  # it says loudly that it cannot do this shape: then nothing uses it
                meter.note(f"{name}: {error}")
                break
            got = _gradients(out, moved, cotangent.to(device, dtype))
            with torch.inference_mode():  # the same keys and values, in the rows of a cache
                got.append(interval_attention(q, k.flip(0), v.flip(0), ranges.to(device), at_q.to(device),
                                              at_k.to(device), slopes, backend=name, plan=plan,
                                              rows=[1, 0]))  # fmt: skip
            at = Where(layer=f"{name}, {n_queries} queries, {n_keys} keys, {kind}")
            names = ("output", "dq", "dk", "dv", "dslopes")[: len(got) - 1]
            for what, a, b in zip([*names, "output, rows of a cache"], [*wanted[: len(names)], wanted[0]], got,
                                  strict=True):  # fmt: skip
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
    return ([x.requires_grad_() for x in inputs], ranges.to(torch.int32), (positions[0], positions[1]),
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
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]


@check(18, "the same twice", "dropout or training mode is left on, or something is random that should not be")
def deterministic(patient: Patient, meter: Meter) -> None:
    """Two evaluations are equal bit for bit; scoring and generation put the model into evaluation mode, and back."""
    document, model, tokenizer = patient.documents[0], patient.exact, patient.tokenizer
    batch, sides = patient.pack([[document]]), ("once", "again")
    with torch.inference_mode():
        once, again = model.log_probs(batch), model.log_probs(batch)
    meter.same("log-probabilities", once, again, partial(patient.where, document), sides)
    model.train()
    modes: list[bool] = []
    handle = model.writer[0].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    try:
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
