#!/usr/bin/env bash
# A student of 0.1M parameters on made-up tokens, for seconds on processors: try a launcher, a cluster, an sbatch file.
#
#   SAVE=runs/tiny bash scripts/pretrain_let_tiny.sh
#
#   SAVE      checkpoints and metrics; on a disk that all nodes share. The same command resumes from it
#   TEACHER   Hugging Face directory of a teacher with 61 ids or more (default: none)
#
# Several nodes, DRY_RUN=1 and more: scripts/recipe.sh (GPUS_PER_NODE, the ranks on this node, is 2 here).
# Under Slurm: scripts/slurm/pretrain_let.sbatch.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"

need SAVE "a directory for checkpoints, on a disk that all nodes share"
GPUS_PER_NODE="${GPUS_PER_NODE:-2}"

model=(
    --num-layers 4 --hidden-size 48 --ffn-hidden-size 96 --num-attention-heads 4
    --seq-length 32 --position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear
    --untie-embeddings-and-output-weights --hidden-dropout 0.1 --attention-dropout 0
)
let=()
if [ -n "${TEACHER:-}" ] && [ "$LET" = on ]; then
    let=(--let-teacher-load "$TEACHER" --let-student-layer 2 --let-weight 1 --let-stop-fraction 0.5)
fi
schedule=(
    --micro-batch-size 2 --global-batch-size 8 --train-iters 20
    --lr 3e-3 --lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0
)
layout=(
    --use-distributed-optimizer # data parallel alone; the optimizer's state is dealt over the ranks
)
records=(
    --mock-data --tokenizer-type NullTokenizer --vocab-size 60 --num-workers 1
    --save "$SAVE" --load "$SAVE" --save-interval 5
    --exit-signal-handler # SIGTERM or SIGUSR1: save, leave with 3
    --eval-iters 0 --log-interval 1
)

start "${model[@]}" "${let[@]}" "${schedule[@]}" "${layout[@]}" "${records[@]}" "$@"
