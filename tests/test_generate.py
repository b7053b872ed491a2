"""Generated texts, and the experts of their tokens."""

from __future__ import annotations

import copy
import re
import sys

import pandas as pd
import pytest
import torch

from dynmoe.data.batches import Batch
from dynmoe.errors import UserError
from dynmoe.generate import _Text, generate, main, stream, stream_with_experts
from dynmoe.model.sampling import Sampling
from dynmoe.moe.layer import capture_plans
from dynmoe.train.replay import read_step
from dynmoe.trained import open_trained
from tests.hf.cases import begin, run_decoder

GREEDY = Sampling(temperature=0)
PROMPTS = ["the quick brown", "a", "some other text that is longer"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus_dir):
    return begin(corpus_dir, tmp_path_factory.mktemp("generate") / "run", ["model.router.p=0.5"]).path


@pytest.fixture(scope="module")
def model(run):
    return open_trained(run, torch.device("cpu"))


def continued(model, prompt: str, num_tokens: int) -> list[int]:
    """Tokens from a full forward pass for each."""
    tokens = [model.tokenizer.eod, *model.tokenizer.encode(prompt)]
    for _ in range(num_tokens):
        logits, _ = run_decoder(model.decoder, torch.tensor([tokens]))
        tokens.append(int(logits[0, -1, : model.tokenizer.vocab_size].argmax()))
        if tokens[-1] == model.tokenizer.eod:
            break
    return tokens


def test_a_text_is_streamed_while_it_is_sampled(model):
    tokens = continued(model, PROMPTS[0], 12)
    parts = list(stream(model, PROMPTS[0], generate(model, PROMPTS[:1], 12, GREEDY)))
    assert parts[0] == PROMPTS[0]
    assert len(parts) > 2
    whole = model.tokenizer.decode([token for token in tokens if token != model.tokenizer.eod])
    assert "".join(parts) == whole.rstrip("\ufffd")


def test_a_batch_of_texts_is_continued_like_each_text_alone(model):
    steps = list(generate(model, PROMPTS, 10, GREEDY))
    for place, prompt in enumerate(PROMPTS):
        drawn = [step.tokens[place] for step in steps]
        expected = continued(model, prompt, 10)[1 + len(model.tokenizer.encode(prompt)) :]
        assert [token for token in drawn if token is not None] == [t for t in expected if t != model.tokenizer.eod]
        if None in drawn:
            assert set(drawn[drawn.index(None) :]) == {None}, "a text goes on after its end"


def test_experts_of_each_token_are_those_of_one_forward_pass_over_the_text(model):
    tokens = continued(model, PROMPTS[0], 12)
    _, maps = run_decoder(model.decoder, torch.tensor([tokens]))
    mean = torch.stack([routed[0].sum(dim=-1) for routed in maps]).float().mean(dim=0)
    text = "".join(stream_with_experts(model, PROMPTS[0], generate(model, PROMPTS[:1], 12, GREEDY)))
    shown = [float(number) for number in re.findall(r"\[(\d\.\d\d)\]", text)]
    known = [token for token in tokens[1:] if token != model.tokenizer.eod]
    last = tokens[-1] != model.tokenizer.eod  # drawn, and never computed
    assert shown == pytest.approx(mean[1 : 1 + len(known) - last].tolist(), abs=0.006)
    assert len(set(shown)) > 1, "nothing is dynamic here"


def test_experts_are_printed_after_complete_characters(model):
    prompt = "a\U0001f600\u6c49b"
    parts = stream_with_experts(model, prompt, generate(model, [prompt], 1, GREEDY))
    shown = "".join(parts)
    assert re.match(r"a\[\d\.\d\d\]\U0001f600(\[\d\.\d\d\]){4}\u6c49(\[\d\.\d\d\]){3}b\[\d\.\d\d\]", shown), shown


def test_characters_of_several_tokens_are_printed_when_complete(model):
    text = _Text(model, "")
    shown = []
    for token in model.tokenizer.encode("a\U0001f600\u6c49b"):
        text.tokens.append(token)
        shown.append(text.more())
    assert "".join(shown) == "a\U0001f600\u6c49b"
    assert "" in shown, "no character has several tokens"
    assert not any("\ufffd" in part for part in shown)


def call(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["generate", *arguments])
    main()


def test_the_command_continues_one_or_several_prompts(run, monkeypatch, capsys, tmp_path):
    call(monkeypatch, str(run), "--prompt", "the quick", "--tokens", "5", "--device", "cpu")
    first = capsys.readouterr().out
    assert first.startswith("the quick")
    call(monkeypatch, str(run), "--prompt", "the quick", "--tokens", "5", "--device", "cpu")
    assert capsys.readouterr().out == first, "the seed does not decide it"
    (tmp_path / "prompts.txt").write_text("one\ntwo\N{LINE SEPARATOR}\n")
    call(monkeypatch, str(run), "--file", str(tmp_path / "prompts.txt"), "--tokens", "3", "--temperature", "0")
    assert re.fullmatch(r"--- 1\none(.|\n)*\n--- 2\ntwo\u2028(.|\n)*\n", capsys.readouterr().out)
    call(monkeypatch, str(run), "--prompt", "the quick", "--tokens", "5", "--show-experts")
    assert re.match(r"the\[\d\.\d\d\]|t\[", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--tokens", "64"],
            "--tokens=64: with a prompt of 1 tokens exceeds data.sequence_length (64), the positions "
            "that were trained; use at most 63",
        ),
        (["--prompt", "a " * 99, "--tokens", "1"], "before it, but data.sequence_length is 64; shorten it"),
        (["--tokens", "0"], "--tokens=0: is out of range; use 1 to"),
        (["--temperature", "-1"], "--temperature=-1.0: is out of range; use 0.0 to"),
        (["--temperature", "nan"], "--temperature=nan"),
        (["--top-k", "-1"], "--top-k=-1: is out of range; use 0 to"),
        (["--top-p", "1.5"], "--top-p=1.5: is out of range; use a number above 0"),
        (["--prompt", "a", "--prompt", "b", "--show-experts"], "--show-experts: supports one prompt, but 2 are given"),
        (["--device", "gpu"], "--device=gpu: is not known; use cpu, cuda or cuda:N"),
        (["--device", "cuda:1"], "device cuda:1: PyTorch finds 1 GPU(s); use another one, or cpu"),
        (["--file", "nowhere.txt"], "--file: nowhere.txt cannot be read"),
    ],
)
def test_options_out_of_range_are_refused(run, monkeypatch, arguments, words):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=re.escape(words)):
        call(monkeypatch, str(run), *arguments)


def test_a_trace_has_the_experts_of_each_token(run, model, monkeypatch, capsys, tmp_path):
    """Of texts with prompts of different lengths, which end at different times; as one forward pass over each text."""
    arguments = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    call(monkeypatch, str(run), *arguments, "--tokens", "10", "--temperature", "0", "--trace", str(tmp_path / "traces"))
    assert "--- 3" in capsys.readouterr().out
    trace = pd.read_parquet(tmp_path / "traces")
    assert sorted(trace["layer"].unique()) == [0, 1, 2]
    assert (trace["step"] == model.step).all()
    for sample, prompt in enumerate(PROMPTS):
        tokens = continued(model, prompt, 10)[:-1]  # the last one was sampled, and its experts never computed
        with capture_plans(model.decoder.moe_layers) as plans:
            model.decoder(torch.tensor([tokens]))
        for layer, plan in enumerate(plans):
            rows = trace[(trace["sample"] == sample) & (trace["layer"] == layer)].sort_values("position")
            assert rows["position"].tolist() == list(range(len(tokens)))
            assert rows["token"].tolist() == tokens
            chosen = [row.nonzero().flatten().tolist() for row in plan.routing_map_TE]
            assert rows["experts"].map(list).tolist() == chosen
            for gates, own_E, experts in zip(rows["gates"], plan.gates_TE, chosen, strict=True):
                assert list(gates) == pytest.approx(own_E[experts].tolist(), rel=1e-4)
            assert rows["dropped"].str.len().sum() == 0
        assert len({len(row) for row in chosen}) > 1, "nothing is dynamic here"


def test_training_replays_a_generated_text(run, model, monkeypatch, capsys, tmp_path):
    """As reinforcement learning needs it: the experts of the rollout, although the router has changed since."""
    call(monkeypatch, str(run), "--prompt", PROMPTS[0], "--tokens", "10", "--trace", str(tmp_path / "traces"))
    trace = pd.read_parquet(tmp_path / "traces").sort_values(["layer", "position"])
    tokens_BS = torch.tensor([trace[trace["layer"] == 0]["token"].tolist()])
    learner = copy.deepcopy(model.decoder).train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in learner.moe_layers:
            layer.router.weight_ED.add_(torch.randn(layer.router.weight_ED.shape, generator=generator))
    positions = torch.arange(tokens_BS.shape[1])
    (folder,) = (tmp_path / "traces").iterdir()
    replay = read_step(folder, learner.moe_layers, [range(1)], [Batch(tokens_BS, tokens_BS)], positions)
    chosen = {}
    for name, changes in (("own", {}), ("replayed", {"replay": replay})):
        with learner.context.override(**changes), capture_plans(learner.moe_layers) as plans:
            learner(tokens_BS, tokens_BS).backward()
        chosen[name] = [row.nonzero().flatten().tolist() for plan in plans for row in plan.routing_map_TE]
    assert chosen["replayed"] == trace["experts"].map(list).tolist()
    assert chosen["own"] != chosen["replayed"]


def test_a_dense_model_has_no_experts_to_show(corpus_dir, tmp_path, monkeypatch, capsys):
    path = begin(corpus_dir, tmp_path / "dense", ["model.moe.experts=0"]).path
    call(monkeypatch, str(path), "--prompt", "a", "--tokens", "3")
    assert capsys.readouterr().out.startswith("a")
    for option in (["--show-experts"], ["--trace", str(tmp_path / "traces")]):
        with pytest.raises(UserError, match=rf"{option[0]}: the model of .* is dense; remove the option"):
            call(monkeypatch, str(path), *option, "--tokens", "3")
