"""Starts ranks of a layout without their GPUs: -m tests.plan.started CONFIG NODES RANKS_PER_NODE RANK ..."""

from __future__ import annotations

import json
import sys

from dynmoe.config import load_config
from dynmoe.plan.dry_start import dry_start
from dynmoe.plan.layout import Layout


def main() -> None:
    """Prints the bytes of each rank as JSON."""
    config = load_config(sys.argv[1])
    assert config.model.vocab_size is not None
    layout = Layout(config, int(sys.argv[2]), int(sys.argv[3]), config.model.vocab_size)
    print(json.dumps(list(dry_start(layout, [int(rank) for rank in sys.argv[4:]]))))


if __name__ == "__main__":
    main()
