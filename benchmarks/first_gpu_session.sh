#!/usr/bin/env bash
# What a GPU should be asked first, for a machine that is lent for 900 s in all, 600 s a command: one command of at most
# 585 s, every step of which is ended after the seconds that stand before it. All that was found by then is in $OUT, at
# most eight files. First what issues 3 and 4 have to show, last what the next session can build upon.
#
#     OUT=/tmp/gpu bash benchmarks/first_gpu_session.sh
#
# 1 tests     the kernels against the reference, first of all what only a GPU can show, CUDA graphs among it; tests.txt
#             names each result as it comes, and one that fails stops none, not even if CUDA is lost to its process
#             ("worker crashed" then follows the error itself). test_low_precision_error[float32-…] may fail: a GPU's
#             exp2 errs by up to 2 ulp (ex2.approx), and the test allows twice eager PyTorch's error. The ratios that
#             it prints are up to about 3 then; anything larger is a bug.
# 2 race      against FlexAttention: plans, decoding and attention. It takes the time that is left: rows may stay "not
#             measured", those of FlashAttention-2 wherever it is not installed; other rivals have to be asked for.
# 3 decoding  of whole models, with CUDA graphs, on English from PyTorch's and Python's docstrings, which are collected
#             beside the tests
# 4 tiles     which tiles are fastest, for a causal mask, the kernel with the most work first; pasted into TILES they race
#             in a later session
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
out=${OUT:?set OUT to the folder that the results go to}
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
mkdir -p "$out" || exit 2
failed=0

step() { # name, seconds, command: its output goes to NAME.txt, its end is also shown
    timeout --kill-after=5 "$2" "${@:3}" >"$out/$1.txt" 2>&1
    local code=$?
    [ "$code" -eq 0 ] || failed=1
    tail -n 40 "$out/$1.txt" | cut -c1-400
    echo "== $1: exit code $code (124: out of time), $SECONDS s since the start"
}

timeout --kill-after=5 130 "$python" -W ignore -c '
import pathlib, sysconfig, torch
from benchmarks.decoding import english
for root in (sysconfig.get_path("stdlib"), pathlib.Path(torch.__file__).parent):
    print(english(pathlib.Path(root)), end="\n\n")' >"$out/english.txt" &

step tests 130 "$python" -m pytest -n 12 --dist load -vv --tb=short -p no:cacheprovider \
    tests/kernels/test_triton_attention.py tests/kernels/test_triton_plan.py tests/kernels/test_triton_decode.py \
    tests/kernels/test_triton_operator.py tests/train/test_gpu_step.py tests/infer/test_recorded.py::test_cuda_graphs \
    tests/doctor/test_doctor.py::test_examining_on_a_gpu
wait

step race 235 "$python" -m benchmarks.attention --rivals flex flash-attention-2 --lengths 8192 \
    --decode-queries 1 8 32 --decode-contexts 32768 --budget-s 180 --repeats 10 --out "$out/race.json"

step decoding 90 "$python" -m benchmarks.decoding --device cuda --cuda-graphs --precision bf16 --batch 1 8 64 \
    --context 1024 256 4096 --budget-s 65 --repeats 3 --text "$out/english.txt" --out "$out/decoding.json"

step tiles 105 "$python" -m benchmarks.attention_tiles --kernels forward dkdv dq decode --repeats 5 --budget-s 70 \
    --out "$out/tiles.json"

exit "$failed"
