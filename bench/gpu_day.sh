#!/usr/bin/env bash
# `python -m bench gpu_day` on a machine with a GPU and PyTorch, but without a network.
# usage: gpu_day.sh pack [--sonic] DIR     with a network: collects what that machine lacks in DIR (16 MB; SonicMoE 58 MB)
#        gpu_day.sh run DIR [ARGUMENTS]    there: installs it into the Python in use, and runs the day
# PYTHON_VERSION is the Python of that machine (default 3.12).
set -euo pipefail

pack() {
    local sonic=()
    # With what its own requirements name: pip would not resolve them together with a newer torch.
    if [[ $1 == --sonic ]]; then
        sonic=(sonic-moe==0.1.2.post1 quack-kernels==0.4.1 nvidia-cutlass-dsl==4.4.2 nvidia-cutlass-dsl-libs-base==4.4.2
            apache-tvm-ffi==0.1.15.post2 torch-c-dlpack-ext==0.1.5)
        shift
    fi
    mkdir -p "$1"
    python3 -m pip download --quiet --no-deps --dest "$1" --python-version "${PYTHON_VERSION:-3.12}" \
        --only-binary=:all: --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
        megatron-core==0.16.1 omegaconf antlr4-python3-runtime hjson msgpack py-cpuinfo pydantic==2.14.3 \
        pydantic-core==2.50.4 annotated-types typing-inspection sentencepiece einops zstandard "${sonic[@]}"
    DS_BUILD_OPS=0 python3 -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$1" deepspeed==0.19.8
    if ((${#sonic[@]})); then squeeze "$1"/nvidia_cutlass_dsl_libs_base-*.whl; fi
    du -sh "$1"
}

# xz makes a third less of a large wheel than its own compression.
squeeze() {
    python3 - "$1" <<'END'
import sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as packed, zipfile.ZipFile(sys.argv[1] + ".plain", "w") as plain:
    for name in packed.namelist():
        plain.writestr(name, packed.read(name))
END
    mv "$1.plain" "$1"
    xz --force "$1"
}

run() {
    local wheels
    wheels=$(realpath "$1")
    shift
    find "$wheels" -name '*.whl.xz' -exec xz --decompress --keep --force {} +
    python3 -m pip install --quiet --no-index --no-deps --no-compile "$wheels"/*.whl
    cd "$(dirname "$0")/.."
    exec python3 -m bench gpu_day "$@"
}

case "${1:-}" in
    pack | run) "$@" ;;
    *)
        sed -n '2,5s/^# //p' "$0" >&2
        exit 2
        ;;
esac
