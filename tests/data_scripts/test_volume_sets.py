"""The sets of DuPLUS's list and BraTS: files named as their releases name them become a dataset folder."""

import json

import amos
import autopet
import brain_structure
import brats
import btcv
import chaos
import kits
import lits
import mnms
import numpy as np
import pytest
import structseg
from volume_files import save_nifti, scan

from lib.data import load_dataset

# script, options, (image, mask, labels) of each volume, volume -> split, T1 of the first case
SETS = {
    "btcv": (
        btcv,
        [],
        [
            (f"RawData/Training/img/img{n}.nii.gz", f"RawData/Training/label/label{n}.nii.gz", range(1, 14))
            for n in ("0001", "0006", "0032")
        ],
        {"img0001": "train", "img0006": "test", "img0032": "val"},
        "A computed tomography scan of the abdomen.",
    ),
    "lits": (
        lits,
        [],
        [(f"Training Batch 1/volume-{n}.nii", f"Training Batch 1/segmentation-{n}.nii", (1, 2)) for n in (0, 1, 2)],
        {"volume-0": "val", "volume-1": "test", "volume-2": "train"},
        "A computed tomography scan of the abdomen.",
    ),
    "kits": (
        kits,
        [],
        [
            (f"data/case_{n:05d}/imaging.nii.gz", f"data/case_{n:05d}/segmentation.nii.gz", (1, 2, 3))
            for n in (0, 1, 10, 500)
        ],
        {"case_00000": "train", "case_00001": "val", "case_00010": "test", "case_00500": "train"},
        "A computed tomography scan of the abdomen.",
    ),
    "amos_ct": (
        amos,
        ["--modality", "ct"],
        [
            (f"amos22/images{part}/amos_{n}.nii.gz", f"amos22/labels{part}/amos_{n}.nii.gz", range(1, 16))
            for part, n in (("Tr", "0001"), ("Tr", "0098"), ("Va", "0008"), ("Tr", "0507"))
        ],
        {"amos_0001": "train", "amos_0098": "val", "amos_0008": "test"},
        "A computed tomography scan of the abdomen.",
    ),
    "amos_mr": (
        amos,
        ["--modality", "mr"],
        [
            (f"amos22/images{part}/amos_{n}.nii.gz", f"amos22/labels{part}/amos_{n}.nii.gz", range(1, 16))
            for part, n in (("Tr", "0001"), ("Tr", "0518"), ("Va", "0588"), ("Tr", "0507"))
        ],
        {"amos_0507": "train", "amos_0518": "val", "amos_0588": "test"},
        "A magnetic resonance imaging scan of the abdomen.",
    ),
    "structseg_head": (
        structseg,
        ["--part", "head"],
        [(f"HaN_OAR/{n}/data.nii.gz", f"HaN_OAR/{n}/label.nii.gz", range(1, 23)) for n in (1, 3, 25)],
        {"patient1": "test", "patient3": "train", "patient25": "val"},
        "A computed tomography scan of the head and neck.",
    ),
    "structseg_thorax": (
        structseg,
        ["--part", "thorax"],
        [(f"Thoracic_OAR/{n}/data.nii.gz", f"Thoracic_OAR/{n}/label.nii.gz", range(1, 7)) for n in (1, 3, 25)],
        {"patient1": "test", "patient3": "val", "patient25": "train"},
        "A computed tomography scan of the thorax.",
    ),
    "chaos": (
        chaos,
        [],
        [
            (f"{folder}/{n}{image}.nii.gz", f"{folder}/{n}_gt.nii.gz", (63, 126, 189, 252))
            for n in (1, 5, 22)
            for folder, image in (("T1", "_InPhase"), ("T1", "_OutPhase"), ("T2", ""))
        ],
        {
            f"patient{n}_{sequence}": split
            for n, split in ((1, "train"), (5, "test"), (22, "val"))
            for sequence in ("t1_in", "t1_out", "t2")
        },
        "A T1-weighted in-phase magnetic resonance imaging scan of the abdomen.",
    ),
    "brain_structure": (
        brain_structure,
        [],
        [(f"images/{n}.nii.gz", f"labels/{n}.nii.gz", (1, 2, 3)) for n in "abcdefghij"],
        dict.fromkeys("abcdefghij"),
        "A T1-weighted magnetic resonance imaging scan of the brain.",
    ),
    "autopet": (
        autopet,
        [],
        [
            (f"FDG/PETCT_{study} Ganzkörper/SUV.nii.gz", f"FDG/PETCT_{study} Ganzkörper/SEG.nii.gz", (1,))
            for study in [*(f"{i:02d}/03-2003" for i in range(9)), "00/05-2004"]
        ],
        {f"PETCT_{i:02d}_03-2003-Ganzk-rper": None for i in range(9)} | {"PETCT_00_05-2004-Ganzk-rper": None},
        "A positron emission tomography scan of the whole body.",
    ),
    "brats_flair": (
        brats,
        ["--sequence", "flair"],
        [
            (f"{name}/{name}_flair.nii.gz", f"{name}/{name}_seg.nii.gz", (1, 2, 4))
            for name in (f"BraTS2021_{n:05d}" for n in range(10))
        ],
        {f"BraTS2021_{n:05d}": None for n in range(10)},
        "A T2-weighted FLAIR magnetic resonance imaging scan of the brain.",
    ),
}  # fmt: skip


def lay_out(folder, volumes, modality):
    for number, (image, mask, labels) in enumerate(volumes):
        grey, drawn = scan(tuple(labels), (10, 8, 8), modality, seed=number)
        save_nifti(folder / image, grey, (2.5, 0.8, 0.8), "LPS")
        save_nifti(folder / mask, drawn, (2.5, 0.8, 0.8), "LPS")


@pytest.mark.parametrize("name", SETS)
def test_a_release_becomes_a_dataset_folder(name, tmp_path):
    script, options, volumes, splits, context = SETS[name]
    modality = "PET" if name == "autopet" else "CT" if "computed" in context else "MR"
    lay_out(tmp_path / "release", volumes, modality)
    script.main([*options, "--archive", str(tmp_path / "release"), "--out", str(tmp_path / name)])
    dataset = load_dataset(tmp_path / name, verify=True)
    assert {case.volume for case in dataset.cases} == splits.keys()
    assert all(splits[case.volume] in (None, case.split) for case in dataset.cases)
    assert set(dataset.card.counts) == {"train", "val", "test"}
    assert dataset.cases[0].prompts["context"] == context
    assert {case.prompts["attribute.modality"] for case in dataset.cases} == {modality}
    assert len(dataset.cases) == len(splits) * len(dataset.card.classes)
    assert all(case.spacing == pytest.approx((2.5, 0.8, 0.8)) for case in dataset.cases)
    assert dataset.card.level == "R" and dataset.card.source.startswith("https://")


def test_a_patient_of_two_studies_is_one_patient(tmp_path):
    lay_out(tmp_path / "release", SETS["autopet"][2], "PET")
    autopet.main(["--archive", str(tmp_path / "release"), "--out", str(tmp_path / "autopet")])
    dataset = load_dataset(tmp_path / "autopet")
    assert len(dataset.cases) == 10 and len({case.patient_id for case in dataset.cases}) == 9


def test_labels_come_under_their_names(tmp_path):
    import nibabel

    lay_out(tmp_path / "release", SETS["brats_flair"][2], "MR")
    brats.main(["--sequence", "flair", "--archive", str(tmp_path / "release"), "--out", str(tmp_path / "brats_flair")])
    dataset = load_dataset(tmp_path / "brats_flair")
    assert list(dataset.card.classes) == ["enhancing_tumor", "edema", "necrotic_core"]
    drawn = scan((1, 2, 4), (10, 8, 8))[1]
    for case, value in zip(dataset.cases[:3], (4, 2, 1), strict=True):
        mask = np.asarray(nibabel.load(case.mask).dataobj).transpose()
        np.testing.assert_array_equal(mask, drawn == value)


def test_frames_of_hearts_keep_the_parts_of_the_release(tmp_path):
    for part, code in (
        ("Training/Labeled", "A1"),
        ("Validation", "B2"),
        ("Testing", "C3"),
        ("Training/Unlabeled", "D4"),
    ):
        films = [np.stack(volumes, -1) for volumes in zip(*(scan((1, 2, 3), seed=i) for i in range(3)), strict=True)]
        films[1][..., 1] = 0
        save_nifti(tmp_path / f"OpenDataset/{part}/{code}/{code}_sa.nii.gz", films[0], (10, 1.2, 1.2))
        if part != "Training/Unlabeled":
            save_nifti(tmp_path / f"OpenDataset/{part}/{code}/{code}_sa_gt.nii.gz", films[1], (10, 1.2, 1.2))
    mnms.main(["--archive", str(tmp_path / "OpenDataset"), "--out", str(tmp_path / "mnms")])
    dataset = load_dataset(tmp_path / "mnms", verify=True)
    assert {(case.volume, case.patient_id, case.split) for case in dataset.cases} == {
        (f"{code}_frame{frame}", code, split)
        for code, split in (("A1", "train"), ("B2", "val"), ("C3", "test"))
        for frame in ("00", "02")
    }
    assert dataset.cases[0].prompts["context"] == "A cine magnetic resonance imaging scan of the cardiac region."
    assert "1 volumes have no masks and were left out." in dataset.card.notes


def test_brain_tissues_come_from_maps_of_probabilities_too(tmp_path):
    for part in ("train", "valid", "test"):
        image, labels = scan((1, 2, 3))
        save_nifti(tmp_path / f"brain/{part}/image/ixi{part}_img.nii", image)
        for value, tissue in enumerate(("graymatter", "whitematter", "csf"), start=1):
            sure = (labels == value) * 0.8 + (labels > 0) * 0.1
            save_nifti(tmp_path / f"brain/{part}/mask/ixi{part}_probmask_{tissue}.nii", sure.astype(np.float32))
    brain_structure.main(["--archive", str(tmp_path / "brain"), "--out", str(tmp_path / "brain_structure")])
    dataset = load_dataset(tmp_path / "brain_structure", verify=True)
    assert [case.case_id for case in dataset.split("val")] == [
        f"ixivalid.{tissue}" for tissue in ("gray_matter", "white_matter", "csf")
    ]
    (tmp_path / "brain/test/mask/ixitest_probmask_csf.nii").unlink()
    with pytest.raises(SystemExit, match=r"ixitest_img\.nii has 2 of its 3 masks"):
        brain_structure.main(["--archive", str(tmp_path / "brain"), "--out", str(tmp_path / "again")])


@pytest.mark.parametrize("name", [*SETS, "mnms"])
def test_an_archive_of_something_else_is_refused_in_one_sentence(name, tmp_path):
    script, options = SETS[name][:2] if name in SETS else (mnms, [])
    (tmp_path / "holiday").mkdir()
    with pytest.raises(SystemExit, match=r"holds no '.*' \(or \.gz\): give the files as they come from"):
        script.main([*options, "--archive", str(tmp_path / "holiday"), "--out", str(tmp_path / name)])
    assert not (tmp_path / name).exists()


def test_an_archive_of_one_modality_has_none_of_the_other(tmp_path):
    lay_out(tmp_path / "release", SETS["amos_ct"][2][:3], "CT")
    with pytest.raises(SystemExit, match="holds no MR scan with masks"):
        amos.main(["--modality", "mr", "--archive", str(tmp_path / "release"), "--out", str(tmp_path / "amos_mr")])


def test_classes_and_spellings_are_those_of_the_published_dictionary(mirrors):
    path = mirrors / "texts/duplus/dict_class_prompts_with_augmentations.json"
    if not path.is_file():
        pytest.skip(f"The published prompts are not at {path}: set MIRROR_DIR to have the spellings compared.")
    published = json.loads(path.read_text())
    layouts = {
        "bcv": btcv.BTCV,
        "lits": lits.LITS,
        "kits": kits.KITS,
        "amos_ct": amos.CT,
        "amos_mr": amos.MR,
        "structseg_oar": structseg.THORAX,
        "structseg_head_oar": structseg.HEAD,
        "chaos&&t2": chaos.CHAOS,
        "mnm": mnms.MNMS,
        "brain_structure": brain_structure.BRAIN,
        "autopet": autopet.AUTOPET,
    }
    for name, layout in layouts.items():
        spelled = [one.released or one.words.replace(" ", "") for one in layout.structures]
        assert spelled == [texts[0].split(" scan of a ")[1].rstrip(".") for texts in published[name]], name
