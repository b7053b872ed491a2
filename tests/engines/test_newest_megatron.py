"""The newest allowed release of Megatron-Core has every name that we use and accepts our arguments.

The tests download and parse its wheel without installing it, which would need another Python and a torch of 3 GB.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile

import pytest

from harness.processes import ROOT
from tests.engines.signatures import Sources, problems

OURS = sorted(
    path
    for folder in ("dynmoe", "data_prep", "bench", "examples", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if "import megatron" in path.read_text() or "from megatron" in path.read_text()
)
# Names that we override, replace or call on objects, which imports do not show: parameters, None for an attribute.
BEYOND_IMPORTS = {
    "core.dist_checkpointing.strategies.torch.TorchDistSaveShardedStrategy.async_save": ["sharded_state_dict"],
    "core.dist_checkpointing.strategies.filesystem_async.FileSystemWriterAsync.write_preloaded_data": ["use_fsync"],
    "core.dist_checkpointing.strategies.filesystem_async._results_queue": None,
    "core.models.hybrid.hybrid_block.HybridStack.__init__": ["post_layer_norm", "post_process", "layer_type_list"],
    "core.models.hybrid.hybrid_block.HybridStack.sharded_state_dict": ["prefix"],
    "core.optimizer.distrib_optimizer.DistributedOptimizer._get_main_param_and_optimizer_states": ["model_param"],
    "core.optimizer.distrib_optimizer.DistributedOptimizer._get_model_param_range_map": ["param"],
    "core.optimizer.distrib_optimizer.DistributedOptimizer.sharded_state_dict": ["is_loading", "metadata"],
    "core.optimizer.optimizer.ChainedOptimizer.step_with_ready_grads": ["self"],
    "core.optimizer.optimizer.ChainedOptimizer.prepare_grads": ["self"],
    "core.pipeline_parallel.p2p_communication._p2p_ops": ["tensor_send_prev", "tensor_send_next"],
    "core.tensor_parallel.random._set_cuda_rng_state": ["new_state"],
    "core.transformer.moe.router.TopKRouter.__init__": ["config", "pg_collection", "is_mtp_layer"],
    "core.transformer.moe.token_dispatcher.MoEAlltoAllTokenDispatcher.preprocess": ["routing_map"],
    "core.transformer.moe.token_dispatcher.MoEAlltoAllTokenDispatcher._maybe_update_cuda_sync_point": ["point"],
    "core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu": ["as_numpy", "record_stream"],
    "core.transformer.moe.token_dispatcher.hybrid_ep_dispatch": ["num_permuted_tokens"],
    "core.transformer.multi_latent_attention.HAVE_TE": None,
    "core.transformer.multi_latent_attention.MLASelfAttention.__init__": ["config", "submodules", "layer_number"],
    "core.transformer.multi_latent_attention.MLASelfAttention.forward": ["hidden_states", "attention_mask"],
    "core.transformer.transformer_layer.TransformerLayer.__init__": ["submodules", "layer_number", "add_layer_offset"],
}


@pytest.fixture(scope="module")
def newest(tmp_path_factory) -> Sources:
    folder = tmp_path_factory.mktemp("megatron")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = [name.split("#")[0] for name in project["dependencies"] if name.startswith("megatron-core")]
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (17, 24, 28)]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--python-version",
         "3.12", *platforms, "--dest", folder, wanted],
        check=True, timeout=300,
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    print(wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return Sources(folder)


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imported_names_exist_and_take_our_arguments(newest, path):
    assert problems(newest, path) == []


@pytest.mark.parametrize("name", sorted(BEYOND_IMPORTS))
def test_overridden_names_exist_and_take_our_arguments(newest, name):
    parts = name.split(".")
    # Class names begin with a capital.
    place = next((number for number, part in enumerate(parts) if part.lstrip("_")[:1].isupper()), len(parts) - 1)
    found = newest.find(".".join(["megatron", *parts[:place]]), parts[place])
    assert found is not None
    module, definition = found
    if place < len(parts) - 1:
        assert isinstance(definition, ast.ClassDef)
        found = newest.method(module, definition, parts[-1])
        assert found is not None
        module, definition = found
    if BEYOND_IMPORTS[name] is not None:
        taken = newest.parameters(module, definition)
        assert taken is None or set(BEYOND_IMPORTS[name]) <= set(taken)


@pytest.mark.parametrize("name", ["build_blending_indices", "build_exhaustive_blending_indices"])
def test_compiled_functions_exist(newest, name):
    """Those of ``helpers_cpp``, whose source is in the wheel."""
    source = newest.root / "megatron/core/datasets/helpers.cpp"
    assert f'm.def("{name}", &{name}' in source.read_text()


def test_missing_names_and_arguments_are_found(newest, tmp_path):
    code = tmp_path / "code.py"
    code.write_text(
        "from megatron.core import parallel_state\n"
        "from megatron.core.models.gpt import GPTModel, NoModel\n"
        "from megatron.core.transformer import TransformerConfig\n"
        "TransformerConfig(num_layers=1, layers=2)\n"
        "parallel_state.initialize_model_parallel(tensor_model_parallel_size=1, experts=2)\n"
        "GPTModel(vocab_size=3, words=4)\n"
    )
    assert problems(newest, code) == [
        "code.py: megatron.core.models.gpt has no NoModel",
        "code.py: TransformerConfig takes no layers",
        "code.py: parallel_state.initialize_model_parallel takes no experts",
        "code.py: GPTModel takes no words",
    ]
