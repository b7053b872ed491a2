#!/usr/bin/env bash
# Files written by safetensors 0.8 are readable only by their owner, and a symbolic link is replaced by a file.
#
# Expected: A new file has the permissions that the umask allows, like all other files saved with it. An existing file
# keeps its permissions. A symbolic link is followed, so that a name in a home directory can refer to another disk.
# Observed: save_file writes a temporary file with mode 0600 and renames it to the given name, so all three fail. Other
# members of the group can read config.json but not the weights, and a link is lost. transformers' save_pretrained does
# the same. Up to safetensors 0.7 all three were as expected; the documentation does not mention the change.
#
# Seen with umask 022, on Linux, numpy 2.3.5:
#   safetensors 0.7.0: new file 0644, file that was 0664 is 0664, link stays a link: True
#   safetensors 0.8.0: new file 0600, file that was 0664 is 0600, link stays a link: False
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -qq numpy==2.3.5

cat > save.py <<'END'
import os
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import mkdtemp

import numpy
from safetensors.numpy import save_file

os.umask(0o022)
os.chdir(mkdtemp(dir="."))
Path("shared").touch()
Path("shared").chmod(0o664)
Path("large_disk").touch()
Path("link").symlink_to("large_disk")
for name in ("new", "shared", "link"):
    save_file({"weight": numpy.zeros(4)}, name)
modes = [f"{Path(name).stat().st_mode & 0o777:04o}" for name in ("new", "shared")]
link = Path("link").is_symlink()
print(
    f"safetensors {version('safetensors')}: new file {modes[0]}, file that was 0664 is {modes[1]}, "
    f"link stays a link: {link}"
)
assert [*modes, str(link)] == sys.argv[1:], f"expected {sys.argv[1:]}"
END
venv/bin/python -m pip install -qq safetensors==0.7.0
venv/bin/python save.py 0644 0664 True
venv/bin/python -m pip install -qq safetensors==0.8.0
venv/bin/python save.py 0600 0600 False
