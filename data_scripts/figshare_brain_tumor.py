"""Make the dataset folder of Cheng's brain tumours (T1 slices after contrast, three kinds) from a mirror or archive.

    python data_scripts/figshare_brain_tumor.py --mirror ../shared/data --out data/figshare_brain_tumor
    python data_scripts/figshare_brain_tumor.py --archive ~/Downloads/1512427.zip --out data/figshare_brain_tumor

The archive, or a folder of its zips, holds MATLAB v7.3 files, which the package h5py reads. figshare publishes no
sha256, so there is no --download.
"""

import argparse
import io
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from common import CLASS_COLUMN, MEDCLIPSEG, MEDCLIPSEG_COLUMNS, MEDCLIPSEG_TEXTS, Mirror, make_splits, run, unpacked
from medclip_prompts import MEDCLIPSAM_COLUMN, PromptSets, brain_class, published_lists, published_prompts

from lib.data import DatasetWriter
from lib.files import DataError

WHERE = "from https://doi.org/10.6084/m9.figshare.1512427 (no account needed)"
KINDS = {1: "meningioma", 2: "glioma", 3: "pituitary"}
CARD = {
    "title": "Brain tumours of Cheng et al., T1-weighted MRI after contrast",
    "modality": "brain MRI, T1 after contrast",
    "dims": 2,
    "classes": {"tumor": 1},
    "level": "R",
    "licence": "CC BY 4.0 (figshare).",
    "citation": (
        "Cheng J, Huang W, Cao S, et al. Enhanced Performance of Brain Tumor Classification via Tumor Region "
        "Augmentation and Partition. PLoS ONE 10(10):e0140381 (2015). Data: doi:10.6084/m9.figshare.1512427 (2017)."
    ),
}
NOTES = [
    "Axial, coronal and sagittal slices are mixed, and every slice holds one tumour.",
    "The pixel size is unknown here (0.49 mm in the original 512x512 files, as remembered): spacing 1 means pixels.",
]


def from_mirror(args: argparse.Namespace) -> None:
    """Write the folder from a mirror, whose splits are kept."""
    mirror = Mirror(args.mirror, "figshare_brain_tumor", ("block", "text_medclipsamv2", *MEDCLIPSEG_TEXTS.values()))
    sets = PromptSets("brain", published_lists(args))
    print(f"reading {len(mirror.rows)} slices from {mirror.folder}")
    card = {
        **CARD,
        "source": (
            "Images: github.com/nanonane/RCS-YOLO, 57449ec; masks: polygons of github.com/arogya-gyawali/brainscan_AI, "
            f"d6d0e6a, through a mirror (256×256, JPEG). Texts: {MEDCLIPSEG}; MedCLIP-SAMv2."
        ),
        "splits": (
            "The mirror's: blocks of about 75 consecutive slices of one class, with gaps between splits and without "
            "look-alikes of another split."
        ),
        "prompts": {
            "class@pathology": CLASS_COLUMN,
            **sets.columns,
            "global@medclipsam": MEDCLIPSAM_COLUMN,
            **MEDCLIPSEG_COLUMNS,
        },
        "notes": [
            *NOTES,
            "The original files carry patient ids (233 patients), the mirror does not: patient_id is the block, which "
            "holds several patients, so intervals by patient are too wide here; a patient at the border of two blocks "
            "may still be in both.",
            "The mirror's captions say where the tumour is from its mask, and they and most prompts name its kind.",
        ],
    }
    with DatasetWriter(args.out, card, overwrite=args.overwrite) as writer:
        for row in mirror.rows:
            writer.add(
                case_id=row["case_id"],
                patient_id=row["patient_id"] or row["block"],
                split=row["split"],
                image=mirror.image(row),
                mask=mirror.mask(row),
                spacing=(1, 1),
                prompts={
                    "class@pathology": brain_class(row["label"]),
                    **sets.of(row["label"]),
                    "global@medclipsam": row["text_medclipsamv2"],
                    **{column: row[text] for column, text in MEDCLIPSEG_TEXTS.items()},
                },
            )


def _files(folder: Path) -> Iterator[tuple[str, Path | io.BytesIO]]:
    """Every .mat file under a folder, loose or inside of the archive's zips: figshare's number and the file."""
    for path in sorted(folder.rglob("*.mat")):
        if path.stem.isdigit():
            yield path.stem, path
    for path in sorted(folder.rglob("*.zip")):
        try:
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith(".mat") and Path(name).stem.isdigit():
                        yield Path(name).stem, io.BytesIO(archive.read(name))
        except zipfile.BadZipFile as error:
            raise DataError(f"{path} is damaged ({error}): get it again.") from error


def _read(number: str, file: Path | io.BytesIO, *names: str) -> list[np.ndarray]:
    """Fields of one slice; MATLAB counts columns first, so the arrays are turned round."""
    try:
        import h5py
    except ImportError as error:
        raise DataError(
            "The original files are MATLAB v7.3 (HDF5) and the package h5py, which reads them, is not installed: "
            "run `make setup`, or give --mirror."
        ) from error
    try:
        with h5py.File(file) as content:
            return [np.asarray(content[f"cjdata/{name}"]).T for name in names]
    except (OSError, KeyError) as error:
        raise DataError(f"{number}.mat is not a file of this dataset or is damaged: get the archive again.") from error


def _patient(codes: np.ndarray) -> str:
    """The patient id, which MATLAB keeps as character codes."""
    return "".join(chr(int(code)) for code in codes.ravel())


def _kind(number: str, label: np.ndarray) -> str:
    if (found := int(label.ravel()[0])) not in KINDS:
        raise DataError(f"{number}.mat has the label {found}: expected {', '.join(map(str, KINDS))}.")
    return KINDS[found]


def from_archive(args: argparse.Namespace) -> None:
    """Write the folder from the original files, splitting by patient."""
    with unpacked(args) as (folder, origin):
        known = {}
        for number, file in _files(folder):
            codes, label = _read(number, file, "PID", "label")
            known[number] = _patient(codes), _kind(number, label)
        if not known:
            raise DataError(f"{folder} holds no files named like 1.mat, also not in zips: give the original archive.")
        print(f"reading {len(known)} slices of {len({patient for patient, _ in known.values()})} patients")
        split = make_splits([patient for patient, _ in known.values()], [kind for _, kind in known.values()])
        sets, published = PromptSets("brain", published_lists(args)), published_prompts(args, "brain")
        told = {"global@medclipsam": MEDCLIPSAM_COLUMN} if published else {}
        card = {
            **CARD,
            "source": "https://doi.org/10.6084/m9.figshare.1512427",
            "splits": "Ours: train/val/test 70/10/20 %, by patient, seeded, stratified by tumour kind.",
            "prompts": {"class@pathology": CLASS_COLUMN, **sets.columns, **told},
            "notes": [*NOTES, "Each slice is scaled from 0 to its own maximum.", origin],
        }
        with DatasetWriter(args.out, card, overwrite=args.overwrite) as writer:
            for number, file in _files(folder):
                patient, kind = known[number]
                image, mask = _read(number, file, "image", "tumorMask")
                writer.add(
                    case_id=f"brain_{int(number):04d}",
                    patient_id=patient,
                    split=split[patient],
                    image=np.clip(image / max(float(image.max()), 1.0), 0, 1),
                    mask=mask > 0,
                    spacing=(1, 1),
                    prompts={
                        "class@pathology": brain_class(kind),
                        **sets.of(kind),
                        **{column: published.get(number) for column in told},
                    },
                )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    build = {True: from_mirror, False: from_archive}
    run("figshare_brain_tumor", lambda args: build[bool(args.mirror)](args), __doc__, WHERE, argv=argv)


if __name__ == "__main__":
    main()
