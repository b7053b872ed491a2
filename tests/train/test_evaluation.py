"""The validation loss of a blend, compared with an independent evaluation of the corpus files."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from dynmoe.config import load_config
from dynmoe.config.checkpoint import CheckpointConfig
from dynmoe.data.corpus import Corpus, open_corpora
from dynmoe.data.validation import apportion, sequences_by_domain, training_shares, validation_shares
from dynmoe.errors import ConfigError
from dynmoe.model import Decoder
from dynmoe.report import figures
from dynmoe.report.page import write_report
from dynmoe.report.runs import read_run
from dynmoe.train import checkpoint
from dynmoe.train.resume import check_unchanged, with_kept_fields
from dynmoe.train.scores import EXPERTS
from dynmoe.trained import open_trained
from tests.engines.cases import config_for
from tests.engines.test_megatron import DP2, EP2, INTERLEAVED, TP2
from tests.faults.test_corpora import edit_manifest, store
from tests.train.cases import BLEND_VOCAB, TrainingProcess, evaluate_blend, read_rows

LENGTH = 32
# For each corpus: weight, number of validation sequences, and unigram entropy in the manifest.
BLEND = {"web": (4, 6, 5.0), "code": (4, 10, 6.0), "books": (2, 36, 1.0)}
WEIGHTS = [weight for weight, *_ in BLEND.values()]
SEQUENCES = {name: count for name, (_, count, _) in BLEND.items()}
DOMAINS = {f"eval/domains/{name}/loss" for name in BLEND}


@pytest.fixture(scope="module")
def blend(corpus_dir, tmp_path_factory) -> list[str]:
    """Three corpora whose validation texts differ in length and difficulty."""
    folder = tmp_path_factory.mktemp("blend")
    random = np.random.default_rng(0)
    for number, (name, (_, sequences, entropy)) in enumerate(BLEND.items()):
        corpus = Path(shutil.copytree(corpus_dir, folder / name))
        text = np.fromfile(corpus / "validation.bin", "<u2")
        drawn = random.integers(5, 400, sequences * LENGTH + 1)
        store(corpus, "validation", [drawn, np.resize(text, drawn.shape), drawn % 40 + 5][number].tolist())
        edit_manifest(corpus, lambda m, e=entropy: m["splits"]["validation"].update(unigram_entropy_nats=e))
    return [str(folder / name) for name in BLEND]


def fields(blend: list[str]) -> list[str]:
    """Fields of a run of ten steps that evaluates all validation sequences of the blend."""
    return [
        f"data.dirs=[{','.join(blend)}]", f"data.weights={WEIGHTS}", "eval.batches=13", "eval.interval=5",
        "train.steps=10", "optimizer.lr=1e-2", "data.documents=joined",
    ]  # fmt: skip


@torch.no_grad()
def count(decoder: Decoder, blend: list[str]) -> dict[str, list[float]]:
    """The losses of all validation sequences of each corpus, one by one, from the tokens in the file."""
    losses: dict[str, list[float]] = {}
    for corpus in map(Path, blend):
        tokens = torch.from_numpy(np.fromfile(corpus / "validation.bin", "<u2").astype(np.int64))
        losses[corpus.name] = [
            F.cross_entropy(decoder(own[None, :-1])[0].double(), own[1:]).item()
            for own in tokens.unfold(0, LENGTH + 1, LENGTH)
        ]
    assert {name: len(own) for name, own in losses.items()} == SEQUENCES
    return losses


def check(row: dict[str, float], losses: dict[str, list[float]]) -> None:
    means = {name: sum(own) / len(own) for name, own in losses.items()}
    loss = 0.4 * means["web"] + 0.4 * means["code"] + 0.2 * means["books"]
    tokens = [6 * LENGTH + 1, 10 * LENGTH + 1, 36 * LENGTH + 1]
    by_tokens = sum(n * mean for n, mean in zip(tokens, means.values(), strict=True)) / sum(tokens)
    assert abs(loss - by_tokens) > 0.01, "both weightings give the same loss"
    assert row["eval/loss"] == pytest.approx(loss, rel=1e-5)
    assert row["eval/perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert row["eval/loss_by_tokens"] == pytest.approx(by_tokens, rel=1e-5)
    assert {name: row[f"eval/domains/{name}/loss"] for name in BLEND} == pytest.approx(means, rel=1e-5)


def test_blend_has_a_loss_weighted_as_in_training_and_one_of_each_domain(blend, corpus_dir, tmp_path):
    process = TrainingProcess(corpus_dir, tmp_path / "runs", *fields(blend), "eval.domains=true")
    assert process.wait() == 0, process.output()
    run = tmp_path / "runs" / "tiny"
    losses = count(open_trained(run, torch.device("cpu")).decoder, blend)
    row = read_rows(run / "metrics.jsonl")[-1]
    check(row, losses)
    assert 0 < row[f"eval/domains/code/{EXPERTS}"] < 4, "eval.domains adds experts per token"
    middle = next(row for row in read_rows(run / "metrics.jsonl") if row["train/step"] == 5)
    assert {name for name in middle if "domains" in name} == DOMAINS
    entropy = 0.4 * 5 + 0.4 * 6 + 0.2 * 1
    said = (
        f"Validation loss {row['eval/loss']:.3f} nats per token, corpora weighted as in training "
        f"(perplexity {math.exp(row['eval/loss']):.1f}; {row['eval/loss_by_tokens']:.3f} weighted by their validation "
        f"tokens); token frequencies alone would give {entropy:.3f}: {abs(entropy - row['eval/loss']):.3f} nats "
    )
    assert said in process.output()
    assert json.loads((run / "outcome.json").read_text())["eval/loss_by_tokens"] == row["eval/loss_by_tokens"]
    assert load_config(run / "config.yaml").eval.weighting == "blend"
    read = read_run(run)
    assert [trace.name for trace in figures.loss([read]).data] == ["training", "validation, weighted as in training"]
    write_report([read], run / "report.html")
    shown = f"<td>validation loss by tokens</td><td>{row['eval/loss_by_tokens']:.3f}</td>"
    assert shown in (run / "report.html").read_text()


def make_old(run: Path) -> None:
    """Turns a run into one from before the field eval.weighting existed."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["eval"].pop("weighting") == "tokens"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    saved = checkpoint.latest_valid(run / "checkpoints")
    state = saved.trainer_state
    del state["config"]["eval"]["weighting"]
    (saved.path / checkpoint.TRAINER).write_text(json.dumps(state))
    manifest = checkpoint.read_manifest(saved.path)
    manifest["files"] = checkpoint.hashes([saved.path / name for name in manifest["files"]], saved.path)
    checkpoint.commit(saved.path, saved.path, manifest)


def test_run_weighted_by_tokens_keeps_its_weighting_on_resume(blend, corpus_dir, tmp_path):
    alone = [*fields(blend), "parallel.expert=1"]
    begun = TrainingProcess(corpus_dir, tmp_path / "runs", *alone, "eval.weighting=tokens", ranks=1)
    assert begun.wait() == 0, begun.output()
    run = tmp_path / "runs" / "tiny"
    make_old(run)
    resumed = TrainingProcess(corpus_dir, tmp_path / "runs", *alone, "train.steps=11", ranks=1)
    assert resumed.wait() == 0, resumed.output()
    rows = read_rows(run / "metrics.jsonl")
    assert [row["train/step"] for row in rows if "eval/loss" in row] == [5, 10, 11]
    by_domain = count(open_trained(run, torch.device("cpu")).decoder, blend)
    losses = [loss for own in by_domain.values() for loss in own]
    assert rows[-1]["eval/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert not any("domains" in name or "by_tokens" in name for row in rows for name in row)
    assert load_config(run / "config.yaml").eval.weighting == "tokens"
    assert f"Validation loss {rows[-1]['eval/loss']:.3f} nats per token (perplexity" in resumed.output()


def test_run_keeps_its_initial_weighting():
    def weighting(*given: Any) -> str | None:
        return with_kept_fields(*given).eval.weighting

    config = load_config()
    old, new = (dataclasses.asdict(load_config(None, [f"eval.weighting={own}"])) for own in ("null", "blend"))
    assert weighting(config, None) == "blend"
    assert weighting(config, new) == "blend"
    assert weighting(config, old) == "tokens"
    assert weighting(config, {"engine": "deepspeed"}) == "tokens"
    assert weighting(load_config(None, ["eval.weighting=tokens"]), None) == "tokens"
    assert weighting(load_config(None, ["eval.weighting=blend"]), old) == "blend", "given explicitly"


def test_run_keeps_what_its_documents_see():
    def documents(*given: Any) -> str | None:
        return with_kept_fields(*given).data.documents

    old = dataclasses.asdict(load_config())
    del old["data"]["documents"]
    new = dataclasses.asdict(load_config(None, ["data.documents=masked"]))
    assert documents(load_config(), None) == "masked"
    assert documents(load_config(), old) == "joined"
    assert documents(load_config(), new) == "masked"
    assert documents(load_config(None, ["data.documents=joined"]), None) == "joined"
    changed = with_kept_fields(load_config(None, ["data.documents=masked"]), old)
    with pytest.raises(ConfigError, match=r"data\.documents='masked': the run's checkpoint has 'joined'"):
        check_unchanged(old, dataclasses.asdict(changed))
    accepted = dataclasses.replace(changed, checkpoint=CheckpointConfig(accept_changes=["data.documents"]))
    check_unchanged(old, dataclasses.asdict(accepted))


LAYOUTS = {
    "DeepSpeed EP 2": ["parallel.expert=2"],
    "DeepSpeed EP 2, ZeRO 3": ["parallel.expert=2", "deepspeed.zero_stage=3"],
    "Megatron CP 2": ["engine=megatron", "parallel.context=2"], "Megatron DP 2": ["engine=megatron", *DP2],
    "Megatron PP 2 interleaved": ["engine=megatron", *INTERLEAVED], "Megatron TP 2": ["engine=megatron", *TP2],
    "Megatron EP 2": ["engine=megatron", *EP2],
}  # fmt: skip
MODEL = ["model.layers=4", "model.kv_heads=2", "model.init_std=0.3"]
ROWS = ["train.micro_batch=1"]


@pytest.fixture(scope="module")
def alone(one_rank, blend, tmp_path_factory):
    return one_rank.run(evaluate_blend, [*MODEL, *ROWS], blend, WEIGHTS, tmp_path_factory.mktemp("alone"))[0]


def test_evaluation_in_one_process_equals_sequences_one_by_one(alone, blend):
    config = config_for(*MODEL)
    check(alone[0], count(Decoder(config.model, BLEND_VOCAB, config.train.seed).eval(), blend))


@pytest.mark.parametrize("layout", [
    pytest.param(name, marks=() if name in ("DeepSpeed EP 2", "Megatron PP 2 interleaved") else pytest.mark.slow)
    for name in LAYOUTS
])  # fmt: skip
def test_every_layout_evaluates_a_blend_like_one_process(alone, blend, two_ranks, tmp_path, layout):
    for rows in two_ranks.run(evaluate_blend, [*MODEL, *LAYOUTS[layout], *ROWS], blend, WEIGHTS, tmp_path):
        for row, expected in zip(rows, alone, strict=True):
            assert row == pytest.approx(expected, rel=1e-5)
            assert row.keys() > DOMAINS


def test_single_corpus_has_no_domain_metrics(one_rank, corpus_dir, tmp_path):
    """The same holds for a corpus that is named twice."""
    for dirs in ([str(corpus_dir)], [str(corpus_dir)] * 2):
        for row in one_rank.run(evaluate_blend, [*MODEL, *ROWS], dirs, [1.0] * len(dirs), tmp_path)[0]:
            assert set(row) == {"eval/loss", "eval/perplexity"}


@pytest.mark.parametrize(
    ("total", "limits", "expected"),
    [
        (10, (99, 99, 99), (4, 4, 2)),
        (50, (99, 99, 99), (20, 20, 10)),
        (3, (99, 99, 99), (1, 1, 1)),
        (10, (2, 99, 99), (2, 5, 3)),  # the others share the remaining 8 as 4 : 2, nearest 5 : 3
        (13, (3, 5, 5), (3, 5, 5)),
    ],
)
def test_sequences_are_split_by_weights(total, limits, expected):
    shares = dict(zip(BLEND, (0.4, 0.4, 0.2), strict=True))
    assert tuple(apportion(total, shares, dict(zip(BLEND, limits, strict=True))).values()) == expected


def test_shares_follow_weights_or_tokens_and_add_up_for_a_repeated_corpus(blend):
    corpora = open_corpora(blend, LENGTH)
    assert training_shares(corpora, [4, 4, 2]) == pytest.approx({"web": 0.4, "code": 0.4, "books": 0.2})
    assert training_shares(corpora, []) == pytest.approx(dict.fromkeys(BLEND, 1 / 3)), "copies of one training text"
    tokens = {name: count * LENGTH + 1 for name, count in SEQUENCES.items()}
    assert validation_shares(corpora) == pytest.approx(
        {name: own / sum(tokens.values()) for name, own in tokens.items()}
    )
    assert training_shares([*corpora, corpora[0]], [4, 4, 2, 6]) == pytest.approx(
        {"web": 10 / 16, "code": 4 / 16, "books": 2 / 16}
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.micro_batch=8"], r"micro_batch=8: the validation data of web does not fill one micro-batch; use"),
        (["train.micro_batch=4", "train.global_batch=4", "eval.batches=2"],
         r"eval\.batches=2: gives 2 micro-batches, fewer than there are corpora \(3\); use a larger"),
        (["train.micro_batch=6", "train.global_batch=6", "eval.batches=99"],
         r"eval\.batches=99: gives 0 micro-batches, fewer than there are corpora \(3\); use a smaller train"),
    ],
)  # fmt: skip
def test_domain_without_validation_sequences_is_refused(blend, overrides, words):
    config = load_config(None, ["data.sequence_length=32", "eval.weighting=blend", *overrides])
    with pytest.raises(ConfigError, match=words):
        sequences_by_domain(config, [Corpus.open(path) for path in blend], 16 if "eval.batches=99" in overrides else 1)
