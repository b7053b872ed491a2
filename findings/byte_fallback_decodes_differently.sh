#!/usr/bin/env bash
# sentencepiece and tokenizers decode byte tokens that are not all valid UTF-8 to different text, for the same model.
#
# Expected: Both decoders of a byte-fallback vocabulary (Llama, Mixtral, Dynamic_MoE) replace invalid bytes by U+FFFD and
# keep valid ones, as Python's decode(errors="replace") does.
# Observed: sentencepiece keeps the valid characters of a run and replaces each other byte. tokenizers, which transformers
# uses, treats a run of byte tokens as a whole: one invalid byte turns every byte of the run into U+FFFD, including valid
# characters and plain ASCII. For a truncated character, Python gives one U+FFFD, and both decoders give one per byte.
# Sampling token by token produces such runs, so texts and scores of one model differ between the two stacks.
#
# Seen with sentencepiece 0.2.3, tokenizers 0.23.3, Python 3.11:
#   bytes             Python        sentencepiece       tokenizers
#   c3 a9             é             é                   é
#   c3 a9 ff          é?            é?                  ???
#   ff c3 a9          ?é            ?é                  ???
#   41 c3 a9 ff       Aé?           Aé?                 ????
#   e6 97             ?             ??                  ??
#   (? stands for U+FFFD)
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -qq sentencepiece==0.2.3 tokenizers==0.23.3

venv/bin/python -I - <<'END'
import io

import sentencepiece
from tokenizers import decoders

model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 10), model_writer=model, vocab_size=300,
    model_type="bpe", byte_fallback=True, add_dummy_prefix=False, minloglevel=2,
)
processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
fallback = decoders.ByteFallback()  # the decoder that transformers gives such vocabularies

expected = {
    b"\xc3\xa9": ("é", "é", "é"),
    b"\xc3\xa9\xff": ("é?", "é?", "???"),
    b"\xff\xc3\xa9": ("?é", "?é", "???"),
    b"A\xc3\xa9\xff": ("Aé?", "Aé?", "????"),
    b"\xe6\x97": ("?", "??", "??"),
}
print(f"{'bytes':17} {'Python':13} {'sentencepiece':19} tokenizers")
for text, texts in expected.items():
    pieces = [f"<0x{byte:02X}>" for byte in text]
    assert all(processor.is_byte(processor.piece_to_id(piece)) for piece in pieces)
    ids = [processor.piece_to_id(piece) for piece in pieces]
    seen = text.decode(errors="replace"), processor.decode(ids), fallback.decode(pieces)
    seen = tuple(each.replace("\ufffd", "?") for each in seen)
    print(f"{text.hex(' '):17} {seen[0]:13} {seen[1]:19} {seen[2]}")
    assert seen == texts, f"expected {texts}"
print("(? stands for U+FFFD)")
END
