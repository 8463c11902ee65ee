"""Every shared plot draws what it is given."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from lib import figures


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_overlays_outline_truth_and_prediction():
    disk = np.hypot(*np.mgrid[-16:16, -16:16]) < 8
    image = np.zeros((32, 32))
    figure = figures.overlays([image] * 2, [disk] * 2, {"model": [disk * 0.9, disk * 0.0]}, ["one", "two"])
    assert [axis.get_title(loc="center") for axis in figure.axes[:2]] == ["image", "model"]
    lines = [len(axis.collections) for axis in figure.axes]
    assert lines == [0, 2, 0, 1]  # the empty prediction has no outline


def test_intervals_draw_one_dot_per_row_and_group():
    table = pd.DataFrame(
        {"label": ["a", "a", "b"], "g": ["x", "y", "x"], "mean": [1, 2, 3], "low": [0, 1, 2], "high": [2, 3, 5]}
    )
    figure = figures.intervals(table, "Dice", group="g", reference=1.0)
    containers = figure.axes[0].containers
    assert [len(c.lines[0].get_xdata()) for c in containers] == [2, 1]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["a", "b"]


def test_sweep_sorts_by_x():
    table = pd.DataFrame({"x": [2, 0, 1], "label": "l", "mean": [2, 0, 1], "low": [1, -1, 0], "high": [3, 1, 2]})
    assert list(figures.sweep(table, "x", "x", "y").axes[0].lines[0].get_xdata()) == [0, 1, 2]


def test_learning_curves_one_line_per_seed_one_label_per_arm():
    log = pd.DataFrame({"step": [1, 2], "loss": [1.0, 0.5], "valid_score": [0.1, 0.2]})
    figure = figures.learning_curves({"a": [log, log], "b": [log]})
    assert len(figure.axes[0].lines) == 3
    assert [t.get_text() for t in figure.axes[1].get_legend().get_texts()] == ["a", "b"]


def test_flow_joins_named_boxes():
    figure = figures.flow({"a": (0.2, 0.5, "A"), "b": (0.8, 0.5, "B")}, [("a", "b")])
    assert {t.get_text() for t in figure.axes[0].texts} == {"A", "B", ""}
    with pytest.raises(KeyError):
        figures.flow({"a": (0.2, 0.5, "A")}, [("a", "missing")])


def test_a_badge_says_its_verdict_in_words_and_symbol():
    assert "supported" in figures.verdict_badge("supported") and "●" in figures.verdict_badge("supported")
    with pytest.raises(KeyError):
        figures.verdict_badge("maybe")


def test_doubt_shows_a_map_per_column_beside_the_image():
    disk = np.hypot(*np.mgrid[-8:8, -8:8]) < 4
    figure = figures.doubt([disk * 0.5] * 2, [disk] * 2, {"entropy": [disk * 0.6] * 2}, ["one", "two"])
    assert [axis.get_title(loc="center") for axis in figure.axes[:2]] == ["image", "entropy"]
    assert figure.axes[1].images[0].get_clim() == (0, np.log(2))


def test_reliability_draws_a_line_per_model():
    table = pd.DataFrame({"forecast": [0.1, 0.9], "frequency": [0, 1], "share": [0.5, 0.5]})
    assert len(figures.reliability({"a": table, "b": table}).axes[0].lines) == 3


def test_survival_curves_step_down_by_group_within_their_band():
    steps = {"time": [0, 100, 300], "survival": [1.0, 0.8, 0.5], "low": [1.0, 0.6, 0.3], "high": [1.0, 0.9, 0.7]}
    table = pd.concat([pd.DataFrame(steps).assign(group=name) for name in ("low risk", "high risk")])
    axis = figures.survival_curves(table).axes[0]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["low risk", "high risk"]
    assert len(axis.lines) == len(axis.collections) == 2 and axis.lines[0].get_drawstyle() == "steps-post"
    assert axis.lines[0].get_ydata().tolist() == [1.0, 0.8, 0.5]


def test_names_of_neighbouring_points_do_not_touch():
    figure, axis = plt.subplots()
    x, y = [1, 1, 1.001, 3], [0.5, 0.5, 0.501, 0.5]
    axis.scatter(x, y)
    axis.set(xlim=(0, 4), ylim=(0, 1))
    figures.name_points(axis, x, y, ["one", "two", "three", "far"])
    figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in axis.texts]  # without the line to its point
    assert [text.get_text() for text in axis.texts] == ["one", "two", "three", "far"]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert boxes[2].y0 > boxes[1].y0 > boxes[0].y0
    assert axis.texts[3].arrow_patch is None and axis.texts[2].arrow_patch is not None
