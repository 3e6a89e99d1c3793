#!/usr/bin/env bash
# Check this project on one GPU, in under ten minutes:  bash scripts/check_gpu.sh
# One table, also written to runs/check_gpu.json (--json). Exit code 0: nothing failed, 1: something did, 2: no GPU.
# Uses the repository's .venv where there is one, else python3, or the interpreter that PYTHON names; installs nothing.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-}"
if [ -z "$python" ]; then
    python=python3
    if [ -x "$root/.venv/bin/python" ]; then
        python="$root/.venv/bin/python"
    fi
fi
if ! command -v "$python" >/dev/null; then
    echo "error: $python not found; set PYTHON to an interpreter that has torch and megatron-core" >&2
    exit 2
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" "$root/tools/check_gpu.py" "$@"
