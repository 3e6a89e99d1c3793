#!/usr/bin/env bash
# Lint, types and the CPU test suite, in a .venv of this repository:  bash scripts/test.sh
# With arguments only pytest runs, with these:                        bash scripts/test.sh tests/let -k schedule
# Works from any directory; paths among the arguments are relative to the repository.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup_venv.sh" requirements/test.txt

export PATH="$root/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=

cd "$root"
if [ "$#" -gt 0 ]; then
    exec python -m pytest "$@"
fi

ruff check .
ruff format --check .
mypy .
if command -v shellcheck >/dev/null; then
    shellcheck scripts/*.sh scripts/slurm/* .ci/run
fi
# Two at a time, the tests of a file one after the other; each may start four ranks of its own.
python -m pytest --numprocesses 2 --dist loadfile
