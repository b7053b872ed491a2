#!/usr/bin/env bash
# Installs the project into `python3` with the versions of requirements.lock, as the images do.
#   launch/install.sh [pip options for torch, such as --index-url URL]
# Keeps installed packages, in particular a torch built for the machine. A torch version that the project was not tested
# with is refused, not replaced.
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

# Ignores an image's own constraints: they are about its installed packages, which are kept anyway.
export PIP_CONSTRAINT='' PIP_NO_CACHE_DIR=1
# Torch first, so that no other package pulls in a different build.
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
    sys.exit(f"error: torch {version('torch')} is installed, but the project was tested with {wanted}; use another image")
PYTHON
python3 -m pip install --constraint "$constraints" --editable .
