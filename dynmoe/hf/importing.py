"""A run that begins from somebody else's checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dynmoe.config import Config, load_config
from dynmoe.data.corpus import TOKENIZER, Corpus
from dynmoe.data.tokenizer import Tokenizer
from dynmoe.errors import UserError
from dynmoe.hf.formats import from_transformers
from dynmoe.hf.kept import to_keep
from dynmoe.hf.qwen2_moe import has_shared_expert
from dynmoe.hf.routers import settle
from dynmoe.hf.tensors import Tensors, read_json
from dynmoe.hf.weights import fill
from dynmoe.model import Decoder
from dynmoe.trained import begin_run


def import_checkpoint(source: Path, output: Path, overrides: Sequence[str] = ()) -> tuple[str, Config]:
    """Makes the run directory ``output``, whose training starts from the weights in ``source``, with fresh moments.

    Known are the release of arXiv 2403.07652, Llama, Mixtral, OLMoE, Qwen3-MoE and every export of ours, as it is or
    saved again by transformers, in safetensors. Routers of ours go on as they were, with their budget, thresholds and
    masks. The tokenizer and what else describes the model is kept in the run directory, for its export.

    Args:
        source: directory with ``config.json`` and the weights.
        output: directory of the new run; must not exist.
        overrides: of our configuration: engine, data, training.

    Returns:
        Whose checkpoint it was, and the configuration of the run.

    Raises:
        UserError: an unknown architecture; a field with which the logits would be others than ours, or may be; tensors
            that are missing, surplus, of another shape, quantized or not finite, or say what our decoder cannot compute
            (each by name); files of mlx-lm; a tokenizer that is not sentencepiece's, or has more ids than the model has
            rows; or an output that exists.
    """
    if output.exists():
        raise UserError(f"RUN: {output} exists; name a new directory")
    found = read_json(source / "config.json")
    tensors = Tensors(source)
    maker, fields, kept = from_transformers(found)
    if maker == "qwen2_moe" and not has_shared_expert(tensors):
        fields.append("model.moe.shared_hidden=0")
    config = load_config(None, [*fields, *overrides, f"run.dir={output.parent}", f"run.name={output.name}"])
    vocab_size = config.model.vocab_size
    assert vocab_size is not None
    _check_tokenizers(source, config, vocab_size)
    decoder = Decoder(config.model, vocab_size, config.train.seed)
    fill(decoder, tensors, maker)
    if maker == "dynmoe":
        settle(decoder, found.get("router") or {})
    begin_run(config, decoder, to_keep(source, found | kept), output)
    return maker, config


def _check_tokenizers(source: Path, config: Config, vocab_size: int) -> None:
    """Refuses ids that the model has no rows for: of the checkpoint's tokenizer, and of corpora that were named."""
    path = source / TOKENIZER
    if path.exists():
        cure = "move it away: the model imports without it, though text can be prepared with sentencepiece's alone"
        size = Tokenizer(path, cure).vocab_size
        if size > vocab_size:
            raise UserError(f"config.json: vocab_size={vocab_size}: {path} has {size} ids; {cure}")
    if config.data.dirs == load_config().data.dirs:
        return
    for folder in config.data.dirs:
        # One that is not there yet may be prepared with the tokenizer of the run.
        size = Corpus.open(folder).tokenizer.vocab_size if Path(folder).is_dir() else 0
        if size > vocab_size:
            problem = f"has {size} token ids, more than the checkpoint's vocab_size={vocab_size}"
            raise UserError(f"data.dirs: {folder} {problem}; prepare it with the tokenizer of the weights")
