#!/usr/bin/env bash
# The main job on a laptop: corpus, tokenizer, teacher, student without and with LET, report and picture in
# runs/quickstart. At most 15 minutes on two cores after installation; --fast takes 3; --help lists the rest.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup_venv.sh" requirements/cpu.txt

cd "$root"
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec .venv/bin/python tools/quickstart.py "$@"
