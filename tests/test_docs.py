"""Every snippet of README and docs is run, or parsed by the tool that it calls."""

from __future__ import annotations

import importlib.util
import json
import re
from typing import Any

import pandas
import pytest
import torch

from dynmoe.__main__ import VERBS
from dynmoe.config import describe_fields, load_config
from dynmoe.errors import UserError
from harness.processes import ROOT
from tests.snippets import Shell, Snippet, blocks, check_block, check_inline, inline_code
from tests.train.cases import read_rows

# What is shown and not run, by how it begins.
SHOWN = {
    "Trained a 4-layer decoder": "what make quickstart prints after minutes",
    "runs/quickstart, step 120": "the table of a run's scores",
    "runs/second: continues": "what the scripts print on other numbers of nodes",
    "errors → fields": "a picture of what tests/test_layering.py checks",
    "from dynmoe.routers.relative": "the line that tests/test_own_router.py adds",
    "import os\nfrom operator": "what tests/served/test_counts.py runs, where vLLM is",
}
# Snippets with a test of their own below, by how they begin.
EXPORT, MEGATRON = (
    "from transformers import AutoModelForCausalLM",
    "from dynmoe.engines.megatron.router import layer_spec",
)
ROUTER, LOSS = '"""A router of our own', '"""An auxiliary loss'
HISTOGRAMS, TREE, TRACES = '{"train/step"', "train.py            ", "pandas.read_parquet("
APART = (EXPORT, MEGATRON, ROUTER, LOSS, HISTOGRAMS, TREE)
BLOCKS = blocks()
FAULTS = (AssertionError, UserError, ModuleNotFoundError)


def block(beginning: str) -> str:
    """The text of the only block that begins so."""
    (found,) = [snippet.text for snippet in BLOCKS if snippet.text.startswith(beginning)]
    return found


@pytest.fixture
def shell(tmp_path, monkeypatch) -> Shell:
    return Shell(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "snippet",
    [snippet for snippet in BLOCKS if not snippet.text.startswith((*SHOWN, *APART))],
    ids=str,
)
def test_a_block_is_of_commands_that_their_tools_take(shell, snippet: Snippet):
    check_block(shell, snippet)


def test_what_is_named_in_a_line_exists(shell):
    wrong, checked = [], 0
    for snippet in inline_code():
        try:
            checked += check_inline(shell, snippet.text)
        except FAULTS as error:
            wrong.append(f"{snippet}: {snippet.text}: {error}")
    assert wrong == []
    assert checked > 250, "code within lines is no longer found"


def test_what_is_not_run_is_still_there():
    for beginning in (*SHOWN, *APART):
        assert block(beginning)


@pytest.mark.parametrize(
    "wrong",
    [
        "make tests", "python -m dynmoe.plna configs/one_node.yaml", "python train.py configs/none.yaml",
        "torchrun --nproc-per-node 2 train.py configs/quickstart.yaml model.router.q=0.5",
        "torchrun --nproc-per-node 3 train.py configs/quickstart.yaml", "NONE=1 launch/torchrun.sh my.yaml",
        "torchrun --processes 2 train.py", "launch/pbs.sh configs/one_node.yaml", "pip install '.[all]'",
        "python -m dynmoe.hf export runs/NAME", "python -m data_prep texts --output data/mine", "sbatch second.sbatch",
        "python -m bench nothing", "python -m pytest tests/test_none.py", "an unknown tongue", "dynmoe train",
        "srun bash -c 'python -m data_prep verify'", "model.router.knid=top_p", "kind=top_q", "eval.batch",
        "docs/none.md", "Trainer.evaluate_all", "--no-such-option", "train/lm_los",
        "python examples/vit_digits.py --epochs 3", "torchrun --nproc-per-node 2 examples/vit_digits.py --epochs 3",
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(shell, wrong):
    with pytest.raises(FAULTS):
        shell.check(wrong) if " " in wrong else check_inline(shell, wrong)


def test_configurations_and_json_are_read(shell):
    check_block(shell, Snippet("a page", 1, "model:\n  layers: 3\n", "yaml"))
    with pytest.raises(UserError, match=r"model\.layer in snippet\.yaml: no such field"):
        check_block(shell, Snippet("a page", 1, "model:\n  layer: 3\n", "yaml"))
    with pytest.raises(ValueError, match="Expecting value"):
        check_block(shell, Snippet("a page", 1, '{"load": [1, …]}', "json"))


def test_the_tree_names_what_there_is():
    lines = [line for line in block(TREE).splitlines() if not line.startswith(" ")]
    assert [line for line in lines if not (ROOT / line.split()[0]).exists()] == []
    shown = {line.split()[0] for line in lines}
    assert {f"dynmoe/{path.parent.name}/" for path in (ROOT / "dynmoe").glob("*/__init__.py")} <= shown


@pytest.fixture(scope="module")
def generated() -> dict[str, str]:
    """The pages that the site generates."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    return hooks.pages()


def test_the_navigation_has_every_page_once(generated):
    text = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r"^ +- [^:]+: (\S+\.md)$", text[text.index("\nnav:") :], re.MULTILINE)
    assert sorted(listed) == sorted([*generated, *(path.name for path in (ROOT / "docs").glob("*.md"))])


def test_the_reference_has_every_field_and_command(generated):
    page = generated["reference/configuration.md"]
    assert [name for name, *_ in describe_fields() if f"| `{name}` |" not in page] == []
    page = generated["reference/commands.md"]
    assert [verb for verb in VERBS if f"## dynmoe.{verb}\n" not in page] == []
    for usage in ("dynmoe.hf export", "data_prep adopt", "dynmoe.report dashboard", "dynmoe.launch address"):
        assert f"usage: python -m {usage} [-h]" in page
    assert "(default: None)" not in page


def test_the_api_reference_names_modules_that_exist(generated):
    for name in ("routing", "moe", "training"):
        modules = re.findall(r"^::: (\S+)$", generated[f"reference/{name}.md"], re.MULTILINE)
        assert len(modules) > 4
        assert name != "moe" or "dynmoe.routers.top_any" in modules
        assert [module for module in modules if importlib.util.find_spec(module) is None] == []


def test_home_is_a_short_readme_whose_links_work_in_the_site(generated):
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
    links = re.findall(r"\]\(([^)#]+)", generated["index.md"])
    pages = {*generated, *(str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*"))}
    assert [link for link in links if not link.startswith("https://") and link not in pages] == []


def test_the_line_of_histograms_is_like_a_runs(undisturbed):
    shown, own = json.loads(block(HISTOGRAMS)), read_rows(undisturbed[0] / "histograms.jsonl")[0]
    assert shown.keys() == own.keys()
    assert shown["layers"]["0"].keys() == own["layers"]["0"].keys()
    layer = shown["layers"]["0"]
    assert sum(k * tokens for k, tokens in enumerate(layer["experts_per_token"])) == sum(layer["load"])


@pytest.mark.parametrize("page", ["README.md", "docs/megatron.md", "docs/cluster.md"])
def test_the_first_screen_says_that_nothing_ran_on_a_gpu_until_a_figure_names_one(page):
    figures = sorted((ROOT / "docs" / "figures").glob("*.json"))
    measured = [figure.name for figure in figures if "NVIDIA" in json.loads(figure.read_text())["machine"]]
    first_screen = (ROOT / page).read_text().splitlines()[:25]
    says = any(re.match(r"\*\*Nothing (of it )?has run on a GPU yet\*\*", line) for line in first_screen)
    assert says == (not measured), f"{page} says {says}; figures of a GPU: {measured}"


def test_traces_are_read_as_shown(undisturbed):
    (shown,) = {own.text for own in inline_code() if own.text.startswith(TRACES)}
    frame = eval(shown.replace("runs/NAME", str(undisturbed[0])), {"pandas": pandas})
    assert {"step", "layer", "sample", "position", "token", "experts", "gates"} <= set(frame.columns)


def test_the_router_and_the_loss_that_are_shown_are_those_that_are_tested():
    for beginning, path in ((ROUTER, "relative_router.py"), (LOSS, "spread_loss.py")):
        text = (ROOT / "tests" / path).read_text().replace("from tests.spread_loss", "from dynmoe.routers.spread")
        assert block(beginning).strip() == text.strip()


def train_as_shown(text: str) -> dict[int, dict[str, float]]:
    """The snippet of Megatron's layer, with a pass of a model where it has dots."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from dynmoe.config.parallel import ParallelConfig
    from dynmoe.engines.megatron.groups import make_groups
    from dynmoe.engines.megatron.model import RMSNorm
    from tests.engines.test_megatron_router import transformer

    before, after = text.split("\n...\n")
    names: dict[str, Any] = {}
    exec(before, names)
    make_groups(ParallelConfig(), seed=1)
    config = transformer()
    layers = TransformerBlockSubmodules(layer_specs=[names["spec"]] * config.num_layers, layer_norm=RMSNorm)
    model = GPTModel(config, layers, 64, 16, position_embedding_type="rope")
    tokens = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0))
    model(tokens[:, :-1].contiguous(), None, None, labels=tokens[:, 1:].contiguous()).mean().backward()
    names["model_chunks"] = [model]
    exec(after, names)
    return names["figures"]


def test_our_router_in_megatrons_layer_as_shown(one_rank):
    (figures,) = one_rank.run(train_as_shown, block(MEGATRON))
    assert sorted(figures) == [0, 1]
    assert all(1 <= own["experts_per_token_mean"] <= 4 for own in figures.values())


def test_an_export_is_used_as_shown(undisturbed, tmp_path, monkeypatch, away_from_the_hub, capsys):
    from dynmoe.hf.export import export

    export(undisturbed[0], tmp_path / "out", torch.float32)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block(EXPORT), names)
    printed = capsys.readouterr().out
    assert "def main(" in printed
    experts_LBS = names["model"](**names["batch"], output_router_logits=True).experts_per_token
    assert experts_LBS.shape == (2, *names["batch"]["input_ids"].shape)
    assert str(experts_LBS) in printed


PAIRS = ["model.moe.moe_layer_freq=2", "model.moe.shortcut=true"]


@pytest.mark.parametrize(("fields", "named"), [
    *(([f"parallel.{name}=2"], f"parallel.{name}") for name in ("tensor", "pipeline", "virtual_pipeline", "context")),
    (["engine=megatron", "model.kv_heads=2", "parallel.tensor=4"], "parallel.tensor"),
    (["engine=megatron", "model.layers=4", "parallel.pipeline=3"], "parallel.pipeline"),
    (["engine=megatron", "model.layers=4", *PAIRS, "parallel.pipeline=4"], "parallel.pipeline"),
    (["engine=megatron", "model.heads=4", "parallel.context=8"], "parallel.context"),
    (["optimizer.kind=muon", "deepspeed.zero_stage=3"], "deepspeed.zero_stage"),
    ([*PAIRS, "model.mtp.layers=1"], "model.mtp.layers"),
    (["model.moe.experts=16", "parallel.expert=3"], "parallel.expert"),
])  # fmt: skip
def test_what_an_engine_does_not_do_is_refused_by_the_field_that_its_table_names(fields, named):
    table = re.search(r"## What each engine does\n(.+?)\n## ", (ROOT / "docs/layouts.md").read_text(), re.DOTALL)[1]
    assert f"`{named}`" in table
    with pytest.raises(UserError, match=f"^{re.escape(named)}="):
        load_config(None, fields)
