#!/usr/bin/env bash
# What the recipes share; sourced by them, not run. Beside its own settings each recipe takes:
#
#   GPUS_PER_NODE   ranks on this node (8)
#   NNODES          nodes (1). With more, start the recipe on each of them, with the same settings and
#   NODE_RANK         0 on the first, 1 on the second, ...
#   MASTER_ADDR       the first node's host name or address
#   MASTER_PORT       a free port there (29500)
#   LAUNCHER        torchrun: start the ranks of this node (default); srun: this is one rank, started by srun
#   LET             off: the same student without its teacher, to compare with (on)
#   CACHE           directory for the sample indices, perhaps on each node's own disk (default: beside the data)
#   DRY_RUN         1: print the command instead of running it
#   PLAN            1: print what the run will cost, here and now: memory, time, the teacher's share. Without GPUs; of the
#                   teacher config.json is enough (then add --vocab-size, as its tokenizer is not there to be asked)
#   PYTHON          the interpreter (python)
#   ENTRY           the program (pretrain_let.py)
#
# Arguments of the recipe are added to the command, after its own: of a flag given twice the last one counts.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

die() {
    echo "error: $*" >&2
    exit 2
}

# need NAME WHAT...: end unless the variable is set.
need() {
    [ -n "${!1:-}" ] || die "$1 is not set: ${*:2}"
}

# one_of NAME VALUE...: end unless the variable has one of the values.
one_of() {
    local value
    for value in "${@:2}"; do
        if [ "${!1}" = "$value" ]; then return; fi
    done
    die "$1=${!1} is not known; allowed: ${*:2}"
}

LET="${LET:-on}"
one_of LET on off

# start FLAG...: run the training program with these flags on the ranks of this node, in place of this shell.
start() {
    NNODES="${NNODES:-1}" GPUS_PER_NODE="${GPUS_PER_NODE:-8}" LAUNCHER="${LAUNCHER:-torchrun}"
    one_of LAUNCHER torchrun srun
    local command=("${PYTHON:-python}")
    if [ "${PLAN:-0}" = 1 ]; then
        set -- "$@" --dry-run --world-size "$((NNODES * GPUS_PER_NODE))"
    elif [ "$LAUNCHER" = torchrun ]; then
        command+=(-m megatron_let.launch --nproc-per-node "$GPUS_PER_NODE") # torchrun, with the ranks' own exit codes
        if [ "$NNODES" != 1 ]; then
            need NODE_RANK "with NNODES=$NNODES each node needs its number, 0 to $((NNODES - 1))"
            need MASTER_ADDR "with NNODES=$NNODES the nodes meet on the first one; give its host name or address"
            command+=(--nnodes "$NNODES" --node-rank "$NODE_RANK")
            command+=(--master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
        fi
    fi
    command+=("${ENTRY:-$ROOT/pretrain_let.py}" "$@")
    if [ "${DRY_RUN:-0}" = 1 ]; then
        printf '%q ' "${command[@]}" && echo
        return
    fi
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
    # One connection a GPU keeps communication in the order in which it was asked for, which overlapping it relies on.
    export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
    exec "${command[@]}"
}
