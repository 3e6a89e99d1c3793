#!/usr/bin/env bash
# Run a training command, and run it again after a crash or a preemption, until it is done or gets nowhere:
#
#   bash scripts/run_until_done.sh python -m megatron_let.launch --nproc-per-node 8 pretrain_let.py ... \
#       --exit-signal-handler --save runs/a --load runs/a --save-interval 500
#
# Again after: 3 (stopped early, everything saved), 1 and signals (crash). Not after: 0 (done), 2 (bad configuration),
# 4 (bad numbers), 130 (Ctrl-C), 126 and 127 (no such command). Under bare torchrun, which only knows 0 and 1, and under srun,
# which ends the other ranks when one leaves and then tells of that signal (128 + n), the code is read from exit_status.json in
# the --save directory. This script ends with the run's own code.
#
# SIGTERM, SIGUSR1, SIGINT and SIGHUP go to the run, which is then waited for and not started again. A run under srun gets SIGUSR1
# for SIGTERM and SIGHUP, which srun does not hand on. Under nohup a hangup is ignored.
#
# Options, before the command:
#   --max-restarts N           stop after N restarts in a row without a newer checkpoint (3)
#   --pause SECONDS            between two starts (10)
#   --save-directory DIR       where the checkpoints are, when the command does not name it by --save
#   --restart-after-signal     start again also after a signal to this script
set -euo pipefail

# A shell cannot trap a signal that came ignored. nohup's SIGHUP and a background job's SIGINT are meant to stay so.
if [[ "$(trap -p TERM USR1)" == *"''"* ]]; then
    exec python3 -c '
import os, signal, sys
for name in ("SIGTERM", "SIGUSR1", "SIGPIPE", "SIGXFSZ"):  # Python itself ignores the last two
    signal.signal(getattr(signal, name), signal.SIG_DFL)
os.execvp("bash", ["bash", *sys.argv[1:]])' "${BASH_SOURCE[0]}" "$@"
fi

max_restarts=3 pause=10 directory="" restart_after_signal=no

say() { echo "run_until_done: $*" >&2; }

die() {
    echo "error: $*" >&2
    exit 2
}

is_count() { [[ "$1" =~ ^[0-9]{1,9}$ ]]; }

while [ "$#" -gt 0 ]; do
    case "$1" in
        --max-restarts | --pause | --save-directory)
            [ "$#" -gt 1 ] || die "$1 needs a value"
            case "$1" in
                --max-restarts) max_restarts="$2" ;;
                --pause) pause="$2" ;;
                *) directory="$2" ;;
            esac
            shift 2
            ;;
        --restart-after-signal) restart_after_signal=yes && shift ;;
        -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit 0 ;;
        --) shift && break ;;
        -*) die "unknown option $1; --help lists them (the command to run comes after them)" ;;
        *) break ;;
    esac
done
is_count "$max_restarts" || die "--max-restarts $max_restarts is not a number of restarts, 0 or more"
is_count "$pause" || die "--pause $pause is not a number of seconds, 0 or more"
[ "$#" -gt 0 ] || die "no command given; --help shows how"

if [ -z "$directory" ]; then
    previous=""
    for word in "$@"; do
        [ "$previous" = --save ] && directory="$word"
        [[ "$word" == --save=* ]] && directory="${word#--save=}"
        previous="$word"
    done
fi
[ -n "$directory" ] || die "the command has no --save: without checkpoints each start would begin anew; add it, or name" \
    "the directory with --save-directory when a --config file holds it"

# The iteration of the checkpoint that the tracker names, 0 when that is not there.
tracked() {
    local tracker="$directory/latest_checkpointed_iteration.txt" text=""
    if [ -f "$tracker" ]; then text="$(head -c 32 "$tracker" 2>/dev/null | tr -d '\0' || true)"; fi
    if is_count "$text" && [ -d "$directory/$(printf 'iter_%07d' "$((10#$text))")" ]; then
        echo "$((10#$text))"
    else
        echo 0
    fi
}

# The exit code that the run itself has left, nothing when it left none.
left_code() {
    local status="$directory/exit_status.json" text=""
    if [ -f "$status" ]; then
        text="$(head -c 65536 "$status" 2>/dev/null |
            sed -n 's/.*"exit_code": *\([0-9]\{1,3\}\)\([^0-9].*\)*$/\1/p' 2>/dev/null | head -n 1 || true)"
    fi
    if is_count "$text" && [ "$text" -le 255 ]; then echo "$text"; fi
}

program="${1##*/}" child="" signalled=""
pass_on() {
    local passed="$1"
    signalled="$1"
    case "$program $1" in
        "srun TERM" | "srun HUP") passed=USR1 ;; # at those srun kills its tasks, at once; USR1 it hands to them
    esac
    if [ -n "$child" ]; then kill -s "$passed" "$child" 2>/dev/null || true; fi
}
for name in TERM INT USR1 HUP; do
    # shellcheck disable=SC2064
    trap "pass_on $name" "$name"
done

# Runs the command to its end, whatever signals arrive meanwhile; sets `code`.
run() {
    rm -f "$directory/exit_status.json" 2>/dev/null || true # a run that is killed early must not leave an older one's
    # A background command would ignore Ctrl-C for good, were it not for the trap.
    (trap - TERM INT USR1 HUP && exec "$@") &
    child=$!
    if [ -n "$signalled" ]; then pass_on "$signalled"; fi # it came before there was a run to pass it on to
    while true; do
        code=0
        wait "$child" || code=$?
        # `wait` ends at each signal with 128 + n: only when the run is gone is the code its own.
        kill -0 "$child" 2>/dev/null || break
    done
    if [ "$code" -gt 128 ] && [ -n "$signalled" ]; then # the run may have ended while `wait` was interrupted
        local again=0
        wait "$child" 2>/dev/null || again=$?
        [ "$again" -eq 127 ] || code="$again"
    fi
    child=""
    local left
    left="$(left_code)"
    if [[ "$code" -eq 1 || "$code" -gt 128 ]] && [ -n "$left" ]; then code="$left"; fi
}

# torchrun itself passes on the first four alone, and would end by SIGUSR1.
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"

# Progress is a checkpoint that no start before has ended with: after a rollback its iteration may be a lower one.
seen=" $(tracked) " restarts=0
while true; do
    run "$@"
    case "$code" in
        0) exit 0 ;;
        2) say "exit code 2, bad configuration: not started again" && exit 2 ;;
        4) say "exit code 4, bad numbers: they would come again; not started again" && exit 4 ;;
        126 | 127) say "exit code $code: the command cannot be run" && exit "$code" ;;
        130) say "interrupted: not started again" && exit 130 ;;
    esac
    if [ -n "$signalled" ] && [ "$restart_after_signal" = no ]; then
        say "exit code $code after SIG$signalled: not started again"
        exit "$code"
    fi
    signalled=""
    now="$(tracked)"
    if [[ "$seen" != *" $now "* ]]; then
        seen+="$now " restarts=0
    elif [ "$restarts" -ge "$max_restarts" ]; then
        say "exit code $code, and no checkpoint newer than iteration $now after $max_restarts restarts: giving up"
        exit "$code"
    fi
    restarts=$((restarts + 1)) # in a row without progress, the coming one included
    say "exit code $code, newest checkpoint: iteration $now; starting again in $pause s" \
        "(restart $restarts of $max_restarts without a newer one)"
    if [ "$pause" -gt 0 ]; then
        sleep "$pause" &
        wait "$!" || kill "$!" 2>/dev/null || true # a signal ends it
    fi
    if [ -n "$signalled" ] && [ "$restart_after_signal" = no ]; then
        say "SIG$signalled between two starts: not started again"
        exit "$code"
    fi
done
