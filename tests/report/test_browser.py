"""The pages in a real browser: headless Chromium, without a network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, Page, expect, sync_playwright
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models

from dynmoe.data.tokenizer import Tokenizer
from dynmoe.data.tokenizer_files import open_tokenizer
from dynmoe.report.images import Image
from dynmoe.report.page import write_report
from dynmoe.report.runs import read_run
from dynmoe.report.tokens import Document, tables, view_documents, write_view
from dynmoe.report.tokens import _read as read_tokens
from dynmoe.routing import RoutingPlan
from harness.processes import ROOT
from tests.data.languages import END, save

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
SWITCHES = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--disable-quic"]  # fmt: skip
WIDE = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(undisturbed, tmp_path_factory, pytestconfig) -> dict[str, Path]:
    """Report and token view: of a small run, or of the one that --screenshot-run names."""
    named = pytestconfig.getoption("screenshot_run")
    run = Path(named) if named else undisturbed[0]
    folder = tmp_path_factory.mktemp("pages")
    write_report([read_run(run)], folder / "report.html")
    # In a process of its own: Playwright's loop runs in this one.
    command = [sys.executable, "-m", "dynmoe.report", "tokens", str(run), "--tokens", "1500", "--output",
               str(folder / "tokens.html")]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return {"run": run, "report": folder / "report.html", "tokens": folder / "tokens.html"}


Opener = Callable[..., Page]


@pytest.fixture(scope="module")
def complaints() -> list[str]:
    """What pages said in the console or asked of a network."""
    return []


@pytest.fixture(autouse=True)
def no_complaint(complaints) -> Iterator[None]:
    yield
    assert complaints == []


@pytest.fixture(scope="module")
def open_page(browser, pages, complaints) -> Iterator[Opener]:
    contexts = []

    def make(name: str, viewport=WIDE, scheme: str = "light", touch: bool = False) -> Page:
        context = browser.new_context(viewport=viewport, color_scheme=scheme, has_touch=touch)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda asked: None if asked.url.startswith(("file:", "data:", "blob:")) else complaints.append(asked.url),
        )
        page.goto(pages[name].as_uri())
        page.wait_for_load_state("load")
        if name == "report":
            expect(page.locator("#figure-loss .main-svg").first).to_be_visible()
        return page

    yield make
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def report(open_page) -> Page:
    """The report on a wide screen, one for several tests: it takes seconds to draw."""
    return open_page("report")


def brightness(page: Page, selector: str, attribute: str) -> float:
    colour = page.locator(selector).first.evaluate(f"(node) => getComputedStyle(node)['{attribute}']")
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


def test_the_slider_moves_the_heatmap_through_training(report, pages):
    page = report
    entries = read_run(pages["run"]).histograms
    shown = "document.getElementById('figure-load_0').data[0].z.map((row) => Array.from(row))"
    figure = page.locator("#figure-load_0")
    figure.scroll_into_view_if_needed()
    label = figure.locator(".slider-label").first
    assert label.text_content() == f"step {entries[-1]['train/step']}"
    before = page.evaluate(shown)
    rail = figure.locator(".slider-rail-touch-rect").bounding_box()
    page.mouse.move(rail["x"] + rail["width"] - 3, rail["y"] + rail["height"] / 2)
    page.mouse.down()
    page.mouse.move(rail["x"] + 3, rail["y"] + rail["height"] / 2, steps=4)
    page.mouse.up()
    expect(label).to_have_text(f"step {entries[0]['train/step']}")
    after = page.evaluate(shown)
    assert after != before
    for row, own in zip(after, entries[0]["layers"].values(), strict=True):
        used = [tokens for tokens, active in zip(own["load"], own["active"], strict=True) if active]
        mean = sum(used) / len(used)
        expected = [
            tokens / mean if active else None for tokens, active in zip(own["load"], own["active"], strict=True)
        ]
        assert row == pytest.approx(expected)


def test_hovering_names_values(report, pages):
    page = report
    rows = read_run(pages["run"]).rows
    figure = page.locator("#figure-loss")
    figure.scroll_into_view_if_needed()
    # The place of the last training loss, by the figure's own axes.
    x, y = page.evaluate(
        """([step, loss]) => {
            const figure = document.getElementById("figure-loss"), { xaxis, yaxis } = figure._fullLayout;
            const box = figure.getBoundingClientRect();
            return [box.x + xaxis._offset + xaxis.l2p(step), box.y + yaxis._offset + yaxis.l2p(loss)];
        }""",
        [rows[-2]["train/step"], rows[-2]["train/lm_loss"]],
    )
    page.mouse.move(x - 30, y)
    page.mouse.move(x, y, steps=3)
    hover = figure.locator(".hoverlayer")
    expect(hover).to_contain_text("training")
    expect(hover).to_contain_text(f"{rows[-2]['train/lm_loss']:.4g}")
    heatmap = page.locator("#figure-load_0")
    heatmap.scroll_into_view_if_needed()
    box = heatmap.locator(".heatmaplayer").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.1, box["y"] + box["height"] * 0.1, steps=3)
    expect(heatmap.locator(".hoverlayer")).to_contain_text(re.compile(r"layer \d+, expert \d+.*× the mean load"))


def test_the_loss_changes_its_axis(report):
    figure = report.locator("#figure-loss")
    figure.locator(".updatemenu-header").click()
    figure.get_by_text("against activated FLOPs (P)").click()
    expect(figure.locator(".xtitle")).to_have_text("activated FLOPs (P)")


@pytest.mark.parametrize("name", ["report", "tokens"])
def test_a_phone_in_the_dark_can_read_it(open_page, name):
    page = open_page(name, PHONE, "dark", touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert brightness(page, "body", "backgroundColor") < 60
    assert brightness(page, "body", "color") > 180
    if name == "report":
        assert brightness(page, "#figure-loss .xtitle", "fill") > 180
        widest = page.evaluate(
            "Math.max(...[...document.querySelectorAll('.main-svg')].map((svg) => svg.getBoundingClientRect().right))"
        )
        assert widest <= PHONE["width"]
    else:
        page.locator("#text span").first.tap()
        expect(page.locator("#detail")).to_contain_text("experts (gates) by layer")
        box = page.locator("#detail").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= PHONE["width"]


def test_the_report_follows_a_change_to_the_dark(report):
    assert brightness(report, "#figure-loss .xtitle", "fill") < 80
    report.emulate_media(color_scheme="dark")
    expect(report.locator("#figure-loss .xtitle")).to_have_css("fill", "rgb(228, 232, 239)")
    report.emulate_media(color_scheme="light")
    expect(report.locator("#figure-loss .xtitle")).to_have_css("fill", "rgb(29, 36, 48)")


def test_each_token_shows_its_experts_and_its_colour(open_page, pages):
    page = open_page("tokens")
    view = json.loads(pages["tokens"].with_suffix(".json").read_text())
    spans = page.locator("#text span")
    assert spans.count() == len(view["tokens"])

    def alphas() -> list[float]:
        colours = spans.evaluate_all("(nodes) => nodes.map((node) => node.style.backgroundColor)")
        return [float(re.search(r"([\d.]+)\)$", colour).group(1)) if "," in colour or "/" in colour else 1.0
                for colour in colours]  # fmt: skip

    def expected(counts: list[float]) -> list[float]:
        low = min(counts)
        high = max(counts)
        return [0.85 * (count - low) / (high - low) for count in counts]

    layers = range(len(view["layers"]))
    means = [sum(map(len, token["experts"])) / len(layers) for token in view["tokens"]]
    assert alphas() == pytest.approx(expected(means), abs=0.01)
    for place in layers:
        page.locator("#layer").select_option(label=f"layer {view['layers'][place]}")
        assert alphas() == pytest.approx(expected([len(t["experts"][place]) for t in view["tokens"]]), abs=0.01)
    number = 5
    spans.nth(number).hover()
    token = view["tokens"][number]
    detail = page.locator("#detail")
    expect(detail).to_contain_text(f"token {token['id']}, position {token['position']}")
    for place in layers:
        gates = ", ".join(
            f"{expert} ({gate:.2f})"
            for expert, gate in zip(token["experts"][place], token["gates"][place], strict=True)
        )
        row = detail.locator("tr").nth(place)
        expect(row).to_contain_text(f"layer {view['layers'][place]}{len(token['experts'][place])}{gates or 'none'}")
    for title in ("Tokens with the most experts", "Tokens with the fewest experts", "By layer", "By source",
                  "By position", "By frequency rank"):  # fmt: skip
        expect(page.locator("#tables")).to_contain_text(title)


CHARACTERS = "日本語 é x 👩\u200d🔬 の\u3099~\n"


@pytest.fixture(scope="module")
def in_bytes(pages, tmp_path_factory) -> Path:
    """A token view of characters that the run's tokenizer writes as bytes, the first and last ones cut."""
    tokenizer = open_tokenizer(pages["run"] / "tokenizer.model")
    pages["bytes"] = tmp_path_factory.mktemp("bytes") / "tokens.html"
    write_tokens(tokenizer, tokenizer.encode(f"神{CHARACTERS}神")[1:-1], pages["bytes"])
    return pages["bytes"]


def write_tokens(tokenizer: Tokenizer, ids: list[int], output: Path) -> None:
    tokens = [
        {"id": token, "piece": piece, "source": 0, "position": place, **character,
         "experts": [list(range(place % 4))], "gates": [[0.5] * (place % 4)]}
        for place, (token, piece, character) in enumerate(read_tokens(tokenizer, ids))
    ]  # fmt: skip
    view = {"run": "bytes", "step": 1, "layers": [0], "sources": ["text"], "tokens": tokens,
            "tables": tables(tokens, [0], ["text"], 64)}  # fmt: skip
    write_view(view, output)


@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
def test_characters_that_are_written_as_bytes_can_be_read(open_page, in_bytes, viewport):
    page = open_page("bytes", viewport)
    tokens = json.loads(in_bytes.with_suffix(".json").read_text())["tokens"]
    spans = page.locator("#text span")
    assert spans.count() == len(tokens)
    shown = CHARACTERS.replace("\n", "↵\n").replace("\u200d", "U+200D").replace("\u3099", "◌\u3099")
    cut = [f"<0x{byte:02X}>" for byte in "神".encode()]
    assert page.locator("#text").text_content() == f"text{cut[1]}{cut[2]}{shown}{cut[0]}{cut[1]}"
    boxes = page.locator("#text .character").evaluate_all(
        """(nodes) => nodes.map((node) => [node, ...node.children].map((part) => {
            const { left, right, top, bottom } = part.getBoundingClientRect();
            return { left, right, top, bottom };
        }))"""
    )
    written = [character for character in CHARACTERS if len(character.encode()) > 1]
    for character, (whole, glyph, *parts) in zip(written, boxes, strict=True):
        assert len(parts) == len(character.encode())
        assert [part["left"] for part in parts[1:]] == pytest.approx([part["right"] for part in parts[:-1]], abs=0.1)
        assert (parts[0]["left"], parts[-1]["right"]) == pytest.approx((whole["left"], whole["right"]), abs=0.1)
        assert parts[0]["right"] - parts[0]["left"] >= 7, "too small to point at"
        assert whole["left"] <= glyph["left"] < glyph["right"] <= whole["right"]
    colours = spans.evaluate_all("(nodes) => nodes.map((node) => node.style.backgroundColor)")
    for colour, token in zip(colours, tokens, strict=True):
        alpha = float(match[1]) if (match := re.search(r"[,/] ?([\d.]+)\)$", colour)) else 1.0
        assert alpha == pytest.approx(0.85 * len(token["experts"][0]) / 3, abs=0.01)
    first = next(number for number, token in enumerate(tokens) if token.get("character") == "本")
    for byte, token in enumerate(tokens[first : first + 2]):  # each has its own experts and words
        spans.nth(first + byte).hover()
        words = f'"本" byte {byte + 1} of 3, "{token["piece"]}", token {token["id"]}, position {token["position"]}'
        expect(page.locator("#detail")).to_contain_text(words)
        expect(page.locator("#detail tr")).to_contain_text(f"layer 0{len(token['experts'][0])}")


def test_tokens_that_begin_and_end_within_characters_share_their_text(open_page, pages, tmp_path):
    """The three bytes of " é" are two tokens, of two bytes and of one, as in byte-level tokenizers."""
    made = Fast(models.BPE({"ĠÃ": 0, "©": 1, "x": 2, END: 3}, []))
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([END])
    pages["shared"] = tmp_path / "tokens.html"
    write_tokens(open_tokenizer(save(made, tmp_path / "tokenizer")), [2, 0, 1, 2, 1], pages["shared"])
    page = open_page("shared", WIDE)
    assert page.locator("#text").text_content() == "textx éx<0xA9>"
    first, second = page.locator("#text .character span").evaluate_all(
        "(nodes) => nodes.map((node) => node.getBoundingClientRect().width)"
    )
    assert first == pytest.approx(2 * second, rel=0.05)
    for number, words in (
        (1, '" é" bytes 1 to 2 of 3, " <0xC3>", token 0'),
        (2, '" é" byte 3 of 3, "<0xA9>", token 1'),
    ):
        page.locator("#text span").nth(number).hover()
        expect(page.locator("#detail")).to_contain_text(words)


@pytest.fixture(scope="module")
def with_images(pages, tmp_path_factory, pytestconfig) -> Path:
    """A token view of two images, each with a text, or the page that --screenshot-images names."""
    named = pytestconfig.getoption("screenshot_images")
    pages["images"] = Path(named).resolve() if named else tmp_path_factory.mktemp("images") / "tokens.html"
    if named:
        return pages["images"]
    experts = [torch.arange(6) < count for count in (1, 2, 3, 6, 0, 2, 4, 1)]
    documents = []
    for number in range(2):
        image = Image(torch.full((20, 30, 3), 200 * number, dtype=torch.uint8), rows=2, columns=3)
        maps = [torch.stack(experts).roll(number + layer, 0) for layer in range(2)]
        plans = [RoutingPlan(own.float() / 6, own, own, own.float()) for own in maps]
        documents.append(Document("scenes", [4, 5], ["what ", "colour "], plans, image))
    write_view(view_documents(documents, "images", 1, [0, 2]), pages["images"])
    return pages["images"]


@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
def test_patches_lie_over_their_image_with_the_text_beside_it(open_page, with_images, viewport):
    page = open_page("images", viewport)
    view = json.loads(with_images.with_suffix(".json").read_text())
    spans = page.locator("#text span")
    assert spans.count() == len(view["tokens"])
    images = page.locator("#text .image")
    assert images.count() == len(view["images"])
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    whole = images.nth(1).bounding_box()
    first = next(number for number, token in enumerate(view["tokens"]) if token.get("image") == 1)
    rows, columns = (view["images"][1][name] for name in ("rows", "columns"))
    for patch in (0, 1, columns, rows * columns - 1):
        box = spans.nth(first + patch).bounding_box()
        row, column = divmod(patch, columns)
        assert box["x"] == pytest.approx(whole["x"] + whole["width"] * column / columns, abs=1)
        assert box["y"] == pytest.approx(whole["y"] + whole["height"] * row / rows, abs=1)
        assert box["width"] == pytest.approx(whole["width"] / columns, abs=1)
    for layer, place in ((f"layer {view['layers'][1]}", 1), ("mean over layers", None)):
        page.locator("#layer").select_option(label=layer)
        counts = [
            sum(map(len, t["experts"])) / len(t["experts"]) if place is None else len(t["experts"][place])
            for t in view["tokens"]
        ]
        colours = spans.evaluate_all("(nodes) => nodes.map((node) => node.style.backgroundColor)")
        for token, colour, count in zip(view["tokens"], colours, counts, strict=True):
            alpha = float(match[1]) if (match := re.search(r"[,/] ?([\d.]+)\)$", colour)) else 1.0
            share = (count - min(counts)) / (max(counts) - min(counts))
            assert alpha == pytest.approx((0.7 if "image" in token else 0.85) * share, abs=0.01)
    spans.nth(first + 1).hover()
    expect(page.locator("#detail")).to_contain_text("patch in row 1, column 2, position 1: experts (gates) by layer")
    words = page.locator("#text .document").nth(1).locator("> :last-child")
    told = "".join(token["piece"] for token in view["tokens"] if token["source"] == 0 and "image" not in token)
    assert words.text_content()
    assert words.text_content() in told
    if viewport == WIDE:
        assert words.bounding_box()["x"] >= whole["x"] + whole["width"]


def test_screenshots(open_page, report, with_images, pytestconfig, tmp_path):
    """Pictures of the pages; with --screenshots they are kept there (see CONTRIBUTING)."""
    folder = Path(pytestconfig.getoption("screenshots") or tmp_path)
    report.locator("#figure-experts_per_token").evaluate("(node) => node.scrollIntoView()")
    report.wait_for_timeout(300)
    report.screenshot(path=folder / "report.png")
    page = open_page("tokens")
    page.locator("#text span").nth(8).hover()
    page.screenshot(path=folder / "tokens.png")
    page = open_page("images", {"width": 1000, "height": 640})
    page.locator("#text .image span").nth(5).hover()
    page.screenshot(path=folder / "vision_language.png")
    for name in ("report", "tokens", "vision_language"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
