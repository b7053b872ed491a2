"""The scenes of examples/vision_language.py: answers are true, and no pair of the test is in a training scene."""

from __future__ import annotations

import sys
from collections import Counter

import pytest
import torch

from harness.processes import ROOT


@pytest.fixture(scope="module")
def scenes():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        import scenes

        yield scenes
        del sys.modules["scenes"]


def test_questions_about_a_scene_have_these_answers(scenes):
    """Two circles and two green things: neither word names one thing, so neither is asked for by place."""
    things = [scenes.Thing("red", "circle", 0), scenes.Thing("green", "circle", 5), scenes.Thing("green", "ring", 2)]
    asked = scenes.ask(things)
    answers = {question.text: question.answer for question in asked}
    assert len(answers) == len(asked)
    assert answers["what colour is at top-left"] == "red"
    assert answers["what colour is at right"] == "green"
    assert answers["how many are green"] == "two"
    assert answers["how many are circle"] == "two"
    assert answers["how many are ring"] == "one"
    assert answers["how many are blue"] == "none"
    assert answers["where is the red"] == "top-left"
    assert answers["where is the ring"] == "top-right"
    assert answers["is the red left-of the ring"] == "yes"
    assert answers["is the ring left-of the red"] == "no"
    assert answers["is the ring right-of the red"] == "yes"
    kinds = Counter(question.kind for question in asked)
    # Rows of red and ring are the same, so only left-of and right-of are asked, both ways round.
    assert kinds == {"colour": 3, "number": len(scenes.COLOURS) + len(scenes.SHAPES), "place": 2, "relation": 4}
    assert "where is the green" not in answers


def test_above_is_in_a_higher_row(scenes):
    answers = {q.text: q.answer for q in scenes.ask([scenes.Thing("red", "ring", 1), scenes.Thing("blue", "cross", 6)])}
    assert answers["is the red above the cross"] == "yes"
    assert answers["is the red below the blue"] == "no"
    assert answers["is the cross below the ring"] == "yes"
    assert answers["is the red right-of the blue"] == "yes"


def test_no_pair_of_the_test_is_in_training(scenes):
    training = scenes.draw_scenes(300, "training", each=3, seed=0)
    test = scenes.draw_scenes(100, "test", each=1, seed=1)
    pairs = {thing.pair for scene in training for thing in scene.things}
    assert pairs == set(scenes.PAIRS) - scenes.HELD_OUT
    assert {colour for colour, _ in pairs} == set(scenes.COLOURS)
    assert {shape for _, shape in pairs} == set(scenes.SHAPES)
    for scene in test:
        assert sorted(question.kind for question in scene.questions) == sorted(scenes.KINDS)
        for question in scene.questions:
            assert any(thing.pair in scenes.HELD_OUT for thing in question.about), question
    asked = {thing.pair for scene in test for own in scene.questions for thing in own.about}
    assert asked >= scenes.HELD_OUT
    assert len(scenes.HELD_OUT) == len({shape for _, shape in scenes.HELD_OUT}) == len(scenes.COLOURS)


def test_text_names_every_pair(scenes):
    text = scenes.draw_scenes(300, "text", each=3, seed=0)
    assert {thing.pair for scene in text for thing in scene.things} == set(scenes.PAIRS)


def test_questions_of_a_scene_are_true_and_differ(scenes):
    words = set(scenes.vocabulary())
    for scene in scenes.draw_scenes(50, "training", each=3, seed=2):
        true = {question.text: question.answer for question in scenes.ask(scene.things)}
        texts = [question.text for question in scene.questions]
        assert len(set(texts)) == len(texts) <= 3 * len(scenes.KINDS)
        for question in scene.questions:
            assert true[question.text] == question.answer
            assert words >= {*question.text.split(), question.answer}


def test_pictures_show_the_things_where_they_are(scenes):
    drawn = scenes.draw_scenes(20, "test", each=1, seed=3)
    pictures = scenes.paint(drawn, seed=4)
    names = scenes.names_of_cells(drawn)
    assert pictures.shape == (20, 3, scenes.SIDE, scenes.SIDE)
    colours = torch.tensor([(0.1, 0.1, 0.1), *scenes.COLOURS.values()])
    cells = pictures.unfold(2, scenes.CELL, scenes.CELL).unfold(3, scenes.CELL, scenes.CELL)
    right = 0
    for picture, scene, named in zip(cells, drawn, names, strict=True):
        by_cell = {thing.cell: thing for thing in scene.things}
        for cell, (colour, shape) in enumerate(named.tolist()):
            pixels = picture[:, cell // scenes.GRID, cell % scenes.GRID].flatten(1).t()
            bright = pixels[pixels.amax(dim=1) > 0.4]
            assert (cell in by_cell) == (len(bright) > 10) == (colour > 0) == (shape > 0)
            if cell in by_cell:
                thing = by_cell[cell]
                assert (thing.colour, thing.shape) == ([*scenes.COLOURS][colour - 1], [*scenes.SHAPES][shape - 1])
                area = scenes.SHAPES[thing.shape].count("#")
                assert len(bright) == pytest.approx(area, abs=2)
                right += int((bright.mean(dim=0) - colours).abs().sum(dim=1).argmin() == colour)
    assert right >= 0.9 * sum(len(scene.things) for scene in drawn)  # shades may come close to another colour
