#!/usr/bin/env bash
# What a GPU should be asked first, for a machine that is lent for 900 s in all, 600 s a command: one command of at most
# 590 s, every step of which is ended after the seconds that stand before it. All that was found by then is in $OUT.
#
#     OUT=/tmp/gpu bash benchmarks/first_gpu_session.sh
#
# 1 tests  the kernels against the reference; tests.txt names each result as it comes, and one that fails stops none.
#          test_low_precision_error[float32-…] may fail: a GPU's exp2 errs by up to 2 ulp (ex2.approx), and the test allows
#          twice eager PyTorch's error. Then out and gradients are off by a few 1e-7; anything larger is a bug.
# 2 tiles  which tiles are fastest, for a causal mask
# 3 race   against FlexAttention and others, with the tiles in use and with those of step 2 (tidal-tiles). It takes the
#          time that is left: rows may stay "not measured", those of FlashAttention-2 wherever it is not installed, and
#          max-autotune has to be asked for.
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

step tests 150 "$python" -m pytest -n 12 --dist load -vv --tb=short -p no:cacheprovider \
    tests/kernels/test_triton_attention.py tests/kernels/test_triton_plan.py tests/kernels/test_triton_decode.py \
    tests/kernels/test_triton_operator.py tests/train/test_gpu_step.py tests/infer/test_recorded.py::test_cuda_graphs \
    tests/doctor/test_doctor.py::test_examining_on_a_gpu

step tiles 150 "$python" -m benchmarks.attention_tiles --kernels forward dq dkdv --repeats 5 --budget-s 130 \
    --out "$out/tiles.json"

found=()
[ -s "$out/tiles.json" ] && found=(--tiles "$out/tiles.json")
step race 270 "$python" -m benchmarks.attention --lengths 8192 --decode-queries 1 8 32 --decode-contexts 32768 \
    --budget-s 240 --repeats 10 --out "$out/race.json" "${found[@]}"

exit "$failed"
