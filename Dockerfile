# CPU:   docker build -t dynmoe .
# CUDA:  docker build -t dynmoe --build-arg BASE=IMAGE .   with an image that brings CUDA and its own torch
# PIP_ARGS reaches pip when torch has to be installed, to name the index that offers the CPU build.
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG PIP_ARGS=""

# A compiler for packages that build themselves on installation.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/dynmoe
COPY pyproject.toml README.md LICENSE ./
COPY dynmoe ./dynmoe
COPY data_prep ./data_prep
COPY bench ./bench
COPY configs ./configs
COPY train.py ./

# An image with torch of its own keeps it; elsewhere torch comes first, so that nothing draws in another build.
RUN python3 -c "import torch" 2>/dev/null || python3 -m pip install --no-cache-dir ${PIP_ARGS} torch==2.13.0
RUN python3 -m pip install --no-cache-dir --editable .

RUN useradd --create-home trainer && mkdir -p data runs && chown trainer data runs
USER trainer
ENTRYPOINT ["python3"]
CMD ["train.py", "--help"]
