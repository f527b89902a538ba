#!/usr/bin/env bash
# Everything that needs a GPU, in under 8 minutes: correctness on the device first, then the benchmark grid.
# Run from the repository root in an environment with torch, triton, transformers and pytest (with pytest-xdist eight
# processes compile kernels at a time, without it one):
#
#   bash kernels/measure_on_gpu.sh [OUTPUT]
#
# A benchmark that was cut short is taken up by the next run; a finished one in OUTPUT is kept, and named.
#
# With DRY_RUN=1 the same steps run without a GPU, by Triton's interpreter and on the smallest grid.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)
scratch=$(mktemp -d)
trap 'rm -r "$scratch"' EXIT
if ! "$python" -c "import deepseek_cli" 2> /dev/null; then  # not installed: by links under the import names
    links=$scratch/links
    mkdir "$links"
    ln -s "$PWD/modeling_deepseek" "$links/modeling_deepseek"
    for folder in kernels model_cards training eval cli; do ln -s "$PWD/$folder" "$links/deepseek_$folder"; done
    export PYTHONPATH="$links${PYTHONPATH:+:$PYTHONPATH}"
fi
pytest=("$python" -m pytest -p no:cacheprovider -x)
workers=()
grid=gpu
if [ "${DRY_RUN:-0}" = 1 ]; then
    export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
    grid=quick
fi
output=${1:-runs/bench-kernels-$grid}
export HF_HUB_OFFLINE=1 # What is not here is left out, not waited for.
"$python" -c "import xdist" 2> /dev/null && workers=(-n 8)

# Every dtype and shape is compiled anew, so time may run out before the tests do: said, and no failure.
check() {
    local seconds=$1 status=0 begun=$SECONDS
    shift
    timeout --signal INT --kill-after 10 "$seconds" "$@" | tee "$scratch/log" || status=$?
    # 137: not ended by itself within ten seconds after the interrupt.
    if grep -q "FAILED\|[0-9] failed" "$scratch/log"; then
        exit 1
    elif [ "$status" -eq 124 ] || { [ "$status" -eq 137 ] && [ $((SECONDS - begun)) -ge "$seconds" ]; }; then
        echo "stopped after $seconds s without a failure, and without having run every test: $*"
    elif [ "$status" -ne 0 ]; then
        exit "$status"
    fi
}

check 90 "${pytest[@]}" "${workers[@]}" tests/kernels/test_triton_kernels.py tests/kernels/test_triton_layer.py \
    tests/kernels/test_tune.py -m "slow or not slow"
check 50 "${pytest[@]}" "${workers[@]}" tests/kernels/test_fuzz.py -m slow
if command -v compute-sanitizer > /dev/null; then
    check 50 compute-sanitizer --error-exitcode 1 "${pytest[@]}" tests/kernels/test_triton_layer.py \
        -k "test_routing_patterns and some_unused-7"
fi
timeout 240 "$python" -m deepseek_cli.main bench kernels --grid "$grid" --seconds 1 --output "$output" || {
    echo "the benchmark ended with $?; what it measured is in $output, and the same command goes on from there" >&2
    exit 1
}
