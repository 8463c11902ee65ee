"""The lesion phantom: every attribute can be seen, unseen diseases are new combinations of values that are met."""

from collections import Counter
from functools import cache
from itertools import combinations

import numpy as np
import pytest
from phantom import lesions
from phantom.lesions import CALCIFIED, CLOSE, CONTRAST, DISEASES, HYPER, HYPO, ISO, ROUND, SEEN, SHARP, UNEVEN, WALLED
from phantoms import main
from scipy.ndimage import binary_dilation, distance_transform_edt, laplace

from lib.attributes import ATTRIBUTES, parse, prompts
from lib.data import load_dataset

SIZE = 32


@cache
def volumes(kind: str = "lesions_ct", weighting: str = "T1", number: int = 60) -> tuple:
    return tuple(
        lesions.regenerate(f"{kind}_{i:05d}", 0, SIZE, split="test" if i % 2 else "train", weighting=weighting)
        for i in range(1, number + 1)
    )


def measured(volume, lesion) -> dict[str, float]:
    """Simple quantities of a lesion from the image, its mask and the organs' masks."""
    image, mask, anatomy = volume.image, lesion.mask, volume.traits["anatomy"]
    inside, outside = distance_transform_edt(mask), distance_transform_edt(~mask)
    near = np.any([other.relative < 1.45 for other in anatomy.lesions], axis=0) | binary_dilation(anatomy.vessels)
    host = anatomy.organs[lesion.host] & ~near
    others = np.any([organ for name, organ in anatomy.organs.items() if name != lesion.host], axis=0)
    core = image[inside >= min(2, 0.6 * inside.max())]
    spread = np.linalg.eigvalsh(np.cov(np.argwhere(mask).T))
    voxels = image[inside > 1]  # without the margin
    return {
        "density": np.median(core) - np.median(image[host]),
        "variation": np.subtract(*np.percentile(voxels, (70, 30))),
        "shape": spread[0] / spread[2],
        "surface": np.abs(laplace(image))[(inside > 0) & (inside < 2) | (outside > 0) & (outside < 2)].mean(),
        "relation": (binary_dilation(mask) & others).sum() / mask.sum(),
        "bright": voxels.max() - np.percentile(voxels, 75),
        "dark": np.percentile(voxels, 25) - voxels.min(),
        "wall": image[(inside > 0) & (inside <= 1.5)].mean() - np.median(image[inside >= min(2.2, inside.max())]),
        "enhancement": image[anatomy.vessels].mean() - image[host].mean() if anatomy.vessels.any() else np.nan,
    }


@cache
def table(kind: str = "lesions_ct", weighting: str = "T1") -> tuple:
    return tuple(
        (lesion, measured(volume, lesion))
        for volume in volumes(kind, weighting)
        for lesion in volume.traits["anatomy"].lesions
    )


def auc(rows: tuple, quantity: str, attribute: str, high: str, low: str | None = None) -> float:
    """Chance that a lesion with the value `high` measures more than one with `low`, or with any other."""
    groups = [[], []]
    for lesion, found in rows:
        value = getattr(lesion.attributes, attribute)
        if np.isfinite(found[quantity]) and (low is None or value in (high, low)):
            groups[value == high].append(found[quantity])
    less, more = map(np.array, groups)
    assert min(len(less), len(more)) >= 10
    return float((more[:, None] > less).mean() + (more[:, None] == less).mean() / 2)


# --- what can be seen --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, weighting", [("lesions_ct", "T1"), ("lesions_mr", "T1"), ("lesions_mr", "T2")])
def test_every_attribute_can_be_seen(kind, weighting):
    rows, inverted = table(kind, weighting), weighting == "T2"
    order = (HYPO, ISO, HYPER)[:: -1 if inverted else 1]  # fluid is bright there
    assert auc(rows, "density", "density", order[1], order[0]) > 0.9
    assert auc(rows, "density", "density", order[2], order[1]) > 0.9
    assert auc(rows, "shape", "shape", ROUND) > 0.95
    assert auc(rows, "variation", "variation", UNEVEN) > 0.8
    assert auc(rows, "surface", "surface", SHARP) > 0.8
    assert auc(rows, "relation", "relation", CLOSE) > 0.95
    assert auc(rows, "enhancement", "enhancement", CONTRAST) > 0.8
    assert auc(rows, "bright" if kind == "lesions_ct" else "dark", "features", CALCIFIED) > 0.8
    wall = auc(rows, "wall", "features", WALLED)
    assert (1 - wall if inverted else wall) > 0.8


def test_a_lesion_lies_where_and_as_its_attributes_say():
    for lesion, found in table():
        organ, low, high = lesions.SITES[lesion.attributes.location]
        assert organ == lesion.host and lesion.attributes.location in DISEASES[lesion.disease].places
        column = (np.argwhere(lesion.mask).mean(0)[2] + 0.5) / SIZE
        assert low - 0.15 < column < high + 0.15
        assert (lesion.touched is not None) == (lesion.attributes.relation == CLOSE)
        assert (found["relation"] > 0.05) == (lesion.attributes.relation == CLOSE)
    left, right = (
        [np.argwhere(lesion.mask).mean(0)[2] for lesion, _ in table() if lesion.attributes.location.startswith(side)]
        for side in ("left", "right")
    )
    assert max(left) < SIZE / 2 + 2 < min(right) + 4


def test_lesions_are_large_enough_and_do_not_touch_one_another():
    sizes = [lesion.mask.sum() for lesion, _ in table()]
    assert np.percentile(sizes, 5) > 75 and np.median(sizes) > 180 and max(sizes) < 800
    for volume in volumes():
        assert volume.image.shape == (SIZE,) * 3 and volume.image.min() >= 0 and volume.image.max() <= 1
        masks = [lesion.mask for lesion in volume.traits["anatomy"].lesions]
        assert len(masks) <= lesions.MOST
        for one, other in combinations(masks, 2):
            assert not (binary_dilation(one) & other).any()


def test_ct_and_mr_show_the_same_lesions_in_another_contrast():
    for ct, mr in zip(volumes(), volumes("lesions_mr", "T2"), strict=True):
        for name in DISEASES:
            assert np.array_equal(ct.masks[name], mr.masks[name])
            assert ct.prompts[name]["attribute.density"] == mr.prompts[name]["attribute.density"]
        assert not np.allclose(ct.image, mr.image, atol=0.2)
    organs = [
        {name: np.median(v.image[m]) for name, m in v.traits["anatomy"].organs.items()}
        for v in (volumes()[0], volumes("lesions_mr", "T1")[0])
    ]
    assert sorted(organs[0], key=organs[0].get) != sorted(organs[1], key=organs[1].get)


# --- diseases ----------------------------------------------------------------------------------------------


def test_unseen_diseases_are_new_combinations_of_seen_values():
    assert len(SEEN) == 8 and len(lesions.UNSEEN) == 4
    for one, other in combinations(DISEASES.values(), 2):
        assert lesions.apart(one, other) >= 2
    met = {name: {getattr(DISEASES[disease], name) for disease in SEEN} for name in lesions.COMBINED}
    together = {tuple(getattr(DISEASES[disease], name) for name in lesions.VARYING) for disease in SEEN}
    places = {place for disease in SEEN for place in DISEASES[disease].places}
    for name in lesions.UNSEEN:
        disease = DISEASES[name]
        assert all(getattr(disease, attribute) in met[attribute] for attribute in lesions.COMBINED)
        assert tuple(getattr(disease, attribute) for attribute in lesions.VARYING) not in together
        assert (set(disease.places) <= places) == (name != lesions.ELSEWHERE)
    for attribute, other in combinations(lesions.VARYING, 2):  # no value stands for another in training
        pairs = Counter((getattr(DISEASES[name], attribute), getattr(DISEASES[name], other)) for name in SEEN)
        assert set(pairs.values()) == {2}


def test_training_volumes_hold_no_unseen_disease_and_test_volumes_mix_them():
    rng = np.random.default_rng(0)
    for _ in range(200):
        assert set(lesions.drawn(rng, "train")) <= set(SEEN) and set(lesions.drawn(rng, "val")) <= set(SEEN)
        tested = lesions.drawn(rng, "test")
        assert len(set(tested)) == len(tested) >= 2
        assert set(tested) & set(SEEN) and set(tested) & set(lesions.UNSEEN)


def test_an_untypical_lesion_stays_nearest_to_its_disease():
    rng = np.random.default_rng(0)
    for name in DISEASES:
        for _ in range(5):
            said = lesions.untypical(rng, name)
            rest = [lesions.apart(said, other) for key, other in DISEASES.items() if key != name]
            assert lesions.apart(said, DISEASES[name]) <= 1 < min(rest)
    typical = [lesions.regenerate(f"lesions_ct_{i:05d}", typical=1.0) for i in range(1, 5)]
    for volume in typical:
        for lesion in volume.traits["anatomy"].lesions:
            assert lesions.apart(lesion.attributes, DISEASES[lesion.disease]) == 0
    assert sum(lesions.apart(lesion.attributes, DISEASES[lesion.disease]) for lesion, _ in table()) > 10


# --- words -------------------------------------------------------------------------------------------------


def test_prompts_say_what_was_drawn_and_of_an_absent_disease_what_is_usual():
    for volume in volumes():
        here = {lesion.disease: lesion.attributes for lesion in volume.traits["anatomy"].lesions}
        for name, said in volume.prompts.items():
            assert list(said) == list(lesions.COLUMNS)
            assert said["class"] == name.replace("_", " ")
            drawn = prompts(here.get(name, lesions.usual(name)))
            assert {column: said[column] for column in drawn} == drawn
            assert (said["attribute.location"] is not None) == volume.masks[name].any() == (name in here)
            assert said["attribute.location@known"] is None and said["attribute.enhancement@known"] is None
            assert {column: said[column] for column in prompts(parse(said["report"]), "@parsed")} == prompts(
                parse(said["report"]), "@parsed"
            )
            others = [prompts(one, "@other") for key, one in here.items() if key != name] if name in here else []
            told = {column: said[column] for column in prompts(lesions.usual(name), "@other")}
            assert told in others or (not others and not any(told.values()))
    known = {name: {v.prompts[name]["attribute.shape@known"] for v in volumes()} for name in DISEASES}
    assert all(len(said) == 1 for said in known.values())


def test_rules_read_the_reports_with_some_errors_and_gaps():
    read, right, total = Counter(), Counter(), 0
    for volume in volumes():
        for lesion in volume.traits["anatomy"].lesions:
            report = volume.prompts[lesion.disease]["report"]
            said, total = parse(report), total + 1
            assert report[0].isupper() and report.endswith(".") and "  " not in report and "{" not in report
            for name in ATTRIBUTES:
                read[name] += getattr(said, name) is not None
                right[name] += getattr(said, name) == getattr(lesion.attributes, name)
    for name in ("shape", "density", "variation", "surface", "relation"):
        assert 0.4 * total < read[name] < 0.95 * total
        assert right[name] > 0.95 * read[name]  # what the rules know they read well; the rest is silence
    known = sum(lesion.attributes.location != "spleen" for lesion, _ in table())  # of no released place
    assert right["features"] > 0.85 * total and right["location"] == known


def test_a_sentence_begins_with_the_right_article():
    assert lesions._articled("a irregular lesion in a uniform organ") == "an irregular lesion in a uniform organ"


# --- folders, seeds, bad input -----------------------------------------------------------------------------


def test_folders_load_with_equal_patients_and_no_unseen_disease_in_training(tmp_path):
    prints = []
    for kind, where in (("lesions_ct", "a"), ("lesions_ct", "b"), ("lesions_mr", "a")):
        folder = tmp_path / where / f"phantom_{kind}"
        assert main([kind, "--out", str(folder), "--n", "10", "--seed", "3"]) == 0
        dataset = load_dataset(folder, verify=kind == "lesions_mr")
        prints.append(dataset.card.fingerprint)
        assert list(dataset.card.classes) == list(DISEASES) and len(dataset.cases) == 10 * 12
        for case in dataset.cases:
            if case.prompts["attribute.location"] and case.target in lesions.UNSEEN:
                assert case.split == "test"
    assert prints[0] == prints[1] != prints[2]
    case = next(c for c in dataset.cases if c.split == "test")
    again = lesions.regenerate(case.case_id, 3, split="test")
    assert again.prompts[case.target] == case.prompts
    note = " ".join(dataset.card.notes)
    assert "splenic_hematoma is the unseen disease in an organ that holds no seen lesion" in note


def test_another_size_shows_the_same_proportions():
    large = lesions.regenerate("lesions_ct_00002", 0, 48)
    assert large.image.shape == (48,) * 3 and large.spacing == (4.0,) * 3
    shares = [lesion.mask.mean() for lesion in large.traits["anatomy"].lesions]
    assert shares and all(0.0015 < share < 0.03 for share in shares)


def test_a_case_of_another_phantom_is_refused():
    with pytest.raises(ValueError, match="Case id 'torso_ct_00001' is not one of this phantom"):
        lesions.regenerate("torso_ct_00001")


@pytest.mark.parametrize(
    "kind, options, said",
    [
        ("lesions_ct", ["--typical", "1.5"], "typical is 1.5, expected a share between 0 and 1"),
        ("lesions_mr", ["--size", "24"], "size is 24, expected at least 32 voxels"),
        ("lesions_ct", ["--n", "9"], "n is 9, expected at least 10 images"),
        ("lesions_ct", ["--splits", "0.5,0.5,0.5"], "expected three positive shares"),
    ],
)
def test_a_bad_parameter_gives_one_sentence_and_leaves_nothing(kind, options, said, tmp_path, capsys):
    assert main([kind, "--out", str(tmp_path / "x"), "--n", "10", *options]) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_unknown_weighting_is_refused(tmp_path):
    with pytest.raises(ValueError, match="weighting is PD, expected a way to weight MR: use T1 or T2"):
        lesions.write_lesions(tmp_path / "x", modality="MR", weighting="PD")
