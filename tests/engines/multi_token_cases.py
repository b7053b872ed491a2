"""What runs on a rank for the comparison with Megatron-Core's own multi-token prediction."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from dynmoe.data.batches import Batch
from tests.engines.cases import VOCAB, config_for, micro_batches


def with_megatrons_own(overrides: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses and gradients of a micro-batch: with our layers on the last stage, and with Megatron's from equal weights.

    Gradients are under the names of ours; those of Megatron's loss are at its scale of 1.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer import multi_token_prediction as theirs
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from dynmoe.engines.megatron.groups import make_context, make_groups, start_processes
    from dynmoe.engines.megatron.model import _layer_spec, build_chunks, transformer_config
    from dynmoe.engines.megatron.norms import RMSNorm
    from dynmoe.model.documents import Documents

    config = config_for("engine=megatron", "train.micro_batch=2", *overrides)
    model = config.model
    device = start_processes()
    make_groups(config.parallel, 0)
    context = make_context("auto")
    (ours,) = build_chunks(config, VOCAB, context, device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            if "norm" in name:  # no norm is the identity
                weight.copy_(0.5 + torch.rand(weight.shape, generator=generator))

    settings = dataclasses.replace(
        transformer_config(config), mtp_num_layers=model.mtp.layers, mtp_loss_scaling_factor=model.mtp.loss_weight
    )
    specs = [_layer_spec(config, context, [], layer) for layer in range(model.trained_layers)]
    further = [
        ModuleSpec(
            theirs.MultiTokenPredictionLayer,
            submodules=theirs.MultiTokenPredictionLayerSubmodules(
                RMSNorm, RMSNorm, ColumnParallelLinear, spec, RMSNorm
            ),
        )
        for spec in specs[model.layers :]
    ]
    block = theirs.MultiTokenPredictionBlockSubmodules(further)
    whole = GPTModel(
        settings,
        TransformerBlockSubmodules(specs[: model.layers], RMSNorm),
        VOCAB,
        64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=model.tie_embeddings,
        mtp_block_spec=ModuleSpec(theirs.MultiTokenPredictionBlock, submodules=block),
    )
    whole.rotary_pos_emb = ours.rotary_pos_emb

    def name_of(name: str) -> str:
        """The name in ours of one of Megatron's weights."""
        for before, after in {
            "mtp.": "prediction.", "transformer_layer.": "layer.", "enorm.": "join.embedding_norm.",
            "hnorm.": "join.hidden_norm.", "eh_proj.weight": "join.w_join", "final_layernorm.": "norm.",
        }.items():  # fmt: skip
            name = name.replace(before, after) if name.startswith(("mtp.", "prediction.")) else name
        return name

    known = dict(ours.named_parameters())
    with torch.no_grad():
        for name, weight in whole.named_parameters():
            weight.copy_(known[name_of(name)])

    batch = micro_batches(config, 0)[0].looking_ahead(model.mtp.layers)
    documents = Documents(None, batch.tokens_BS.shape[1], device)
    result = _ours(ours, batch, documents), _theirs(whole, batch, documents, theirs)
    gradients = (
        {name: weight.grad for name, weight in known.items()},
        {name_of(name): weight.grad for name, weight in whole.named_parameters()},
    )
    return result[0] | gradients[0], result[1] | gradients[1]


def _ours(model: Any, batch: Batch, documents: Any) -> dict[str, torch.Tensor]:
    model.prediction.batches = batch.ahead
    loss = model(batch.tokens_BS, None, documents, labels=batch.labels_BS).mean()
    loss.backward()
    return {"loss": loss.detach(), "further": model.prediction.loss}


def _theirs(model: Any, batch: Batch, documents: Any, module: Any) -> dict[str, torch.Tensor]:
    module.MTPLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    positions = torch.arange(batch.tokens_BS.shape[1]).expand_as(batch.tokens_BS)
    loss = model(batch.tokens_BS, positions, documents, labels=batch.labels_BS).mean()
    loss.backward()
    by_depth = module.MTPLossLoggingHelper.tracker.pop("values")
    return {"loss": loss.detach(), "further": by_depth.mean()}
