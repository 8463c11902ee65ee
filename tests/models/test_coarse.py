"""From saliency to masks, boxes and points: counted examples, properties, and what cannot be cleaned up."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lib.models import coarse
from lib.models.coarse import METHODS, boxes, coarse_mask, keep_confident, keep_largest, points


def picture(*rows):
    """Rows of digits as a map from 0 to .9."""
    return np.array([[int(digit) / 10 for digit in row] for row in rows])


@pytest.fixture
def two_blobs():
    """A large blob of middling saliency and a small bright one, on a dim ground."""
    saliency = np.full((64, 128), 0.1)
    saliency[5:25, 5:25], saliency[30:34, 40:46] = 0.7, 0.9
    return saliency


def test_the_released_rules_keep_the_largest_and_the_paper_the_brightest(two_blobs):
    for method, kept in (("two_means", 0.7), ("threshold", 0.7), ("otsu", 0.9)):
        assert np.array_equal(coarse_mask(two_blobs, method), two_blobs == kept)
        assert np.array_equal(coarse_mask(two_blobs, method, components=2), two_blobs > 0.5)
        assert np.array_equal(coarse_mask(two_blobs, method, components=None), two_blobs > 0.5)


@settings(max_examples=30, deadline=None)
@given(arrays("uint8", (8, 16), elements=st.integers(0, 255)).filter(lambda x: x.min() < x.max()))
def test_any_map_that_is_not_flat_gives_a_part_of_it(values):
    for method in ("otsu", "two_means"):
        mask = coarse_mask(values / 255, method)
        assert mask.shape == values.shape and mask.dtype == bool and mask.any() and not mask.all()
        assert values[mask].min() > values.min()


def test_two_means_returns_its_centroids_and_looks_at_256_pixels_a_side(two_blobs):
    mask, centroids = coarse.two_means(two_blobs)
    bright = two_blobs > 0.5
    assert centroids == pytest.approx([0.1, two_blobs[bright].mean()], abs=0.01) and np.array_equal(mask, bright)
    line = np.zeros((512, 512))
    line[1] = 1  # between two samples
    with pytest.raises(ValueError, match="map is 0 everywhere"):
        coarse.two_means(line)
    step = np.repeat([[0.0, 1.0]], [21, 19], axis=1).repeat(40, axis=0)
    assert coarse.two_means(step)[0][0].tolist() == [False] * 22 + [True] * 18  # 40 does not divide 256: as released


def test_components_touch_at_corners_and_ties_are_kept():
    mask = picture("1000011", "0100000", "0000000", "1100001") > 0
    assert keep_largest(mask).tolist() == mask.tolist()[:-1] + [[True, True, *[False] * 5]]
    assert np.array_equal(keep_largest(mask, 9), mask)
    assert np.array_equal(keep_largest(255 * mask.astype(np.uint8)), keep_largest(mask))
    assert not keep_largest(np.zeros((3, 3), bool)).any()


def test_confidence_is_the_mean_saliency_of_a_component():
    saliency = picture("990000", "240003", "000000", "070000")
    first, second = saliency == 0.7, (saliency > 0) & (np.arange(6) < 2)  # .7, (.9 + .9 + .2 + .4) / 4 and .3
    assert np.array_equal(keep_confident(saliency > 0, saliency), first)
    assert np.array_equal(keep_confident(saliency > 0, saliency, 2), second)


def test_a_box_ends_one_past_its_pixels_but_stays_inside():
    mask = picture("000000", "011000", "010001", "000011") > 0
    assert boxes(mask).tolist() == [[1, 1, 5, 3]]
    assert boxes(mask, union=False).tolist() == [[1, 1, 3, 3], [4, 2, 5, 3]]


def test_a_component_in_a_hole_has_no_box_of_its_own():
    mask = picture("11111", "10001", "10101", "10001", "11111") > 0
    assert boxes(mask, union=False).tolist() == [[0, 0, 4, 4]]


def test_points_lie_inside_then_outside_and_never_twice(two_blobs):
    mask = two_blobs == 0.9
    drawn = points(mask, positive=10, negative=5, seed=3)
    x, y = drawn.T
    assert drawn.shape == (15, 2) and len(np.unique(drawn, axis=0)) == 15
    assert mask[y, x].tolist() == [True] * 10 + [False] * 5
    assert np.array_equal(drawn, points(mask, 10, 5, seed=3)) and not np.array_equal(drawn, points(mask, 10, 5, seed=4))
    assert len(points(mask, positive=100)) == mask.sum() and len(points(np.ones((2, 3)), 4, 4)) == 4


# ---- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("saliency", "sentence"),
    [
        (np.full((4, 4), 0.5), "map is 0.5 everywhere, which marks nothing: count the case as not found"),
        (np.array([[0, np.nan], [1, 0]]), r"shape \(2, 2\) is not a finite \[H, W\] map from 0 to 1: divide 8-bit"),
        (np.array([[0, 255], [1, 0]]), "not a finite"),
        (np.array([0.0, 1.0]), r"shape \(2,\) is not a finite \[H, W\] map"),
    ],
)
def test_a_map_that_marks_nothing_is_one_sentence(saliency, sentence, method):
    with pytest.raises(ValueError, match=sentence):
        coarse_mask(saliency, method)


def test_nothing_left_is_one_sentence(two_blobs):
    with pytest.raises(
        ValueError, match=r"No component .* left after threshold, its largest value being 0\.18: stretch"
    ):
        coarse_mask(two_blobs / 5, "threshold")
    with pytest.raises(ValueError, match="To keep 0 components leaves nothing: keep 1 or more"):
        coarse_mask(two_blobs, components=0)
    with pytest.raises(ValueError, match="no clean-up 'crf' of saliency maps: use one of otsu, two_means, threshold"):
        coarse_mask(two_blobs, "crf")


@pytest.mark.parametrize(("draw", "prompt"), [(boxes, "box"), (points, "point")])
def test_an_empty_mask_has_no_prompts(draw, prompt):
    with pytest.raises(
        ValueError, match=f"mask is empty, so there is no {prompt} to draw: count the case as not found"
    ):
        draw(np.zeros((4, 4), bool))
