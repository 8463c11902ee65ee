"""What the scripts of volumes share: orientation, spacing, grids, labels, grey scales, names of files."""

import argparse
from dataclasses import replace

import nibabel
import numpy as np
import pytest
from volume_files import patch_header, save_nifti, scan
from volumes import (
    Layout,
    Scan,
    Structure,
    build,
    choose,
    find_scans,
    grey,
    grey_note,
    mirror_rows,
    read_masks,
    read_nifti,
    spacing_of,
    structures,
    survival,
)

from lib.data import DataError, load_dataset

LAYOUT = Layout(
    name="tiny",
    title="Two rows",
    modality="MR",
    region="box",
    structures=structures("liver", "left kidney"),
    image="images/{case}.nii",
    mask="labels/{case}.nii",
    licence="CC0",
    citation="none",
    where="from https://example.org (free)",
    splits="seeded",
)


def pair(folder, case="a", labels=(1, 2), **kinds):
    image, mask = scan(labels, seed=sum(map(ord, case)))
    save_nifti(folder / f"images/{case}.nii.gz", image, **kinds)
    save_nifti(folder / f"labels/{case}.nii.gz", mask, **kinds)
    return image, mask


def make(folder, out, layout=LAYOUT):
    build(layout, argparse.Namespace(mirror=None, archive=folder, out=out, overwrite=False, name=layout.name))
    return load_dataset(out, verify=True)


# --- orientation, spacing and grids ----------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "IPL", "SAR", "PIR"])
def test_however_a_file_lies_the_array_comes_out_the_same(tmp_path, axes):
    image, _ = scan()
    path = save_nifti(tmp_path / "a.nii.gz", image, (3.0, 0.5, 0.8), axes, shift=(5, -7, 11))
    assert "".join(nibabel.aff2axcodes(nibabel.load(path).affine)) == axes
    array, affine = read_nifti(path)
    np.testing.assert_array_equal(array, image)
    assert spacing_of(affine) == pytest.approx((3.0, 0.5, 0.8))
    np.testing.assert_allclose(affine[:3, 3], (5, -7, 11))


def test_a_flipped_volume_becomes_the_same_dataset(tmp_path):
    for axes in ("RAS", "LPI"):
        pair(tmp_path / axes, axes=axes, spacing=(2.5, 0.7, 0.9))
        pair(tmp_path / axes, "b", axes=axes, spacing=(2.5, 0.7, 0.9))
    first, second = (make(tmp_path / axes, tmp_path / "out" / axes / "tiny") for axes in ("RAS", "LPI"))
    assert first.card.fingerprint == second.card.fingerprint
    assert first.cases[0].spacing == pytest.approx((2.5, 0.7, 0.9))


@pytest.mark.parametrize("size", [0.0, -1.0, float("nan"), float("inf")])
def test_a_size_of_voxels_that_is_none_is_refused(tmp_path, size):
    path = patch_header(save_nifti(tmp_path / "a.nii", scan()[0]), 80 + 4, "f", size)
    with pytest.raises(DataError, match=r"a\.nii gives its voxels the size .* mm: expected three positive"):
        read_nifti(path)


def test_a_matrix_without_extent_is_refused(tmp_path):
    path = patch_header(save_nifti(tmp_path / "a.nii", scan()[0]), 280, "4f", 0, 0, 0, 0)
    with pytest.raises(DataError, match="gives its voxels the size 0 x"):
        read_nifti(path)


def test_a_file_that_does_not_tell_how_it_lies_is_refused(tmp_path):
    path = patch_header(save_nifti(tmp_path / "a.nii", scan()[0]), 252, "hh", 0, 0)
    with pytest.raises(DataError, match="does not say how it lies in the patient"):
        read_nifti(path)


def test_damaged_and_foreign_files_are_named(tmp_path):
    path = save_nifti(tmp_path / "a.nii.gz", scan()[0])
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(DataError, match=r"a\.nii\.gz cannot be read to its end"):
        read_nifti(path)
    (tmp_path / "b.nii").write_text("not a volume")
    with pytest.raises(DataError, match=r"b\.nii cannot be read as NIfTI"):
        read_nifti(tmp_path / "b.nii")
    with pytest.raises(DataError, match=r"c\.nii is missing"):
        read_nifti(tmp_path / "c.nii")
    with pytest.raises(DataError, match="expected a volume with three axes"):
        read_nifti(save_nifti(tmp_path / "d.nii", np.zeros((3, 4, 5, 2), np.float32)))


def test_a_mask_on_another_grid_is_refused(tmp_path):
    image, mask = pair(tmp_path)
    save_nifti(tmp_path / "labels/a.nii.gz", mask[:-1])
    with pytest.raises(DataError, match=r"a\.nii\.gz has 5 x 7 x 8 voxels and .* 6 x 7 x 8: a mask must lie"):
        make(tmp_path, tmp_path / "tiny")
    save_nifti(tmp_path / "labels/a.nii.gz", mask, shift=(0, 3, 0))
    with pytest.raises(DataError, match=r"lie 3\.0 mm apart: a mask must lie on the grid"):
        make(tmp_path, tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()
    save_nifti(tmp_path / "labels/a.nii.gz", mask, shift=(0, 0.01, 0))
    assert len(make(tmp_path, tmp_path / "tiny").cases) == 2


def test_an_image_is_brought_onto_the_grid_of_its_mask(tmp_path):
    ramp = np.mgrid[:8, :8, :8].astype(np.float32) + 1
    save_nifti(tmp_path / "images/a.nii", ramp[0] + 2 * ramp[2], (2, 2, 2), "LPS", shift=(-1, -1, -1))
    mask = np.zeros((6, 5, 4), np.uint8)
    mask[2, 2, 1:3] = 1
    save_nifti(tmp_path / "labels/a.nii", mask, (1, 2, 3))
    layout = replace(LAYOUT, structures=structures("liver"), onto_mask=True)
    dataset = make(tmp_path, tmp_path / "tiny", layout)
    from lib.data import _decode

    got, _ = _decode(dataset.cases[0], 1)
    z, _, x = np.mgrid[:6, :5, :4]
    # In voxels of the image a mask voxel lies at (mm + 1) / 2.
    wanted = ((z + 1) / 2 + 1) + 2 * ((3 * x + 1) / 2 + 1)
    low, high = np.percentile(wanted.astype(np.float32), (0.5, 99.5))
    np.testing.assert_allclose(got[0], ((wanted - low) / (high - low)).clip(0, 1), atol=1 / 255)
    assert dataset.cases[0].spacing == (1, 2, 3)


# --- labels ----------------------------------------------------------------------------------------------------------


def test_a_label_of_no_class_is_refused_and_an_ignored_one_is_background(tmp_path):
    pair(tmp_path, labels=(1, 2, 7))
    with pytest.raises(DataError, match=r"has the label 7, which is none of tiny's \(1 liver, 2 left kidney\)"):
        make(tmp_path, tmp_path / "tiny")
    dataset = make(tmp_path, tmp_path / "tiny", replace(LAYOUT, ignored={7: "cyst"}))
    assert "Label 7 (cyst) is background here." in dataset.card.notes
    assert [case.target for case in dataset.cases] == ["liver", "left_kidney"]


@pytest.mark.parametrize("value", [-1, 0.5])
def test_values_that_are_no_labels_are_refused(tmp_path, value):
    image, mask = pair(tmp_path)
    save_nifti(tmp_path / "labels/a.nii.gz", np.where(mask == 2, value, mask).astype(np.float32))
    with pytest.raises(DataError, match="no whole numbers from 0 on"):
        make(tmp_path, tmp_path / "tiny")


def test_every_class_has_its_mask_and_an_absent_one_is_empty(tmp_path):
    _, mask = pair(tmp_path, labels=(2,))
    masks, _ = read_masks(Scan("a", "a", tmp_path / "images/a.nii.gz", (tmp_path / "labels/a.nii.gz",)), LAYOUT)
    assert not masks["liver"].any()
    np.testing.assert_array_equal(masks["left_kidney"], mask == 2)


def test_of_maps_of_probabilities_the_likeliest_wins(tmp_path):
    maps = np.zeros((2, 3, 4, 5), np.float32)
    maps[0, 0, 0, :3] = 0.2, 0.6, 0.4
    maps[1, 0, 0, 1:4] = 0.3, 0.5, 0.1
    paths = tuple(save_nifti(tmp_path / f"{i}.nii", array) for i, array in enumerate(maps))
    masks, _ = read_masks(Scan("a", "a", paths[0], paths), LAYOUT)
    assert masks["liver"][0, 0].tolist() == [True, True, False, False, False]
    assert masks["left_kidney"][0, 0].tolist() == [False, False, True, True, False]
    assert masks["liver"].sum() + masks["left_kidney"].sum() == 4


def test_of_a_film_the_outlined_frames_are_taken(tmp_path):
    films = [np.stack(volumes, -1) for volumes in zip(*(scan((1, 2), seed=i) for i in range(4)), strict=True)]
    films[1][..., [0, 2]] = 0
    save_nifti(tmp_path / "images/a.nii", films[0], (4, 1, 1), "LPS")
    save_nifti(tmp_path / "labels/a.nii", films[1], (4, 1, 1), "LPS")
    layout = replace(LAYOUT, cine=True)
    scans, _ = find_scans(tmp_path, layout)
    assert [(one.case_id, one.frame) for one in scans] == [("a_frame01", 1), ("a_frame03", 3)]
    np.testing.assert_array_equal(read_nifti(scans[1].image, 3)[0], films[0][..., 3])
    save_nifti(tmp_path / "labels/a.nii", films[1] * 0)
    with pytest.raises(DataError, match="no frame with an outline"):
        find_scans(tmp_path, layout)
    save_nifti(tmp_path / "labels/a.nii", films[1][..., 0])
    with pytest.raises(DataError, match="expected a fourth axis"):
        find_scans(tmp_path, layout)


# --- grey ------------------------------------------------------------------------------------------------------------


def test_each_modality_is_scaled_by_what_is_known_of_it(tmp_path):
    def scaled(modality, *values, **window):
        return grey(np.array(values, float).reshape(1, 1, -1), modality, tmp_path, **window).ravel().tolist()

    assert scaled("CT", -3000, -175, 37.5, 250, 3000) == [0, 0, 128, 255, 255]
    assert scaled("CT", -1000, 0, window=(-1000, 1000)) == [0, 128]
    assert scaled("PET", -1, 0, 15 / 4, 15, 60) == [0, 0, 128, 255, 255]
    values = np.concatenate([np.zeros(5000), np.linspace(100, 1100, 1001)])
    got = np.array(scaled("MR", *values))
    assert not got[:5000].any() and got[5000] == 0 and got[-1] == 255
    assert got[5500] == pytest.approx(127.5, abs=1)  # the zeros around the body do not count
    assert "[-1000, 400] HU" in grey_note("CT", (-1000, 400))


@pytest.mark.parametrize("modality", ["CT", "MR", "PET"])
def test_a_volume_of_one_grey_or_with_holes_is_refused(tmp_path, modality):
    for constant in (0, 5000):
        with pytest.raises(DataError, match=f"is of one grey in its {modality} window"):
            grey(np.full((2, 2, 2), constant), modality, tmp_path / "a.nii")
    with pytest.raises(DataError, match="no finite numbers"):
        grey(np.array([[[1, np.nan]]]), modality, tmp_path / "a.nii")


# --- names of files --------------------------------------------------------------------------------------------------


def test_names_give_patients_parts_and_held_out_cases(tmp_path):
    layout = replace(
        LAYOUT,
        image="images{part}/{patient}/{case}.nii",
        mask="labels{part}/{patient}/{case}.nii",
        parts={"Tr": "train", "Ts": "test"},
        held_out={"val": ("2",)},
        prefix="v-",
    )
    for part, patient, case in (("Tr", "p1", "1"), ("Tr", "p1 b", "2"), ("Ts", "p2", "3"), ("Ts", "p3", "4")):
        save_nifti(tmp_path / f"deep/images{part}/{patient}/{case}.nii", scan()[0])
        if case != "4":
            save_nifti(tmp_path / f"deep/labels{part}/{patient}/{case}.nii.gz", scan()[1])
    (tmp_path / "deep/imagesTr/p1/._1.nii").write_text("left by another system")
    scans, unlabelled = find_scans(tmp_path, layout)
    assert unlabelled == 1
    assert [(one.case_id, one.patient, one.split) for one in scans] == [
        ("v-1_p1", "p1", "train"),
        ("v-2_p1-b", "p1 b", "val"),
        ("v-3_p2", "p2", "test"),
    ]
    with pytest.raises(DataError, match="is in the part 'Tr': expected one of Va"):
        find_scans(tmp_path, replace(layout, parts={"Va": "val"}))


def test_what_is_not_held_out_is_for_training(tmp_path):
    for case in "abc":
        pair(tmp_path, case)
    scans, _ = find_scans(tmp_path, replace(LAYOUT, held_out={"test": ("b",)}))
    assert [one.split for one in scans] == ["train", "test", "train"]
    assert {one.split for one in find_scans(tmp_path, LAYOUT)[0]} == {""}


def test_an_archive_without_the_files_is_refused(tmp_path):
    (tmp_path / "holiday").mkdir()
    with pytest.raises(DataError, match=r"holds no 'images/\{case\}\.nii' \(or \.gz\): give .* from https://example"):
        find_scans(tmp_path, LAYOUT)
    save_nifti(tmp_path / "images/a.nii", scan()[0])
    with pytest.raises(DataError, match=r"holds no 'labels/\{case\}\.nii'"):
        find_scans(tmp_path, LAYOUT)
    save_nifti(tmp_path / "labels/b.nii", scan()[1])
    with pytest.raises(DataError, match=r"b\.nii has no image beside it"):
        find_scans(tmp_path, LAYOUT)


def test_prompts_name_the_structure_another_one_and_its_spellings(tmp_path):
    pair(tmp_path)
    layout = replace(LAYOUT, structures=structures("liver", Structure("left kidney", released="lefftkidney")))
    liver, kidney = make(tmp_path, tmp_path / "tiny", layout).cases
    assert liver.case_id == "a.liver" and liver.volume == kidney.volume == "a"
    assert liver.prompts["context"] == "A magnetic resonance imaging scan of the box."
    assert liver.prompts["target@other"] == kidney.prompts["target"]
    assert "lefftkidney" in kidney.prompts["target@released"]
    assert "sinistral" in kidney.prompts["target@synonym"] and "left kidney" in kidney.prompts["target@free"]


# --- tables and options ----------------------------------------------------------------------------------------------


def test_times_and_outcomes_that_cannot_be_are_refused(tmp_path):
    assert survival(tmp_path, "p", "12.5", "dead", "dead", "censored") == (12.5, True)
    assert survival(tmp_path, "p", 0, "censored", "dead", "censored") == (0, False)
    for days in ("-3", "", "nan", "soon", "inf"):
        with pytest.raises(DataError, match=f"gives patient 'p' the follow-up '{days}': expected days"):
            survival(tmp_path, "p", days, "dead", "dead", "censored")
    with pytest.raises(DataError, match="gives patient 'p' the outcome 'alive': expected 'dead' or 'censored'"):
        survival(tmp_path, "p", "3", "alive", "dead", "censored")


def test_a_mirror_without_its_table_or_a_column_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no mirror of 'tiny'"):
        mirror_rows(tmp_path, "tiny", ())
    (tmp_path / "metadata.csv").write_text("id,image\na,images/a.nii\n")
    assert mirror_rows(tmp_path, "tiny", ("id",)) == (tmp_path, [{"id": "a", "image": "images/a.nii"}])
    with pytest.raises(DataError, match="lacks the column 'patient'"):
        mirror_rows(tmp_path, "tiny", ("id", "patient"))


def test_an_option_of_one_script_is_taken_off_the_command_line(capsys):
    assert choose("--part", ("head", "thorax"), ["--out", "x", "--part", "thorax"]) == ("thorax", ["--out", "x"])
    assert choose("--part", ("head", "thorax"), ["--help"]) == ("head", ["--help"])
    with pytest.raises(SystemExit):
        choose("--part", ("head", "thorax"), ["--part", "knee"])
    assert "invalid choice: 'knee'" in capsys.readouterr().err
