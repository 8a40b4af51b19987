#!/usr/bin/env bash
# A first real run on the CPU, in minutes: a TiM and a flow-matching baseline are trained on handwriting on the same
# budget, at the same time, one core each; both are sampled at 1 to 32 steps and scored, the baseline, which needs no
# derivative and ends first, while TiM still trains. Every command is printed before it runs, so that it can be repeated
# by hand. Starting again continues what was interrupted and skips what is finished.
#
#     bash launch/quickstart.sh          (or: make quickstart, which installs first)
#
# Environment:
#   RUNS       folder of data, runs and results                            (default: runs)
#   PROCESSES  training processes of each run, each a rank of DeepSpeed    (default: 1)
#   ENGINE     DeepSpeed settings                                          (default: ds_configs/cpu_smoke.json)
#   PORT       where a run's processes meet; the baseline takes the next   (default: 29500)
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
RUNS=${RUNS:-runs}
PROCESSES=${PROCESSES:-1}
ENGINE=${ENGINE:-ds_configs/cpu_smoke.json}
PORT=${PORT:-29500}
# In a training step the matrices are small: a second thread costs more in waiting than it computes. Sampling's have
# thousands of rows, and in the end it has the machine for itself.
SAMPLING_THREADS=${OMP_NUM_THREADS:-$(getconf _NPROCESSORS_ONLN)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

DATA=$RUNS/handwriting
TIM=$RUNS/handwriting_tim
FLOW=$RUNS/handwriting_flow
RESULTS=$RUNS/handwriting_nfe

if [ -d .venv/bin ]; then PATH=$PWD/.venv/bin:$PATH; fi
if ! command -v deepspeed > /dev/null; then
    echo "quickstart: deepspeed is not installed here; run 'make quickstart', which installs it" >&2
    exit 1
fi

show() {
    printf '\n== %s\n$' "$1"
    shift
    printf ' %q' "$@"
    printf '\n'
}

stage() {
    local title=$1 begin=$SECONDS
    show "$@"
    shift
    "$@"
    printf -- '-- %s: %d s\n' "$title" $((SECONDS - begin))
}

# Puts the command that trains a recipe into `command`.
training() {
    local recipe=$1 run=$2
    # Something answers there: another run on this machine.
    while (exec 3<> "/dev/tcp/127.0.0.1/$PORT") 2> /dev/null; do PORT=$((PORT + 1)); done
    command=(deepspeed --num_gpus "$PROCESSES" --master_port "$PORT" launch/train.py "$recipe"
        --ds "$ENGINE" --run "$run" "data.shards=$DATA")
    PORT=$((PORT + 1))
}

# Trains the baseline and scores it; ended, it ends what it runs.
baseline() {
    local running
    trap 'kill "$running" 2> /dev/null; exit 143' TERM
    "${command[@]}" &
    running=$!
    wait "$running"
    "${scoring[@]}" &
    running=$!
    wait "$running"
}

stage "handwriting: captioned strips and columns of digits" \
    python -m data_pipeline.handwriting --out "$DATA"

training launch/recipes/handwriting_flow.yaml "$FLOW"
mkdir -p "$RUNS"
show "training the flow-matching baseline, beside the next; its output: $FLOW.log" "${command[@]}"
scoring=(python launch/evaluate.py nfe "$FLOW/export" --label "flow matching" --data "$DATA" --out "$RESULTS")
show "then scoring it" "${scoring[@]}"
baseline > "$FLOW.log" 2>&1 &
baseline=$!
trap 'kill "$baseline" 2> /dev/null || true' EXIT

training launch/recipes/handwriting_tim.yaml "$TIM"
stage "training TiM" "${command[@]}"

echo "waiting for the baseline"
if ! wait "$baseline"; then
    tail -n 20 "$FLOW.log" >&2
    echo "quickstart: the baseline failed; its whole output is in $FLOW.log" >&2
    exit 1
fi
trap - EXIT

# The rows of the baseline are read back from $RESULTS.
export OMP_NUM_THREADS=$SAMPLING_THREADS
stage "quality against the number of steps" \
    python launch/evaluate.py nfe "$TIM/export" --baseline "$FLOW/export" \
    --label "TiM" --baseline-label "flow matching" --data "$DATA" --out "$RESULTS"

cat << END

== done in $((SECONDS / 60)) min $((SECONDS % 60)) s
table         $RESULTS/table.md
pictures      $RESULTS/samples_seen.png  $RESULTS/samples_held_back.png
plot          $RESULTS/quality.png
all scores    $RESULTS/results.json
TensorBoard   tensorboard --logdir $RUNS

Next, a prompt of your own (cells are 8x8 pixels; 'above' stacks them, 'before' puts them in a row):
  python launch/sample.py --export $TIM/export --prompt "a three above a seven" --size 16x8 --steps 4 --out $RUNS/mine
or other step counts:
  python launch/evaluate.py nfe $TIM/export --data $DATA --steps 1,3,16 --out $RUNS/more_steps
END
