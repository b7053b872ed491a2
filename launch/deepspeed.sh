#!/usr/bin/env bash
# Trains on the hosts of a hostfile with DeepSpeed's launcher, over pdsh and ssh: one command, on any machine that
# reaches them without a password and sees the project's directory where they see it.
#   launch/deepspeed.sh [--include SPEC] [--exclude SPEC] [--ssh-port P] HOSTFILE CONFIG [key=value ...]
# HOSTFILE has lines like "worker-1 slots=8"; SPEC is DeepSpeed's, like "worker-1@worker-2:0,1".
#   MASTER_ADDR           address of the first host for the others (what its name resolves to here)
#   MASTER_PORT (29500)
#   JOIN_TIMEOUT_S (600)  how long hosts, and then ranks, are waited for
#   RELAUNCH (1)          1: start again after a failure, for as long as checkpoints get newer:
#   STARTS_WITHOUT_PROGRESS (3)   so many in a row may end without a newer one
#   PYTHON                the interpreter, at the same place on every host
# Further variables for the ranks: lines like NAME=VALUE in ~/.deepspeed_env or ./.deepspeed_env.
# Output of all ranks: on the screen and in RUN/logs/deepspeed.log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

fail() {
    echo "error: $*" >&2
    exit 2
}

filters=() ssh_port=()
while [[ ${1:-} == --* ]]; do
    case $1 in
    --include | --exclude) filters+=("$1" "${2:?$1 needs a value}") ;;
    --ssh-port) ssh_port=("${2:?--ssh-port needs a number}") ;;
    *) fail "$1: no such option; see the head of launch/deepspeed.sh" ;;
    esac
    shift 2
done
(($# >= 2)) || fail "launch/deepspeed.sh HOSTFILE CONFIG [key=value ...]: too few arguments"
hostfile=$1
shift
[[ -r $hostfile ]] || fail "hostfile $hostfile: cannot be read; give lines like 'worker-1 slots=8'"
command -v pdsh >/dev/null || fail "pdsh is not installed, and DeepSpeed's launcher needs it; apt-get install pdsh"

# Hosts and ranks of each after the filters, by DeepSpeed's own rules.
read_hosts() {
    "$PYTHON" - "$hostfile" "${filters[@]}" <<'PYTHON'
import argparse, os, sys
answer = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # DeepSpeed logs to standard output when it is imported
from deepspeed.launcher.runner import fetch_hostfile, parse_inclusion_exclusion
parser = argparse.ArgumentParser()
parser.add_argument("hostfile"), parser.add_argument("--include", default=""), parser.add_argument("--exclude", default="")
given = parser.parse_args()
try:
    active = parse_inclusion_exclusion(fetch_hostfile(given.hostfile), given.include, given.exclude)
except ValueError as error:
    sys.exit(print("error:", error, file=answer))
for host, slots in active.items():
    print(host, len(slots), file=answer)
PYTHON
}
JOIN_TIMEOUT_S=${JOIN_TIMEOUT_S:-600}
ssh_options=(-o BatchMode=yes -o "ConnectTimeout=10")
((${#ssh_port[@]} == 0)) || ssh_options+=(-p "${ssh_port[0]}")
on_host() { # HOST COMMAND ...: what every host must allow
    timeout 20 ssh -n "${ssh_options[@]}" "$@"
}

listed=$(read_hosts) || true
[[ -n $listed && $listed != error:* ]] || fail "hostfile $hostfile: ${listed#error: }; see --include, --exclude and its lines"
hosts=() slots=() ranks=0
while read -r host count; do
    hosts+=("$host") slots+=("$count") ranks=$((ranks + count))
done <<<"$listed"

# Returns when all hosts answer; sets OMP_NUM_THREADS by the one with the fewest cores for a rank.
wait_for_hosts() {
    local deadline=$((SECONDS + JOIN_TIMEOUT_S)) number answer own cores=0 told=
    for number in "${!hosts[@]}"; do
        until answer=$(on_host "${hosts[number]}" nproc 2>&1); do
            answer=${answer%$'\r'}
            answer="host ${hosts[number]} of $hostfile does not answer over ssh (${answer##*$'\n'})"
            ((SECONDS < deadline)) || fail "$answer within $JOIN_TIMEOUT_S s; start it, or leave it out with --exclude"
            [[ $told == "$answer" ]] || echo "$answer; waiting for it" >&2
            told=$answer
            sleep 2
        done
        answer=${answer##*$'\n'} # a greeting may come before it
        [[ $answer =~ ^[0-9]+$ ]] || fail "host ${hosts[number]}: nproc says '$answer' there; it should say a number"
        own=$((answer / slots[number]))
        ((cores > 0 && cores < own)) || cores=$((own > 0 ? own : 1))
    done
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cores}
}

if [[ -z ${MASTER_ADDR:-} ]]; then
    MASTER_ADDR=$(getent ahostsv4 "${hosts[0]}" | awk 'NR == 1 { print $1 }') || true
    # A host that looks up its own name may find a loopback address: then DeepSpeed asks the host.
    [[ $MASTER_ADDR == 127.* && ${#hosts[@]} -gt 1 ]] && MASTER_ADDR=
fi

# Told to end: the ranks save at the end of their step, and the launch ends with them. The second time it ends at once.
tell_ranks() {
    ((++told == 1)) || { kill -TERM "$launcher" 2>/dev/null || true; return; }
    local host
    for host in "${hosts[@]}"; do
        # The ranks alone: DeepSpeed's own process on the host has the same arguments.
        on_host "$host" "pkill -USR1 -f -- '-u train\\.py .*[l]aunch-$name'" || true
    done
}

while :; do
    wait_for_hosts
    set_environment 1
    name=$(date +%s)-$$
    merged=$(mktemp)
    run=$("$PYTHON" -m dynmoe.launch begin --ranks "$ranks" --merged "$merged" "$@")
    # Hosts get a file in place of fields, which a remote shell would read in its own way. Its name is that of no
    # other launch: what is left of this one is found by it.
    config=$run/logs/launch-$name.yaml environment=$run/logs/environment-$name
    mv "$merged" "$config"
    (umask 077 && : >"$environment") # there may be keys among them
    {
        cat ~/.deepspeed_env .deepspeed_env 2>/dev/null | grep -E '^[A-Za-z_][A-Za-z_0-9]*=' || true
        for variable in OMP_NUM_THREADS PYTORCH_ALLOC_CONF NCCL_DEBUG PYTHONUNBUFFERED DS_ACCELERATOR; do
            [[ -z ${!variable:-} ]] || echo "$variable=${!variable}"
        done
        echo "DYNMOE_FAILURES=$run/logs/failures"
        echo "DEEPSPEED_TIMEOUT=$(((JOIN_TIMEOUT_S + 59) / 60))" # minutes
    } >"$environment"
    arguments=(--hostfile "$hostfile" "${filters[@]}" --launcher pdsh --no_local_rank --no_ssh_check --force_multi
        --master_port "${MASTER_PORT:-29500}")
    [[ -z $MASTER_ADDR ]] || arguments+=(--master_addr "$MASTER_ADDR")
    ((${#ssh_port[@]} == 0)) || arguments+=(--ssh_port "${ssh_port[0]}")
    # A host that vanishes without a word ends its connection within a minute.
    keepalive="-o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
    # In a session of its own: DeepSpeed's launcher would answer Ctrl-C by killing ranks that could have saved.
    DS_ENV_FILE=$environment PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} $keepalive" \
        setsid "$PYTHON" -m deepspeed.launcher.runner "${arguments[@]}" train.py "$config" \
        > >(tee -a "$run/logs/deepspeed.log") 2>&1 &
    launcher=$!
    told=0
    trap tell_ranks TERM INT
    wait $launcher || true
    while kill -0 $launcher 2>/dev/null; do wait $launcher || true; done
    trap - TERM INT
    rm -f "$environment"
    # ssh leaves behind what it started.
    for host in "${hosts[@]}"; do
        on_host "$host" "pkill -KILL -f '[l]aunch-$name'" || true
    done
    verdict=0
    "$PYTHON" -m dynmoe.launch after --starts-without-progress "${STARTS_WITHOUT_PROGRESS:-3}" "$config" || verdict=$?
    ((verdict == 76 && !told)) && [[ ${RELAUNCH:-1} == 1 ]] || exit "$verdict"
done
