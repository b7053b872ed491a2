"""Makes a checkpoint of engine=megatron, and its masters and moments by the plain model's names.

    python -m tests.golden.make_megatron FOLDER

``megatron_0_16`` and ``megatron_0_19`` beside this file were made so, each under the version in its name.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dynmoe.engines import make_engine
from dynmoe.engines.megatron.conversion import write_canonical
from tests.engines.cases import VOCAB, config_for, save_state, step_once

# Of every kind of parameter and buffer one: a dense layer, a shared expert, norms over projections, thresholds, masks.
FIELDS = [
    "engine=megatron", "model.hidden=16", "model.layers=2", "model.moe.moe_layer_freq=2", "model.ffn_hidden=16",
    "model.moe.expert_hidden=8", "model.moe.shared_hidden=8", "model.moe.active_at_start=3", "model.qk_norm=projection",
    "model.router.kind=top_any", "model.router.variant=improved", "model.router.temperature=learned",
    "train.micro_batch=2",
]  # fmt: skip


def main(folder: Path) -> None:
    engine = make_engine(config_for(*FIELDS), VOCAB)
    for step in range(3):
        step_once(engine, step)
    save_state(engine, str(folder))
    (folder / "plain").mkdir()
    write_canonical(engine, folder / "plain")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
