"""The torso phantoms: one anatomy under three scanners, and survival times whose hazard is known."""

from functools import cache

import numpy as np
import pytest
from phantom import prognosis, torso
from phantoms import main

from lib.data import load_dataset

SIZE = 32
NUMBER = 20


@cache
def volumes(modality: str) -> tuple:
    kind = f"torso_{modality.lower()}"
    return tuple(torso.regenerate(f"{kind}_{i:05d}", 0, SIZE) for i in range(1, NUMBER + 1))


@cache
def patients(number: int = 80, **options) -> tuple:
    return tuple(prognosis.regenerate(f"prognosis_{i:05d}", 0, SIZE, **options) for i in range(1, number + 1))


def level(modality: str, name: str) -> float:
    """Mean brightness of a structure over the volumes that hold it."""
    found = [v.image[v.masks[name]].mean() for v in volumes(modality) if v.masks[name].any()]
    return float(np.mean(found))


def concordance(days: np.ndarray, event: np.ndarray, risk: np.ndarray) -> float:
    """Harrell's C: share of the pairs known to be in order that the risk puts in order."""
    known = (days[:, None] < days[None, :]) & event[:, None]
    right = np.sign(risk[:, None] - risk[None, :]) / 2 + 0.5
    return float(right[known].mean())


# --- one anatomy, three scanners ---------------------------------------------------------------------------


def test_the_modalities_show_the_same_patients():
    for ct, mr, pet in zip(*map(volumes, torso.MODALITIES), strict=True):
        for name in torso.STRUCTURES:
            assert np.array_equal(ct.masks[name], mr.masks[name]) and np.array_equal(ct.masks[name], pet.masks[name])
        assert ct.traits == mr.traits == pet.traits
        assert not np.allclose(ct.image, mr.image, atol=0.2) and not np.allclose(mr.image, pet.image, atol=0.2)


def test_every_volume_is_in_range_with_masks_that_do_not_overlap():
    for modality in torso.MODALITIES:
        for v in volumes(modality):
            assert v.image.shape == (SIZE,) * 3 and v.image.dtype == np.float32
            assert v.image.min() >= 0 and v.image.max() <= 1
            assert list(v.masks) == list(torso.STRUCTURES) and v.spacing == (6.0, 6.0, 6.0)
            assert sum(mask.astype(int) for mask in v.masks.values()).max() == 1
            assert all(v.masks[name].sum() >= 12 for name in torso.STRUCTURES if name != "tumor")


def test_an_order_of_brightness_that_holds_in_one_modality_fails_in_another():
    for dark, bright in (("liver", "spleen"), ("liver", "right_kidney"), ("bladder", "aorta")):
        assert level("CT", dark) < level("CT", bright) and level("MR", dark) > level("MR", bright)
    assert level("CT", "bladder") < level("CT", "liver") and level("PET", "bladder") > level("PET", "liver")
    assert level("CT", "tumor") < level("CT", "liver") and level("PET", "tumor") > level("PET", "liver")
    assert level("CT", "aorta") > level("CT", "spleen") + 0.05 and level("MR", "aorta") < level("MR", "spleen") - 0.2


def test_the_kidneys_look_the_same_and_lie_on_their_sides():
    for modality in torso.MODALITIES:
        healthy = [v for v in volumes(modality) if v.traits["host"] in (None, "liver")]  # no tumor glows into them
        gaps = [v.image[v.masks["right_kidney"]].mean() - v.image[v.masks["left_kidney"]].mean() for v in healthy]
        assert abs(np.mean(gaps)) < 0.04
    right, left = (
        np.array([np.argwhere(v.masks[name]).mean(0) for v in volumes("CT")])
        for name in ("right_kidney", "left_kidney")
    )
    assert (right[:, 2] > left[:, 2] + 4).all()  # columns run to the patient's right, where the liver is
    assert np.array([np.argwhere(v.masks["liver"]).mean(0) for v in volumes("CT")])[:, 2].mean() > SIZE / 2
    assert abs((right - left)[:, :2]).mean() < 3


def test_tumors_grow_in_their_host_and_many_patients_have_none():
    with_tumor = [v for v in volumes("CT") if v.traits["host"]]
    assert 0.35 < len(with_tumor) / NUMBER < 0.85
    for v in volumes("CT"):
        assert v.masks["tumor"].any() == (v.traits["host"] is not None)
    for v in with_tumor:
        far = np.linalg.norm(np.argwhere(v.masks["tumor"]).mean(0) - np.argwhere(v.masks[v.traits["host"]]), axis=1)
        assert far.min() < 6 and v.masks["tumor"].sum() >= 8
    assert not torso.regenerate("torso_ct_00002", tumor_share=0.0).masks["tumor"].any()
    assert torso.regenerate("torso_ct_00001", tumor_share=1.0).masks["tumor"].any()


def test_the_framing_moves_the_organs_so_that_their_mean_place_is_a_poor_guess():
    masks = np.array([v.masks["spleen"] for v in volumes("CT")])
    guess = masks.mean(0) > 0.5 * masks.mean(0).max()
    scores = 2 * (masks & guess).sum((1, 2, 3)) / (masks.sum((1, 2, 3)) + guess.sum())
    assert 0.05 < scores.mean() < 0.6


# --- prompts -----------------------------------------------------------------------------------------------


def test_prompts_name_the_scan_and_the_structure():
    v = volumes("PET")[0]
    said = v.prompts["right_kidney"]
    assert said["context"] == "A positron emission tomography scan of the abdomen."
    assert said["target"] == "A positron emission tomography scan of a right kidney."
    assert said["target@released"] == "A positron emission tomography scan of a rightkidney."
    assert said["target@other"] == "A positron emission tomography scan of a left kidney."
    for v in volumes("PET"):
        for name, said in v.prompts.items():
            assert all(said[column] for column in torso.COLUMNS)
            assert v.masks["tumor"].any() or "tumor" not in said["target@other"]  # never what is absent
            assert said["target@other"] != said["target"], name


def test_a_record_reads_well_and_an_idle_one_has_its_form():
    said = {"age": 82, "sex": "man", "smoking": "former smoker", "grade": 2, "performance": 0}
    whole = "An 82-year-old man, former smoker, with a liver tumor of grade 2; performance status 0."
    assert prognosis.sentence(prognosis.WORDINGS[0], said) == whole
    assert len(prognosis.WORDINGS) == len(prognosis.IDLE_WORDINGS)
    for v in patients():
        liver, tumor = v.prompts["liver"], v.prompts["tumor"]
        assert liver["report"] == tumor["report"] and set(tumor) == set(prognosis.PROGNOSIS_PROMPTS)
        assert all(str(v.traits[name]).lower() in tumor["report"].lower() for name in prognosis.RECORD)
        idle = tumor["report@irrelevant"]
        assert not any(word in idle for word in ("smoker", "tumor", "year", "grade", "status"))
    assert len({v.prompts["tumor"]["report"].split()[0] for v in patients()}) >= 5


# --- survival ----------------------------------------------------------------------------------------------


def test_the_hazard_is_what_the_truth_columns_say():
    for v in patients():
        said, trait = v.prompts["tumor"], v.traits
        shown = prognosis.image_risk(trait["volume_ml"], trait["texture"])
        told = prognosis.record_risk(trait["age"], trait["grade"])
        assert float(said["attribute.image_risk"]) == pytest.approx(shown, abs=1e-3)
        assert float(said["attribute.record_risk"]) == pytest.approx(told, abs=1e-3)
        assert trait["volume_ml"] == pytest.approx(v.masks["tumor"].sum() * 6.0**3 / 1000)
        days, event = v.outcome
        assert isinstance(days, int) and days >= 1
        assert days == trait["days"] if event else days <= trait["days"]
    logs = np.log([v.traits["volume_ml"] for v in patients()])
    assert abs(logs.mean() - prognosis.LOG_ML[0]) < 0.25 and abs(logs.std() - prognosis.LOG_ML[1]) < 0.2


@pytest.mark.parametrize(
    "signal, alone, together",
    [
        ("both", (0.69, 0.69), 0.79),
        ("image", (0.74, 0.50), 0.74),
        ("record", (0.50, 0.74), 0.74),
        ("none", (0.5, 0.5), 0.5),
    ],
)
def test_image_and_record_alone_have_a_ceiling_that_both_together_exceed(signal, alone, together):
    rng, number = np.random.default_rng(1), 3000
    volume = np.exp(prognosis.LOG_ML[0] + prognosis.LOG_ML[1] * rng.uniform(-1, 1, number) * np.sqrt(3))
    image = prognosis.image_risk(volume, rng.uniform(size=number))
    record = prognosis.record_risk(
        rng.normal(*prognosis.YEARS, number), rng.choice(prognosis.GRADES, number, p=prognosis.GRADE_ODDS)
    )
    risk = image * (signal in ("both", "image")) + record * (signal in ("both", "record"))
    days = prognosis.survival(rng, risk)
    follow_up = prognosis.follow_up(signal, 0.4) * rng.uniform(size=number)
    event = days <= follow_up
    assert abs(event.mean() - 0.6) < 0.03
    for seen, last in ((np.ones(number, bool), days), (event, np.minimum(days, follow_up))):
        found = [concordance(last, seen, r) for r in (image, record, risk)]
        assert found == pytest.approx([*alone, together], abs=0.025)


def test_the_drawn_cohort_has_these_ceilings_too():
    cohort = patients()
    days, event = (np.array(column) for column in zip(*(v.outcome for v in cohort), strict=True))
    image, record = (
        np.array([float(v.prompts["tumor"][f"attribute.{name}"]) for v in cohort])
        for name in ("image_risk", "record_risk")
    )
    assert 0.27 < 1 - event.mean() < 0.53
    assert 0.58 < concordance(days, event, image) < 0.8 and 0.58 < concordance(days, event, record) < 0.8
    assert 0.73 < concordance(days, event, image + record) < 0.88
    assert abs(np.corrcoef(image, record)[0, 1]) < 0.25


def test_texture_can_be_seen_in_the_tumor():
    inside = [v.image[v.masks["tumor"]] for v in patients()]
    darkest = np.array([np.percentile(voxels, 20) for voxels in inside])
    assert np.corrcoef(darkest, [v.traits["texture"] for v in patients()])[0, 1] < -0.55


def test_signal_and_censoring_change_no_image_and_no_record():
    for plain, none in zip(patients(), patients(6, signal="none", censored=0.0), strict=False):
        assert np.array_equal(plain.image, none.image)
        assert none.prompts["tumor"]["report"] == plain.prompts["tumor"]["report"]
        assert none.prompts["tumor"]["attribute.image_risk"] == "0.0000" and none.outcome[1]


# --- folders, seeds, bad input -------------------------------------------------------------------------------


def test_folders_load_with_equal_patients_and_splits_and_are_the_same_every_time(tmp_path):
    splits, prints = [], []
    for kind, where in (("torso_ct", "a"), ("torso_ct", "b"), ("torso_pet", "a"), ("prognosis", "a")):
        folder = tmp_path / where / f"phantom_{kind}"
        assert main([kind, "--out", str(folder), "--n", "10", "--size", "24", "--seed", "2"]) == 0
        dataset = load_dataset(folder, verify=kind == "prognosis")
        prints.append(dataset.card.fingerprint)
        splits.append({case.patient_id: case.split for case in dataset.cases})
    assert prints[0] == prints[1] != prints[2]
    assert splits[0] == splits[2] == splits[3] and set(splits[0].values()) == {"train", "val", "test"}
    pet = load_dataset(tmp_path / "a" / "phantom_torso_pet")
    assert [case.target for case in pet.cases[:7]] == list(torso.STRUCTURES) and pet.cases[0].spacing == (8.0,) * 3
    assert all(case.outcome[0] >= 1 for case in dataset.cases) and dataset.cases[1].target == "tumor"


def test_a_volume_can_be_drawn_again_from_a_case_of_it():
    again = torso.regenerate("torso_mr_00003.liver", 0, SIZE)
    assert np.array_equal(again.image, volumes("MR")[2].image)
    assert not np.array_equal(torso.regenerate("torso_mr_00003", 1, SIZE).image, again.image)
    assert np.array_equal(prognosis.regenerate("prognosis_00002.tumor").image, patients()[1].image)
    for draw in (torso.regenerate, prognosis.regenerate):
        with pytest.raises(ValueError, match="Case id 'bus_00001' is not one of this phantom"):
            draw("bus_00001")


@pytest.mark.parametrize(
    "kind, options, said",
    [
        ("torso_ct", ["--tumor-share", "1.5"], "tumor_share is 1.5, expected a share between 0 and 1"),
        ("torso_mr", ["--size", "16"], "size is 16, expected at least 24 voxels"),
        ("torso_pet", ["--n", "9"], "n is 9, expected at least 10 images"),
        ("prognosis", ["--censored", "1"], "censored is 1.0, expected a share from 0 to 0.95"),
        ("prognosis", ["--splits", "0.5,0.5,0.5"], "expected three positive shares"),
    ],
)
def test_a_bad_parameter_gives_one_sentence_and_leaves_nothing(kind, options, said, tmp_path, capsys):
    assert main([kind, "--out", str(tmp_path / "x"), "--n", "10", *options]) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_unknown_signal_is_refused(tmp_path):
    with pytest.raises(ValueError, match="signal is 'text', expected a source of the hazard: use one of both, image"):
        prognosis.write_prognosis(tmp_path / "x", signal="text")
