#!/usr/bin/env bash
# A first real run on the CPU, in minutes: a TiM and a flow-matching baseline are trained on handwriting on the same
# budget, sampled at 1 to 32 steps, and scored. Every command is printed before it runs, so that it can be repeated by
# hand. Starting again continues what was interrupted and skips what is finished.
#
#     bash launch/quickstart.sh          (or: make quickstart, which installs first)
#
# Environment:
#   RUNS       folder of data, runs and results                      (default: runs)
#   PROCESSES  training processes, each a rank of DeepSpeed          (default: 1)
#   ENGINE     DeepSpeed settings                                    (default: ds_configs/cpu_smoke.json)
#   PORT       where the processes meet; the next free one is taken  (default: 29500)
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
RUNS=${RUNS:-runs}
PROCESSES=${PROCESSES:-1}
ENGINE=${ENGINE:-ds_configs/cpu_smoke.json}
PORT=${PORT:-29500}

DATA=$RUNS/handwriting
TIM=$RUNS/handwriting_tim
FLOW=$RUNS/handwriting_flow
RESULTS=$RUNS/handwriting_nfe

if [ -d .venv/bin ]; then PATH=$PWD/.venv/bin:$PATH; fi
if ! command -v deepspeed > /dev/null; then
    echo "quickstart: deepspeed is not installed here; run 'make quickstart', which installs it" >&2
    exit 1
fi

stage() {
    local title=$1 begin=$SECONDS
    shift
    printf '\n== %s\n$' "$title"
    printf ' %q' "$@"
    printf '\n'
    "$@"
    printf -- '-- %s: %d s\n' "$title" $((SECONDS - begin))
}

train() {
    local title=$1 recipe=$2 run=$3
    # Something answers there: another run on this machine.
    while (exec 3<> "/dev/tcp/127.0.0.1/$PORT") 2> /dev/null; do PORT=$((PORT + 1)); done
    stage "$title" deepspeed --num_gpus "$PROCESSES" --master_port "$PORT" launch/train.py "$recipe" \
        --ds "$ENGINE" --run "$run" "data.shards=$DATA"
}

stage "handwriting: captioned strips and columns of digits" \
    python -m data_pipeline.handwriting --out "$DATA"

train "training TiM" launch/recipes/handwriting_tim.yaml "$TIM"
train "training the flow-matching baseline" launch/recipes/handwriting_flow.yaml "$FLOW"

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
