"""Scores against hand-made masks, MONAI, and the properties their definitions promise."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.metrics import compute_dice, compute_surface_dice
from monai.metrics.calibration import calibration_binning
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn

from lib import evaluation
from lib.data import Batch
from lib.models import Prediction
from lib.text import Prompts

masks = arrays(bool, (7, 9))
pairs = st.tuples(masks, masks)
quick = settings(max_examples=60, deadline=None)


def disc(row, column, radius, side=32):
    rows, columns = np.mgrid[:side, :side]
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


def overlap(truth, prediction):
    return {name: score[0] for name, score in evaluation.overlap_scores(truth[None], prediction[None]).items()}


# --- Overlap


@quick
@given(pairs)
def test_dsc_is_symmetric_and_fixes_iou(pair):
    forth, back = overlap(*pair), overlap(*reversed(pair))
    assert forth["dsc"] == back["dsc"]
    assert forth["iou"] == pytest.approx(forth["dsc"] / (2 - forth["dsc"]))
    assert forth["area_true"] == back["area_pred"] == pair[0].sum()


@quick
@given(pairs)
def test_dsc_agrees_with_monai(pair):
    assume(pair[0].any())
    truth, prediction = (torch.from_numpy(mask)[None, None].float() for mask in pair)
    assert overlap(*pair)["dsc"] == pytest.approx(compute_dice(prediction, truth).item(), abs=1e-6)


def test_pixel_rates_of_a_counted_example():
    truth, prediction = np.zeros((2, 5), bool), np.zeros((2, 5), bool)
    truth[0, :4] = True
    prediction[0, 1:5] = prediction[1, 0] = True
    scores = overlap(truth, prediction)  # TP 3, FP 2, FN 1, TN 4
    assert (scores["fpr"], scores["fnr"], scores["precision"]) == (2 / 6, 1 / 4, 3 / 5)
    assert (scores["dsc"], scores["iou"]) == (6 / 9, 3 / 6)


def test_xbusnet_scores_of_a_counted_example():
    truth, prediction = np.zeros((1, 2, 5), bool), np.zeros((1, 2, 5))
    truth[0, 0, :4] = True
    prediction[0, 0, 1:5] = prediction[0, 1, 0] = 1.0
    scores = evaluation.xbusnet_scores(prediction, truth)
    assert scores["dice"][0] == pytest.approx((6 / 9 + 8 / 11) / 2)
    assert scores["fpr"][0] == pytest.approx((2 / 8 + 1 / 7) / 2)  # a/(3a+2b) and b/(3b+2a) for a = 2, b = 1
    assert scores["fnr"][0] == pytest.approx((1 / 4 + 2 / 6) / 2)


@quick
@given(pairs)
def test_xbusnet_fpr_says_only_whether_an_image_is_perfect(pair):
    truth, prediction = pair
    fpr = evaluation.xbusnet_scores(prediction[None].astype(float), truth[None])["fpr"][0]
    if (truth == prediction).all():
        assert fpr == 0
    else:
        assert 1 / 6 - 1e-9 <= fpr <= 1 / 5 + 1e-9


@quick
@given(arrays(np.int8, (4, 5), elements=st.integers(0, 3)), arrays(np.int8, (4, 5), elements=st.integers(0, 3)))
def test_ignored_voxels_change_no_region_metric(truth, prediction):
    noise = np.where(truth == 3, 1, prediction)
    table, other = (evaluation.region_metrics(truth, p, [1, (1, 2)], ignore_label=3) for p in (prediction, noise))
    pd.testing.assert_frame_equal(table, other)
    assert (table[["TP", "FP", "FN", "TN"]].sum(axis=1) == (truth != 3).sum()).all()


# --- Surfaces


def test_two_squares_three_pixels_apart():
    truth, prediction = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    truth[5:10, 5:10] = prediction[5:10, 8:13] = True
    pair = evaluation.surface_distances(truth, prediction, (1.0, 2.0))
    assert pair[0].size.sum() == pytest.approx(2 * 4 * 1.0 + 2 * 4 * 2.0 + 4 * 0.5 * 5**0.5)  # sides and cut corners
    assert evaluation.hausdorff(*pair, 100) == 6.0  # three columns of 2 mm
    assert evaluation.surface_dice(*pair, 6.0) == 1.0
    assert evaluation.surface_dice(*pair, 5.9) < 1.0


@quick
@given(pairs, st.floats(0.3, 3.0), st.floats(0.3, 3.0), st.floats(0.0, 4.0))
def test_surface_dice_agrees_with_monai(pair, height, width, tolerance):
    assume(pair[0].any() and pair[1].any())
    truth, prediction = (torch.from_numpy(mask)[None, None].float() for mask in pair)
    spacing = [height, width]
    surfaces = evaluation.surface_distances(*pair, spacing)
    # A distance that equals the tolerance up to rounding may fall on either side of it.
    assume(all((np.abs(surface.distance - tolerance) > 1e-5).all() for surface in surfaces))
    expected = compute_surface_dice(prediction, truth, [tolerance], True, spacing=spacing, use_subvoxels=True)
    assert evaluation.surface_dice(*surfaces, tolerance) == pytest.approx(expected.item(), abs=1e-5)


@quick
@given(pairs)
def test_surface_scores_are_symmetric_and_perfect_together(pair):
    assume(pair[0].any() and pair[1].any())
    forth, back = evaluation.surface_distances(*pair, (1, 1)), evaluation.surface_distances(*reversed(pair), (1, 1))
    assert evaluation.hausdorff(*forth) == evaluation.hausdorff(*back)
    assert (evaluation.hausdorff(*forth, 100) == 0) == (evaluation.surface_dice(*forth, 0.0) == 1)
    itself = evaluation.surface_distances(pair[0], pair[0], (1, 1))
    assert evaluation.surface_dice(*itself, 0.0) == 1


def test_a_shift_in_3d_is_measured_in_mm():
    truth, prediction = np.zeros((8, 8, 12), bool), np.zeros((8, 8, 12), bool)
    truth[2:5, 2:5, 2:5] = prediction[2:5, 2:5, 4:7] = True
    assert evaluation.hausdorff(*evaluation.surface_distances(truth, prediction, (1.0, 1.0, 2.5)), 100) == 5.0


def test_masks_of_two_shapes_are_refused():
    with pytest.raises(ValueError, match=r"one shape .* \(4, 4\) and \(4, 5\) with 2 spacings"):
        evaluation.surface_distances(np.ones((4, 4)), np.ones((4, 5)), (1, 1))


# --- Calibration


@quick
@given(arrays(np.int16, (3, 8, 8), elements=st.integers(0, 149)), arrays(bool, (3, 8, 8)))
def test_calibration_error_agrees_with_monai(level, mask):
    probability = (level + 0.5) / 150  # never on the edge of a bin, which MONAI rounds differently
    inputs = (torch.from_numpy(x)[:, None].float() for x in (probability, mask))
    predicted, observed, count = calibration_binning(*inputs, num_bins=15)
    expected = (torch.nan_to_num((predicted - observed).abs()) * count).sum(-1)[:, 0] / 64
    np.testing.assert_allclose(evaluation.calibration_error(probability, mask), expected, atol=1e-5)


def test_calibration_in_a_region_sees_only_that_region():
    mask = disc(16, 16, 8)
    band = evaluation.boundary_band(mask, 2.0, (1, 1))
    probability = np.where(band, 0.5, mask)[None]
    assert evaluation.calibration_error(probability, mask[None], ~band[None])[0] == 0
    inside = evaluation.calibration_error(probability, mask[None], band[None])[0]
    assert inside == pytest.approx(abs(0.5 - mask[band].mean()))
    assert np.isnan(evaluation.calibration_error(probability, mask[None], np.zeros_like(band)[None])[0])


def test_the_boundary_band_follows_the_spacing():
    mask = np.zeros((12, 12), bool)
    mask[:, 6:] = True
    assert evaluation.boundary_band(mask, 2.0, (1, 1)).any(0).nonzero()[0].tolist() == [4, 5, 6, 7]
    assert evaluation.boundary_band(mask, 2.0, (1, 2)).any(0).nonzero()[0].tolist() == [5, 6]
    assert not evaluation.boundary_band(np.ones((4, 4)), 2.0, (1, 1)).any()


# --- A model on a feed


class Repeat(nn.Module):
    """Gives back its input as logits."""

    def __init__(self):
        super().__init__()
        self.modes = []

    def forward(self, image, prompts):
        self.modes.append(self.training)
        return Prediction(image, {})


class StoredFeed:
    """A feed over given logits and masks, as lib.data.Feed looks to evaluate."""

    def __init__(self, logits, masks, spacing=(1.0, 1.0)):
        self.logits, self.masks = (torch.from_numpy(np.stack(x)[:, None].astype(np.float32)) for x in (logits, masks))
        cases = tuple(SimpleNamespace(dataset="toy", case_id=f"c{i}", patient_id=f"p{i}") for i in range(len(masks)))
        rows = torch.arange(len(masks))[:, None]
        self.cache = SimpleNamespace(cases=cases, rows=rows, spacing=torch.tensor([spacing] * len(masks)))

    def __len__(self):
        return len(self.masks)

    def batch(self, index):
        prompts = SimpleNamespace(to=lambda device: None)
        return Batch(self.logits[index], self.masks[index], prompts, index, torch.full((len(index), 2), torch.nan))


def logit(mask, size=6.0):
    return np.where(mask, size, -size)


def test_a_row_per_case_and_threshold_whatever_the_batch():
    truths = [disc(16, 16, 6), disc(10, 20, 5), disc(16, 12, 7)]
    feed = StoredFeed([logit(disc(16, 17, 6)), logit(disc(10, 20, 5)), logit(disc(12, 12, 7), 1.0)], truths)
    model = Repeat().train()
    table = evaluation.evaluate(model, feed, thresholds=(0.5, 0.8), batch=2)
    assert model.training and not any(model.modes)
    assert sorted(zip(table["case_id"], table["threshold"], strict=True)) == [
        (f"c{i}", threshold) for i in range(3) for threshold in (0.5, 0.8)
    ]
    first = table[table["threshold"] == 0.5].set_index("case_id")
    assert first.loc["c1", ["dsc", "iou", "nsd", "hd95", "xbusnet_fpr"]].tolist() == [1, 1, 1, 0, 0]
    pair = evaluation.surface_distances(truths[0], disc(16, 17, 6), (1, 1))
    assert first.loc["c0", "nsd"] == evaluation.surface_dice(*pair, 2.0)
    assert first.loc["c0", "hd95"] == evaluation.hausdorff(*pair)
    other = table[table["threshold"] == 0.8].set_index("case_id")
    assert other["nsd"].isna().all() and other.loc["c2", "area_pred"] == 0  # sigmoid(1) = 0.73
    alone = evaluation.evaluate(model, feed, thresholds=(0.5, 0.8), batch=1)
    index = ["case_id", "threshold"]
    pd.testing.assert_frame_equal(
        *(t.drop(columns="seconds").sort_values(index, ignore_index=True) for t in (table, alone))
    )


def test_brier_and_calibration_of_a_hedging_model():
    truth = np.zeros((8, 8), bool)
    truth[:2] = True
    row = evaluation.evaluate(Repeat(), StoredFeed([np.zeros((8, 8))], [truth])).loc[0]
    assert row["brier"] == 0.25
    assert row["ece"] == pytest.approx(0.25)  # says one half, a quarter is foreground
    assert row["area_pred"] == 0  # exactly at the threshold is background


def test_empty_masks_follow_the_stated_rule():
    full, empty = disc(16, 16, 6), np.zeros((32, 32), bool)
    feed = StoredFeed([logit(x) for x in (empty, full, empty)], [empty, empty, full], spacing=(0.5, 0.5))
    table = evaluation.evaluate(Repeat(), feed)
    assert table[["dsc", "iou", "nsd", "precision"]].to_numpy().tolist() == [[1] * 4, [0] * 4, [0] * 4]
    assert table["hd95"].tolist() == pytest.approx([0, 16 * 2**0.5, 16 * 2**0.5])
    assert table["fnr"].isna().tolist() == [True, True, False]
    assert table["fpr"].notna().all()


def test_distances_are_in_mm():
    feed = [StoredFeed([logit(disc(16, 20, 6))], [disc(16, 16, 6)], spacing) for spacing in ((1.0, 1.0), (1.0, 0.25))]
    near, far = (evaluation.evaluate(Repeat(), f, tolerance=1.0).loc[0, "nsd"] for f in reversed(feed))
    assert near == 1 > far


def test_nan_logits_name_the_case():
    broken = logit(disc(16, 16, 6))
    broken[0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN logits for case c1"):
        evaluation.evaluate(Repeat(), StoredFeed([logit(disc(16, 16, 6)), broken], [disc(16, 16, 6)] * 2))


def test_logits_of_another_size_are_refused():
    feed = StoredFeed([np.zeros((16, 16))], [disc(16, 16, 6)])
    with pytest.raises(ValueError, match=r"logits of shape \(1, 1, 16, 16\) for masks of shape \(1, 1, 32, 32\)"):
        evaluation.evaluate(Repeat(), feed)


# --- uncertainty


def test_doubt_at_the_errors_is_rewarded_and_doubt_elsewhere_is_not():
    truth = disc(16, 16, 6)
    wrong = np.zeros_like(truth)
    wrong[:2] = True
    sure, unsure = 0.98, 0.6
    predicted = truth ^ wrong

    def probability(doubtful):
        certainty = np.where(doubtful, unsure, sure)
        return np.where(predicted, certainty, 1 - certainty)

    honest, blind = probability(wrong), probability(np.roll(wrong, 8, axis=0))
    scores = evaluation.uncertainty_scores(np.stack([honest, blind, truth * 0.9]), np.stack([truth] * 3))
    assert scores["error_auroc"][0] == 1 and scores["error_auroc"][1] < 0.5 and np.isnan(scores["error_auroc"][2])
    assert scores["aurc"][0] < scores["aurc"][1] and scores["aurc"][2] == 0
    assert scores["risk_0.9"][0] == 0 < scores["risk_0.9"][1]
    assert scores["confidence"][2] == pytest.approx(0.9)


def test_risk_at_full_coverage_is_the_error_rate_whatever_the_order():
    wrong = np.array([True, False, False, True])
    for doubt in ([0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.5] * 4):
        assert evaluation.DoubtCurve.of(wrong, np.array(doubt)).risk()[-1] == 0.5
    assert evaluation.DoubtCurve.of(wrong, np.full(4, 0.5)).risk().tolist() == [0.5] * 4  # ties share their risk


@given(arrays(bool, 30), arrays(np.int64, 30, elements=st.integers(0, 6)))
@settings(deadline=None, max_examples=60)
def test_error_detection_agrees_with_scikit_learn(wrong, doubt):
    curve = evaluation.DoubtCurve.of(wrong, doubt)
    if wrong.all() or not wrong.any():
        assert np.isnan(curve.auroc()) and np.isnan(curve.auprc())
    else:
        assert curve.auroc() == pytest.approx(roc_auc_score(wrong, doubt))
        assert curve.auprc() == pytest.approx(average_precision_score(wrong, doubt))


def test_entropy_is_symmetric_and_peaks_at_one_half():
    entropy = evaluation.binary_entropy(np.array([0, 0.1, 0.5, 0.9, 1]))
    assert entropy[0] == entropy[4] == 0 and entropy[1] == pytest.approx(entropy[3]) and entropy.argmax() == 2


@given(st.integers(0, 2**31 - 1))
@settings(deadline=None, max_examples=20)
def test_a_calibrated_forecast_has_a_small_adaptive_error(seed):
    rng = np.random.default_rng(seed)
    probability = rng.uniform(size=(1, 60, 60))
    mask = rng.uniform(size=probability.shape) < probability
    assert evaluation.adaptive_calibration_error(probability, mask)[0] < 0.08
    assert evaluation.adaptive_calibration_error(probability, ~mask)[0] > 0.3


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_temperature_undoes_over_and_underconfidence(factor):
    rng = np.random.default_rng(0)
    honest = rng.normal(size=(4, 48, 48))
    truths = list(rng.uniform(size=honest.shape) < 1 / (1 + np.exp(-honest)))
    feed = StoredFeed(list(factor * honest), truths)
    assert evaluation.fit_temperature(Repeat(), feed) == pytest.approx(factor, rel=0.15)
    plain, tempered = (evaluation.evaluate(Repeat(), feed, temperature=t, uncertainty=True) for t in (1, factor))
    assert tempered["ece"].mean() < plain["ece"].mean() and (tempered["dsc"] == plain["dsc"]).all()
    assert set(evaluation.UNCERTAINTY_COLUMNS) <= set(plain.columns)


def test_the_boundary_band_is_never_thinner_than_a_pixel():
    feed = StoredFeed([logit(disc(16, 20, 6))], [disc(16, 16, 6)], spacing=(5.0, 5.0))
    assert evaluation.evaluate(Repeat(), feed, tolerance=2.0)["ece_band"].notna().all()


def test_a_model_that_draws_its_prompts_is_asked_with_them_and_the_same_ones_each_time():
    class Drawing(Repeat):
        def draw(self, mask, generator):
            place = torch.rand(len(mask), generator=generator)
            return SimpleNamespace(to=lambda device: (mask, place))

        def forward(self, image, prompts):
            self.modes.append(prompts[1].tolist())
            return Prediction(12 * prompts[0] - 6, {})

    truths = [disc(16, 16, 6), disc(10, 20, 5), disc(16, 12, 7)]
    model, feed = Drawing(), StoredFeed([np.zeros((32, 32))] * 3, truths)
    assert all(evaluation.evaluate(model, feed, batch=2)["dsc"].tolist() == [1, 1, 1] for _ in range(2))
    assert len(model.modes) == 4 and model.modes[:2] == model.modes[2:]


# --- Saliency


@given(arrays(np.int8, (3, 5, 6), elements=st.integers(0, 4)), arrays(bool, (3, 5, 6)))
@quick
def test_saliency_scores_agree_with_scikit_learn_and_with_pointing_at_random(level, mask):
    scores = evaluation.saliency_scores(level / 4, mask)
    for image, truth, auroc, pointing in zip(level, mask, scores["auroc"], scores["pointing"], strict=True):
        if truth.all() or not truth.any():
            assert np.isnan(auroc)
        else:
            assert auroc == pytest.approx(roc_auc_score(truth.ravel(), image.ravel()))
        hits = [truth[place] for place in np.ndindex(image.shape) if image[place] == image.max()]
        assert pointing == pytest.approx(sum(hits) / len(hits))


def test_the_slab_of_the_released_evaluation_hides_a_shift_that_the_outline_shows():
    radius = 29.99  # of 30, without the four pixels that only touch it, which raise the outline's to .213
    truth, prediction = disc(64, 60, radius, side=128), disc(64, 68, radius, side=128)
    outline = evaluation.surface_dice(*evaluation.surface_distances(truth, prediction, (1, 1)), 2.0)
    scores = (overlap(truth, prediction)["dsc"], evaluation.slab_surface_dice(truth, prediction), outline)
    assert scores == pytest.approx((0.832, 0.893, 0.208), abs=5e-4)


def test_empty_slabs_follow_the_stated_rule():
    full, empty = disc(16, 16, 6), np.zeros((32, 32), bool)
    pairs = ((empty, empty), (empty, full), (full, empty), (full, full))
    assert [evaluation.slab_surface_dice(*pair) for pair in pairs] == [1, 0, 0, 1]


def test_maps_and_slabs_have_a_column_where_they_are_asked_for():
    truth = disc(16, 16, 6)
    feed = StoredFeed([logit(truth), logit(disc(16, 20, 6))], [truth] * 2)
    plain, asked = (evaluation.evaluate(Repeat(), feed, saliency=more, slab=more) for more in (False, True))
    assert set(asked.columns) - set(plain.columns) == {"auroc", "pointing", "nsd_slab"}
    assert asked.loc[0, ["auroc", "pointing", "nsd_slab"]].tolist() == [1, 1, 1]
    assert asked.loc[1, "auroc"] < 1 and asked.loc[1, "pointing"] == overlap(truth, disc(16, 20, 6))["precision"]


# --- Retrieval


class Towers(nn.Module):
    """Gives back stored features."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def encode_image(self, image):
        return image.flatten(1)

    def encode_text(self, prompts):
        return prompts.pooled["local"], prompts.present["local"]


class PairFeed:
    """A feed over given features of images and of their sentences, [N, D] each."""

    def __init__(self, image, text):
        self.image, self.text = image[..., None, None], text
        cases = tuple(SimpleNamespace(dataset="toy", case_id=f"c{i}", patient_id=f"p{i}") for i in range(len(image)))
        self.cache = SimpleNamespace(cases=cases)

    def __len__(self):
        return len(self.text)

    def batch(self, index):
        prompts = Prompts({"local": self.text[index]}, {"local": torch.ones(len(index), dtype=torch.bool)})
        mask, unknown = torch.zeros(len(index), 1, 1, 1), torch.full((len(index), 2), torch.nan)
        return Batch(self.image[index], mask, prompts, index, unknown)


TOPS = ["top1_i2t", "top1_t2i", "top2_i2t", "top2_t2i"]


def features(number, dim=64, seed=0):
    return torch.randn(number, dim, generator=torch.Generator().manual_seed(seed))


def test_perfect_towers_find_every_partner_whatever_the_length_of_their_features():
    text = features(70)
    table = evaluation.retrieval(Towers(), PairFeed(3 * text, text), 10)
    assert table["case_id"].tolist() == [f"c{i}" for i in range(70)] and (table[TOPS] == 1).all(axis=None)
    wrapped = nn.Module()
    wrapped.towers = Towers()
    pd.testing.assert_frame_equal(evaluation.retrieval(wrapped, PairFeed(3 * text, text), 10), table)


def test_random_towers_find_one_partner_in_a_group():
    table = evaluation.retrieval(Towers(), PairFeed(features(400, seed=1), features(400, seed=2)), 10)
    assert table[TOPS].mean().tolist() == pytest.approx([0.1, 0.1, 0.2, 0.2], abs=0.04)


def test_the_two_directions_are_not_mixed_up():
    # Both images look at sentence 0: its image is found by it, image 1 finds another's sentence.
    feed = PairFeed(torch.tensor([[1.0, 0.0], [0.9, 0.1]]), torch.eye(2))
    table = evaluation.retrieval(Towers(), feed, 2).set_index("case_id")
    assert table["top1_i2t"].tolist() == [1, 0] and table["top1_t2i"].tolist() == [1, 1]
    assert (table[TOPS[2:]] == 1).all(axis=None)


def test_images_that_share_their_sentence_are_no_rivals():
    text = features(8)
    text[4:] = text[:4]
    image = text.clone()
    image[4:] += 0.5 * features(8)[4:]  # further from the sentence than the first image that has it
    table = evaluation.retrieval(Towers(), PairFeed(image, text), 8)
    assert (table[TOPS] == 1).all(axis=None)
    alike = PairFeed(features(8), torch.ones(8, 64))
    assert (evaluation.retrieval(Towers(), alike, 8)[TOPS] == 1).all(axis=None)


def test_left_over_cases_join_no_group():
    text = features(7)
    once = evaluation.retrieval(Towers(), PairFeed(text, text), 5, shuffles=1)
    assert len(once) == 5 and once["case_id"].is_unique and once[TOPS].notna().all(axis=None)
    other = evaluation.retrieval(Towers(), PairFeed(text, text), 5, shuffles=1, seed=1)
    assert set(once["case_id"]) != set(other["case_id"])
    assert len(evaluation.retrieval(Towers(), PairFeed(text, text), 5, shuffles=20)) == 7


@pytest.mark.parametrize(("cases", "pairs"), [(4, 5), (4, 1)])
def test_too_few_cases_or_pairs_are_refused(cases, pairs):
    feed = PairFeed(features(cases), features(cases))
    with pytest.raises(ValueError, match=f"Retrieval among {pairs} pairs needs 2 or more, and {cases} cases"):
        evaluation.retrieval(Towers(), feed, pairs)
