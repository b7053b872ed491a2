"""Passages are scored as one after the other by the plain model, however they are batched and wherever it lies."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from dynmoe.config.constants import IGNORED
from dynmoe.data.batches import PretrainingData
from dynmoe.data.corpus import Corpus
from dynmoe.evaluate import scoring
from dynmoe.evaluate.domains import score_domains
from dynmoe.evaluate.models import WholeModel
from dynmoe.evaluate.scoring import ExpertUse, Passage, score
from dynmoe.train.scores import EXPERTS
from dynmoe.trained import open_trained
from tests.engines.test_megatron import ALONE, BASE, DP2, EP2, INTERLEAVED, PP2, TP2
from tests.evaluate.cases import score_passages, some_passages
from tests.hf.cases import begin, run_decoder
from tests.train.cases import evaluation_loss

LAYOUTS = {"DP 2": DP2, "EP 2": EP2, "TP 2": TP2, "PP 2": PP2, "PP 2 interleaved": INTERLEAVED}


@pytest.fixture(scope="module")
def model(corpus_dir, tmp_path_factory):
    fields = ["model.router.p=0.5", "train.micro_batch=2", "train.global_batch=2"]
    return WholeModel(open_trained(begin(corpus_dir, tmp_path_factory.mktemp("score") / "run", fields).path))


def by_hand(model: WholeModel, passage: Passage) -> tuple[float, bool, list[int]]:
    """Log-probability, whether greedy decoding writes it, experts of each token in each layer."""
    tokens = torch.tensor(passage.tokens)
    logits, maps = run_decoder(model.trained.decoder, tokens[None, :-1])
    log_probs = F.log_softmax(logits[0].double(), dim=1)[-passage.scored :]
    labels = tokens[-passage.scored :]
    greedy = bool((log_probs.argmax(dim=1) == labels).all())
    total = float(log_probs.gather(1, labels[:, None]).sum())
    return total, greedy, [int(count) for routed in maps for count in routed[0].sum(dim=-1)]


def test_scores_are_those_of_one_passage_after_the_other(model):
    passages = some_passages(448, 64)
    prompt = passages[0].tokens[:5]
    logits, _ = run_decoder(model.trained.decoder, torch.tensor([prompt]))
    passages.append(Passage([*prompt, int(logits[0, -1].argmax())], 1, "easy"))  # what greedy decoding writes
    use = ExpertUse()
    calls = []
    scores = score(model, passages, use, lambda done, of: calls.append((done, of)))
    used = {"easy": [], "hard": []}
    for passage, own in zip(passages, scores, strict=True):
        total, greedy, experts = by_hand(model, passage)
        assert own.log_prob == pytest.approx(total, rel=1e-5)
        assert own.greedy == greedy
        used[passage.group] += experts
    assert scores[-1].greedy
    assert not all(own.greedy for own in scores)
    for group, counts in used.items():
        assert use.figures([group]) == {EXPERTS: pytest.approx(sum(counts) / len(counts), rel=1e-12)}
    everything = used["easy"] + used["hard"]
    assert use.figures(["easy", "hard"]) == {EXPERTS: pytest.approx(sum(everything) / len(everything), rel=1e-12)}
    assert len(calls) > 3, "nothing was batched"
    assert calls == [(number, len(calls)) for number in range(1, len(calls) + 1)]


def test_a_model_with_a_window_sees_few_lengths(corpus_dir, tmp_path, monkeypatch):
    """FlexAttention compiles a kernel for each, and no more than eight."""
    fields = ["model.window=8", "train.micro_batch=2", "train.global_batch=2"]
    model = WholeModel(open_trained(begin(corpus_dir, tmp_path / "run", fields).path))
    seen = set()
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda tokens, wanted: seen.add(tokens.shape[1]) or logits(tokens, wanted))
    passages = [Passage([*range(3, 5 + length)], 1, "all") for length in range(1, 64)]
    scores = score(model, passages, ExpertUse(), lambda done, of: None)
    assert seen == {8, 16, 32, 64}
    for passage, own in zip(passages, scores, strict=True):
        assert own.log_prob == pytest.approx(by_hand(model, passage)[0], rel=1e-5)


def test_passes_are_no_larger_than_memory_allows(model, monkeypatch):
    monkeypatch.setattr(scoring, "_MAX_LOGITS", 448 * 64)  # one sequence
    assert scoring.rows_of_pass(model, 64) == 1
    assert scoring.rows_of_pass(model, 16) == 4
    assert scoring.rows_of_pass(model, 65) == 1, "what is too large is computed alone"
    monkeypatch.undo()
    assert scoring.rows_of_pass(model, 64) == 2, "as many as in training"


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_model_spread_over_ranks_scores_as_one_in_one_process(one_rank, two_ranks, name):
    (alone,) = one_rank.run(score_passages, [*BASE, *ALONE])
    for result in two_ranks.run(score_passages, [*BASE, *LAYOUTS[name]]):
        assert result["log_probs"] == pytest.approx(alone["log_probs"], rel=1e-5)
        assert result["greedy"] == alone["greedy"]
        assert result["experts"] == alone["experts"]
        shared = name in ("DP 2", "EP 2")
        assert (len(result["passes"]) < len(alone["passes"])) or not shared, "ranks do not share the passes"


def test_deepspeeds_ranks_share_passes_of_unequal_lengths(one_rank, two_ranks):
    plain = [part for part in BASE if part != "engine=megatron"]
    (alone,) = one_rank.run(score_passages, [*plain, *ALONE])
    for result in two_ranks.run(score_passages, [*plain, *EP2]):
        assert result["log_probs"] == pytest.approx(alone["log_probs"], rel=1e-5)
        assert result["experts"] == alone["experts"]


def test_the_domain_of_a_run_on_one_corpus_has_its_validation_loss(undisturbed, corpus_dir, tmp_path):
    model = WholeModel(open_trained(undisturbed[0], torch.device("cpu")))
    calls = []
    scores = score_domains(
        model, {"here": Corpus.open(corpus_dir)}, tmp_path, lambda done, of: calls.append((done, of))
    )["here"]
    assert scores["loss"] == pytest.approx(evaluation_loss(undisturbed[0], tmp_path / "other"), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(2.718281828 ** scores["loss"], rel=1e-6)
    assert 0 < scores[EXPERTS] < 4
    assert calls[-1] == (8, 8)


@pytest.mark.parametrize("packing", [None, "best_fit"])
@pytest.mark.parametrize("documents", [{"documents": "joined"}, {"documents": "masked", "predict_first_token": False}])
def test_the_loss_of_a_domain_is_that_of_its_batches(model, corpus_dir, tmp_path, documents, packing):
    """However documents fill sequences, and whatever they see; the loss of whole batches is the decoder's."""
    own = WholeModel(model.trained)
    own.config = dataclasses.replace(
        model.config, data=dataclasses.replace(model.config.data, packing=packing, **documents)
    )
    corpus = Corpus.open(corpus_dir)
    data = PretrainingData([corpus], own.config.data, own.config.train.seed, tmp_path / "batches")
    batch = data.validation_batch(range(min(20, data.validation_samples)))
    counted_BS = batch.labels_BS != IGNORED
    assert counted_BS.all() == (packing is None and documents["documents"] == "joined")
    if packing is not None:
        breaks_BS = (batch.labels_BS[:, :-1] != batch.tokens_BS[:, 1:]) & counted_BS[:, :-1]
        assert breaks_BS.any(), "no label differs from the next token"
    with torch.no_grad():
        expected = own.trained.decoder(batch.tokens_BS, batch.labels_BS, batch.start_BS).item()
    found = score_domains(own, {"here": corpus}, tmp_path / "passages", lambda done, of: None)["here"]
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
