"""Semi-synthetic CT: real masks and rows in, intensities that show what the rows say, cysts only in testing."""

import csv

import kits19_semisynthetic as script
import nibabel
import numpy as np
import pytest
from kits19_semisynthetic import CYST, CYSTS, DISEASES, FILLS, TUMOR, balanced, sided
from lesion_words import Row, read_codes, rows_of
from phantom.kidney import EXTENT_MM, simulate
from scipy.ndimage import binary_erosion

from lib.attributes import TABLE, VOCABULARY, Attributes, parse, prompts
from lib.data import load_dataset

SIZE = 32
CODES = ("enhancement", "location", "shape", "density", "variation", "surface", "relation")
REPORT = "Contrast-enhanced CT: A round hypodense lesion is seen in the left kidney, with well-defined margins."


def row(lesion: str, name: str, *codes: int, report: str = REPORT) -> dict[str, str]:
    """A row of the released table: codes in the order of CODES."""
    coded = {f"{TABLE[attribute]}_code": str(code) for attribute, code in zip(CODES, codes, strict=True)}
    return {"lesion": lesion, "id": name, "report": report} | coded


def write_table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def write_mask(path, tumor: bool = True, label: int = 2):
    """Two kidneys of 3 mm voxels, the left one of the patient with a tumour at its front."""
    z, y, x = np.indices((60, 60, 80))
    labels = np.zeros(z.shape, np.uint8)
    for middle in (18, 62):
        labels[((z - 30) / 18) ** 2 + ((y - 25) / 9) ** 2 + ((x - middle) / 9) ** 2 < 1] = 1
    if tumor:
        labels[(z - 30) ** 2 + (y - 34) ** 2 + (x - 18) ** 2 < 36] = label
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(labels.transpose(), np.diag([3.0, 3.0, 3.0, 1.0])), path)


@pytest.fixture
def archive(tmp_path):
    """Twelve patients with masks, the attribute table beside them."""
    folder = tmp_path / "kits19"
    looks = [(2, 1, 1, 1, 2, 2, 1), (2, 1, 1, 2, 2, 2, 2), (2, 2, 1, 3, 1, 2, 1), (2, 1, 2, 1, 1, 1, 1)]
    rows = [row("renal cell carcinoma", f"case_{n:05d}", *looks[n % 4]) for n in range(12)]
    rows += [row("renal cyst", f"case_{n:05d}", 2, 2, 1, 1, 1, 1, 1) for n in range(20, 24)]
    write_table(folder / "attributes.csv", rows)
    for n in range(12):
        write_mask(folder / "data" / f"case_{n:05d}" / "segmentation.nii.gz")
    return folder


def run(folder, tmp_path, *options, option="--archive"):
    script.main([option, str(folder), "--size", str(SIZE), "--out", str(tmp_path / script.NAME), *options])
    return load_dataset(tmp_path / script.NAME)


# --- intensities -------------------------------------------------------------------------------------------


def scene() -> tuple[np.ndarray, np.ndarray]:
    """A kidney and a lesion on it."""
    z, y, x = np.indices((SIZE,) * 3) - 15.5
    lesion = (z**2 + (y - 5) ** 2 + x**2) < 30
    return (((z / 10) ** 2 + (y / 6) ** 2 + (x / 6) ** 2) < 1) & ~lesion, lesion


def shown(seed: int = 0, **values: str) -> np.ndarray:
    kidney, lesion = scene()
    said = {"enhancement": "contrast-enhanced CT", "density": "isodense", "variation": "homogeneous"}
    said |= {"surface": "well-defined margin"} | values
    return simulate(np.random.default_rng(seed), kidney, [(lesion, Attributes(**said))], -8.0)


def test_density_variation_contrast_and_features_can_be_seen():
    kidney, lesion = scene()
    inner, core = binary_erosion(lesion), binary_erosion(lesion, iterations=2)
    organ = binary_erosion(kidney, iterations=2)
    for seed in range(3):
        levels = [np.median(shown(seed, density=density)[core]) for density in VOCABULARY["density"][:3]]
        assert levels[0] < levels[1] - 0.1 < levels[2] - 0.15
        assert abs(levels[1] - np.median(shown(seed)[organ])) < 0.06
        even, uneven = (shown(seed, variation=value)[inner].std() for value in VOCABULARY["variation"])
        assert uneven > 1.5 * even
        plain = shown(seed, enhancement="non-contrast CT")
        assert np.median(plain[kidney]) < np.median(shown(seed)[kidney]) - 0.2
        assert shown(seed, features="hyperdense foci")[lesion].max() > shown(seed)[lesion].max() + 0.05
        assert shown(seed, features="hypodense areas")[lesion].min() < shown(seed)[lesion].min() - 0.05


def test_a_sharp_margin_is_steeper_and_a_close_relation_puts_tissue_beside_the_lesion():
    kidney, lesion = scene()
    sharp, vague = (
        np.mean([np.abs(np.diff(shown(seed, density="hypodense", surface=surface), axis=1)).max() for seed in range(4)])
        for surface in VOCABULARY["surface"]
    )
    assert sharp > vague
    beyond = np.zeros_like(lesion)
    beyond[12:20, 26:30, 12:20] = True
    apart, close = (shown(relation=relation)[beyond].mean() for relation in VOCABULARY["relation"])
    assert close > apart + 0.15


def test_a_simulation_is_a_function_of_its_seed_and_an_unknown_value_needs_no_word():
    kidney, lesion = scene()
    assert np.array_equal(shown(3), shown(3)) and not np.array_equal(shown(3), shown(4))
    blank = simulate(np.random.default_rng(0), kidney, [(lesion, Attributes())], 40.0)
    assert blank.shape == lesion.shape and blank.min() >= 0 and blank.max() <= 1


# --- rows --------------------------------------------------------------------------------------------------


def test_a_row_told_of_the_other_side_is_changed_in_attribute_and_report():
    told = Row("a", Attributes(location="left kidney", shape="irregular"), REPORT)
    moved = sided(told, "right kidney")
    assert moved.attributes == Attributes(location="right kidney", shape="irregular")
    assert "right kidney" in moved.report and "left" not in moved.report and parse(moved.report).location
    assert sided(told, "left kidney") is told


def test_rare_looks_are_drawn_as_often_as_common_ones_and_keep_the_shape():
    common = Attributes(location="left kidney", shape="irregular", density="hypodense", surface="ill-defined margin")
    rare = Attributes(location="right kidney", shape="irregular", density="hypodense", surface="well-defined margin")
    other = Attributes(location="left kidney", shape="round-like", density="isodense")
    rows = [Row(str(n), common, REPORT) for n in range(30)] + [Row("rare", rare, REPORT), Row("round", other, REPORT)]
    rng = np.random.default_rng(0)
    chosen = [one for _ in range(100) for one in balanced(rng, rows, rows[0], 1)]
    assert 35 < sum(one.patient == "rare" for one in chosen) < 65
    assert {one.attributes.shape for one in chosen} == {"irregular"}
    assert {one.attributes.location for one in chosen} == {"left kidney"}


def test_the_workbook_and_the_table_made_of_it_say_the_same(mirrors, tmp_path):
    folder = mirrors / "texts" / "malenia_attributes"
    if not (folder / "annotations_of_lesion_descriptions.xlsx").is_file():
        pytest.skip(f"There is no attribute table at {folder}: set MIRROR_DIR to have it tested.")
    (tmp_path / "annotations_of_lesion_descriptions.xlsx").symlink_to(
        folder / "annotations_of_lesion_descriptions.xlsx"
    )
    for name, number in ((TUMOR, 162), (CYST, 66)):
        workbook, table = (rows_of(read_codes(place), DISEASES[name]) for place in (tmp_path, folder))
        assert workbook == table and len(table) == number


# --- folders -----------------------------------------------------------------------------------------------


def test_cysts_are_in_test_volumes_only_and_every_volume_tells_of_both(archive, tmp_path):
    dataset = run(archive, tmp_path)
    assert dataset.card.level == "S" and "SIMULATED" in dataset.card.modality
    assert "SIMULATED" in dataset.card.notes[0] and CYST in dataset.card.notes[1]
    volumes = {}
    for case in dataset.cases:
        volumes.setdefault(case.volume, {})[case.target] = case
    kinds = []
    for cases in volumes.values():
        assert list(cases) == [TUMOR, CYST]
        masks = {name: np.asarray(nibabel.load(case.mask).dataobj) > 0 for name, case in cases.items()}
        for name, case in cases.items():
            assert case.spacing == (EXTENT_MM / SIZE,) * 3 and masks[name].shape == (SIZE,) * 3
            assert (case.prompts["attribute.location"] is not None) == masks[name].any()
            assert case.prompts["class"] == DISEASES[name] and case.prompts["report"]
            assert case.prompts["attribute.location@known"] is None
            if masks[name].any():
                read = prompts(parse(case.prompts["report"]), "@parsed")
                assert {column: case.prompts[column] for column in read} == read
                assert masks[name].sum() >= 10
        assert not (masks[TUMOR] & masks[CYST]).any()
        kinds.append((cases[TUMOR].split, *(bool(mask.any()) for mask in masks.values())))
    assert not any(cyst for split, _, cyst in kinds if split != "test")
    tested = [kind for kind in kinds if kind[0] == "test"]
    patients = {case.patient_id for case in dataset.split("test")}
    assert len(patients) == 3 and tested.count(("test", True, False)) == 3
    assert tested.count(("test", False, True)) == 3 * CYSTS and ("test", True, True) in tested
    trained = {case.patient_id for case in dataset.split("train")}
    assert sum(split == "train" for split, *_ in kinds) == len(trained) * (FILLS + 1)


def test_a_folder_is_the_same_every_time(archive, tmp_path):
    first = run(archive, tmp_path).card.fingerprint
    assert run(archive, tmp_path, "--overwrite").card.fingerprint == first


def test_the_lesion_is_in_the_middle_of_the_cube_and_the_spine_on_its_side(archive):
    kidney, tumor, midline = script.read_crop(archive / "data" / "case_00001" / "segmentation.nii.gz", SIZE)
    assert kidney.any() and not (kidney & tumor).any()
    assert np.abs(np.argwhere(kidney | tumor).mean(0) - (SIZE - 1) / 2).max() < 2.5
    volume = tumor.sum() * (EXTENT_MM / SIZE) ** 3
    assert volume == pytest.approx(4 / 3 * np.pi * 18**3, rel=0.2)
    assert midline == pytest.approx(15.5 + (39.5 - 18) * 3 / 5, abs=0.5)


def test_a_part_of_the_mirror_keeps_its_split_and_real_rows(mirrors, tmp_path):
    source = mirrors / script.MIRRORED
    if not (source / "metadata.csv").is_file():
        pytest.skip(f"There is no mirror of KiTS19's masks at {mirrors}: set MIRROR_DIR to have it tested.")
    with open(source / "metadata.csv", newline="") as file:
        rows = {one["id"]: one for one in csv.DictReader(file)}
    chosen = {"case_00122": "train", "case_00152": "val", "case_00064": "test"}  # few slices, so that they read fast
    small = tmp_path / "mirror" / script.MIRRORED
    small.mkdir(parents=True)
    (small / "masks").symlink_to(source / "masks")
    (tmp_path / "mirror" / "texts").symlink_to(mirrors / "texts")
    write_table(small / "metadata.csv", [rows[name] | {"split": split} for name, split in chosen.items()])
    dataset = run(tmp_path / "mirror", tmp_path, option="--mirror")
    assert {case.patient_id: case.split for case in dataset.cases} == chosen
    own = next(case for case in dataset.cases if case.case_id == f"case_00122_1.{TUMOR}")
    assert own.prompts["report"] == rows["case_00122"]["text_report"]
    assert rows["case_00122"]["attr_density"] in own.prompts["attribute.density"]
    absent = next(case for case in dataset.cases if case.case_id == f"case_00122_1.{CYST}")
    assert absent.prompts["attribute.shape"] == "The shape of the lesion is round-like."
    assert absent.prompts["attribute.location@parsed"] is None and "hypodense" in absent.prompts["report"]


# --- bad input ---------------------------------------------------------------------------------------------


def test_what_cannot_be_used_is_refused_in_a_sentence(archive, tmp_path):
    mask = archive / "data" / "case_00003" / "segmentation.nii.gz"
    for options, said in (({"label": 3}, "holds labels other than 0, 1"), ({"tumor": False}, "outlines no tumor")):
        write_mask(mask, **options)
        with pytest.raises(SystemExit, match=said):
            run(archive, tmp_path)
    (archive / "attributes.csv").unlink()
    with pytest.raises(SystemExit, match="holds no attribute table: put annotations_of_lesion_descriptions"):
        run(archive, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"holds no 'segmentation\.nii\.gz'"):
        run(tmp_path / "empty", tmp_path)
    assert not (tmp_path / script.NAME).exists()


def test_a_table_without_rows_of_a_disease_or_of_any_patient_is_refused(archive, tmp_path):
    tumors = [row("renal cell carcinoma", f"case_{n:05d}", 2, 1, 1, 1, 2, 2, 1) for n in range(12)]
    write_table(archive / "attributes.csv", tumors)
    with pytest.raises(SystemExit, match="no row of 'renal cyst' but those of test patients"):
        run(archive, tmp_path)
    write_table(archive / "attributes.csv", [row("renal cell carcinoma", "case_99999", 2, 1, 1, 1, 2, 2, 1)])
    with pytest.raises(SystemExit, match="has masks of no patient of the attribute table"):
        run(archive, tmp_path)
