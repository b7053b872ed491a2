# Sourced by the other scripts of this folder: chooses Python and sets each rank's environment. Keeps what you set.
# shellcheck shell=bash

if [[ -z ${PYTHON:-} ]]; then
    if [[ -x .venv/bin/python ]]; then PYTHON=$PWD/.venv/bin/python; else PYTHON=python3; fi
fi

count_gpus() {
    if command -v nvidia-smi >/dev/null; then nvidia-smi --list-gpus | grep -c '^GPU' || true; else echo 0; fi
}

count_numa_nodes() {
    find /sys/devices/system/node -maxdepth 1 -name 'node[0-9]*' 2>/dev/null | wc -l
}

# Sets the environment for RANKS ranks on this node.
set_environment() { # RANKS
    local cores ranks=$1
    cores=$(nproc)
    # By default each rank uses all cores, or only one under torchrun.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
    # With a dynamic number of experts, tensor sizes change every step: expandable segments avoid fragmentation.
    export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
    # Makes NCCL report why it failed.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    export PYTHONUNBUFFERED=1
    # In a shared store, a restart in place would read keys of the previous attempt ("connectFullMesh ... Connection
    # refused" with gloo).
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    # Prefixes output lines with their rank.
    # shellcheck disable=SC2016
    export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE=${TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE:-'[${rank}] '}
    # Each rank sets its own network interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME) to the one that reaches the first
    # rank, because interface names differ between hosts. NCCL chooses InfiniBand devices itself (NCCL_IB_HCA).
}
