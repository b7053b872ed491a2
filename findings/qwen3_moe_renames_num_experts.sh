#!/usr/bin/env bash
# Loading and saving a Qwen3-MoE renames the field with its number of experts; related models keep theirs.
#
# Expected: config.json has num_experts before and after, as the published models have it, and as Qwen2-MoE and OLMoE keep
# it in the same version.
# Observed: For this family, transformers 5 writes num_local_experts, Mixtral's name. transformers itself reads both
# names. A reader that looks for num_experts with a default gets the family's 128. That is correct for the large published
# models, so it goes unnoticed, and wrong for all others. transformers 4 creates 128 experts from such a file.
#
# Seen with torch 2.13.0, transformers 5.24.0 (a configuration with num_experts = 4, loaded and saved again):
#   qwen3_moe: num_local_experts
#   qwen2_moe: num_experts
#   olmoe:     num_experts
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -qq torch==2.13.0
venv/bin/python -m pip install -qq transformers==5.24.0

venv/bin/python -I - <<'END'
import json
from pathlib import Path

from transformers import AutoConfig

names = {}
for family in ("qwen3_moe", "qwen2_moe", "olmoe"):
    Path(family).mkdir()
    Path(family, "config.json").write_text(json.dumps({"model_type": family, "num_experts": 4}))
    config = AutoConfig.from_pretrained(family)
    assert config.num_experts == 4
    config.save_pretrained(f"{family}-again")
    saved = json.loads(Path(f"{family}-again", "config.json").read_text())
    names[family] = sorted({"num_experts", "num_local_experts"} & saved.keys())
    print(f"{family + ':':10} {', '.join(names[family])}")
    assert AutoConfig.from_pretrained(f"{family}-again").num_experts == 4
assert names == {"qwen3_moe": ["num_local_experts"], "qwen2_moe": ["num_experts"], "olmoe": ["num_experts"]}
END
