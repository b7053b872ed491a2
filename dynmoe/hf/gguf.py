"""Export of a run as a single GGUF file, for llama.cpp and the tools that are built on it."""

from __future__ import annotations

import secrets
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynmoe.config import ModelConfig, load_config
from dynmoe.data.huggingface_tokenizer import HuggingFaceTokenizer
from dynmoe.data.sentencepiece_tokenizer import SentencePieceTokenizer
from dynmoe.data.tokenizer import Tokenizer
from dynmoe.errors import ConfigError, UserError, first_line
from dynmoe.hf.export import own_fields
from dynmoe.hf.gguf_byte_level import byte_level_vocabulary
from dynmoe.hf.gguf_tensors import SERVERS, describe, find_architecture, tensors
from dynmoe.hf.gguf_vocabulary import Vocabulary, vocabulary
from dynmoe.hf.kept import Kept
from dynmoe.hf.tokenizer import padding
from dynmoe.train.run_directory import RunDirectory
from dynmoe.trained import TrainedDecoder, open_trained

if TYPE_CHECKING:
    from gguf import GGUFWriter

# Element types of matrices (--type), and the file types that GGUF has for them.
TYPES = {"f32": "ALL_F32", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
# Gates and vectors are fp32 in every file, as llama.cpp's own tools write them.
_EXACT = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")
_BLOCK = 32  # numbers of a row that share a scale in q8_0


@dataclass(frozen=True)
class Written:
    """A GGUF file that was written.

    Attributes:
        architecture: the architecture, as llama.cpp calls it.
        parameters: number of parameters.
        size: size of the file, in bytes.
        composes: whether training normalized text to NFC, which llama.cpp does not do.
    """

    architecture: str
    parameters: int
    size: int
    composes: bool


def write_gguf(run: Path, output: Path, kind: str = "f32") -> Written:
    """Writes the latest valid checkpoint of a run, of either engine, as a file for llama.cpp.

    Embedding rows that represent no piece are omitted, because llama.cpp would generate them.

    Args:
        run: directory of the run.
        output: path of the file; must not exist.
        kind: element type of the matrices, a key of ``TYPES``.

    Raises:
        UserError: no run, no valid checkpoint, an existing output, or a model or tokenizer unsupported by llama.cpp.
    """
    if kind not in TYPES:
        cure = "for another type, convert a bf16 file with llama.cpp's llama-quantize"
        raise UserError(f"--type {kind}: must be one of {', '.join(TYPES)}; {cure}")
    if output.exists():
        raise UserError(f"FILE: {output} exists; name a new file")
    try:
        from gguf import GGUFWriter
    except ModuleNotFoundError:
        raise UserError("gguf: the package is not installed; run: pip install 'dynmoe[gguf]'") from None
    settings = load_config(RunDirectory(run).config).model.without_mtp()
    architecture = find_architecture(settings)
    if kind == "q8_0":
        _check_rows(settings)
    model = open_trained(run, torch.device("cpu"))
    kept = Kept.of(run)
    _check_router_state(model)
    words = _words(model.tokenizer)
    ids = own_fields(model, model.tokenizer, kept) | {"unk_token_id": model.tokenizer.unknown}
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = padding(model.tokenizer)
    fields = describe(settings, architecture, len(words.pieces), ids["max_position_embeddings"])
    weights = {name: own.detach() for name, own in model.decoder.named_parameters()}
    made = dict(tensors(settings, architecture, weights, len(words.pieces)))
    building = output.with_name(f"{output.name}.tmp-{secrets.token_hex(4)}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            writer = GGUFWriter(building, architecture)
            _add_fields(writer, kind, fields)
            _add_vocabulary(writer, words, ids, _SpecialTokens.of(kept))
            _write(writer, made, kind)
            size = building.stat().st_size
            building.rename(output)
        finally:
            building.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"FILE: {output} cannot be written: {first_line(error)}; name another place") from None
    return Written(architecture, sum(tensor.numel() for tensor in made.values()), size, words.composes)


def _words(tokenizer: Tokenizer) -> Vocabulary:
    if isinstance(tokenizer, SentencePieceTokenizer):
        return vocabulary(tokenizer)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return byte_level_vocabulary(tokenizer)


def _check_rows(model: ModelConfig) -> None:
    """Refuses matrices whose row length is not a multiple of q8_0's block."""
    widths = {
        "model.hidden": model.hidden,
        "model.head_dim": model.heads * model.width_of_head,
        "model.ffn_hidden": _BLOCK if model.moe_layers else model.ffn_hidden,
        "model.moe.expert_hidden": model.moe.expert_hidden if model.moe_layers else _BLOCK,
        "model.moe.shared_hidden": model.moe.shared_hidden,
    }
    for field, width in widths.items():
        if width % _BLOCK:
            problem = f"q8_0 packs {_BLOCK} numbers of a row, and {width} is not a multiple of {_BLOCK}"
            value = model.width_of_head if field == "model.head_dim" else width
            raise ConfigError(field, value, problem, "use --type bf16")


def _check_router_state(model: TrainedDecoder) -> None:
    """Refuses selection biases and inactive experts, which a GGUF file cannot express."""
    for layer, moe in zip(model.config.model.moe_layers, model.decoder.moe_layers, strict=True):
        state = dict(moe.router.named_buffers())
        if bool(state["bias_E"].any()):
            problem = "has biases of loss-free balancing, which llama.cpp does not support"
            raise UserError(f"layer {layer}: {problem}; {SERVERS}")
        if not bool(state["active_E"].all()):
            inactive = (~state["active_E"].bool()).nonzero().flatten().tolist()
            problem = f"experts {inactive} are inactive, which llama.cpp does not support"
            raise UserError(f"layer {layer}: {problem}; remove them (python -m dynmoe.compact RUN), or {SERVERS}")


@dataclass(frozen=True)
class _SpecialTokens:
    """Special tokens that an imported tokenizer adds to a text (ours adds none), and its chat template.

    Attributes:
        begins: whether it prepends the BOS token.
        ends: whether it appends the EOS token.
        template: the chat template; empty if there is none.
    """

    begins: bool = False
    ends: bool = False
    template: str = ""

    @classmethod
    def of(cls, kept: Kept) -> _SpecialTokens:
        """Asks transformers, because several files determine the result."""
        if not kept.has_tokenizer:
            return cls()
        try:
            from transformers import AutoTokenizer
        except ModuleNotFoundError:
            raise UserError("transformers: the imported tokenizer requires it; run: pip install 'dynmoe[hf]'") from None
        with tempfile.TemporaryDirectory() as folder:
            kept.write(Path(folder))
            theirs = AutoTokenizer.from_pretrained(folder)
        plain, whole = (theirs("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        more = len(whole) > len(plain)
        template = theirs.chat_template if isinstance(theirs.chat_template, str) else ""
        return cls(more and whole[0] == theirs.bos_token_id, more and whole[-1] == theirs.eos_token_id, template)


def _add_fields(writer: GGUFWriter, kind: str, fields: dict[str, int | float]) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    writer.add_type("model")
    writer.add_file_type(LlamaFileType[TYPES[kind]])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    for name, value in fields.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{writer.arch}.{name}", value)


def _add_vocabulary(writer: GGUFWriter, words: Vocabulary, ids: dict[str, Any], added: _SpecialTokens) -> None:
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.words)
    writer.add_token_list(words.pieces)
    if words.scores:
        writer.add_token_scores(words.scores)
    writer.add_token_types(words.types)
    if words.merges:
        writer.add_token_merges(words.merges)
    writer.add_add_space_prefix(words.space_before)
    writer.add_remove_extra_whitespaces(words.spaces_as_one)
    if words.charsmap:
        writer.add_precompiled_charsmap(words.charsmap)
    ends = ids["eos_token_id"] if isinstance(ids["eos_token_id"], list) else [ids["eos_token_id"]]
    special = {name: ids[f"{name}_token_id"] for name in ("unk", "bos", "pad")}
    special |= dict(zip(("eos", "eot"), ends, strict=False))
    for name, token in special.items():
        if token is not None and token < len(words.pieces):
            getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(added.begins)
    writer.add_add_eos_token(added.ends)
    writer.add_chat_template(added.template)


def _write(writer: GGUFWriter, made: dict[str, Tensor], kind: str) -> None:
    """Writes the whole file, converting one tensor at a time."""
    import numpy as np
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape, quantize

    kinds: dict[str, GGMLQuantizationType] = {}
    for name, tensor in made.items():
        exact = tensor.ndim == 1 or name.endswith(_EXACT)
        kinds[name] = GGMLQuantizationType["F32" if exact else kind.upper()]
        size = prod(quant_shape_to_byte_shape(tensor.shape, kinds[name]))
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, kinds[name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in made.items():
            writer.write_tensor_data(quantize(tensor.contiguous().numpy(), kinds[name]))
    finally:
        writer.close()
