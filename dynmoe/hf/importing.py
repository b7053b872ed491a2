"""Import of a transformers checkpoint as the start of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dynmoe.config import Config, load_config
from dynmoe.data.corpus import Corpus
from dynmoe.data.tokenizer import Tokenizer
from dynmoe.data.tokenizer_files import find_tokenizer, open_tokenizer
from dynmoe.errors import ConfigError, UserError
from dynmoe.hf.deepseek_v3 import is_interleaved
from dynmoe.hf.formats import from_transformers
from dynmoe.hf.kept import to_keep
from dynmoe.hf.qwen2_moe import has_gates, has_shared_expert
from dynmoe.hf.routers import restore_router_state
from dynmoe.hf.tensors import Tensors, read_json
from dynmoe.hf.weights import load_weights
from dynmoe.model import Decoder
from dynmoe.trained import begin_run


def import_checkpoint(source: Path, output: Path, overrides: Sequence[str] = ()) -> tuple[str, Config]:
    """Creates the run directory ``output``, whose training starts from the weights in ``source`` with new moments.

    Supported are the release of arXiv 2403.07652, Llama, Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, DeepSeek-V3 with as
    many layers for further tokens as ``model.mtp.layers``, LongCat-Flash without such layers, and every export of
    ours, as written or as saved again by transformers, in safetensors. Our routers keep their budget, thresholds and
    masks. The tokenizer and other files of the model are kept in the run directory, for a later export.

    Args:
        source: directory with ``config.json`` and the weights.
        output: directory of the new run; must not exist.
        overrides: overrides of the run's configuration: engine, data, training.

    Returns:
        The architecture of the checkpoint, and the configuration of the run.

    Raises:
        UserError: the architecture, a field or a tensor is not supported or inconsistent; mlx-lm wrote the files; the
            tokenizer cannot be used or has more ids than the model has rows; or the output exists.
    """
    if output.exists():
        raise UserError(f"RUN: {output} exists; name a new directory")
    found = read_json(source / "config.json")
    tensors = Tensors(source)
    architecture, fields, kept = from_transformers(found)
    if architecture == "qwen2_moe":
        shares = has_shared_expert(tensors)
        fields.append(f"model.moe.shared_gate={str(shares and has_gates(tensors)).lower()}")
        if not shares:
            fields.append("model.moe.shared_hidden=0")
    config = load_config(None, [*fields, *overrides, f"run.dir={output.parent}", f"run.name={output.name}"])
    if config.model.mtp.layers and architecture != "deepseek_v3":
        problem = f"a checkpoint of {architecture} has no such layers"
        raise ConfigError("model.mtp.layers", config.model.mtp.layers, problem, "remove it")
    vocab_size = config.model.vocab_size
    assert vocab_size is not None
    tokenizer = _own_tokenizer(source, vocab_size, is_ours=architecture == "dynmoe")
    _check_corpora(config, vocab_size)
    decoder = Decoder(config.model, vocab_size, config.train.seed)
    load_weights(decoder, tensors, architecture, is_interleaved(found))
    if architecture == "dynmoe":
        restore_router_state(decoder, found.get("router") or {})
    begin_run(config, decoder, to_keep(source, found | kept, tokenizer), output)
    return architecture, config


def _own_tokenizer(source: Path, vocab_size: int, is_ours: bool) -> Tokenizer | None:
    """The checkpoint's tokenizer, if it has one, which must have no ids beyond the model's embedding rows.

    Only a model of ours says by its files whether special tokens in a text to train on are tokens.
    """
    path = find_tokenizer(source)
    if path is None:
        return None
    cure = "move it away to import without it, and prepare text with data_prep --tokenizer"
    tokenizer = open_tokenizer(path, cure, special_tokens=None if is_ours else False)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"config.json: vocab_size={vocab_size}: {path} has {tokenizer.vocab_size} ids; {cure}")
    return tokenizer


def _check_corpora(config: Config, vocab_size: int) -> None:
    """Checks that the named corpora have no ids beyond the model's embedding rows."""
    if config.data.dirs == load_config().data.dirs:
        return
    for folder in config.data.dirs:
        # A corpus that does not exist yet may be prepared with the tokenizer of the run.
        size = Corpus.open(folder).tokenizer.vocab_size if Path(folder).is_dir() else 0
        if size > vocab_size:
            problem = f"has {size} token ids, more than the checkpoint's vocab_size={vocab_size}"
            raise UserError(f"data.dirs: {folder} {problem}; prepare it with the tokenizer of the weights")
