#!/usr/bin/env bash
# Everything that needs a GPU, in under 8 minutes: correctness on the device first, then the benchmark grid.
# Run from the repository root in an environment with torch, triton, transformers and pytest:
#
#   bash kernels/measure_on_gpu.sh [OUTPUT]
set -euo pipefail
cd "$(dirname "$0")/.."
output=${1:-runs/bench-kernels-gpu}
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)

timeout 180 "$python" -m pytest tests/kernels/test_triton_kernels.py -m "slow or not slow" -p no:cacheprovider
if command -v compute-sanitizer > /dev/null; then
    timeout 60 compute-sanitizer --error-exitcode 1 "$python" -m pytest tests/kernels/test_triton_kernels.py \
        -k "test_layer_and_gradients and some_unused" -p no:cacheprovider
fi
timeout 240 "$python" -m deepseek_cli.main bench kernels --grid gpu --seconds 1 --output "$output" --overwrite
