#!/usr/bin/env bash
# Trains with DeepSpeed's launcher on the hosts of a hostfile, over pdsh and ssh. Run it once, on any machine that
# reaches them without a password and has the project's directory at the same path.
#   launch/deepspeed.sh [--include SPEC] [--exclude SPEC] [--ssh-port P] HOSTFILE CONFIG [key=value ...]
# A run continues on other hosts with the same command and another HOSTFILE or SPEC. GPUs that its layout cannot use stay
# idle, which is printed (parallel.elastic).
# HOSTFILE has lines like "worker-1 slots=8"; SPEC is DeepSpeed's, like "worker-1@worker-2:0,1".
#   MASTER_ADDR           address of the first host as the others see it (default: what its name resolves to here)
#   MASTER_PORT (29500)
#   JOIN_TIMEOUT_S (600)  how long to wait for hosts; ranks wait for each other for guard.hang_timeout_s
#   RELAUNCH (1)          1: restart after failures while starts make progress
#   STARTS_WITHOUT_PROGRESS (3)   maximum number of consecutive starts without a newer checkpoint
#   PYTHON                the interpreter, at the same path on every host
# Set further variables for the ranks by lines like NAME=VALUE in ~/.deepspeed_env or ./.deepspeed_env.
# Output of all ranks: the screen and RUN/logs/deepspeed.log.
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
    *) fail "$1: is not a known option; see the top of launch/deepspeed.sh" ;;
    esac
    shift 2
done
(($# >= 2)) || fail "too few arguments; use launch/deepspeed.sh HOSTFILE CONFIG [key=value ...]"
hostfile=$1
shift
[[ -r $hostfile ]] || fail "hostfile $hostfile: cannot be read; give lines like 'worker-1 slots=8'"
command -v pdsh >/dev/null || fail "pdsh: is not installed, but DeepSpeed's launcher needs it; run apt-get install pdsh"

# Prints each host and the GPUs of its ranks after applying the filters, by DeepSpeed's own rules.
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
    print(host, *slots, file=answer)
PYTHON
}
JOIN_TIMEOUT_S=${JOIN_TIMEOUT_S:-600}
ssh_options=(-o BatchMode=yes -o "ConnectTimeout=10")
((${#ssh_port[@]} == 0)) || ssh_options+=(-p "${ssh_port[0]}")
on_host() { # HOST COMMAND ...: every host must allow this
    timeout 20 ssh -n "${ssh_options[@]}" "$@"
}

listed=$(read_hosts) || true
[[ -n $listed && $listed != error:* ]] || fail "hostfile $hostfile: ${listed#error: }; check --include, --exclude and its lines"
hosts=() slots=() ranks=0
while read -r host gpus; do
    hosts+=("$host") slots+=("$(wc -w <<<"$gpus")") ranks=$((ranks + slots[-1]))
done <<<"$listed"

# Prints the SPEC of the first RANKS of the listed GPUs.
first_gpus() { # RANKS
    local left=$1 host gpus own spec=
    while read -r host gpus; do
        read -ra own <<<"$gpus"
        own=("${own[@]:0:left}")
        left=$((left - ${#own[@]}))
        ((${#own[@]} == 0)) || spec+=${spec:+@}$host:$(IFS=, && echo "${own[*]}")
    done <<<"$listed"
    echo "$spec"
}

# Waits until all hosts answer; sets OMP_NUM_THREADS for the host with the fewest cores per rank.
wait_for_hosts() {
    local deadline=$((SECONDS + JOIN_TIMEOUT_S)) number answer own cores=0 reported=
    for number in "${!hosts[@]}"; do
        until answer=$(on_host "${hosts[number]}" nproc 2>&1); do
            answer=${answer%$'\r'}
            answer="host ${hosts[number]} of $hostfile does not answer over ssh (${answer##*$'\n'})"
            ((SECONDS < deadline)) || fail "$answer within $JOIN_TIMEOUT_S s; start it, or remove it with --exclude"
            [[ $reported == "$answer" ]] || echo "$answer; waiting for it" >&2
            reported=$answer
            sleep 2
        done
        answer=${answer##*$'\n'} # a login message may precede it
        [[ $answer =~ ^[0-9]+$ ]] || fail "host ${hosts[number]}: nproc printed '$answer'; it must print a number"
        own=$((answer / slots[number]))
        ((cores > 0 && cores < own)) || cores=$((own > 0 ? own : 1))
    done
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cores}
}

if [[ -z ${MASTER_ADDR:-} ]]; then
    MASTER_ADDR=$(getent ahostsv4 "${hosts[0]}" | awk 'NR == 1 { print $1 }') || true
    # A host may resolve its own name to a loopback address; then leave the choice to DeepSpeed.
    [[ $MASTER_ADDR == 127.* && ${#hosts[@]} -gt 1 ]] && MASTER_ADDR=
fi

# On the first stop request the ranks save at the end of their step and the launch ends; on the second it ends at once.
stop_ranks() {
    ((++stop_requests == 1)) || { kill -TERM "$launcher" 2>/dev/null || true; return; }
    local host
    for host in "${hosts[@]}"; do
        # Only the ranks: DeepSpeed's own process on the host has the same arguments.
        on_host "$host" "pkill -USR1 -f -- '-u train\\.py .*[l]aunch-$name'" || true
    done
}

while :; do
    wait_for_hosts
    set_environment 1
    name=$(date +%s)-$$
    merged=$(mktemp)
    start=$("$PYTHON" -m dynmoe.launch begin --ranks "$ranks" --merged "$merged" "$@")
    run=${start#* } used=$(first_gpus "${start%% *}")
    ((${start%% *} == ranks)) || echo "the other GPUs stay idle; in use: $used"
    # Hosts get a file instead of fields, which a remote shell would expand. Its name is unique to this launch, so that
    # leftover processes can be found by it.
    config=$run/logs/launch-$name.yaml environment=$run/logs/environment-$name
    mv "$merged" "$config"
    (umask 077 && : >"$environment") # it may contain keys
    {
        cat ~/.deepspeed_env .deepspeed_env 2>/dev/null | grep -E '^[A-Za-z_][A-Za-z_0-9]*=' || true
        for variable in OMP_NUM_THREADS PYTORCH_ALLOC_CONF NCCL_DEBUG PYTHONUNBUFFERED DS_ACCELERATOR; do
            [[ -z ${!variable:-} ]] || echo "$variable=${!variable}"
        done
        echo "DYNMOE_FAILURES=$run/logs/failures"
    } >"$environment"
    arguments=(--hostfile "$hostfile" --include "$used" --launcher pdsh --no_local_rank --no_ssh_check --force_multi
        --master_port "${MASTER_PORT:-29500}")
    [[ -z $MASTER_ADDR ]] || arguments+=(--master_addr "$MASTER_ADDR")
    ((${#ssh_port[@]} == 0)) || arguments+=(--ssh_port "${ssh_port[0]}")
    # The connection to a host that vanishes ends within a minute.
    keepalive="-o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
    # In its own session: on Ctrl-C, DeepSpeed's launcher would kill the ranks before they save.
    DS_ENV_FILE=$environment PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} $keepalive" \
        setsid "$PYTHON" -m deepspeed.launcher.runner "${arguments[@]}" train.py "$config" \
        > >(tee -a "$run/logs/deepspeed.log") 2>&1 &
    launcher=$!
    stop_requests=0
    trap stop_ranks TERM INT
    wait $launcher || true
    while kill -0 $launcher 2>/dev/null; do wait $launcher || true; done
    trap - TERM INT
    rm -f "$environment"
    # ssh does not end the processes that it started.
    for host in "${hosts[@]}"; do
        on_host "$host" "pkill -KILL -f '[l]aunch-$name'" || true
    done
    verdict=0
    "$PYTHON" -m dynmoe.launch after --starts-without-progress "${STARTS_WITHOUT_PROGRESS:-3}" "$config" || verdict=$?
    ((verdict == 76 && !stop_requests)) && [[ ${RELAUNCH:-1} == 1 ]] || exit "$verdict"
done
