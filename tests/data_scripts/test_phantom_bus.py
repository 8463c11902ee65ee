"""The breast-ultrasound phantom: its physics, its words, and that only the words name the target."""

from functools import cache

import numpy as np
import pytest
from common import class_prompt
from mask_words import lesion_sentence, pixel_sentence
from phantom import bus
from phantom.bus import DESCRIPTORS, Patient, breast_ultrasound, regenerate, speckle, write_bus
from phantom.parts import patient_of, split_of_patients
from phantoms import main
from PIL import Image
from threadpoolctl import threadpool_limits

from lib.data import load_dataset
from lib.text import role_of

SIZE = 64


@cache
def cases(number: int = 240) -> tuple:
    return tuple(regenerate(f"bus_{i:05d}", seed=0, size=SIZE) for i in range(1, number + 1))


def ambiguous_cases() -> list:
    return [p for p in cases() if p.distractor.any()]


def words_said(sentence: str, name: str) -> str | None:
    """The value of a descriptor that a local prompt states, or None where it is left out."""
    forms = {
        "shape": "{} shape",
        "margin": "{} margin",
        "echo": ", {}",
        "posterior": "posterior {}",
    }
    if name == "posterior" and "posterior features" in sentence:
        return "none" if "no posterior" in sentence else "combined"
    return next((v for v in DESCRIPTORS[name] if forms[name].format(v) in sentence), None)


# --- truth and words -------------------------------------------------------------------------------------


def test_every_case_is_an_image_in_range_with_a_mask_of_its_size():
    for p in cases():
        assert p.image.shape == p.mask.shape == p.distractor.shape == (SIZE, SIZE)
        assert p.image.dtype == np.float32 and p.image.min() >= 0 and p.image.max() <= 1
        assert set(np.unique(p.mask)) <= {0, 1}
        assert p.spacing == (40 / SIZE, 40 / SIZE)
        assert set(p.prompts) == set(bus.BUS_PROMPTS)


def test_lesions_cover_one_to_twelve_percent_and_8_to_37_percent_of_the_width():
    masks = [m for p in cases() for m in (p.mask, p.distractor) if m.any()]
    shares = np.array([m.mean() for m in masks])
    widths = np.array([np.ptp(np.nonzero(m)[1]) + 1 for m in masks]) / SIZE
    assert shares.min() > 0.01 and shares.max() < 0.12 and shares.std() > 0.01
    assert widths.min() > 0.08 and widths.max() < 0.37


def test_two_lesions_never_touch():
    for p in ambiguous_cases():
        columns = np.nonzero(p.mask)[1]
        other = np.nonzero(p.distractor)[1]
        assert columns.max() < other.min() or other.max() < columns.min()


def test_ambiguous_pairs_differ_twice_and_the_text_decides():
    pairs = ambiguous_cases()
    assert len(pairs) > 80
    for p in pairs:
        named, other = p.descriptors, p.descriptors["other"]
        differ = {name for name in DESCRIPTORS if named[name] != other[name]}
        assert len(differ) >= 2 and differ & {"echo", "shape"}
        for sentence, this, that in (
            (p.prompts["local"], named, other),
            (p.prompts["local@other"], other, named),
        ):
            said = {name: words_said(sentence, name) for name in ("shape", "margin", "echo", "posterior")}
            assert all(word in (None, this[name]) for name, word in said.items())
            assert any(said[name] and said[name] != that[name] for name in ("shape", "echo"))


def test_named_and_other_lesion_have_the_same_prior():
    pairs = ambiguous_cases()
    left = np.mean([np.nonzero(p.mask)[1].mean() < SIZE / 2 for p in pairs])
    larger = np.mean([p.mask.sum() > p.distractor.sum() for p in pairs])
    dark = np.mean([p.descriptors["echo"] == "anechoic" for p in pairs])
    dark_other = np.mean([p.descriptors["other"]["echo"] == "anechoic" for p in pairs])
    assert abs(left - 0.5) < 0.15 and abs(larger - 0.5) < 0.15 and abs(dark - dark_other) < 0.15


def test_without_local_text_there_is_one_lesion_at_most():
    silent = [p for p in cases() if p.prompts["local"] is None]
    assert silent and not any(p.distractor.any() for p in silent)
    assert all(p.prompts["local@other"] is None for p in silent)


def test_an_image_without_lesion_has_no_local_text_but_may_have_a_global_one():
    empty = [p for p in cases() if not p.mask.any()]
    assert 4 <= len(empty) <= 24
    for p in empty:
        assert p.prompts["local"] is p.prompts["local@mask"] is p.prompts["attribute.echo"] is None
        assert p.prompts["class@pathology"] == class_prompt("normal")
        assert p.prompts["global"] is None or p.prompts["global"].endswith("no mass.")


@pytest.mark.parametrize("ambiguous, text_share", [(0.0, 0.5), (1.0, 0.9)])
def test_shares_are_those_asked_for(ambiguous, text_share):
    drawn = [regenerate(f"bus_{i:05d}", 3, 48, ambiguous=ambiguous, text_share=text_share) for i in range(1, 161)]
    lesion = [p for p in drawn if p.mask.any()]
    local = np.array([p.prompts["local"] is not None for p in lesion])
    named_globally = np.array([p.prompts["global"] is not None for p in lesion])
    two = np.array([p.distractor.any() for p in lesion])
    assert abs(local.mean() - text_share) < 0.12 and abs(named_globally.mean() - text_share) < 0.12
    assert two[local].mean() == ambiguous
    if text_share == 0.5:
        patterns = [(named_globally == g).astype(int) * (local == w) for g in (0, 1) for w in (0, 1)]
        assert all(pattern.mean() > 0.12 for pattern in patterns)


def test_global_text_holds_context_only():
    for p in cases():
        if sentence := p.prompts["global"]:
            d = p.descriptors
            assert sentence == (f"Breast ultrasound, {d['tissue']} tissue, {d['probe']} linear probe, {d['masses']}.")


def test_pathology_leans_on_the_descriptors_but_is_not_given_by_them():
    lesion = [p.descriptors for p in cases() if p.mask.any()]
    malignant = {
        margin: np.mean([d["pathology"] == "malignant" for d in lesion if d["margin"] == margin])
        for margin in ("circumscribed", "spiculated")
    }
    assert malignant["circumscribed"] < 0.3 < 0.6 < malignant["spiculated"]
    assert any(d["pathology"] == "malignant" for d in lesion if d["margin"] == "circumscribed")


def test_mask_prompts_are_missing_where_the_template_prompts_are():
    for p in cases():
        if p.mask.any():
            assert (p.prompts["local"] is None) == (p.prompts["local@mask"] is None)
            assert (p.prompts["global"] is None) == (p.prompts["global@mask"] is None)
            assert p.prompts["local@mask"] in (None, lesion_sentence(p.mask))
            assert p.prompts["global@mask"] in (None, pixel_sentence(p.mask))


# --- physics ---------------------------------------------------------------------------------------------


def test_speckle_of_a_homogeneous_patch_is_rayleigh():
    envelope = speckle(np.random.default_rng(0), np.ones((256, 256), np.float32))
    assert envelope.mean() / envelope.std() == pytest.approx(1.91, abs=0.06)
    assert np.mean(envelope**2) == pytest.approx(1, abs=0.05)


def test_point_spread_is_finite_and_widest_away_from_the_focus():
    envelope = speckle(np.random.default_rng(1), np.ones((256, 256), np.float32), probe=8)

    def lag_one(band):
        band = band - band.mean()
        return (band[:, 1:] * band[:, :-1]).mean() / band.var()

    focus, deep = lag_one(envelope[95:135]), lag_one(envelope[215:255])
    assert 0.3 < focus < deep
    far = envelope[:, 60:] - envelope.mean()
    assert abs((far * (envelope[:, :-60] - envelope.mean())).mean()) / envelope.var() < 0.05


def words_of(**changed) -> dict[str, str]:
    plain = dict(shape="oval", margin="microlobulated", echo="anechoic", posterior="none")
    return plain | {"orientation": "parallel"} | changed


def drawn_lesion(posterior: str, seed: int, echo: str = "hypoechoic"):
    words = words_of(echo=echo, posterior=posterior)
    rng = np.random.default_rng(seed)
    lesion = bus._place(rng, 96, words, 0.2, 0.8, largest=0.28)
    return bus._render(rng, 96, Patient(bus.TISSUES[1], 12, 0.0, 60.0), [lesion]), lesion.mask


def below_against_beside(posterior: str) -> float:
    """Mean brightness beneath the lesion less that beside it at the same depth, over a few images."""
    gaps = []
    for seed in range(6):
        image, mask = drawn_lesion(posterior, seed)
        rows, columns = np.nonzero(mask)
        band = slice(rows.max() + 3, rows.max() + 14)
        middle, half = int(columns.mean()), max(2, np.ptp(columns) // 5)
        beneath = image[band, middle - half : middle + half + 1]
        beside = np.delete(image[band], np.arange(max(columns.min() - 9, 0), columns.max() + 10), axis=1)
        gaps.append(beneath.mean() - beside.mean())
    return float(np.mean(gaps))


def test_shadow_and_enhancement_are_seen_beneath_the_lesion():
    shadow, none, enhanced = (below_against_beside(p) for p in ("shadowing", "none", "enhancement"))
    assert shadow < none - 0.12 and enhanced > none + 0.07
    assert abs(none) < 0.07


def test_a_shadow_follows_a_steered_beam():
    words = words_of(posterior="shadowing")
    lesion = bus._place(np.random.default_rng(0), 96, words, 0.04, 0.4, largest=0.28)
    rows, columns = np.nonzero(lesion.mask)
    for slope in (-0.1, 0.0, 0.1):
        gain = bus._posterior(np.random.default_rng(0), lesion, slope)[-1]
        expected = columns.mean() + slope * (95 - rows.mean())
        assert np.average(np.arange(96), weights=-gain) == pytest.approx(expected, abs=1.5)


def test_echo_patterns_are_ordered_by_brightness():
    inside = {}
    for echo in ("anechoic", "hypoechoic", "isoechoic", "hyperechoic"):
        drawn = [drawn_lesion("none", seed, echo) for seed in range(4)]
        inside[echo] = np.mean([image[mask].mean() for image, mask in drawn])
    assert inside["anechoic"] + 0.08 < inside["hypoechoic"] < inside["isoechoic"] - 0.08
    assert inside["isoechoic"] + 0.2 < inside["hyperechoic"]


def test_a_cystic_solid_lesion_holds_both_black_and_grey():
    def spread(echo):
        return np.mean([image[mask].std() for image, mask in (drawn_lesion("none", s, echo) for s in range(4))])

    assert spread("complex cystic-solid") > 1.5 * spread("hypoechoic")


def test_margins_change_the_outline_as_named():
    def roughness(margin):  # perimeter² / (4π area) through counting border pixels, several lesions
        values = []
        for seed in range(5):
            words = words_of(shape="round", margin=margin)
            mask = bus._place(np.random.default_rng(seed), 256, words, 0.1, 0.9, largest=0.36).mask
            inner = mask[1:-1, 1:-1] & mask[2:, 1:-1] & mask[:-2, 1:-1] & mask[1:-1, 2:] & mask[1:-1, :-2]
            values.append((mask[1:-1, 1:-1] & ~inner).sum() ** 2 / mask.sum())
        return np.mean(values)

    smooth = roughness("circumscribed")
    assert roughness("microlobulated") > 1.1 * smooth and roughness("spiculated") > 1.3 * smooth


def test_fibroglandular_tissue_is_brighter_than_fat():
    def middle(tissue):
        rng = np.random.default_rng(4)
        images = [bus._render(rng, 64, Patient(tissue, 12, 0.0, 60.0), []) for _ in range(4)]
        return np.mean([image[18:36].mean() for image in images])

    assert middle(bus.TISSUES[1]) > middle(bus.TISSUES[0]) + 0.05


# --- seeds, patients, splits -----------------------------------------------------------------------------


def test_a_case_depends_on_its_seed_and_number_only():
    one, again = (regenerate("bus_00007", seed=5, size=SIZE) for _ in range(2))
    assert np.array_equal(one.image, again.image) and one.prompts == again.prompts
    assert not np.array_equal(one.image, regenerate("bus_00007", seed=6, size=SIZE).image)
    assert not np.array_equal(one.image, regenerate("bus_00008", seed=5, size=SIZE).image)


def test_a_case_does_not_depend_on_the_number_of_threads():
    with threadpool_limits(1):
        alone = regenerate("bus_00003")
    with threadpool_limits(2):
        assert np.array_equal(regenerate("bus_00003").image, alone.image)


@pytest.mark.parametrize("seed", range(12))
def test_an_angular_outline_closes(seed):
    radius, _ = bus._outline(np.random.default_rng(seed), words_of(margin="angular"))
    assert np.abs(np.diff(radius, append=radius[0])).max() < 0.05


def test_patients_have_one_to_three_images_of_the_same_tissue_and_probe():
    groups: dict = {}
    for index, p in enumerate(cases(), start=1):
        groups.setdefault(patient_of(0, index), []).append((p.descriptors["tissue"], p.descriptors["probe"]))
    assert {len(group) for group in groups.values()} == {1, 2, 3}
    assert all(len(set(group)) == 1 for group in groups.values())


@pytest.mark.parametrize("patients", [5, 40])
def test_splits_follow_the_shares_and_none_is_empty(patients):
    images = {f"p{i}": 1 + i % 3 for i in range(patients)}
    given = split_of_patients(images, (0.6, 0.15, 0.25), seed=0)
    total = sum(images.values())
    for split, share in zip(("train", "val", "test"), (0.6, 0.15, 0.25), strict=True):
        held = sum(images[p] for p in images if given[p] == split)
        assert held > 0 and abs(held - share * total) <= 3


# --- the dataset folder ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "phantom_bus"
    assert main(["bus", "--out", str(folder), "--n", "40", "--size", "48", "--seed", "2"]) == 0
    return folder


def test_the_written_folder_loads_and_its_card_is_honest(written):
    dataset = load_dataset(written)
    card = dataset.card
    assert len(dataset.cases) == 40 and sum(card.counts.values()) == 40
    assert (card.name, card.level, card.licence, card.dims) == ("phantom_bus", "P", "Apache-2.0", 2)
    assert all(role_of(column) == card.prompts[column].role for column in card.prompts)
    assert card.prompts["local@mask"].origin == card.prompts["global@mask"].origin == "mask-derived"
    assert any("never ambiguous" in note for note in card.notes)
    assert {case.split for case in dataset.cases} == {"train", "val", "test"}


def test_any_written_case_can_be_drawn_again(written):
    for case in load_dataset(written).cases[::7]:
        p = regenerate(case.case_id, seed=2, size=48)
        assert np.array_equal(np.asarray(Image.open(case.image)), np.round(p.image * 255).astype(np.uint8))
        assert np.array_equal(np.asarray(Image.open(case.mask)) > 0, p.mask > 0)
        assert case.prompts == p.prompts and case.spacing == pytest.approx((40 / 48, 40 / 48))


def test_same_seed_same_bytes_and_another_seed_another_dataset(written, tmp_path):
    same, other = tmp_path / "same" / "phantom_bus", tmp_path / "other" / "phantom_bus"
    write_bus(same, n=40, size=48, seed=2)
    write_bus(other, n=40, size=48, seed=3)
    files = sorted(f.relative_to(written) for f in written.rglob("*") if f.is_file())
    assert all((written / f).read_bytes() == (same / f).read_bytes() for f in files)
    prints = [load_dataset(f).card.fingerprint for f in (written, same, other)]
    assert prints[0] == prints[1] != prints[2]


# --- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, said",
    [
        (["--ambiguous", "1.5"], "ambiguous is 1.5, expected a share between 0 and 1"),
        (["--text-share", "-0.1"], "text_share is -0.1, expected a share between 0 and 1"),
        (["--ambiguous", "nan"], "ambiguous is nan, expected a share between 0 and 1"),
        (["--size", "32"], "size is 32, expected at least 48 pixels"),
        (["--n", "9"], "n is 9, expected at least 10 images"),
        (["--seed", "-1"], "seed is -1, expected 0 or more"),
        (["--splits", "0.5,0.5"], "splits are (0.5, 0.5), expected three positive shares"),
        (["--splits", "0.9,0.2,0.1"], "give train,val,test that sum to 1"),
    ],
)
def test_a_bad_parameter_gives_one_sentence_and_leaves_nothing(options, said, tmp_path, capsys):
    assert main(["bus", "--out", str(tmp_path / "bus"), "--n", "10", "--size", "48", *options]) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_alien_case_id_is_refused():
    with pytest.raises(ValueError, match="Case id 'benign_001' is not one of this phantom"):
        regenerate("benign_001")


def test_the_size_is_checked_without_the_writer_too():
    with pytest.raises(ValueError, match="size is 40, expected at least 48"):
        breast_ultrasound(np.random.default_rng(0), 40)
