# CPU:   docker build -t dynmoe .
# CUDA:  docker build -t dynmoe --build-arg BASE=IMAGE .   where IMAGE is one of NVIDIA's PyTorch images
#        (nvcr.io/nvidia/pytorch), which bring CUDA, NCCL, Transformer Engine and their own torch: above 2.11, below 2.15.
# PIP_ARGS reaches pip when torch has to be installed, to name the index that offers the CPU build.
# Run:   mkdir -p data runs && docker run --rm -it [--gpus all] --ipc host --ulimit memlock=-1 -v "$PWD/data:/opt/dynmoe/data" \
#            -v "$PWD/runs:/opt/dynmoe/runs" --user "$(id -u):$(id -g)" -e HOME=/tmp dynmoe launch/torchrun.sh configs/one_gpu.yaml
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}
ARG PIP_ARGS=""
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# A compiler for packages that build themselves on installation; ssh and pdsh for DeepSpeed's launcher. Security updates
# of the distribution are wanted, so their versions are not pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential numactl openssh-client pdsh procps \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/dynmoe
COPY pyproject.toml requirements.lock README.md LICENSE train.py ./
COPY dynmoe ./dynmoe
COPY data_prep ./data_prep
COPY bench ./bench
COPY harness ./harness
COPY configs ./configs
COPY launch ./launch

RUN launch/install.sh ${PIP_ARGS}

RUN useradd --create-home --uid 10001 trainer && mkdir -p data runs && chown -R 10001:10001 data runs
USER 10001
# Trains three steps soon after the start, and once a day: with the first GPU where there is one.
HEALTHCHECK --start-period=10m --start-interval=30s --interval=24h --timeout=10m --retries=2 CMD ["launch/health.sh"]
CMD ["python3", "train.py", "--help"]
