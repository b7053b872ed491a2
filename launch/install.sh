#!/usr/bin/env bash
# Installs the project into the Python that `python3` is, in the versions of requirements.lock: what the images run.
#   launch/install.sh [options of pip for torch, such as --index-url URL]
# What is there already stays, above all a torch that was built for the machine; one that the project was not tested with
# is refused, and not replaced.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT

python3 - >"$constraints" <<'PYTHON'
import re
from importlib.metadata import distributions

def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()

present = {normal(found.metadata["Name"]): found.version for found in distributions()}
for line in open("requirements.lock"):
    if not line.startswith("#") and normal(line.split("==")[0]) not in present:
        print(line, end="")
if "torch" in present:
    print(f"torch=={present['torch']}")
PYTHON

# An image may have constraints of its own, which are about packages that it brings and that stay.
export PIP_CONSTRAINT='' PIP_NO_CACHE_DIR=1
# Torch first, so that no other package draws in another build of it.
python3 -c 'import torch' 2>/dev/null || python3 -m pip install "$@" --constraint "$constraints" torch
python3 -m pip install --constraint "$constraints" packaging
python3 - <<'PYTHON'
import sys
import tomllib
from importlib.metadata import version

from packaging.requirements import Requirement

needs = map(Requirement, tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"])
wanted = next(need.specifier for need in needs if need.name == "torch")
if not wanted.contains(version("torch"), prereleases=True):
    sys.exit(f"error: torch {version('torch')} is installed, and {wanted} is what the project was tested with; use another image")
PYTHON
python3 -m pip install --constraint "$constraints" --editable .
