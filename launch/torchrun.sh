#!/usr/bin/env bash
# Trains on one node or on several with torchrun: the same command on every node, in any order.
#   launch/torchrun.sh CONFIG [key=value ...]
# Paths are relative to the project's directory, which all nodes must see, and the run directory too.
#   NNODES (1), NODE_RANK (0), MASTER_ADDR (127.0.0.1: name or address of node 0), MASTER_PORT (29500),
#   NPROC_PER_NODE (the GPUs of a node, else 1)   the layout; in a Slurm job Slurm's variables give it
#   HOSTS                  names of the nodes in the order of their ranks, for messages
#   JOIN_TIMEOUT_S (600)   how long nodes wait for each other
#   MAX_RESTARTS (3)       how often ranks that fail are started again in place, from the newest checkpoint
#   RELAUNCH (1)           1: start again after that too, for as long as checkpoints get newer:
#   STARTS_WITHOUT_PROGRESS (3)   so many in a row may end without a newer one
#   PYTHON                 the interpreter (.venv/bin/python where there is one)
# Output of every rank: RUN/logs/node_N. On the screen: the first rank of each node.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

if [[ -n ${SLURM_JOB_ID:-} ]]; then
    NNODES=${NNODES:-$SLURM_NNODES}
    NODE_RANK=${NODE_RANK:-$SLURM_NODEID}
    HOSTS=${HOSTS:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | xargs)}
    MASTER_ADDR=${MASTER_ADDR:-${HOSTS%% *}}
    MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))} # jobs that share a node keep apart
    NPROC_PER_NODE=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
fi
NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0} MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-$((NNODES > 1 ? 29500 : 0))} # alone, any free one
gpus=$(count_gpus)
NPROC_PER_NODE=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
JOIN_TIMEOUT_S=${JOIN_TIMEOUT_S:-600} MAX_RESTARTS=${MAX_RESTARTS:-3} RELAUNCH=${RELAUNCH:-1}
STARTS_WITHOUT_PROGRESS=${STARTS_WITHOUT_PROGRESS:-3}
read -ra hosts <<<"${HOSTS:-}"
port=()
if ((NODE_RANK == 0)); then port=(--port "$MASTER_PORT"); fi
set_environment "$NPROC_PER_NODE"

rdzv=(--nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" --max-restarts "$MAX_RESTARTS" --rdzv-backend c10d
    --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "dynmoe-$MASTER_PORT"
    --rdzv-conf "is_host=$((NODE_RANK == 0)),join_timeout=$JOIN_TIMEOUT_S,read_timeout=$JOIN_TIMEOUT_S")
if ((NNODES > 1)); then
    # Under which other nodes find the first rank; a host's own idea of its name is often known to nobody else.
    rdzv+=(--local-addr "$("$PYTHON" -m dynmoe.launch address "$MASTER_ADDR")")
fi
# Ranks near their GPU's memory: pages of another socket cost a copy across it.
if ((gpus > 0 && $(count_numa_nodes) > 1)) && command -v numactl >/dev/null; then rdzv+=(--numa-binding node); fi

# Told to end, by whatever signal: the ranks are, by one that torchrun ignores. It would give them 30 s to save, and Slurm
# may signal nothing but this script. Before there are ranks it ends itself.
told=0
tell_ranks() {
    local ranks
    ranks=$(cat /proc/"$torchrun"/task/*/children 2>/dev/null) || true
    # shellcheck disable=SC2086
    if [[ -n ${ranks// /} ]]; then kill -USR1 $ranks 2>/dev/null || true; else kill -TERM "$torchrun" 2>/dev/null || true; fi
}
trap 'told=1' TERM INT USR1

# Says which nodes are not there: each touches a file for as long as it lives.
name_missing_nodes() {
    local node
    for ((node = 0; node < NNODES; node++)); do
        if [[ -z $(find "$nodes/$node" -newermt '-30 seconds' 2>/dev/null) ]]; then
            echo "error: node $node (${hosts[node]:-$(cat "$nodes/$node" 2>/dev/null || echo 'name unknown')}) is not" \
                "there, $JOIN_TIMEOUT_S s after the others began to wait; start this command on it" >&2
        fi
    done
}

another_gave_up() { [[ $nodes/gave_up -nt $nodes/start_$NODE_RANK ]]; }

while :; do
    # A job script has begun the start for all nodes.
    run=${DYNMOE_RUN:-$("$PYTHON" -m dynmoe.launch begin --ranks $((NNODES * NPROC_PER_NODE)) --node "$NODE_RANK" \
        "${port[@]}" "$@")}
    export DYNMOE_FAILURES=$run/logs/failures
    nodes=$run/logs/nodes
    mkdir -p "$nodes"
    hostname >"$nodes/$NODE_RANK"
    touch "$nodes/start_$NODE_RANK"
    # In a session of its own: what a terminal sends is for this script.
    (
        trap '' USR1
        exec setsid "$PYTHON" -m torch.distributed.run "${rdzv[@]}" --log-dir "$run/logs/node_$NODE_RANK" --tee 3 \
            --local-ranks-filter 0 train.py "$@"
    ) &
    torchrun=$!
    # Ranks would wait for those of a node that has given up until their collectives time out.
    (while sleep 5 && kill -0 $$ 2>/dev/null; do
        touch "$nodes/$NODE_RANK" || true
        if another_gave_up; then kill -TERM $torchrun 2>/dev/null || true; fi
    done) &
    heart=$!
    status=0
    wait $torchrun || status=$?
    # A signal ends the wait, not torchrun. Ranks are told again: one that is just starting may not listen yet.
    while kill -0 $torchrun 2>/dev/null; do
        if ((told)); then
            tell_ranks
            sleep 2 || true
        else
            wait $torchrun || status=$?
        fi
    done
    kill $heart 2>/dev/null || true
    if ((status == 0)); then exit 0; fi
    if ((!told)); then name_missing_nodes; fi
    # In a job, the job script judges: for all nodes, once.
    [[ $RELAUNCH == 1 ]] || exit "$status"
    verdict=0
    "$PYTHON" -m dynmoe.launch after --node "$NODE_RANK" --starts-without-progress "$STARTS_WITHOUT_PROGRESS" "$@" \
        || verdict=$?
    if another_gave_up; then exit "$(<"$nodes/gave_up")"; fi
    if ((verdict == 2 || verdict == 3)); then echo "$verdict" >"$nodes/gave_up"; fi
    if ((verdict != 76 || told)); then exit "$verdict"; fi
done
