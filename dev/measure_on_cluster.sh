#!/usr/bin/env bash
# What needs several GPUs, in five parts:
#
#   bash dev/measure_on_cluster.sh [FOLDER] [PART ...]
#
#   exchange   all-to-all between the processes: milliseconds and GB/s by the number of tokens
#   alone      one process with the same rows per step, which the others are held against
#   steps      the same training by each layout: loss against one process, seconds per step
#   saves      seconds that the training stands still for a checkpoint: whole, in parts, in the background
#   resume     each layout stopped in the middle of a step; the same command goes on and must end with the same losses
#
# Run from the repository root. Without parts: all five. FOLDER (default: $OUT, else runs/cluster) gets
#
#   summary.txt    one line per step, the machine, the tables
#   results.json   every number
#   log.txt        what the steps printed
#
#   PROCESSES=8     processes in all (default: the GPUs of this machine)
#   PRESET=1b       a model size of deepseek-moe, with TOKENS=4096 per row and ROWS=1 per process
#   ONLY='fsdp2'    layouts whose name has this
#   STEPS=24        optimizer steps of each training; a checkpoint comes after each third of them
#   LIMIT=600       seconds that one step may take
#
# On several machines start it on each, with one FOLDER that all see: NODES=4 NODE_RANK=0 MASTER=first-host, PROCESSES of
# all together. No step stops the ones after it. With DRY_RUN=1 the same steps run on two CPU processes and a tiny model.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
begun=$SECONDS
folder=$(realpath -m "${1:-${OUT:-runs/cluster}}")
parts=" ${*:2} "
[ "$#" -gt 1 ] || parts=" exchange alone steps saves resume "
for part in $parts; do
    [[ " exchange alone steps saves resume " == *" $part "* ]] || {
        echo "part: got $part, expected exchange, alone, steps, saves or resume" >&2
        exit 2
    }
done
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
gpus=$(nvidia-smi --list-gpus 2> /dev/null | wc -l)
preset=${PRESET:-1b} tokens=${TOKENS:-4096} rows=${ROWS:-1} num_steps=${STEPS:-24} hidden=2048
processes=${PROCESSES:-$gpus}
if [ "${DRY_RUN:-0}" = 1 ]; then
    export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu
    preset=${PRESET:-debug} tokens=${TOKENS:-32} num_steps=${STEPS:-6} hidden=64
    processes=${PROCESSES:-2}
fi
save_steps=$((num_steps / 3))
[ "$processes" -ge 2 ] || {
    echo "PROCESSES: got $processes, expected at least 2 (DRY_RUN=1 starts two on the CPU)" >&2
    exit 2
}
rank=${NODE_RANK:-0} limit=${LIMIT:-600}
runs=$folder/runs
if [ "$rank" = 0 ]; then
    rm -rf "$runs"
    mkdir -p "$runs" "$folder/times"
fi
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
launch=$("$python" -c "from deepseek_training.engine import LAUNCH_FOLDER as f; print(f)") || exit 1
layouts="data fsdp2 fsdp2_sharded expert_parallel"
"$python" -c "import deepspeed" 2> /dev/null && layouts="$layouts zero3"

say() { [ "$rank" != 0 ] || echo "[$((SECONDS - begun)) s] $*" | tee -a "$folder/summary.txt"; }

# step NAME COMMAND...: run it, never longer than LIMIT, never stopping the script.
step() {
    local name=$1 status=0 at=$SECONDS
    shift
    timeout --signal INT --kill-after 15 "$limit" "$@" >> "$folder/log.txt" 2>&1 || status=$?
    say "$name: exit $status after $((SECONDS - at)) s"
}

# started LAYOUT COMMAND...: as PROCESSES processes of the layout's engine.
started() {
    local config=$1 machines=()
    shift
    [ "$config" = data ] && config=expert_parallel # its file only starts processes
    [ "${NODES:-1}" -gt 1 ] && machines=(--num_machines "$NODES" --machine_rank "$rank" --main_process_ip "$MASTER" \
        --main_process_port "${PORT:-29511}")
    "$python" -m accelerate.commands.accelerate_cli launch --config_file "$launch/$config.yaml" \
        --num_processes "$processes" "${machines[@]}" "$@"
}
export -f started
export python launch processes rank

# settings PASSES: of the training that all layouts share; dropout's draws would depend on the layout.
settings() {
    echo "pretrain pretrain-debug --preset $preset --sequence-length $tokens --batch-size $rows --max-steps $num_steps" \
        "--gradient-accumulation-steps $1 --logging-steps 2 --save-steps 0 --eval-bytes 2000 --check-bigram false --report-to []" \
        "--model {\"hidden_dropout\":0.0,\"tie_word_embeddings\":false,\"max_position_embeddings\":$tokens}" \
        "--sample-prompts []"
}

# trained NAME LAYOUT SETTINGS...: a run under the name, its times beside it.
trained() {
    local name=$1 layout=$2
    shift 2
    [[ $name =~ ${ONLY:-.} ]] || return 0
    [ "$layout" = expert_parallel ] && set -- "$@" --expert-parallel-size "$processes"
    # shellcheck disable=SC2046
    step "$name" env TIMES="$folder/times/$name.json" bash -c 'started "$@"' _ "$layout" dev/cluster_worker.py train \
        $(settings 2) --output "$runs/$name" "$@"
}
does() { [[ $parts == *" $1 "* ]]; }

{
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    nvidia-smi topo -m
    "$python" -c "import torch, transformers, accelerate as a; print(torch.__version__, transformers.__version__, a.__version__)"
} 2> /dev/null | { [ "$rank" = 0 ] && tee -a "$folder/summary.txt"; }

if does exchange; then
    step exchange env TIMES="$folder/times/exchange.json" bash -c 'started "$@"' _ data dev/cluster_worker.py exchange \
        "$hidden"
fi
if does alone && [ "$rank" = 0 ]; then
    # shellcheck disable=SC2046
    step alone env TIMES="$folder/times/alone.json" "$python" dev/cluster_worker.py train \
        $(settings $((2 * processes))) --output "$runs/alone"
    # On CPUs one process can have every core too.
    # shellcheck disable=SC2046
    [ "${DRY_RUN:-0}" = 1 ] && step alone-all-cores env OMP_NUM_THREADS="$processes" \
        TIMES="$folder/times/alone-all-cores.json" "$python" dev/cluster_worker.py train \
        $(settings $((2 * processes))) --output "$runs/alone-all-cores"
fi
if does steps; then
    for layout in $layouts; do trained "$layout" "$layout"; done
fi
if does saves; then
    for layout in fsdp2 fsdp2_sharded expert_parallel; do
        [ -f "$folder/times/$layout.json" ] || trained "$layout" "$layout" # to compare with
        trained "$layout-saving" "$layout" --save-steps "$save_steps"
        [ "$layout" = fsdp2 ] || trained "$layout-saving-behind" "$layout" --save-steps "$save_steps" \
            --save-in-background true
    done
fi
if does resume; then
    for layout in $layouts; do
        STOP_AT=$((save_steps + 2)) trained "$layout-stopped" "$layout" --save-steps "$save_steps"
        trained "$layout-stopped" "$layout" --save-steps "$save_steps"
    done
fi
[ "$rank" = 0 ] && "$python" dev/cluster_table.py "$folder" "$save_steps" | tee -a "$folder/summary.txt"
say "done"
exit 0
