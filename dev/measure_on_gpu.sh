#!/usr/bin/env bash
# What needs a GPU, in four parts:
#
#   bash dev/measure_on_gpu.sh [FOLDER] [PART ...]
#
#   check      correctness on the device                                                          490 s at most
#   bench      the fused layer beside its peers                                                   170
#   compare    whole models, the host's share, LoRA, 4 bits, FP8 and each product with other
#              tiles, beside what they replace                                                    515
#   profile    time per kernel, Nsight Compute, compute-sanitizer, the slow layer tests and forty
#              random layers                                                                      360
#
# Each needs a call of its own, with LIMIT at least so large: a part that comes second, or has less time, is cut. The
# limits leave room beyond what the steps took on an H100 with twelve processes and nothing compiled.
#
# Run from the repository root with torch, triton and pytest. No step stops the ones after it, each has a time limit, and
# what it measured until then is kept. All steps together end after LIMIT seconds (default 520). Without parts: all
# four. ONLY='lora|fp8' runs the steps with such a name. FOLDER (default: $OUT, else runs/gpu) gets at most seven files:
#
#   summary.txt     one line per step, the machine, the end of every table
#   tests.txt       what failed, in full
#   tables.txt      every table
#   bench.json      the fused layer beside its peers: milliseconds, standard errors, TFLOP/s, memory
#   results.json    what the other steps measured, by step
#   profile.txt     time per kernel of a training step; Nsight Compute, if it is there
#   memcheck.txt    compute-sanitizer, if it is there
#
# With DRY_RUN=1 the same steps run without a GPU, by Triton's interpreter and on the smallest grid.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
begun=$SECONDS
limit=${LIMIT:-520}
folder=$(realpath -m "${1:-${OUT:-runs/gpu}}")
parts=" ${*:2} "
[ "$#" -gt 1 ] || parts=" check bench compare profile "
for part in $parts; do
    [[ " check bench compare profile " == *" $part "* ]] || {
        echo "part: got $part, expected check, bench, compare or profile" >&2
        exit 2
    }
done
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$folder"
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
"$python" -c "import deepseek_cli" 2> /dev/null || { # not installed: by links under the import names
    mkdir "$scratch/links"
    ln -s "$PWD/modeling_deepseek" "$scratch/links/modeling_deepseek"
    for room in kernels records model_cards training eval serving cli; do
        ln -s "$PWD/$room" "$scratch/links/deepseek_$room"
    done
    export PYTHONPATH="$scratch/links${PYTHONPATH:+:$PYTHONPATH}"
}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TRITON_CACHE_DIR="$scratch/triton"
grid=lease
select=(-m "slow or not slow")
if [ "${DRY_RUN:-0}" = 1 ]; then
    export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
    grid=quick
    select=(-m "not slow and not gpu")
fi
workers=()
"$python" -c "import xdist" 2> /dev/null && [ "${DRY_RUN:-0}" != 1 ] && workers=(-n 12 --dist loadgroup)
pytest=("$python" -m pytest -p no:cacheprovider -p no:benchmark --maxfail=40 --tb=short "${workers[@]}" "${select[@]}")

say() { echo "[$((SECONDS - begun)) s] $*" | tee -a "$folder/summary.txt"; }

# step SECONDS NAME LOG COMMAND...: run it, never longer than what is left, never stopping the script.
step() {
    local seconds=$1 name=$2 log=$3 status=0 left=$((limit - (SECONDS - begun)))
    shift 3
    [[ $name =~ ${ONLY:-.} ]] || return 0
    [ "$left" -lt "$seconds" ] && seconds=$left
    if [ "$seconds" -lt 8 ]; then
        say "$name: left out, no time"
        return
    fi
    local at=$SECONDS
    timeout --signal INT --kill-after 15 "$seconds" "$@" >> "$log" 2>&1 || status=$?
    say "$name: exit $status after $((SECONDS - at)) s$([ "$status" -ge 124 ] && echo ", stopped by its limit of $seconds s")"
}

describe() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit --format=csv,noheader
    "$python" - << 'CODE'
import importlib.util, platform, sys
import torch
print("python", platform.python_version(), "torch", torch.__version__)
for name in ("triton", "transformers", "peft", "accelerate", "liger_kernel", "scattermoe", "sonicmoe", "pytest", "xdist"):
    found = importlib.util.find_spec(name)
    print(name, getattr(__import__(name), "__version__", "there") if found else "missing")
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0))
CODE
}
describe 2>&1 | tee -a "$folder/summary.txt"

tests=tests/kernels/gpu
is_dry=${DRY_RUN:-0}
does() { [[ $parts == *" $1 "* ]]; }
# timed SECONDS MODULE: what a module of the benchmarks measures, into results/MODULE.json
timed() {
    step "$1" "$2" "$folder/tables.txt" "$python" -m "deepseek_cli.benchmarks.$2" --output "$scratch/results"
}
mkdir -p "$scratch/results"

if does check; then
    step 200 "tests on the device" "$folder/tests.txt" "${pytest[@]}" $tests/test_rows_on_device.py \
        $tests/test_on_device.py $tests/test_lora_on_device.py $tests/test_fp8_on_device.py \
        $tests/test_four_bit_on_device.py
    step 130 "tests of the shipped tiles" "$folder/tests.txt" "${pytest[@]}" $tests/test_production_tiles.py \
        $tests/test_planted_faults.py
    step 80 "other operators" "$folder/tests.txt" "${pytest[@]}" $tests/test_triton_rows.py $tests/test_triton_lora.py \
        $tests/test_fp8_kernels.py $tests/test_fp8_lora_kernels.py $tests/test_four_bit_kernels.py \
        $tests/test_triton_epilogue.py -m "not slow"
    step 80 "layer tests" "$folder/tests.txt" "${pytest[@]}" $tests/test_triton_layer.py \
        $tests/test_triton_kernels.py $tests/test_tune.py -m "not slow"
fi
compile_ahead() { # so that no timing waits for the compiler
    [ "$is_dry" = 1 ] || step 60 "compiled ahead" "$folder/tables.txt" "$python" \
        -m deepseek_cli.benchmarks.kernel_variants --compile-only
}
if does bench; then
    compile_ahead
    step 110 "benchmark" "$folder/tables.txt" "$python" -m deepseek_cli.main bench kernels --grid "$grid" \
        --seconds 1.5 --output "$scratch/bench" --overwrite
    cp "$scratch/bench/results.json" "$folder/bench.json" 2> /dev/null
fi
if does compare && [ "$is_dry" = 1 ]; then
    step 90 whole_model_on_gpu "$folder/tables.txt" env -u TRITON_INTERPRET "$python" \
        -m deepseek_cli.benchmarks.whole_model_on_gpu --tiny --per-row 0.01 --output "$scratch/results"
fi
if does compare && [ "$is_dry" != 1 ]; then
    timed 175 whole_model_on_gpu
    timed 45 host_cost
    timed 60 lora_on_gpu
    timed 40 four_bit_on_gpu
    timed 75 fp8_on_gpu
    [[ kernel_variants =~ ${ONLY:-.} ]] && ONLY=. compile_ahead
    timed 60 kernel_variants
fi
if does profile; then
    step 30 "profile" "$folder/profile.txt" "$python" -m deepseek_cli.benchmarks.kernel_profile
fi
if does profile && [ "$is_dry" != 1 ]; then
    step 150 "slow layer tests" "$folder/tests.txt" "${pytest[@]}" $tests/test_triton_layer.py \
        $tests/test_triton_kernels.py $tests/test_tune.py -m slow
    # Every shape compiles kernels of its own.
    step 90 "forty random layers" "$folder/tests.txt" "${pytest[@]}" "tests/kernels/test_fuzz.py::test_layer["{0..39}"]"
    command -v compute-sanitizer > /dev/null && step 45 "memcheck" "$folder/memcheck.txt" \
        compute-sanitizer --tool memcheck --target-processes all "$python" -m pytest -p no:cacheprovider -q \
        $tests/test_production_tiles.py -k "test_a_tile_of_every_kernel"
    command -v ncu > /dev/null && step 45 "counters" "$folder/profile.txt" ncu --clock-control none \
        --section SpeedOfLight --section Occupancy --section WarpStateStats --section LaunchStats \
        --kernel-name-base function \
        --kernel-name 'regex:gate_up|grouped_gemm|down_backward|weight_gradient|combine' --launch-count 8 \
        "$python" -m deepseek_cli.benchmarks.kernel_profile --once
fi
"$python" - "$scratch/results" "$folder/results.json" << 'CODE'
import json, pathlib, sys
found = {path.stem: json.loads(path.read_text()) for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json"))}
if found:
    pathlib.Path(sys.argv[2]).write_text(json.dumps(found, indent=1))
CODE
{
    grep -aE "passed|failed|FAILED|ERROR" "$folder/tests.txt" | tail -40
    grep -a "ERROR SUMMARY" "$folder/memcheck.txt"
    tail -80 "$folder/tables.txt"
    head -60 "$folder/profile.txt"
} 2> /dev/null | tee -a "$folder/summary.txt"
say "done"
exit 0
