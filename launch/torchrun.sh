#!/usr/bin/env bash
# Trains with torchrun on one or more nodes: run the same command on every node, in any order.
#   launch/torchrun.sh CONFIG [key=value ...]
# Paths are relative to the project's directory. All nodes must share this directory and the run directory.
# A run continues on another number of nodes with the same command and another NNODES. Nodes that its layout cannot use
# say so and stay idle (parallel.elastic).
#   NNODES (1), NODE_RANK (0), MASTER_ADDR (127.0.0.1: name or address of node 0), MASTER_PORT (29500),
#   NPROC_PER_NODE (number of GPUs of the node, else 1)   the layout; in a Slurm job, taken from Slurm's variables
#   HOSTS                  names of the nodes in the order of their ranks, for messages
#   JOIN_TIMEOUT_S (600)   how long nodes wait for each other
#   MAX_RESTARTS (3)       how often torchrun restarts failed ranks in place, from the newest checkpoint
#   RELAUNCH (1)           1: after that, keep restarting while starts make progress
#   STARTS_WITHOUT_PROGRESS (3)   maximum number of consecutive starts without a newer checkpoint
#   PYTHON                 the interpreter (.venv/bin/python if it exists)
# Output of every rank: RUN/logs/node_N. The screen shows the first rank of each node.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

if [[ -n ${SLURM_JOB_ID:-} ]]; then
    NNODES=${NNODES:-$SLURM_NNODES}
    NODE_RANK=${NODE_RANK:-$SLURM_NODEID}
    HOSTS=${HOSTS:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | xargs)}
    MASTER_ADDR=${MASTER_ADDR:-${HOSTS%% *}}
    MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))} # separate ports for jobs that share a node
    NPROC_PER_NODE=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
fi
NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0} MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-$((NNODES > 1 ? 29500 : 0))} # on a single node, any free port
gpus=$(count_gpus)
NPROC_PER_NODE=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
JOIN_TIMEOUT_S=${JOIN_TIMEOUT_S:-600} MAX_RESTARTS=${MAX_RESTARTS:-3} RELAUNCH=${RELAUNCH:-1}
STARTS_WITHOUT_PROGRESS=${STARTS_WITHOUT_PROGRESS:-3}
read -ra hosts <<<"${HOSTS:-}"
port=()
if ((NODE_RANK == 0)); then port=(--port "$MASTER_PORT"); fi
set_environment "$NPROC_PER_NODE"

rdzv=(--max-restarts "$MAX_RESTARTS" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT"
    --rdzv-id "dynmoe-$MASTER_PORT"
    --rdzv-conf "is_host=$((NODE_RANK == 0)),join_timeout=$JOIN_TIMEOUT_S,read_timeout=$JOIN_TIMEOUT_S")
if ((NNODES > 1)); then
    # The address at which other nodes find the first rank; they often cannot resolve a host's own name.
    rdzv+=(--local-addr "$("$PYTHON" -m dynmoe.launch address "$MASTER_ADDR")")
fi
# Bind ranks to the NUMA node of their GPU: access to another socket's memory is slower.
if ((gpus > 0 && $(count_numa_nodes) > 1)) && command -v numactl >/dev/null; then rdzv+=(--numa-binding node); fi

# Forwards a stop request to the ranks with a signal that torchrun ignores: torchrun itself would give them only 30 s to
# save, and Slurm may signal this script alone. If there are no ranks yet, torchrun is stopped.
stop_requested=0
stop_ranks() {
    local ranks
    ranks=$(cat /proc/"$torchrun"/task/*/children 2>/dev/null) || true
    # shellcheck disable=SC2086
    if [[ -n ${ranks// /} ]]; then kill -USR1 $ranks 2>/dev/null || true; else kill -TERM "$torchrun" 2>/dev/null || true; fi
}
trap 'stop_requested=1' TERM INT USR1

# Names missing nodes: each live node keeps touching its file.
name_missing_nodes() {
    local node
    for ((node = 0; node < nodes_in_use; node++)); do
        if [[ -z $(find "$nodes/$node" -newermt '-30 seconds' 2>/dev/null) ]]; then
            echo "error: node $node (${hosts[node]:-$(cat "$nodes/$node" 2>/dev/null || echo 'name unknown')}) did" \
                "not join within $JOIN_TIMEOUT_S s; run this command on it" >&2
        fi
    done
}

another_gave_up() { [[ $nodes/gave_up -nt $nodes/start_$NODE_RANK ]]; }

while :; do
    # In a Slurm job, the job script has already run begin for all nodes.
    start=${DYNMOE_START:-$("$PYTHON" -m dynmoe.launch begin --ranks $((NNODES * NPROC_PER_NODE)) --node "$NODE_RANK" \
        "${port[@]}" "$@")}
    run=${start#* } ranks_in_use=${start%% *}
    # Ranks fill the nodes in order.
    nodes_in_use=$(((ranks_in_use + NPROC_PER_NODE - 1) / NPROC_PER_NODE))
    own_ranks=$((ranks_in_use - NODE_RANK * NPROC_PER_NODE))
    if ((own_ranks <= 0)); then
        echo "node $NODE_RANK ($(hostname)) stays idle: the run uses $ranks_in_use ranks, on $nodes_in_use node(s)"
        exit 0
    fi
    if ((own_ranks > NPROC_PER_NODE)); then own_ranks=$NPROC_PER_NODE; fi
    export DYNMOE_FAILURES=$run/logs/failures
    nodes=$run/logs/nodes
    mkdir -p "$nodes"
    hostname >"$nodes/$NODE_RANK"
    touch "$nodes/start_$NODE_RANK"
    # In its own session, so that only this script receives signals from the terminal.
    (
        trap '' USR1
        exec setsid "$PYTHON" -m torch.distributed.run "${rdzv[@]}" --nnodes "$nodes_in_use" \
            --nproc-per-node "$own_ranks" --log-dir "$run/logs/node_$NODE_RANK" --tee 3 \
            --local-ranks-filter 0 train.py "$@"
    ) &
    torchrun=$!
    # Heartbeat. Stops torchrun if another node gave up: its ranks would wait until their collectives time out.
    (while sleep 5 && kill -0 $$ 2>/dev/null; do
        touch "$nodes/$NODE_RANK" || true
        if another_gave_up; then kill -TERM $torchrun 2>/dev/null || true; fi
    done) &
    heartbeat=$!
    status=0
    # After a stop request that came during begin, do not wait.
    if ((stop_requested)); then status=143; else wait $torchrun || status=$?; fi
    # A signal ends the wait, not torchrun. Signal repeatedly: a rank that is starting may not handle signals yet.
    while kill -0 $torchrun 2>/dev/null; do
        if ((stop_requested)); then
            stop_ranks
            sleep 2 || true
        else
            wait $torchrun || status=$?
        fi
    done
    kill $heartbeat 2>/dev/null || true
    if ((status == 0)); then exit 0; fi
    if ((!stop_requested)); then name_missing_nodes; fi
    # In a Slurm job, the job script decides once for all nodes.
    [[ $RELAUNCH == 1 ]] || exit "$status"
    verdict=0
    "$PYTHON" -m dynmoe.launch after --node "$NODE_RANK" --starts-without-progress "$STARTS_WITHOUT_PROGRESS" "$@" \
        || verdict=$?
    if another_gave_up; then exit "$(<"$nodes/gave_up")"; fi
    if ((verdict == 2 || verdict == 3)); then echo "$verdict" >"$nodes/gave_up"; fi
    if ((verdict != 76 || stop_requested)); then exit "$verdict"; fi
done
