#!/usr/bin/env bash
# Checks that this installation trains: prepares a small corpus and takes three steps. Exits with 0 on success.
#   launch/health.sh [key=value ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for ((number = 0; number < 200; number++)); do
    echo "Document $number: the router takes the experts that each token needs, and $((number * number)) rows are sent."
done | split --lines 2 - "$folder/text-"
mkdir "$folder/text" && mv "$folder"/text-* "$folder/text"
"$PYTHON" -m data_prep "$folder/text" --out "$folder/corpus" --vocab-size 330 --validation-fraction 0.3 --workers 1
set_environment 1
"$PYTHON" train.py "data.dirs=[$folder/corpus]" "run.dir=$folder/runs" run.name=health data.sequence_length=16 \
    model.layers=2 model.hidden=32 model.heads=2 model.kv_heads=1 model.moe.experts=4 model.moe.expert_hidden=32 \
    train.steps=3 train.global_batch=4 train.micro_batch=4 schedule.warmup_steps=1 logging.interval=1 "$@"
