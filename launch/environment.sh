# Sourced by the other scripts of this folder: which Python, and what every rank should find set. What you set stays.
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

# Settings of the ranks, for RANKS of them on this node.
set_environment() { # RANKS
    local cores ranks=$1
    cores=$(nproc)
    # torch takes every core in every rank otherwise, or one where torchrun chooses.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
    # A dynamic number of experts gives tensors of another size in every step: segments that can grow keep the
    # allocator from ending in fragments.
    export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
    # NCCL says why it fails, not only that it did.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    export PYTHONUNBUFFERED=1
    # A restart in place would meet the keys of the attempt before in a store that both share ("connectFullMesh ...
    # Connection refused" on gloo).
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    # Lines on the screen begin with the rank they come from.
    # shellcheck disable=SC2016
    export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE=${TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE:-'[${rank}] '}
    # The network interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME) each rank finds out for itself: the one that
    # reaches the first rank. Hosts name theirs differently. InfiniBand is NCCL's own choice (NCCL_IB_HCA).
}
