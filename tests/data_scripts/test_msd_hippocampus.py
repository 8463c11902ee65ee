"""MSD Task04: folders from the tar and from the mirror."""

import csv
import shutil
import tarfile

import msd_hippocampus
import pytest
from volume_files import save_nifti, scan

from lib.data import load_dataset


@pytest.fixture
def archive(tmp_path):
    """A tar in the layout of Task04_Hippocampus, with what another system left in it."""
    folder = tmp_path / "Task04_Hippocampus"
    for number in range(10):
        image, mask = scan((1, 2), seed=number)
        save_nifti(folder / f"imagesTr/hippocampus_{number:03d}.nii.gz", image * 10**number)
        save_nifti(folder / f"labelsTr/hippocampus_{number:03d}.nii.gz", mask)
    save_nifti(folder / "imagesTs/hippocampus_100.nii.gz", image)
    (folder / "imagesTr/._hippocampus_000.nii.gz").write_text("no volume")
    with tarfile.open(tmp_path / "Task04_Hippocampus.tar", "w") as tar:
        tar.add(folder, folder.name)
    return tmp_path / "Task04_Hippocampus.tar"


def test_the_tar_becomes_a_valid_folder(archive, tmp_path):
    msd_hippocampus.main(["--archive", str(archive), "--out", str(tmp_path / "msd_hippocampus")])
    dataset = load_dataset(tmp_path / "msd_hippocampus", verify=True)
    assert dataset.card.counts == {"train": 14, "val": 2, "test": 4}
    first, second = dataset.cases[:2]
    assert (first.target, second.target) == ("anterior_hippocampus", "posterior_hippocampus")
    assert first.prompts["context"] == "A T1-weighted magnetic resonance imaging scan of the brain."
    assert first.prompts["target"] == "A magnetic resonance imaging scan of a anterior hippocampus."


def test_the_mirror_becomes_a_folder_with_its_splits(mirrors, tmp_path):
    source, mirror = mirrors / "msd_hippocampus", tmp_path / "mirror/msd_hippocampus"
    if not source.is_dir():
        pytest.skip(f"There is no mirror of the hippocampus at {source}: set MIRROR_DIR to have it tested.")
    with open(source / "metadata.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file)]
    rows = [next(row for row in rows if row["split"] == split) for split in ("train", "val", "test")]
    for row in rows:
        for kind in ("image", "mask"):
            (mirror / row[kind]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / row[kind], mirror / row[kind])
    with open(mirror / "metadata.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    msd_hippocampus.main(["--mirror", str(tmp_path / "mirror"), "--out", str(tmp_path / "msd_hippocampus")])
    dataset = load_dataset(tmp_path / "msd_hippocampus", verify=True)
    assert dataset.card.counts == {"train": 2, "val": 2, "test": 2}
    assert {case.volume: case.split for case in dataset.cases} == {row["case_id"]: row["split"] for row in rows}
    from lib.data import _decode

    image, anterior = _decode(dataset.cases[0], 1)
    _, posterior = _decode(dataset.cases[1], 1)
    assert anterior.sum() == int(rows[0]["voxels_anterior"]) and posterior.sum() == int(rows[0]["voxels_posterior"])
    # Rows go from back to front, so that the anterior part has the larger ones.
    assert anterior.nonzero()[1].mean() > posterior.nonzero()[1].mean() + 5
    assert image.min() == 0 and image.max() == 1
