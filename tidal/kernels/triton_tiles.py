# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Interval attention in Triton: what the forward and the backward kernels share, and how both work.

    forward    a program per tile of queries and head: visits its key tiles, keeps a running softmax
    delta      Σ_d dout · out of every query
    dq         as forward, with the weights recomputed from log Σ exp; also the slopes' gradient
    dkdv       a program per tile of keys and query head: visits the query tiles that see it; where asked, it adds to
               dq, too, in place of the kernel for dq

after Dao, "FlashAttention-2" (2023). Everything that decides a visit is in the plan (triton_plan.py): tiles that
need no mask get none, and the loops over them have no branches.

FAST, for bfloat16 and float16, means two things; float32 does without, to err no more than plain PyTorch does.
First, scores are in base 2: log2(e) is folded into scale and slopes. Second, ALiBi has two forms. In general

    score[i, j] = scale · q_i·k_j − slope · |p_i − p_j|

If all keys of a tile lie in the past, the absolute value goes away, and what depends on the query alone cancels
in the softmax. With an origin o = slope · r, where r is a position near the queries,

    score[i, j] + shift_i = scale · q_i·k_j + (slope · p_j − o)        shift_i = slope · p_i − o

costs one fused multiply-add a score and one a key, instead of three operations a score; o is rounded once, and so
cancels. Both forms meet in one row of the softmax, so the running maximum is of score + shift everywhere. The shift
costs precision: half an ulp of slope · p_j − o for keys near the query, so the form is used only where
slope · (spread of the queries' positions) < MOST_SPREAD. In dkdv the roles are exchanged: r is near the keys.

Registers decide how large a tile can be. What a loop needs is loaded right before it; results are stored under
masks of 64 bits, because those of the loads, being equal, would be kept through all loops.

Shapes: q [B, H, Lq, D], k and v [B, Hkv, Lk, D] with any strides but 1 for the last dimension; ranges, positions,
lse and delta are contiguous. Offsets of tiles are 64-bit, offsets inside a tile 32-bit.
"""

import torch
import triton
import triton.language as tl

from tidal.kernels.triton_plan import FULL, LOW, MERGED, PARTIAL, SPREAD

HEAD_DIMS = (32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1.0e30)
"""below any score, and finite: the maximum of no scores (−inf would give NaN in differences)"""
MOST_SPREAD = tl.constexpr(256.0)
"""limit of the shifted form: float32 then errs by at most 2^−16 in the score of a key near the query"""
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LENGTHS = ("n_heads", "group", "n_queries", "n_keys", "n_tiles", "n_query_tiles")
"""arguments for whose values no kernel is compiled anew"""


@triton.jit
def exponential(x, FAST: tl.constexpr):
    """e^x, or 2^x for scores in base 2."""
    return tl.exp2(x) if FAST else tl.exp2(x * LOG2E)


@triton.jit
def logarithm(x, FAST: tl.constexpr):
    """The inverse of exponential."""
    return tl.log2(x) if FAST else tl.log2(x) * LN2


@triton.jit
def in_base(x, FAST: tl.constexpr):
    """A scale or slope, times log2(e) where scores are in base 2."""
    return x * LOG2E if FAST else x * 1.0


@triton.jit
def dot(a, b, acc=None):
    """a · b + acc in float32; float32 operands are multiplied in full precision, not as tf32."""
    if INTERPRETED:  # Triton's interpreter multiplies the bits of bfloat16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


# --------------------------------------------------------------------------------------- what a program visits


@triton.jit
def work_of(order, n_tiles, SIZE: tl.constexpr, AGAIN: tl.constexpr = False):
    """What this program works on: an entry of the plan's order, and its batch row, its head and its first row in there;
    all int64. If AGAIN, it is read from memory once more, so that no registers keep it through the loops.

    One head after another, each from its longest tiles on, so that programs which run at the same time read the same
    keys and values (in dkdv queries), and find them in the L2 cache. Batch rows are mixed: one head of all rows still
    fits there (16 MB of keys and values for 32,768 tokens at D 128), and fewer long tiles are left for the end than if
    rows, too, came one after another.
    """
    slot = tl.load(order + tl.program_id(0), volatile=AGAIN)
    batch, first = slot // n_tiles, slot % n_tiles * SIZE
    return slot.to(tl.int64), batch.to(tl.int64), tl.program_id(1).to(tl.int64), first.to(tl.int64)


@triton.jit
def partial_tiles(row):
    """Read the tiles that need the mask from a row of the plan (triton_plan.py).

    Returns how many there are, how many of these need one range only, which is all or none, and their four segments in
    the form that `segment_tile` takes.
    """
    part = row + PARTIAL
    a_0, a_1, a_2, a_3 = tl.load(part), tl.load(part + 2), tl.load(part + 4), tl.load(part + 6)
    n_0 = tl.load(part + 1) - a_0
    n_1 = n_0 + tl.load(part + 3) - a_1
    n_2 = n_1 + tl.load(part + 5) - a_2
    n_3 = n_2 + tl.load(part + 7) - a_3
    n_single = tl.where(tl.load(row + MERGED) != 0, 0, n_3)
    return n_3, n_single, (n_0, n_1, n_2, a_0, a_1 - n_0, a_2 - n_1, a_3 - n_2)


@triton.jit
def full_tiles(row):
    """Read the tiles that need no mask from a row of the plan: how many, and their two segments as in partial_tiles."""
    a_0, a_1 = tl.load(row + FULL), tl.load(row + FULL + 2)
    n_0 = tl.load(row + FULL + 1) - a_0
    n_1 = n_0 + tl.load(row + FULL + 3) - a_1
    return n_1, (n_0, n_1, n_1, a_0, a_1 - n_0, 0, 0)


@triton.jit
def segment_tile(i, segments):
    """The i-th tile of up to four segments that follow one another: arithmetic instead of a list in memory.

    segments: the number of tiles in the first one, two and three, then for every segment what to add to i.
    """
    n_0, n_1, n_2, a_0, a_1, a_2, a_3 = segments
    return i + tl.where(i < n_0, a_0, tl.where(i < n_1, a_1, tl.where(i < n_2, a_2, a_3)))


# ------------------------------------------------------------------------------------------- loads and scores


@triton.jit
def load_rows(pointer, first, stride, n_left, N: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """Load the rows first … first + N of a matrix: [N, D] in its dtype. If MASKED, rows from n_left on are zeros."""
    local = tl.arange(0, N)[:, None]
    pointers = pointer + first.to(tl.int64) * stride + (local * stride + tl.arange(0, D)[None, :])
    if MASKED:
        return tl.load(pointers, mask=local < n_left, other=0.0)
    return tl.load(pointers)


@triton.jit
def row_numbers(N: tl.constexpr):
    """0 … N − 1, for loading one number a row inside of a loop.

    As tl.arange, but nothing that Triton could work out anew in another layout. It would else (up to 3.6) move the load
    into the layout of the scores, in which a thread copies all the numbers that it will need, up to 32 of them four
    bytes each, for every row, and every warp does so. Like this a thread copies one.
    """
    return tl.cumsum(tl.full([N], 1, tl.int32), 0) - 1


@triton.jit
def load_some(pointer, first, n_left, other, N: tl.constexpr, MASKED: tl.constexpr):
    """Load one number a row, of the rows first … first + N: [N]. If MASKED, those from n_left on are `other`."""
    local = row_numbers(N)
    if MASKED:
        return tl.load(pointer + (first + local), mask=local < n_left, other=other)
    return tl.load(pointer + (first + local))


@triton.jit
def store_rows(pointer, first, stride, n_left, value, N: tl.constexpr, D: tl.constexpr):
    """Store value [N, D] into the rows first … first + N of a matrix, in its dtype; not those from n_left on."""
    local = tl.arange(0, N)[:, None]
    pointers = pointer + first.to(tl.int64) * stride + (local * stride + tl.arange(0, D)[None, :])
    tl.store(pointers, value.to(pointer.dtype.element_ty), mask=local < n_left)


@triton.jit
def add_rows(pointer, first, stride, n_left, value, N: tl.constexpr, D: tl.constexpr):
    """Add value [N, D] to the rows of a float32 matrix that other programs add to at the same time, as store_rows."""
    local = tl.arange(0, N)[:, None]
    pointers = pointer + first.to(tl.int64) * stride + (local * stride + tl.arange(0, D)[None, :])
    tl.atomic_add(pointers, value, mask=local < n_left, sem="relaxed")


@triton.jit
def load_range(ranges, local, n_left, n_keys, AXIS: tl.constexpr):
    """Load one of the two ranges of some queries: int32 start and end, which is cut to n_keys.

    Both have a new axis AXIS, so that they broadcast over keys. Queries from n_left on have empty ranges.
    """
    start = tl.load(ranges + local * 4, mask=local < n_left, other=0)
    end = tl.minimum(tl.load(ranges + local * 4 + 1, mask=local < n_left, other=0), n_keys)
    return tl.expand_dims(start, AXIS), tl.expand_dims(end, AXIS)


@triton.jit
def load_ranges(ranges, local, n_left, n_keys, AXIS: tl.constexpr):
    """Load both ranges, as load_range: start_0, end_0, start_1, end_1."""
    start_0, end_0 = load_range(ranges, local, n_left, n_keys, AXIS)
    start_1, end_1 = load_range(ranges + 2, local, n_left, n_keys, AXIS)
    return start_0, end_0, start_1, end_1


@triton.jit
def one_range(bounds, second):
    """The first or the second of the ranges that `load_ranges` loaded: start and end."""
    start_0, end_0, start_1, end_1 = bounds
    return tl.where(second, start_1, start_0), tl.where(second, end_1, end_0)


@triton.jit
def score_of(
    product, q_position, k_position, key, bounds, origin, scale, slope,
    RANGES: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Scores of a tile from its products q·k, float32; all arguments broadcast against these.

    If SHIFTED, the shift (see above) is in them, and nothing is masked. Keys outside the ranges get −inf: `bounds` has
    the start and end of one or two of them (RANGES; 0 for no mask).
    """
    if SHIFTED:
        return product * scale + tl.fma(k_position, slope, -origin)
    # fused by hand: what a compiler fuses may differ between the passes, and so would the rounding
    score = tl.fma(product, scale, -slope * tl.abs(q_position - k_position))
    if RANGES == 1:
        start, end = bounds
        score = tl.where((key >= start) & (key < end), score, float("-inf"))
    if RANGES == 2:
        start_0, end_0, start_1, end_1 = bounds
        seen = ((key >= start_0) & (key < end_0)) | ((key >= start_1) & (key < end_1))
        score = tl.where(seen, score, float("-inf"))
    return score


@triton.jit
def may_shift(entry, slope):
    """Whether a program uses the shifted form in its full tiles, and the origin to use it with.

    entry: the plan's row or column. What it says is the same for all threads, as what they would find out together is,
    too; but the compiler knows, and need not keep addresses of shared memory in each thread's registers.
    """
    spread, low = tl.load(entry + SPREAD), tl.load(entry + LOW)
    shifts = tl.abs(slope) * spread.to(tl.float32, bitcast=True) < MOST_SPREAD
    return shifts, slope * low.to(tl.float32, bitcast=True)
