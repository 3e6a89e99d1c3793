#!/usr/bin/env bash
# Make or renew .venv in the repository root from a lock file:  scripts/setup_venv.sh requirements/cpu.txt
# Does nothing when that lock is installed already. PYTHON names the interpreter to use (default: python3).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
lock="$root/${1:-requirements/cpu.txt}"
venv="$root/.venv"
python="${PYTHON:-python3}"

die() {
    echo "error: $*" >&2
    exit 2
}

[ -f "$lock" ] || die "$lock does not exist; lock files are in requirements/"
command -v "$python" >/dev/null || die "$python not found; install Python 3.10 or newer, or set PYTHON to one"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "$("$python" --version) is too old; install Python 3.10 or newer, or set PYTHON to one"

if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$python has no venv module; install it (Debian, Ubuntu: apt-get install python3-venv)"
    echo "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi

# What must be the same for "installed already": the lock with all that it includes, the package's metadata, Python.
fingerprint="$(
    cd "$root"
    { cat requirements/*.txt setup.py megatron_let/__init__.py; "$venv/bin/python" --version; echo "$root"; } |
        "$venv/bin/python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
)"
stamp="$venv/.installed-$(basename "$lock" .txt)"
if [ "$(cat "$stamp" 2>/dev/null)" = "$fingerprint" ]; then
    exit 0
fi

echo "installing $lock into $venv (the first time this takes minutes)"
rm -f "$stamp"
"$venv/bin/python" -m pip install --disable-pip-version-check --no-input -r "$lock"
"$venv/bin/python" -m pip install --disable-pip-version-check --no-input --quiet --no-deps --no-build-isolation \
    -e "$root"
echo "$fingerprint" >"$stamp"
