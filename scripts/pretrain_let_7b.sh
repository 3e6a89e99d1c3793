#!/usr/bin/env bash
# LET (arXiv 2602.05393): a LLaMA-style student of 7B parameters, guided by Llama-3.2-1B. For 32 GPUs of 80 GB: 4 nodes of 8.
#
#   export DATA=data/pile_text_document TEACHER=teachers/Llama-3.2-1B SAVE=runs/7b
#   sbatch scripts/slurm/pretrain_let.sbatch scripts/pretrain_let_7b.sh                                        # Slurm
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=node-a bash scripts/pretrain_let_7b.sh                                    # by hand, on each node
#
#   DATA        data, preprocessed with the teacher's tokenizer: a prefix, or "WEIGHT PREFIX WEIGHT PREFIX ..."
#   TEACHER     Hugging Face directory of Llama-3.2-1B (width 2048)
#   SAVE        checkpoints and metrics; on a disk that all nodes share. The same command resumes from it
#   PRECISION   bf16 (default), or fp8 on Hopper and later: matrix products in FP8 by Transformer Engine, the rest in BF16
#
# PLAN=1 (what it will cost), DRY_RUN=1 and more: scripts/recipe.sh.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"

need DATA "the prefix of data preprocessed with the teacher's tokenizer, such as data/pile_text_document"
need TEACHER "the Hugging Face directory of Llama-3.2-1B"
need SAVE "a directory for checkpoints, on a disk that all nodes share"
read -ra blend <<<"$DATA"
NNODES="${NNODES:-4}"

# 6.5B parameters in the layers and 1.05B in embedding and output, Llama 3's 128,256 ids being many: 7.5B.
model=(
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32
    --seq-length 2048 --position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear
    --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
)
# Published: weight 0.1 at 1.4B, falling to 0. When it gets there is ours: 15 % of the run.
let=(
    --let-teacher-load "$TEACHER"
    --let-student-layer 4 # an early layer: 32 / 8
    --let-weight 0.1 --let-stop-fraction 0.15
)
if [ "$LET" = off ]; then let=(); fi
# 20,000 iterations of 512 x 2048 tokens: 21B. AdamW and cosine are published, the numbers are usual ones.
schedule=(
    --micro-batch-size 2 --global-batch-size 512 --train-iters 20000
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 500
    --weight-decay 0.1 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95
)
PRECISION="${PRECISION:-bf16}"
one_of PRECISION bf16 fp8
precision=(--bf16)
if [ "$PRECISION" = fp8 ]; then
    # hybrid: e4m3 forward, e5m2 gradients. delayed: scaling factors from the largest of the last 1024 values.
    precision+=(--transformer-impl transformer_engine --fp8-format hybrid --fp8-recipe delayed)
    precision+=(--fp8-amax-history-len 1024 --fp8-amax-compute-algo max)
fi
layout=(
    --tensor-model-parallel-size 2   # two GPUs of a node share every matrix: 22.6 GB of weights and gradients on each instead of 45
    --sequence-parallel              # they share the activations between the matrices too
    --pipeline-model-parallel-size 1 # no stages: none waits for another, and none is slower for having the teacher
    --use-distributed-optimizer      # its 12 bytes a parameter are dealt over the 16 data-parallel ranks: 2.8 GB on each
    --overlap-grad-reduce            # gradients travel between nodes while backward goes on
    --overlap-param-gather           # weights come back while the next forward goes on
)
records=(
    --data-path "${blend[@]}" --split "990,8,2" --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TEACHER"
    --save "$SAVE" --load "$SAVE" --save-interval 500 --save-keep-last 3 --async-save
    --exit-signal-handler # SIGTERM or SIGUSR1: save, leave with 3
    --eval-interval 1000 --eval-iters 20 --log-interval 10
)
if [ -n "${CACHE:-}" ]; then records+=(--data-cache-path "$CACHE"); fi

start "${model[@]}" "${let[@]}" "${schedule[@]}" "${precision[@]}" "${layout[@]}" "${records[@]}" "$@"
