"""Texts in five languages and code, tokenizers that are made from them, and the names of their special tokens."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = {
    "English": "The router doesn't take the same experts for each token; it'll choose 2, 3 or 12345 of them.\n\nWe've "
    "measured that \u2014 and I'm sure THEY'RE right. 'Tis 3.14159!",
    "German": "Der Verteiler wählt für jedes Wort andere Fachleute aus; größere Aufgaben brauchen mehr davon.\n  "
    "Straße, Übermaß und Ärger kosten 1.234,56 €.",
    "Russian": "Маршрутизатор выбирает для каждого слова разное число экспертов.\r\nЁлка стоит 17 рублей — не больше!",
    "Chinese": "路由器为每个词选择不同数量的专家。更难的任务需要更多专家,一共 2024 位。\u3000神経網𠮷",
    "Arabic": "يختار الموجّه لكل كلمة عددًا مختلفًا من الخبراء، والمهام الصعبة تحتاج إلى ١٢٣٤ خبيرًا.",
    "code": 'def route(x_TD: Tensor, k: int = 2) -> "Plan":\n    """Chooses experts."""\n\tif x_TD.shape[0] == 0x1F:\n'
    "        return {'a': [1e-5, *range(100000)]}  # TODO: don't\n\n\n    while True:\n        pass\n",
}
# What splits are easily got wrong on: space at the ends, several kinds of it, marks, digits of other scripts, emoji.
ODD = [
    "", " ", "\n", "  \n  ", "a\n  ", "a\n\n  \n b", "x  \t y\r\n\r\n z", "\u00a0\u3000a\u2003b\u200b",
    "e\u0301 の\u3099", "👩\u200d🔬🏳️\u200d🌈 ☕", "१२३४५६७ ½ Ⅻ ①②", "I'LL we'Ve x'\u017f y'S", "'''\"\"\"---===",
    "\x00\x1f\x7f\u0085", "AbcDEFghi ǅungla ΑΒΓδε", "1234567890123", "aaaaaaaaaaaaaaa  aaaa", "ﬆ ﬁ ß ẞ",
    "\ufeffx\ufffd", "/usr/lib//x\n/",
]  # fmt: skip
END = "<|endoftext|>"
BEGIN = "<|begin|>"
NAMED = [f"a{END}b", f"{BEGIN} {END}", f"{END}{END}", "<|tool|> and <|tool|>"]
EVERYTHING = [*TEXTS.values(), *ODD, *NAMED]

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def _byte_level(pattern: str | None, more: int = 200) -> Tokenizer:
    """A byte-level byte-pair encoding that splits text by ``pattern``, or as GPT-2 does."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern is not None:
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    made.decoder = decoders.ByteLevel()
    _train(made, trainers.BpeTrainer, 256 + more, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return made


def _train(made: Tokenizer, trainer: type, size: int, **settings: object) -> None:
    made.train_from_iterator(TEXTS.values(), trainer(vocab_size=size, show_progress=False, **settings))


def olmoe() -> Tokenizer:
    """GPT-2's splits, NFC, and special tokens within the vocabulary's ids; one added token is not special."""
    made = _byte_level(None)
    made.normalizer = normalizers.NFC()
    made.add_special_tokens([END, "<|padding|>"])
    made.add_tokens([AddedToken("<|tool|>", normalized=False), "   "])
    return made


def gpt2() -> Tokenizer:
    """GPT-2's splits and nothing else."""
    made = _byte_level(None)
    made.add_special_tokens([END])
    return made


def qwen3() -> Tokenizer:
    """Single digits, NFC, and chat tokens."""
    made = _byte_level(QWEN)
    made.normalizer = normalizers.NFC()
    made.add_special_tokens([END, "<|im_start|>", "<|im_end|>"])
    return made


def llama3() -> Tokenizer:
    """Whole words first, and a token that is prepended to each text."""
    made = _byte_level(LLAMA)
    made.model.ignore_merges = True
    made.add_special_tokens([BEGIN, "<|end_of_text|>"])
    template = f"{BEGIN} $A"
    made.post_processor = processors.TemplateProcessing(template, None, [(BEGIN, made.token_to_id(BEGIN))])
    return made


def dbrx() -> Tokenizer:
    """As Llama 3, without looking for whole words."""
    made = llama3()
    made.model.ignore_merges = False
    return made


def smollm() -> Tokenizer:
    """As OLMoE, with digits by themselves."""
    made = olmoe()
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return made


def llama2() -> Tokenizer:
    """Sentencepiece's conventions: spaces as U+2581, and pieces for bytes."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    _train(made, trainers.BpeTrainer, 500, special_tokens=pieces, limit_alphabet=60)
    settings = json.loads(made.to_str())
    settings["added_tokens"] = settings["added_tokens"][:3]  # pieces for bytes are ordinary ones
    return Tokenizer.from_str(json.dumps(settings))


def unigram() -> Tokenizer:
    """A unigram model, whose vocabulary contains its special tokens."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    _train(made, trainers.UnigramTrainer, 300, special_tokens=["<unk>", "</s>"], unk_token="<unk>")
    return made


def save(made: Tokenizer, folder: Path, **config: object) -> Path:
    """Writes a directory as the hub has them."""
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def every_part(texts: Iterable[str]) -> dict[bytes, int]:
    """Ranks of every part of the texts with up to five bytes, so that each way to split them gives other ids."""
    raw = [text.encode() for text in texts]
    parts = {own[place : place + size] for own in raw for place in range(len(own)) for size in range(2, 6)}
    tokens = sorted((part for part in parts if len(part) > 1), key=lambda part: (len(part), part))
    return {token: rank for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), *tokens])}


def save_ranks(ranks: dict[bytes, int], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(ranks.items(), key=lambda own: own[1])
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ordered))
    return path
