"""The token view: what it says of a token is what the model did with it."""

from __future__ import annotations

import io
import json
import sys

import matplotlib.image
import pytest
import torch

from dynmoe.errors import UserError
from dynmoe.model import Decoder
from dynmoe.moe.layer import capture_plans
from dynmoe.report import main
from dynmoe.report.images import Image, png
from dynmoe.report.texts import Text, read_texts, validation_texts
from dynmoe.report.tokens import Document, view_documents, view_tokens, write_view
from dynmoe.trained import TrainedModel, open_trained
from tests.moe.cases import ROUTERS, tiny_model
from tests.train.cases import evaluation_loss

TEXT = "The router sends 7 of the tokens.\nThe expert takes them, é and all.\n" * 6
NUM_TOKENS = 150


@pytest.fixture(scope="module")
def model(undisturbed) -> TrainedModel:
    return open_trained(undisturbed[0], torch.device("cpu"))


@pytest.fixture(scope="module")
def view(model):
    return view_tokens(model, [Text("prose", TEXT), Text("list", "1, 2, 3, 4, 5\n" * 20)], NUM_TOKENS)


def test_the_opened_model_is_the_trained_one(undisturbed, model, one_rank, tmp_path):
    outcome = json.loads((undisturbed[0] / "outcome.json").read_text())
    assert model.step == 40
    loss = one_rank.run(evaluation_loss, undisturbed[0], tmp_path)[0]
    assert loss == pytest.approx(outcome["eval/loss"], rel=1e-5)


def test_each_token_has_the_experts_and_gates_that_its_layers_used(model, view):
    assert view["layers"] == [0, 1]
    assert view["sources"] == ["list", "prose"]
    tokens = view["tokens"]
    assert [sum(token["source"] == source for token in tokens) for source in (0, 1)] == [75, 75]
    window = model.config.data.sequence_length - 1
    first = [token for token in tokens if token["source"] == 1][: 2 * window]
    ids = model.tokenizer.encode(TEXT)[: 2 * window]
    assert [token["id"] for token in first] == ids
    assert [token["position"] for token in first] == [*range(window), *range(window)]
    assert "".join(token["piece"] for token in first).replace("<0x0A>", "\n").startswith("The router sends 7 of")
    # Once more, by what each layer hands to its dispatcher, over the second window.
    given = {}
    for layer in model.decoder.moe_layers:
        dispatch = layer.dispatcher.dispatch

        def watched(x_TD, plan, max_rows=None, layer=layer, dispatch=dispatch):
            given[layer.layer] = plan
            return dispatch(x_TD, plan, max_rows)

        layer.dispatcher.dispatch = watched
    with torch.no_grad():
        model.decoder(torch.tensor([[model.tokenizer.eod, *ids[window:]]]))
    for layer in model.decoder.moe_layers:
        del layer.dispatcher.dispatch
    for place, token in enumerate(first[window:], start=1):
        for layer, experts, gates in zip(given, token["experts"], token["gates"], strict=True):
            plan = given[layer]
            assert sorted(experts) == plan.routing_map_TE[place].nonzero().flatten().tolist()
            assert gates == pytest.approx(plan.gates_TE[place, experts].tolist(), abs=1e-4)
            assert gates == sorted(gates, reverse=True)


def test_the_tables_are_counts_over_the_tokens(view):
    tokens = view["tokens"]
    tables = view["tables"]
    used = [sum(map(len, token["experts"])) / 2 for token in tokens]

    def check(row, chosen):
        values = [value for token, value in zip(tokens, used, strict=True) if chosen(token)]
        assert row["count"] == len(values) > 0
        assert row["mean"] == pytest.approx(sum(values) / len(values), abs=1e-4)

    pieces = [token["piece"] for token in tokens]
    for name in ("most", "fewest"):
        for row in tables[name]:
            assert pieces.count(row["name"]) == row["count"] >= 3
            check(row, lambda token, row=row: token["piece"] == row["name"])
    assert [row["mean"] for row in tables["most"]] == sorted((row["mean"] for row in tables["most"]), reverse=True)
    assert tables["most"][0]["mean"] >= tables["fewest"][0]["mean"]
    for number, row in enumerate(tables["sources"]):
        assert row["name"] == view["sources"][number]
        check(row, lambda token, number=number: token["source"] == number)
    for row in tables["positions"]:
        first, last = (int(part) for part in row["name"].split(" to "))
        check(row, lambda token, first=first, last=last: first <= token["position"] <= last)
    ids = [token["id"] for token in tokens]
    by_frequency = sorted(dict.fromkeys(ids), key=lambda token: -ids.count(token))
    for row in tables["ranks"]:
        first, last = (int(part) for part in (row["name"].split(" to ") * 2)[:2])
        check(row, lambda token, own=by_frequency[first - 1 : last]: token["id"] in own)
    for place, row in enumerate(tables["layers"]):
        counts = [len(token["experts"][place]) for token in tokens]
        assert row["mean"] == pytest.approx(sum(counts) / len(counts), abs=1e-4)
        assert row["histogram"] == [counts.count(number) for number in range(max(counts) + 1)]
    for name in ("sources", "positions", "ranks"):
        assert sum(row["count"] for row in tables[name]) == len(tokens)


def test_bytes_say_which_character_they_are_of(model):
    """By windows: one that ends within a character has its first bytes, and the next one the others."""
    window = model.config.data.sequence_length - 1
    text = "神経🔬é~ " * 12
    tokens = view_tokens(model, [Text("text", text)], 2 * window - 1)["tokens"]
    ids = model.tokenizer.encode(text)[: 2 * window - 1]
    assert [token["id"] for token in tokens] == ids
    cut = 0
    for own in (tokens[:window], tokens[window:]):
        raw = b"".join(_raw(token) for token in own)
        whole = raw.decode(errors="ignore")
        assert len(whole) > 10
        assert [token["character"] for token in own if token.get("byte") == 0] == [*whole.replace(" ", "")]
        for token in own:
            if "character" in token:
                assert _raw(token) == token["character"].encode()[token["byte"]].to_bytes()
        cut += len(raw) - len(whole.encode())
    assert cut > 0, "no character is cut"


def _raw(token) -> bytes:
    piece = token["piece"]
    return bytes([int(piece[1:-1], 16)]) if piece.startswith("<0x") else piece.encode()


def test_the_page_carries_its_data_and_escapes_it(view, tmp_path):
    hostile = {**view, "run": "</script><script>alert(1)</script>", "tokens": [dict(token) for token in view["tokens"]]}
    hostile["tokens"][0]["piece"] = "</script><b>"
    write_view(hostile, tmp_path / "tokens.html")
    page = (tmp_path / "tokens.html").read_text()
    assert json.loads((tmp_path / "tokens.json").read_text()) == hostile
    assert "<script>alert" not in page
    assert "</script><b>" not in page
    data = page.split('id="data">')[1].split("</script>")[0]
    assert json.loads(data) == hostile


def test_a_png_has_the_pixels():
    pixels = torch.randint(256, (5, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    read = torch.tensor(matplotlib.image.imread(io.BytesIO(png(pixels)), format="png"))
    assert (read[..., :3] * 255).round().tolist() == pixels.tolist()


@torch.no_grad()
def test_patches_of_images_are_tokens_with_their_own_experts(tmp_path):
    """Two images with text, and a text without: every token has the experts of its row in the plans."""
    model = tiny_model(*ROUTERS["top_any"])
    decoder = Decoder(model, 48, seed=0).eval()
    words = torch.tensor([[1, 2, 3, 1]])
    image = Image(torch.zeros(4, 6, 3, dtype=torch.uint8), rows=2, columns=3)
    documents = []
    for number in range(3):
        own = image if number < 2 else None
        prefix = torch.randn(1, 6, model.hidden, generator=torch.Generator().manual_seed(number))
        with capture_plans(decoder.moe_layers) as plans:
            decoder.hidden(words, prefix_BPD=prefix if own else None)
        source = "with images" if own else "text"
        documents.append(Document(source, words[0].tolist(), ["a ", "b ", "c ", "a "], plans, own))
    view = view_documents(documents, "tiny", 7, model.moe_layers)
    assert view["sources"] == ["with images", "text"]
    assert [own["rows"] * own["columns"] for own in view["images"]] == [6, 6]
    tokens = view["tokens"]
    assert [token["position"] for token in tokens] == [*range(10), *range(10), *range(4)]
    assert [(t["image"], t["patch"]) for t in tokens if "patch" in t] == [(i, p) for i in range(2) for p in range(6)]
    assert tokens[4]["piece"] == "patch in row 2, column 2"
    assert [token["piece"] for token in tokens[6:10]] == ["a ", "b ", "c ", "a "]
    for document, start in zip(documents, (0, 10, 20), strict=True):
        for place, plan in enumerate(document.plans):
            for row, map_E in enumerate(plan.routing_map_TE):
                assert sorted(tokens[start + row]["experts"][place]) == map_E.nonzero().flatten().tolist()
    kinds = {row["name"]: row for row in view["tables"]["kinds"]}
    for name, isin in (("image", True), ("text", False)):
        own = [token for token in tokens if ("image" in token) == isin]
        assert kinds[name]["count"] == len(own) == 12
        means = [sum(len(token["experts"][place]) for token in own) / 12 for place in range(2)]
        assert kinds[name]["layers"] == pytest.approx(means, abs=1e-4)
    assert {row["name"] for row in view["tables"]["most"]} == {"a ", "b ", "c "}  # no patch
    write_view(view, tmp_path / "tokens.html")
    page = (tmp_path / "tokens.html").read_text()
    assert "By kind of token" in page
    assert page.count("data:image/png;base64,") == 2


def test_texts_come_from_files_lines_and_standard_input(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "tw\u2028o", "source": "web"}\n\n{"text": "three"}\n')
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"vier\n")))
    texts = read_texts([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"), "-"])
    assert texts == [Text("a.txt", "one"), Text("web", "tw\u2028o"), Text("b.jsonl", "three"),
                     Text("standard input", "vier\n")]  # fmt: skip


def test_json_lines_are_lines_by_any_name_and_a_byte_order_mark_is_no_text(tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "two"))
    (tmp_path / "a.json").write_text(lines, encoding="utf-8-sig")
    (tmp_path / "b.txt").write_text('{"title": "no text"}\nprose', encoding="utf-8-sig")
    texts = read_texts([str(tmp_path / "a.json"), str(tmp_path / "b.txt")])
    assert [text.content for text in texts] == ["one", "two", '{"title": "no text"}\nprose']


def test_files_of_the_same_name_are_sources_of_their_own(tmp_path):
    paths = [tmp_path / folder / "x.txt" for folder in ("en", "fr")]
    for path in paths:
        path.parent.mkdir()
        path.write_text("text")
    assert [text.source for text in read_texts([str(path) for path in paths])] == [str(path) for path in paths]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("none.txt", None, "cannot be read (No such file or directory); use a text file"),
        ("blank.txt", b" \n", "contains no text"),
        ("bytes.txt", b"\xff\xfe", "is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', "line 2 has no text"),
        ("b.jsonl", b"[1]\n", "line 1 has no text"),
    ],
)
def test_texts_that_cannot_be_used_are_refused_by_name(tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_texts([str(tmp_path / name)])
    assert f"--text {tmp_path / name}: " in str(caught.value)
    assert sentence in str(caught.value)


def test_without_a_text_the_validation_text_is_shown(model, corpus_dir):
    texts = validation_texts(model, 100)
    assert sum(len(text.content) for text in texts) == 100
    assert {text.source for text in texts} == {corpus_dir.name}
    assert model.tokenizer.decode(list(texts[0].content)).startswith("# Document ")


def test_the_command_reads_standard_input_and_prints_where_the_pages_are(undisturbed, tmp_path, monkeypatch, capsys):
    output = tmp_path / "view.html"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    arguments = ["tokens", str(undisturbed[0]), "--text", "-", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["dynmoe report", *arguments])
    main()
    assert f"Token view: {output} (data: {tmp_path / 'view.json'})" in capsys.readouterr().out
    assert json.loads((tmp_path / "view.json").read_text())["sources"] == ["standard input"]


def test_a_run_without_tokenizer_or_checkpoint_is_refused_in_one_line(undisturbed, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text((undisturbed[0] / "config.yaml").read_text())
    with pytest.raises(UserError, match=r"tokenizer\.model is missing; copy it from the corpus"):
        open_trained(run)
    (run / "tokenizer.model").write_bytes((undisturbed[0] / "tokenizer.model").read_bytes())
    with pytest.raises(UserError, match="no valid checkpoint"):
        open_trained(run)
