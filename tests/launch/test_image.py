"""What the Dockerfile does, without an engine that builds images."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from harness.processes import CPU, ROOT

LOCKED = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines() if line[0] != "#"]
LOCK = {
    locked.name: str(locked.specifier).removeprefix("==")
    for locked in LOCKED
    if locked.marker is None or locked.marker.evaluate()
}


def test_locked_versions_are_within_the_tested_ranges():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for need in map(Requirement, project["dependencies"]):
        assert need.name in {name.lower() for name in LOCK}, f"make lock: {need.name} is missing"
        version = next(version for name, version in LOCK.items() if name.lower() == need.name)
        assert need.specifier.contains(version), f"make lock: {need.name} {version} is not {need.specifier}"


def copied(folder: Path) -> Path:
    """What the image gets: the paths of its COPY lines, and nothing else."""
    folder.mkdir(exist_ok=True)
    for line in re.findall(r"^COPY (.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE):
        *sources, target = line.split()
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, folder / target)
    return folder


def test_the_image_gets_what_it_runs(tmp_path):
    text = (ROOT / "Dockerfile").read_text()
    folder = copied(tmp_path)
    for name in ("train.py", "launch/health.sh", "launch/install.sh", "launch/torchrun.sh", "requirements.lock"):
        assert (folder / name).exists()
    assert 'CMD ["launch/health.sh"]' in text
    assert "RUN launch/install.sh" in text
    assert re.search(r"^USER \d+$", text, re.MULTILINE), "not root"


@pytest.mark.slow
def test_a_fresh_environment_installs_and_trains(tmp_path):
    """The image's own steps, in a copy of what it gets and a new virtual environment."""
    folder = copied(tmp_path / "project")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= CPU | {"PATH": f"{tmp_path / 'venv' / 'bin'}:{os.environ['PATH']}", "PYTHON": "python3"}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600
        )

    done = run("launch/install.sh")
    assert done.returncode == 0, done.stdout + done.stderr
    installed = dict(
        line.split("==") for line in run("python3", "-m", "pip", "freeze").stdout.splitlines() if "==" in line
    )
    assert installed | {"torch": installed["torch"].split("+")[0]} == installed | LOCK
    healthy = run("launch/health.sh")
    assert healthy.returncode == 0, healthy.stdout + healthy.stderr
    assert "step 3/3" in healthy.stdout
    assert run("launch/health.sh", "model.router.p=7").returncode == 2

    # A torch of another version is refused, and stays.
    metadata = next((tmp_path / "venv" / "lib").glob("python*/site-packages/torch-*.dist-info/METADATA"))
    metadata.write_text(re.sub(r"^Version: .*$", "Version: 2.7.0", metadata.read_text(), count=1, flags=re.MULTILINE))
    refused = run("launch/install.sh")
    assert refused.returncode != 0
    assert "error: torch 2.7.0 is installed" in refused.stderr
