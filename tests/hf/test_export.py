"""An exported model gives our results in transformers, and supports its features."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dynmoe.errors import UserError
from dynmoe.hf.export import export
from dynmoe.hf.gguf import write_gguf
from tests.hf.cases import BATCH, LENGTH, OWN, STANDARD, begin, run_decoder, some_tokens
from tests.moe.cases import LATENT

USE = Path(__file__).with_name("use_export.py")


def read(path: Path, **settings):
    from transformers import AutoModelForCausalLM

    settings = {"trust_remote_code": True, **settings}
    model, found = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **settings)
    assert not any(found.values()), found
    return model.eval()


@pytest.fixture(scope="module")
def top_p(tmp_path_factory, corpus_dir):
    """A top-p run and its export."""
    folder = tmp_path_factory.mktemp("export")
    run = begin(corpus_dir, folder / "run", OWN["top_p"])
    done = export(run.path, folder / "out")
    assert done.texts > 0
    return run, folder / "out"


@pytest.mark.parametrize("name", OWN)
def test_logits_and_routing_of_every_router(corpus_dir, tmp_path, name):
    run = begin(corpus_dir, tmp_path / name.replace(" ", "_").replace(",", ""), OWN[name])
    assert export(run.path, tmp_path / "out").architecture == "dynmoe"
    model = read(tmp_path / "out")
    tokens = some_tokens()
    expected, maps = run_decoder(run.decoder, tokens)
    with torch.no_grad():
        found = model(tokens, output_router_logits=True)
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(found.routing_maps, maps, strict=True))
    assert torch.equal(found.experts_per_token, torch.stack([routed.sum(dim=-1) for routed in maps]))
    assert all(logits.shape[:2] == (BATCH, LENGTH) for logits in found.router_logits)
    assert found.experts_per_token.float().std() > 0 or name.startswith("top_k"), "nothing is dynamic here"


@pytest.mark.parametrize("name", STANDARD)
def test_a_fixed_number_of_experts_needs_no_custom_code(corpus_dir, tmp_path, name):
    run = begin(corpus_dir, tmp_path / "run", STANDARD[name])
    assert export(run.path, tmp_path / "out").architecture == name.split(",")[0]
    assert not list((tmp_path / "out").glob("*.py"))
    model = read(tmp_path / "out", trust_remote_code=False)
    tokens = some_tokens()
    assert type(model).__module__.startswith("transformers.models.")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, run_decoder(run.decoder, tokens)[0], rtol=0, atol=1e-5)


def test_a_megatron_run_is_exported_too(corpus_dir, tmp_path):
    run = begin(corpus_dir, tmp_path / "run", ["engine=megatron", *OWN["top_any improved"]])
    export(run.path, tmp_path / "out")
    with torch.no_grad():
        found = read(tmp_path / "out")(some_tokens()).logits
    torch.testing.assert_close(found, run_decoder(run.decoder, some_tokens())[0], rtol=0, atol=1e-5)


def test_generation_with_a_cache_and_padding_on_the_left(top_p):
    from transformers import AutoTokenizer

    run, path = top_p
    model = read(path)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    texts = ["the quick", "a much longer beginning of a text than the other one"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert batch["attention_mask"][0, 0] == 0, "padding is on the right"
    written = model.generate(**batch, max_new_tokens=8, do_sample=False)
    for text, own in zip(texts, written, strict=True):
        tokens = tokenizer(text)["input_ids"]
        for _ in range(8):  # a full forward pass of our decoder per token
            logits, _ = run_decoder(run.decoder, torch.tensor([tokens]))
            tokens.append(int(logits[0, -1, : len(tokenizer)].argmax()))  # further rows represent no piece
            if tokens[-1] == tokenizer.eos_token_id:
                break
        begins = len(own) - 8 - len(tokenizer(text)["input_ids"])
        assert own[begins : begins + len(tokens)].tolist() == tokens


def test_padding_changes_neither_losses_nor_routing(top_p):
    _, path = top_p
    model = read(path)
    tokens = some_tokens()
    padded = torch.cat([torch.zeros(BATCH, 4, dtype=torch.int64), tokens], dim=1)
    mask = torch.cat([torch.zeros(BATCH, 4, dtype=torch.int64), torch.ones_like(tokens)], dim=1)
    labels = padded.masked_fill(mask == 0, -100)
    labels[:, 4] = -100  # the first token has no context
    with torch.no_grad():
        alone = model(tokens, labels=tokens, output_router_logits=True)
        filled = model(padded, attention_mask=mask, labels=labels, output_router_logits=True)
        without = model(tokens, labels=tokens)
    torch.testing.assert_close(filled.loss, alone.loss)
    torch.testing.assert_close(filled.aux_loss, alone.aux_loss)
    torch.testing.assert_close(alone.loss, without.loss + alone.aux_loss)
    assert torch.equal(filled.experts_per_token[..., 4:], alone.experts_per_token)


@pytest.mark.parametrize(
    "name", ["top_p", "top_any", "top_any released", "top_any improved", "null_experts", "sigmoid"]
)
def test_the_routers_own_losses_are_those_of_training(corpus_dir, tmp_path, name):
    run = begin(corpus_dir, tmp_path / "run", OWN[name])
    export(run.path, tmp_path / "out")
    model = read(tmp_path / "out").train()
    tokens = some_tokens()
    totals = []
    for layer in run.decoder.train().moe_layers:
        layer.router.register_forward_hook(lambda module, inputs, plan: totals.append(_weighted(module, plan)))
    run.decoder(tokens)
    torch.testing.assert_close(model(tokens, output_router_logits=True).aux_loss, torch.stack(totals).sum())


def _weighted(router, plan):
    return sum(router.loss_coefficients[name] * value for name, value in router.losses(plan).items())


def test_bf16_keeps_the_precision_of_router_state(corpus_dir, tmp_path):
    run = begin(corpus_dir, tmp_path / "run", OWN["sigmoid"])
    export(run.path, tmp_path / "out", torch.bfloat16)
    model = read(tmp_path / "out", dtype=torch.bfloat16)
    router = model.model.layers[0].mlp.router
    assert router.weight.dtype == torch.bfloat16
    assert torch.equal(router.offset, run.decoder.moe_layers[0].router.offset_E)
    assert torch.equal(read(tmp_path / "out").to(torch.bfloat16).model.layers[0].mlp.router.offset, router.offset)
    expected, _ = run_decoder(run.decoder, some_tokens())
    with torch.no_grad():
        found = model(some_tokens()).logits.float()
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("name", OWN)
def test_bf16_rounds_where_training_rounds(corpus_dir, tmp_path, name):
    """Logits of a bf16 export are bitwise identical to those of the decoder, cast as the engines do."""
    run = begin(corpus_dir, tmp_path / name.replace(" ", "_").replace(",", ""), OWN[name])
    export(run.path, tmp_path / "out", torch.bfloat16)
    model = read(tmp_path / "out", dtype=torch.bfloat16)
    decoder = run.decoder.bfloat16()
    tokens = some_tokens()
    with torch.no_grad():
        alone = [(model(token.view(1, 1)).logits, decoder(token.view(1, 1))) for token in tokens[0]]
        assert all(torch.equal(ours, theirs) for ours, theirs in alone)
        found = model(tokens, output_router_logits=True)
        expected, maps = run_decoder(decoder, tokens)
    assert torch.equal(found.logits, expected)
    assert all(torch.equal(a, b) for a, b in zip(found.routing_maps, maps, strict=True))


@pytest.mark.parametrize("name", ["top_p", "top_any improved"])
def test_routers_stay_in_fp32_under_autocast(corpus_dir, tmp_path, name):
    """As in Trainer with bf16=True: a router gives the same outputs for the same input."""
    run = begin(corpus_dir, tmp_path / "run", OWN[name])
    export(run.path, tmp_path / "out")
    model = read(tmp_path / "out").train()
    tokens = some_tokens()
    seen = {}
    block = model.model.layers[0].mlp
    block.register_forward_hook(lambda module, given, output: seen.update(x_BSD=given[0], routing=output[1]))
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens, labels=tokens, output_router_logits=True).loss.backward()
    for now, without in zip(seen["routing"], block(seen["x_BSD"], None, True)[1], strict=True):
        assert torch.equal(now, without)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_quantile_routers_choose_alike_in_training_and_evaluation(corpus_dir, tmp_path):
    """An export keeps its thresholds, whereas training here takes those of the batch."""
    run = begin(corpus_dir, tmp_path / "run", OWN["quantile"])
    export(run.path, tmp_path / "out")
    model = read(tmp_path / "out")
    found = model(some_tokens(), output_router_logits=True)
    trained = model.train()(some_tokens(), output_router_logits=True)
    assert torch.equal(torch.stack(list(trained.routing_maps)), torch.stack(list(found.routing_maps)))


def test_checkpointed_gradients_are_the_same(top_p):
    _, path = top_p
    gradients = []
    for checkpoints in (False, True):
        model = read(path).train()
        if checkpoints:
            model.gradient_checkpointing_enable()
        model(some_tokens(), labels=some_tokens(), output_router_logits=True).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    assert gradients[0]["model.layers.0.mlp.router.weight"].abs().sum() > 0


def test_attention_implementation_and_outputs_can_be_chosen(top_p):
    run, path = top_p
    model = read(path)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(some_tokens(), output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(found.logits, run_decoder(run.decoder, some_tokens())[0], rtol=0, atol=1e-5)
    assert [weights.shape for weights in found.attentions] == [(BATCH, 2, LENGTH, LENGTH)] * 3
    assert len(found.hidden_states) == 4


def test_attention_knows_the_documents_of_a_flattened_batch(top_p, monkeypatch):
    """As a collator without padding writes it; FlashAttention masks by these arguments alone."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = read(top_p[1])
    given = []

    def attend(module, query, key, value, mask, **kwargs):
        given.append(kwargs)
        return query.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "recorded", attend)
    model.set_attn_implementation("recorded")
    places = torch.tensor([[*range(5), *range(8)]])
    ends = torch.tensor([0, 5, 13], dtype=torch.int32)
    model(some_tokens()[:1], position_ids=places, cu_seq_lens_q=ends, use_cache=False)
    assert len(given) == 3
    for kwargs in given:
        assert torch.equal(kwargs["position_ids"], places)
        assert torch.equal(kwargs["cu_seq_lens_q"], ends)


def test_a_saved_model_loads_with_the_same_logits(top_p, tmp_path):
    _, path = top_p
    model = read(path)
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(read(tmp_path / "again")(some_tokens()).logits, model(some_tokens()).logits)


def test_the_tokenizer_gives_the_ids_of_the_whole_corpus(top_p, corpus_dir):
    from transformers import AutoTokenizer

    from dynmoe.data.corpus import Corpus

    fast = AutoTokenizer.from_pretrained(top_p[1], trust_remote_code=True)
    corpus = Corpus.open(corpus_dir)
    count = 0
    for split in corpus.splits.values():
        for tokens in split.documents():
            assert tokens.pop() == corpus.tokenizer.eod == fast.eos_token_id == fast.bos_token_id
            text = corpus.tokenizer.decode(tokens)
            assert fast(text)["input_ids"] == tokens
            assert fast.decode(tokens) == text
            count += 1
    assert count == 60
    for text in ("", " ", "</s> is text", "tabs\tand\n\n  lines", "\u2581", "caf\u00e9 \u6c49\u5b57 \U0001f600 \x00"):
        assert fast(text)["input_ids"] == corpus.tokenizer.encode(text)


def test_a_sequence_classifier_reads_the_last_token(top_p):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(top_p[1], trust_remote_code=True, num_labels=3).eval()
    tokens = some_tokens()
    padded = torch.cat([tokens, torch.zeros(BATCH, 2, dtype=torch.int64)], dim=1)
    mask = (torch.arange(LENGTH + 2) < LENGTH).long().expand(BATCH, -1)
    with torch.no_grad():
        alone = model(tokens)
        filled = model(padded, attention_mask=mask, labels=torch.tensor([0, 2]))
    torch.testing.assert_close(alone.logits, filled.logits)
    torch.testing.assert_close(filled.loss, torch.nn.functional.cross_entropy(filled.logits, torch.tensor([0, 2])))
    with torch.no_grad():
        routed = model(padded, attention_mask=mask, labels=torch.tensor([0, 2]), output_router_logits=True)
        whole = model.model(tokens, output_router_logits=True)
    assert torch.equal(routed.experts_per_token[..., :LENGTH], whole.experts_per_token)
    torch.testing.assert_close(routed.aux_loss, whole.aux_loss)
    torch.testing.assert_close(routed.loss, filled.loss + whole.aux_loss)


def test_an_export_works_without_this_project(top_p, tmp_path):
    """Generation and one epoch of Trainer, in an interpreter that cannot import this project or its engines."""
    _, path = top_p
    missing = ["dynmoe", "data_prep", "bench", "deepspeed", "megatron", "sentencepiece", "omegaconf"]
    script = f"import runpy, sys; sys.modules.update(dict.fromkeys({missing})); runpy.run_path(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, str(USE), str(path), str(tmp_path / "tuned")], cwd=tmp_path, check=False,
        text=True, capture_output=True, timeout=300,
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    before, after, experts = json.loads(done.stdout.splitlines()[-1])
    assert after < before - 0.5
    assert 1 <= experts <= 4


def test_a_failed_export_leaves_nothing_behind(corpus_dir, tmp_path, monkeypatch):
    run = begin(corpus_dir, tmp_path / "run", OWN["top_p"])
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match=r"OUT: .*there exists; name a new directory"):
        export(run.path, tmp_path / "there")
    monkeypatch.setattr("dynmoe.hf.export._save", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(run.path, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "there"]
    with pytest.raises(UserError, match=r"config\.yaml"):
        export(tmp_path / "nothing", tmp_path / "out")


def test_latent_attention_is_refused_by_name(corpus_dir, tmp_path):
    run = begin(corpus_dir, tmp_path / "run", [*OWN["top_p"], *LATENT])
    problems = {
        export: r"^model\.router\.kind='top_p': is 'top_k' in DeepSeek-V3; run it with python -m dynmoe\.generate$",
        write_gguf: r"^model\.latent\.kv_lora_rank=12: .*run it with python -m dynmoe\.generate$",
    }
    for write, problem in problems.items():
        with pytest.raises(UserError, match=problem):
            write(run.path, tmp_path / "out")
