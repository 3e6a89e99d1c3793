#!/usr/bin/env bash
# Can this node train? Prints nothing and ends with 0, or one line "NODE: why" and 1. By srun, one task a node, or by hand:
#
#   bash scripts/slurm/check_node.sh SAVE_DIRECTORY
#
# GPUs that answer, as many as Slurm gave and without memory errors that wait for a reset; /dev/shm and the temporary directory can
# be written to; the save directory is there, writable, and has room.
set -euo pipefail

node="${SLURMD_NODENAME:-$(uname -n)}"
unfit() {
    echo "$node: $*"
    exit 1
}

# Something that can be written, read again and removed, within 30 s: a dead network disk never answers.
is_writable() {
    timeout --kill-after=5 30 bash -s "$1" 2>/dev/null <<'PROBE'
probe="$(mktemp "$1/.check_node.XXXXXX")" && echo well >"$probe" && [ "$(cat "$probe")" = well ]
code=$?
rm -f "$probe"
exit "$code"
PROBE
}

for place in /dev/shm "${TMPDIR:-/tmp}" "${1:-.}"; do
    is_writable "$place" || unfit "$place cannot be written to"
done
free="$(df --output=avail --block-size=1M "${1:-.}" | tail -n 1 | tr -d ' ')"
[ "$free" -ge "${MIN_FREE_MB:-1024}" ] || unfit "only $free MB are free in ${1:-.}"

wanted="${SLURM_GPUS_ON_NODE:-0}"
if [ "$wanted" -gt 0 ] || command -v nvidia-smi >/dev/null; then
    command -v nvidia-smi >/dev/null || unfit "Slurm gave $wanted GPUs and there is no nvidia-smi"
    query=index,ecc.errors.uncorrected.volatile.total,retired_pages.pending,remapped_rows.pending
    answer="$(timeout --kill-after=5 60 nvidia-smi --query-gpu="$query" --format=csv,noheader 2>&1)" ||
        unfit "nvidia-smi does not answer: $(head -n 1 <<<"$answer")"
    found="$(grep -cE '^[0-9]+,' <<<"$answer" || true)" # beside them it may print warnings
    [ "$found" -ge "$wanted" ] || unfit "$found GPUs answer of the $wanted that Slurm gave"
    while IFS=', ' read -r gpu errors pages rows; do
        [[ "$gpu" =~ ^[0-9]+$ ]] || continue
        [[ "$errors" =~ ^[0-9]+$ && "$errors" -gt 0 ]] && unfit "GPU $gpu has $errors uncorrected memory errors"
        [[ "$pages $rows" == *Yes* ]] && unfit "GPU $gpu waits for a reset (pages or rows of its memory are to be replaced)"
    done <<<"$answer"
fi
exit 0
