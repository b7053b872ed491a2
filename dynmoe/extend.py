"""Starts a run with longer sequences from the weights of another one: python -m dynmoe.extend RUN OUT --length N"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from dynmoe.cli import run_tool
from dynmoe.config import Config, load_config
from dynmoe.errors import UserError


def extend(run: Path, output: Path, length: int, kind: str = "yarn", overrides: Sequence[str] = ()) -> Config:
    """Creates the run directory ``output``, whose rotary positions are stretched to sequences of ``length`` tokens.

    The first step starts from the weights and router state of ``run``, with a new optimizer.

    Args:
        run: directory of the run, of either engine.
        output: directory of the new run; must not exist.
        length: tokens of a sequence, more than in the run.
        kind: how positions are stretched (``model.rope_scaling.kind``); that of the run, if its positions are already.
        overrides: further fields of the new run, such as a smaller ``optimizer.lr``.

    Raises:
        UserError: the length is not longer, the run was extended in another way, or the output exists.
    """
    if output.exists():
        raise UserError(f"OUT: {output} exists; name a new directory")
    old = load_config(run / "config.yaml")
    config = load_config(run / "config.yaml", [*_stretched(old, _reach(run), length, kind), *overrides])
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(output.parent), name=output.name))
    from dynmoe.train.checkpoint import model_files
    from dynmoe.trained import begin_run, open_decoder

    begin_run(config, open_decoder(run, mtp=True).decoder, model_files(run), output)
    return config


def _reach(run: Path) -> int:
    """Positions for which an imported model was trained; 0 if the run was not imported."""
    from dynmoe.train.checkpoint import IMPORTED

    fields = run / IMPORTED / "config.json"
    return (json.loads(fields.read_text()).get("max_position_embeddings") or 0) if fields.exists() else 0


def _stretched(old: Config, reach: int, length: int, kind: str) -> list[str]:
    """The overrides that stretch the positions of a run to ``length``, unless its weights ``reach`` as far."""
    now = old.data.sequence_length
    scaling = old.model.rope_scaling
    if length <= now:
        raise UserError(f"--length {length}: is not longer than the sequences of the run ({now}); use a larger number")
    if scaling.kind not in (None, kind):
        problem = f"the positions of the run are stretched by {scaling.kind}"
        raise UserError(f"--kind {kind}: {problem}; use --kind {scaling.kind}")
    if scaling.kind is None and length <= reach:
        return [f"data.sequence_length={length}"]
    # A factor is relative to the first training, however often a run is extended.
    first = scaling.original_length or round(max(now, reach) / scaling.factor)
    # An imported model may reach beyond the run's sequences already; its frequencies must not change.
    factor = max(length / first, scaling.factor)
    fields = {"kind": kind, "factor": factor, "original_length": first}
    return [f"data.sequence_length={length}", *(f"model.rope_scaling.{name}={value}" for name, value in fields.items())]


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m dynmoe.extend", description="Start a run with longer sequences from the weights of another one."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of the trained run, of either engine")
    parser.add_argument("output", type=Path, metavar="OUT", help="directory of the new run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="fields, such as optimizer.lr=1e-4")
    parser.add_argument("--length", type=int, required=True, help="tokens of a sequence in the new run")
    kinds = ("yarn", "llama3", "linear")
    parser.add_argument("--kind", choices=kinds, default="yarn", help="how positions are stretched; default: yarn")
    given = parser.parse_intermixed_args()
    config = extend(**vars(given))
    scaling = config.model.rope_scaling
    stretched = f"{scaling.kind} by {scaling.factor:g}" if scaling.kind else "positions as before"
    print(f"{given.output}: sequences of {config.data.sequence_length} tokens, {stretched}.")
    print(f"Each step has {config.tokens_per_step} tokens; train.global_batch changes that.")
    print(f"Train it with: {config.training_command}")


if __name__ == "__main__":
    run_tool(main)
