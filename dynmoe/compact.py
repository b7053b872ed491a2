"""Removes inactive experts from the latest checkpoint of a run: python -m dynmoe.compact RUN"""

from __future__ import annotations

import argparse
import dataclasses
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dynmoe.cli import run_tool
from dynmoe.config import Config, load_config
from dynmoe.convert import convert
from dynmoe.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_LAYER = re.compile(r"layers\.(\d+)\.moe\.")


def compact(run: Path, output: Path, multiple: int = 1) -> tuple[Config, dict[int, list[int]]]:
    """Creates the run directory ``output``: the same logits, with active experts only.

    Masters, moments and router state of these experts are kept, so that training can resume.

    Args:
        run: directory of a run.
        output: directory of the new run; must not exist.
        multiple: each layer keeps inactive slots until their number is a multiple of this, for ``parallel.expert``.

    Returns:
        The configuration of the new run, and the slots that each MoE layer kept.

    Raises:
        UserError: the run has no checkpoint or nothing to remove, or the output exists.
    """
    if output.exists():
        raise UserError(f"--output={output}: exists; name a new directory")
    config = load_config(run / "config.yaml")
    if config.engine == "deepspeed":
        return _compact_canonical(run, output, multiple, run)
    # A Megatron run is converted to the canonical form and back.
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        canonical = Path(folder) / "canonical"
        compacted = Path(folder) / "compact"
        convert(run, canonical, "deepspeed")
        new, kept = _compact_canonical(canonical, compacted, multiple, run)
        spread = dataclasses.replace(config.parallel, expert=new.parallel.expert)
        return convert(compacted, output, "megatron", spread), kept


def _compact_canonical(run: Path, output: Path, multiple: int, named: Path) -> tuple[Config, dict[int, list[int]]]:
    """Compacts a run with checkpoints in the canonical form; errors call it ``named``."""
    from dynmoe.engines.canonical_state import read_tensor
    from dynmoe.engines.state_names import buffer_key
    from dynmoe.train.checkpoint import continue_run, latest_valid

    config = load_config(run / "config.yaml")
    if config.model.router.n_group > 1:
        problem = "without the inactive slots, experts would be in other groups"
        raise UserError(f"model.router.n_group={config.model.router.n_group}: {problem}; keep the slots")
    checkpoint = latest_valid(run / "checkpoints")
    masks = {layer: read_tensor(checkpoint.path, buffer_key(f"layers.{layer}.moe.router.active_E")).tolist()
             for layer in config.model.moe_layers}  # fmt: skip
    kept = {layer: slots_to_keep(mask, multiple) for layer, mask in masks.items()}
    for layer, slots in kept.items():
        if len(slots) % multiple:
            used = sum(masks[layer])
            raise UserError(
                f"--multiple={multiple}: layer {layer} has {used} active experts of {len(masks[layer])}, and too few "
                f"inactive ones to fill up; use a divisor of {len(slots)}"
            )
    if all(len(kept[layer]) == len(masks[layer]) for layer in masks):
        raise UserError(f"{named}: nothing to remove, as every expert is active or kept by --multiple={multiple}")
    new = _configuration(config, output, [len(slots) for slots in kept.values()])

    def write(target: Path) -> None:
        for file in sorted(checkpoint.path.glob("*.safetensors")):
            _rewrite_file(file, target / file.name, kept)

    continue_run(checkpoint, new, output, write)
    return new, kept


def slots_to_keep(active: list[bool], multiple: int) -> list[int]:
    """Active slots, filled up with the first inactive ones to a multiple of ``multiple``, in ascending order."""
    used = [slot for slot, on in enumerate(active) if on]
    spare = [slot for slot, on in enumerate(active) if not on]
    return sorted(used + spare[: -len(used) % multiple])


def _configuration(config: Config, output: Path, counts: list[int]) -> Config:
    moe = dataclasses.replace(config.model.moe, experts_by_layer=counts, active_at_start=None)
    router = config.model.router
    if router.has_field("initial_experts"):  # only for a new run
        router = dataclasses.replace(router, initial_experts=None)  # type: ignore[call-arg]
    router = router.without_idle_maximum(counts)
    # The expert-parallel size may not divide the new numbers of experts.
    spread = config.parallel.expert if all(count % config.parallel.expert == 0 for count in counts) else 1
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dir=str(output.parent), name=output.name),
        model=dataclasses.replace(config.model, moe=moe, router=router),
        parallel=dataclasses.replace(config.parallel, expert=spread),
    )


def _rewrite_file(source: Path, target: Path, kept: Mapping[int, list[int]]) -> None:
    from safetensors import safe_open

    from dynmoe.train.tensor_files import save_tensors

    with safe_open(source, framework="pt") as file:
        tensors = {}
        for key in file.keys():  # noqa: SIM118
            new = _rewrite_key(key, kept)
            if new is not None:
                tensors[new] = _select(key, file.get_tensor(key), kept)
    save_tensors(tensors, target)


def _layer_of(key: str) -> int | None:
    match = _LAYER.search(key)
    return int(match.group(1)) if match else None


def _rewrite_key(key: str, kept: Mapping[int, list[int]]) -> str | None:
    """The key with the new index of its expert; None for a removed expert."""
    from dynmoe.engines.state_names import parameter_key, split_expert

    layer = _layer_of(key)
    if layer is None or ".moe.experts." not in key:
        return key
    name, expert, part = split_expert(key)
    return parameter_key(name, part, kept[layer].index(expert)) if expert in kept[layer] else None


def _select(key: str, tensor: Tensor, kept: Mapping[int, list[int]]) -> Tensor:
    """The kept slots of a router tensor; the letter E in the suffix of its name marks the expert dimension."""
    import torch

    layer = _layer_of(key)
    if layer is None or ".moe.router." not in key:
        return tensor
    name = key.removeprefix("buffer|").split("|")[0].rsplit(".", 1)[-1]
    letters = name.rsplit("_", 1)[-1]
    if not letters.isupper() or "E" not in letters:
        return tensor
    index = torch.tensor(kept[layer])
    # From the end, as a buffer may have a row for each budget.
    return tensor.index_select(letters.index("E") - len(letters), index).contiguous()


def main() -> None:
    parser = argparse.ArgumentParser("python -m dynmoe.compact", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--output", type=Path, help="directory of the new run (default: RUN-compact)")
    parser.add_argument(
        "--multiple", type=int, default=1, metavar="N", help="keep a multiple of N experts in each layer"
    )
    given = parser.parse_args()
    if given.multiple < 1:
        raise UserError(f"--multiple={given.multiple}: is too small; use at least 1")
    output = given.output or given.run.with_name(f"{given.run.name}-compact")
    config, kept = compact(given.run, output, given.multiple)
    counts = ", ".join(f"layer {layer}: {len(slots)}" for layer, slots in kept.items())
    print(f"{output}: experts kept in {counts}; expert-parallel size {config.parallel.expert}.")
    print(f"Resume training with: {config.training_command}")


if __name__ == "__main__":
    run_tool(main)
