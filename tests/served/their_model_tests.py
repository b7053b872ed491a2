"""transformers' own tests of a model, for our modeling code with the router named by ``ROUTER``.

``test_model_tests.py`` runs this in a separate process without our pytest settings. The tests come from transformers'
source distribution, unpacked in ``THEIR_TESTS``.
"""

from __future__ import annotations

import importlib
import os
import sys
import unittest
from types import ModuleType
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto import modeling_auto

from dynmoe.config import load_config
from dynmoe.hf.configuration_dynmoe import DynMoEConfig
from dynmoe.hf.formats import to_transformers
from dynmoe.hf.modeling_dynmoe import DynMoEForCausalLM, DynMoEForSequenceClassification, DynMoEModel
from tests.hf.cases import OWN

_VOCAB = 99
_TINY = [
    "model.hidden=32", "model.heads=4", "model.kv_heads=2", "model.layers=2", "model.ffn_hidden=40",
    "model.moe.experts=4", "model.moe.expert_hidden=24",
]  # fmt: skip
# Mixins that the source distribution lacks.
_ABSENT = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


def _theirs() -> tuple[type, type]:
    """The two mixins with their tests; missing mixins are replaced by empty ones."""
    package = sys.modules["theirs"] = ModuleType("theirs")
    package.__path__ = [os.environ["THEIR_TESTS"]]
    for name, mixin in _ABSENT.items():
        module = sys.modules[f"theirs.{name}"] = ModuleType(f"theirs.{name}")
        setattr(module, mixin, type(mixin, (), {}))
    models = importlib.import_module("theirs.test_modeling_common").ModelTesterMixin
    return models, importlib.import_module("theirs.test_training_mixin").TrainingTesterMixin


def _register() -> None:
    """Registers our classes like transformers' own models; the tests look up which have labels or a loss."""
    AutoConfig.register("dynmoe", DynMoEConfig)
    AutoModel.register(DynMoEConfig, DynMoEModel)
    AutoModelForCausalLM.register(DynMoEConfig, DynMoEForCausalLM)
    AutoModelForSequenceClassification.register(DynMoEConfig, DynMoEForSequenceClassification)
    modeling_auto.MODEL_MAPPING_NAMES["dynmoe"] = DynMoEModel.__name__
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["dynmoe"] = DynMoEForCausalLM.__name__
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["dynmoe"] = DynMoEForSequenceClassification.__name__


class Tester:
    """The configuration, inputs and sizes that the tests require."""

    causal_lm_class = DynMoEForCausalLM
    is_training = True
    batch_size = 3
    seq_length = 7

    def __init__(self) -> None:
        config = self.get_config()
        self.hidden_size = config.hidden_size
        self.num_hidden_layers = config.num_hidden_layers
        self.num_attention_heads = config.num_attention_heads

    def get_config(self) -> DynMoEConfig:
        """The configuration that the export of a run writes."""
        config = load_config(None, [*_TINY, *OWN[os.environ["ROUTER"]]])
        fields: dict[str, Any] = to_transformers(config, "dynmoe", _VOCAB)
        for name in ("architectures", "auto_map", "model_type"):
            del fields[name]
        return DynMoEConfig(**fields, pad_token_id=0, bos_token_id=1, eos_token_id=2)

    def prepare_config_and_inputs_for_common(self) -> tuple[DynMoEConfig, dict[str, torch.Tensor]]:
        tokens_BS = torch.randint(3, _VOCAB, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": tokens_BS, "attention_mask": torch.ones_like(tokens_BS)}


_register()


class TestDynMoE(*_theirs(), unittest.TestCase):
    all_model_classes = (DynMoEModel, DynMoEForCausalLM, DynMoEForSequenceClassification)
    model_tester = Tester()
