#!/usr/bin/env bash
# LET (arXiv 2602.05393): a LLaMA-style student of 3B parameters. For 8 GPUs of 80 GB or more.
#
#   DATA=data/pile_text_document TEACHER=teachers/SmolLM-135M SAVE=runs/3b bash scripts/pretrain_let_3b.sh
#
#   DATA      data, preprocessed with the teacher's tokenizer: a prefix, or "WEIGHT PREFIX WEIGHT PREFIX ..."
#   TEACHER   Hugging Face directory of SmolLM-135M (width 576), OPT-125M or Pythia-160M (768)
#   SAVE      checkpoints and metrics; on a disk that all nodes share. The same command resumes from it
#
# Several nodes, PLAN=1 (what it will cost), DRY_RUN=1 and more: scripts/recipe.sh. Under Slurm: scripts/slurm/pretrain_let.sbatch.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"

need DATA "the prefix of data preprocessed with the teacher's tokenizer, such as data/pile_text_document"
need TEACHER "the Hugging Face directory of SmolLM-135M, OPT-125M or Pythia-160M"
need SAVE "a directory for checkpoints, on a disk that all nodes share"
read -ra blend <<<"$DATA"

# 2.9B parameters in the layers and 0.3B in embedding and output: 3.25B with SmolLM's 49,152 ids. The shape is ours.
model=(
    --num-layers 26 --hidden-size 3072 --ffn-hidden-size 8192 --num-attention-heads 24
    --seq-length 2048 --position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear
    --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
)
# Published: weight 0.1 at 1.4B, falling to 0. When it gets there is ours: 15 % of the run.
let=(
    --let-teacher-load "$TEACHER"
    --let-student-layer 3 # an early layer: 26 / 8
    --let-weight 0.1 --let-stop-fraction 0.15
)
if [ "$LET" = off ]; then let=(); fi
# 20,000 iterations of 512 x 2048 tokens: 21B. AdamW and cosine are published, the numbers are usual ones.
schedule=(
    --micro-batch-size 2 --global-batch-size 512 --train-iters 20000
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 500
    --weight-decay 0.1 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95
)
# Data parallel alone. A whole student fits: 2 bytes of weight and 4 of gradient a parameter, 19.5 GB on each GPU.
layout=(
    --bf16
    --tensor-model-parallel-size 1   # no matrix is split, and the teacher runs once, not TP times. GPUs of 40 GB: 2 with --sequence-parallel
    --pipeline-model-parallel-size 1 # no stages: none waits for another, and none is slower for having the teacher
    --use-distributed-optimizer      # its 12 bytes a parameter are dealt over the ranks: 4.9 GB on each of 8
    --overlap-grad-reduce            # gradients travel while backward goes on
    --overlap-param-gather           # weights come back while the next forward goes on
)
records=(
    --data-path "${blend[@]}" --split "990,8,2" --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TEACHER"
    --save "$SAVE" --load "$SAVE" --save-interval 500 --save-keep-last 3 --async-save
    --exit-signal-handler # SIGTERM or SIGUSR1: save, leave with 3
    --eval-interval 1000 --eval-iters 20 --log-interval 10
)
if [ -n "${CACHE:-}" ]; then records+=(--data-cache-path "$CACHE"); fi

start "${model[@]}" "${let[@]}" "${schedule[@]}" "${layout[@]}" "${records[@]}" "$@"
