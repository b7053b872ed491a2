#!/usr/bin/env bash
# tokenizers gives added tokens of a tokenizer.json other ids than the file says, if there are holes before them.
#
# Expected: A tokenizer.json lists added tokens with their ids. A reader uses these ids, or refuses the file.
# Observed: An added token that is not in the model's vocabulary gets the next free id, whatever its "id" says, without a
# message. Vocabularies with holes are common: cl100k has none of the ids 100,261 to 100,275, so that a file written from
# its facts gives <|endofprompt|> the id 100,261 and a model the wrong embedding. With the tokens in the model's vocabulary
# as well, the ids are those of the file.
#
# Seen with tokenizers 0.23.3, Python 3.11, for a vocabulary of ids 0 and 1, and tokens with the ids 7 and 9:
#   as added tokens only      2 3
#   in the vocabulary too     7 9
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -qq tokenizers==0.23.3

venv/bin/python -I - <<'END'
import json

from tokenizers import Tokenizer

IDS = {"<a>": 7, "<b>": 9}
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


def ids(vocabulary: dict[str, int]) -> list[int]:
    """The ids that a file's added tokens get."""
    added = [{"id": number, "content": token, "special": True, **FLAGS} for token, number in IDS.items()]
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "x"}
    tokenizer = Tokenizer.from_str(json.dumps({"version": "1.0", **parts, "added_tokens": added, "model": model}))
    return [tokenizer.token_to_id(token) for token in IDS]


alone = ids({"x": 0, "y": 1})
both = ids({"x": 0, "y": 1} | IDS)
print("as added tokens only     ", *alone)
print("in the vocabulary too    ", *both)
assert (alone, both) == ([2, 3], [7, 9])
END
