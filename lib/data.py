"""Dataset folders, their cases, and the batches made from them."""

import csv
import hashlib
import json
import math
import os
import re
import shutil
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Literal, Self

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lib.files import DataError, full_disk, sha256_file
from lib.text import Prompts, role_of

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
COLUMNS = ("case_id", "patient_id", "split", "image", "mask", "spacing")
OUTCOME = ("time", "event")  # columns of datasets that know how long patients lived


class LeakageError(ValueError):
    """Training data and test data share a case, a patient or an image."""


# ----------------------------------------------------------------------------------------------------------
# Dataset folders
# ----------------------------------------------------------------------------------------------------------


class PromptColumn(BaseModel, extra="forbid"):
    """Where the text of one prompt column comes from."""

    role: str
    origin: Literal["metadata", "human", "mask-derived", "class-oracle", "template"]
    source: str


class Card(BaseModel, extra="forbid"):
    """What card.json says of a dataset."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    title: str
    modality: str
    dims: Literal[0, 2, 3]  # 0: records of patients, without images
    classes: dict[str, int]  # what is outlined -> its number, in the order in which a volume's cases stand
    level: Literal["P", "S", "R"]  # phantom, semi-synthetic, real
    licence: str
    citation: str
    source: str
    splits: str  # how they were made, and whether by patient
    prompts: dict[str, PromptColumn]
    counts: dict[Split, int] = {}
    notes: list[str] = []
    fingerprint: str = ""

    @field_validator("prompts")
    @classmethod
    def _roles_are_known(cls, prompts: dict[str, PromptColumn]) -> dict[str, PromptColumn]:
        for column, described in prompts.items():
            if role_of(column) != described.role:
                raise ValueError(f"column '{column}' is described as role '{described.role}'")
        return prompts

    @model_validator(mode="after")
    def _images_show_something(self) -> Self:
        if self.dims and not self.classes:
            raise ValueError("classes: a dataset with images names at least one")
        return self


@dataclass(frozen=True)
class Case:
    """One image with one mask and the prompts that ask for it; spacing in mm, in array order (slices or rows first).

    A volume with several structures is several cases that share an image; a record without an image has neither.
    """

    dataset: str
    case_id: str
    patient_id: str
    split: str
    image: Path | None
    mask: Path | None
    spacing: tuple[float, ...]
    prompts: dict[str, str | None]
    outcome: tuple[float, bool] | None = None  # days until the event (or the last visit), and whether it came

    @property
    def volume(self) -> str:
        """The name of the image, which in a volume with several structures is the start of the case id."""
        return self.image.name.removesuffix(".gz").rpartition(".")[0] if self.image else self.case_id

    @property
    def target(self) -> str:
        """The structure of a volume that this case is about, a class of the card; empty where there is but one."""
        return self.case_id.removeprefix(self.volume).removeprefix(".")


@dataclass(frozen=True)
class Dataset:
    """A dataset folder that has been read and checked."""

    root: Path
    card: Card
    cases: tuple[Case, ...]

    def split(self, name: str) -> tuple[Case, ...]:
        """The cases of one split."""
        if name not in self.card.counts:
            raise DataError(
                f"Dataset '{self.card.name}' has no split '{name}': use one of {', '.join(self.card.counts)}."
            )
        return tuple(case for case in self.cases if case.split == name)


def load_dataset(folder: str | Path, *, verify: bool = False) -> Dataset:
    """Read a dataset folder and check it; `verify` also hashes and decodes every file."""
    root = Path(folder)
    if not (root / "card.json").is_file():
        raise DataError(
            f"{root} is not a dataset folder (it has no card.json): make it with its script in data_scripts/."
        )
    card = _read_card(root / "card.json")
    if card.name != Path(os.path.abspath(root)).name:
        raise DataError(f"{root / 'card.json'} names the dataset '{card.name}': give its folder that name.")
    cases = _read_cases(root, card)
    for case in cases:
        for path in (case.image, case.mask):
            if path and not path.is_file():
                raise DataError(f"{path} is listed in cases.csv and missing: make the dataset again.")
    if verify:
        if _fingerprint(root) != card.fingerprint:
            raise DataError(
                f"The files of {root} do not have the checksum in its card.json, so something was changed "
                "or damaged: make the dataset again."
            )
        for case in cases:
            if case.image:
                _decode(case, channels=None)
    return Dataset(root, card, cases)


def _read_card(path: Path) -> Card:
    try:
        return Card.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(f"{path} is not a valid card: {_first(error)}; make the dataset again.") from error


def _first(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    return f"{where or 'it'}: {problem['msg'].removeprefix('Value error, ').rstrip('.')}"


def _read_cases(root: Path, card: Card) -> tuple[Case, ...]:
    path = root / "cases.csv"
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header, *rows = csv.reader(file, strict=True)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: make the dataset again.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8.") from error
    except (ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a table ({error}): make the dataset again.") from error
    known = (*COLUMNS, *OUTCOME) if set(OUTCOME) <= set(header) else COLUMNS
    for column in header:
        if column not in known:
            _known_role(column, path)
    for column in (*COLUMNS, *card.prompts):
        if column not in header:
            raise DataError(f"{path} lacks the column '{column}': add it or make the dataset again.")
    if undescribed := [c for c in header if c not in known and c not in card.prompts]:
        raise DataError(
            f"{path} has the prompt column '{undescribed[0]}' of which card.json does not tell the origin: "
            "describe it there under prompts."
        )
    for line, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise DataError(f"{path} has {len(row)} cells in row {line} and {len(header)} columns: repair it.")
    cases = tuple(_case(root, card, dict(zip(header, row, strict=True))) for row in rows)
    _check_cases(cases, card, path)
    return cases


def _known_role(column: str, path: Path) -> None:
    try:
        role_of(column)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def _case(root: Path, card: Card, row: dict[str, str]) -> Case:
    def inside(name: str) -> Path | None:
        path = PurePosixPath(name)
        if not name and card.dims == 0:
            return None
        if not name or path.is_absolute() or ".." in path.parts:
            raise DataError(
                f"{root / 'cases.csv'} gives '{name}' as a file of case '{row['case_id']}': "
                "paths must lie inside the dataset folder."
            )
        return root / path

    try:
        spacing = tuple(float(number) for number in row["spacing"].split())
    except ValueError:
        spacing = ()
    if len(spacing) != card.dims or not all(0 < number < np.inf for number in spacing):
        raise DataError(
            f"{root / 'cases.csv'} gives '{row['spacing']}' as the spacing of case '{row['case_id']}': "
            f"expected {card.dims} positive numbers (mm) with a space between."
        )
    return Case(
        dataset=card.name,
        case_id=row["case_id"],
        patient_id=row["patient_id"],
        split=row["split"],
        image=inside(row["image"]),
        mask=inside(row["mask"]),
        spacing=spacing,
        prompts={column: row[column] or None for column in card.prompts},
        outcome=_outcome(root, row),
    )


def _outcome(root: Path, row: dict[str, str]) -> tuple[float, bool] | None:
    days, event = row.get("time", ""), row.get("event", "")
    if not days and not event:
        return None
    try:
        time = float(days)
    except ValueError:
        time = math.nan
    if not 0 < time < math.inf or event not in ("0", "1"):
        raise DataError(
            f"{root / 'cases.csv'} gives case '{row['case_id']}' the outcome '{days}', '{event}': "
            "expected a positive number of days and 1 for an event or 0 for the last visit."
        )
    return time, event == "1"


def _check_cases(cases: Sequence[Case], card: Card, path: Path) -> None:
    for case_id, times in Counter(case.case_id for case in cases).items():
        if times > 1 or not case_id:
            raise DataError(f"{path} has {times} rows with the case id '{case_id}': give each case its own.")
    home: dict[str, str] = {}
    shared: dict[Path, Case] = {}
    for case in cases:
        if case.image:
            other = shared.setdefault(case.image, case)
            if (other.spacing, other.outcome) != (case.spacing, case.outcome):
                raise DataError(
                    f"{path} gives the cases '{other.case_id}' and '{case.case_id}' of one image another spacing or "
                    "outcome: repair it."
                )
        if case.split not in SPLITS:
            raise DataError(
                f"{path} puts case '{case.case_id}' into the split '{case.split}': use {', '.join(SPLITS)}."
            )
        if not case.patient_id:
            raise DataError(f"{path} gives case '{case.case_id}' no patient id: repeat the case id there.")
        if home.setdefault(case.patient_id, case.split) != case.split:
            raise DataError(
                f"{path} has patient '{case.patient_id}' in the splits {home[case.patient_id]} and "
                f"{case.split}: keep each patient in one."
            )
    counts = Counter(case.split for case in cases)
    for split in card.counts:
        if not counts[split]:
            raise DataError(f"{path} has no case in the split '{split}' of card.json: make the dataset again.")
    if dict(counts) != card.counts:
        raise DataError(f"{path} has {dict(counts)} cases and card.json counts {card.counts}: make the dataset again.")


def _fingerprint(root: Path) -> str:
    """One hash over every visible file but the card, whose wording may change without changing the data."""
    files = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.is_file() and path.name != "card.json" and not path.name.startswith(".")
    )
    digest = hashlib.sha256()
    for name in files:
        digest.update(f"{name}\0{sha256_file(root / name)}\n".encode())
    return digest.hexdigest()


class DatasetWriter:
    """Builds a dataset folder out of sight and shows it only when it is whole.

    `card_fields` are the fields of Card without name (the folder's), counts and fingerprint. A folder that is
    there already is replaced only with `overwrite`. Whatever goes wrong, no part of a dataset is left behind;
    what a killed run left is removed by the next one.
    """

    def __init__(self, folder: str | Path, card_fields: dict, overwrite: bool = False) -> None:
        self.folder = Path(os.path.abspath(folder))
        self.overwrite = overwrite
        try:
            self._card = Card(**{"name": self.folder.name, **card_fields})
        except ValidationError as error:
            raise DataError(f"The card for {self.folder} is not valid: {_first(error)}.") from error
        if self._card.name != self.folder.name:
            raise DataError(f"Dataset '{self._card.name}' must be written into a folder of that name.")
        self._cases: dict[str, Case] = {}

    def __enter__(self) -> Self:
        if self.folder.exists() and not self.overwrite:
            raise DataError(f"{self.folder} exists already: give --overwrite (or remove it) to make it again.")
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._remove_stale()
        me = psutil.Process()
        self._draft = self._sibling(f"{me.pid}-{int(me.create_time())}-{uuid.uuid4().hex[:8]}")
        for part in ("images", "masks"):
            (self._draft / part).mkdir(parents=True)
        return self

    def _sibling(self, suffix: str) -> Path:
        return self.folder.with_name(f".{self.folder.name}.partial-{suffix}")

    def _remove_stale(self) -> None:
        pattern = re.compile(re.escape(self._sibling("").name) + r"(\d+)-(\d+)-\w+")
        for left in self.folder.parent.iterdir():
            if not (match := pattern.fullmatch(left.name)):
                continue
            pid, created = match.groups()
            try:
                alive = int(psutil.Process(int(pid)).create_time()) == int(created)
            except psutil.NoSuchProcess:
                alive = False
            if not alive:
                shutil.rmtree(left, ignore_errors=True)

    def add(
        self,
        *,
        case_id: str,
        patient_id: str,
        split: str,
        image: np.ndarray,
        mask: np.ndarray,
        spacing: Sequence[float],
        prompts: dict[str, str | None],
    ) -> None:
        """Add a case.

        image: [*S] grey or [H, W, 3], uint8 or float in [0, 1]; mask: [*S] of 0 and 1 (or 255);
        spacing: mm per array axis, 1 where unknown; prompts: declared column -> text or None.
        """
        image, mask = np.asarray(image), np.asarray(mask)
        where = self._where(case_id)
        self._check_image(image, where)
        _check_mask(mask, image.shape[: self._card.dims], f"The mask of {where}")
        self._register(case_id, patient_id, split, prompts, spacing=spacing, files=(case_id, case_id))
        self._write(self._cases[case_id].image, image)
        self._write(self._cases[case_id].mask, (mask > 0).astype(np.uint8) * (255 if self._card.dims == 2 else 1))

    def add_volume(
        self,
        *,
        case_id: str,
        patient_id: str,
        split: str,
        image: np.ndarray,
        masks: dict[str, np.ndarray],
        spacing: Sequence[float],
        prompts: dict[str, dict[str, str | None]],
        outcome: tuple[float, bool] | None = None,
    ) -> None:
        """Add a volume with a mask for each class that is labelled in it: a case `<case_id>.<class>` for each.

        image: [D, H, W] uint8 or float in [0, 1]; masks: class -> [D, H, W] of 0 and 1, all 0 where the structure is
        labelled as absent; spacing: mm per array axis; prompts: class -> declared column -> text or None;
        outcome: (days, event), the same for all volumes of a patient.
        """
        image, where = np.asarray(image), self._where(case_id)
        if self._card.dims != 3:
            raise DataError(f"{where[0].upper()}{where[1:]} is a volume: give its card 3 dims.")
        self._check_image(image, where)
        if unknown := set(masks) - set(self._card.classes):
            raise DataError(
                f"{where[0].upper()}{where[1:]} has a mask of '{min(unknown)}', which is no class of its card: "
                f"use {', '.join(self._card.classes)}."
            )
        if not masks or masks.keys() != prompts.keys():
            raise DataError(
                f"{where[0].upper()}{where[1:]} has masks of {', '.join(masks) or 'nothing'} and prompts for "
                f"{', '.join(prompts) or 'nothing'}: give both for the same classes."
            )
        for name in sorted(masks, key=list(self._card.classes).index):
            _check_mask(np.asarray(masks[name]), image.shape, f"The mask of {name} of {where}")
            row = f"{case_id}.{name}"
            files = (case_id, row)
            self._register(row, patient_id, split, prompts[name], spacing=spacing, files=files, outcome=outcome)
            self._write(self._cases[row].mask, (np.asarray(masks[name]) > 0).astype(np.uint8))
        self._write(self._cases[row].image, image)

    def add_record(
        self,
        *,
        case_id: str,
        patient_id: str,
        split: str,
        prompts: dict[str, str | None],
        outcome: tuple[float, bool] | None = None,
    ) -> None:
        """Add a patient's record without an image, to a dataset whose card has 0 dims; outcome: (days, event)."""
        if self._card.dims:
            raise DataError(f"The card of '{self._card.name}' has {self._card.dims} dims: records need a card with 0.")
        self._register(case_id, patient_id, split, prompts, outcome=outcome)

    def _where(self, case_id: str) -> str:
        return f"case '{case_id}' of dataset '{self._card.name}'"

    def _check_image(self, image: np.ndarray, where: str) -> None:
        dims = self._card.dims
        colour = dims == 2 and image.ndim == 3 and image.shape[-1] == 3
        if image.ndim != dims + colour:
            raise DataError(
                f"The image of {where} has the shape {image.shape}: expected {dims} axes"
                + (", or a third one of 3 colours." if dims == 2 else ".")
            )
        if image.dtype != np.uint8:
            _check_range(image, f"The image of {where}")

    def _register(
        self,
        case_id: str,
        patient_id: str,
        split: str,
        prompts: dict[str, str | None],
        *,
        spacing: Sequence[float] = (),
        files: tuple[str, str] | None = None,
        outcome: tuple[float, bool] | None = None,
    ) -> None:
        """Check and keep the row of a case; files: the stems of its image and its mask."""
        where = self._where(case_id)
        if not case_id or set(case_id) - set(_FILE_CHARACTERS):
            raise DataError(f"The case id '{case_id}' cannot name a file: use letters, digits, '.', '_', '-'.")
        if case_id in self._cases:
            raise DataError(f"{where[0].upper()}{where[1:]} was added twice: give each case its own id.")
        if unknown := set(prompts) - set(self._card.prompts):
            raise DataError(
                f"The prompts of {where} have the column '{min(unknown)}', which its card does not describe: "
                f"use {', '.join(self._card.prompts) or 'none'}."
            )
        if len(spacing) != self._card.dims or not all(0 < number < math.inf for number in spacing):
            raise DataError(
                f"The spacing of {where} is {tuple(spacing)}: expected {self._card.dims} positive numbers in mm."
            )
        suffix = ".png" if self._card.dims == 2 else ".nii.gz"
        self._cases[case_id] = Case(
            dataset=self._card.name,
            case_id=case_id,
            patient_id=patient_id,
            split=split,
            image=self._draft / "images" / f"{files[0]}{suffix}" if files else None,
            mask=self._draft / "masks" / f"{files[1]}{suffix}" if files else None,
            spacing=tuple(float(number) for number in spacing),
            prompts={column: prompts.get(column) or None for column in self._card.prompts},
            outcome=outcome and (float(outcome[0]), bool(outcome[1])),
        )

    def _write(self, path: Path, array: np.ndarray) -> None:
        if self._card.dims == 2:
            _write_png(path, array if array.dtype == np.uint8 else np.round(array * 255).astype(np.uint8))
        else:
            array = array if array.dtype == np.uint8 else array.astype(np.float32)
            _write_nifti(path, array, next(reversed(self._cases.values())).spacing)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self._finish()
            elif full := full_disk(error, self.folder):
                raise full from error
        except OSError as failure:
            raise full_disk(failure, self.folder) or failure from None
        finally:
            shutil.rmtree(self._draft, ignore_errors=True)

    def _finish(self) -> None:
        if not self._cases:
            raise DataError(f"No case was added to {self.folder}, so it was not written: check its source.")
        card = self._card
        counts = Counter(case.split for case in self._cases.values())
        card.counts = {split: counts[split] for split in SPLITS if counts[split]}
        with open(self._draft / "cases.csv", "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            known = OUTCOME if any(case.outcome for case in self._cases.values()) else ()
            table.writerow([*COLUMNS, *known, *card.prompts])
            for case in self._cases.values():
                paths = [p.relative_to(self._draft).as_posix() if p else "" for p in (case.image, case.mask)]
                spacing = " ".join(f"{number:.6g}" for number in case.spacing)
                outcome = [f"{case.outcome[0]:g}", int(case.outcome[1])] if case.outcome else ["", ""]
                texts = [case.prompts[column] or "" for column in card.prompts]
                row = [case.case_id, case.patient_id, case.split, *paths, spacing, *outcome[: len(known)], *texts]
                table.writerow(row)
        card.fingerprint = _fingerprint(self._draft)
        (self._draft / "card.json").write_text(
            json.dumps(card.model_dump(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        _read_cases(self._draft, _read_card(self._draft / "card.json"))
        if self.folder.exists():  # a folder cannot be replaced in one step: the old one steps aside first
            old = self._draft.with_name(f"{self._draft.name}0")
            os.replace(self.folder, old)
            os.replace(self._draft, self.folder)
            shutil.rmtree(old)
        else:
            os.replace(self._draft, self.folder)


_FILE_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"


def _write_png(path: Path, array: np.ndarray) -> None:
    Image.fromarray(array).save(path)


def _write_nifti(path: Path, array: np.ndarray, spacing: Sequence[float]) -> None:
    import nibabel

    # NIfTI counts x, y, z and arrays here are [depth, row, column], so the axes are turned round on disk.
    nibabel.save(nibabel.Nifti1Image(array.transpose(), np.diag([*spacing[::-1], 1.0])), path)


# ----------------------------------------------------------------------------------------------------------
# Pixels
# ----------------------------------------------------------------------------------------------------------


@cache
def _reader(volume: bool):
    # MONAI takes seconds to import; whoever only lists cases or writes datasets should not wait for it.
    from monai.data import NibabelReader, PILReader

    return NibabelReader() if volume else PILReader(converter=_known_mode, reverse_indexing=False)


def _known_mode(image: Image.Image) -> Image.Image:
    if image.mode not in ("1", "L", "I;16", "RGB"):
        raise DataError(
            f"has {len(image.getbands())} channels (mode {image.mode}), expected grey or RGB: "
            "save it again as one of these"
        )
    return image


def _read(path: Path) -> np.ndarray:
    volume = path.name.endswith((".nii", ".nii.gz"))
    reader = _reader(volume)
    try:
        array, _ = reader.get_data(reader.read(path))
        return array.transpose() if volume else array
    except DataError as error:
        raise DataError(f"{path} {error}.") from error
    except Exception as error:  # every decoder has its own errors for damage, and none names the remedy
        raise DataError(
            f"{path} cannot be decoded ({type(error).__name__}): it is damaged or cut short, so make the dataset again."
        ) from error


def _check_range(image: np.ndarray, what: str) -> None:
    if not np.isfinite(image).all():
        raise DataError(f"{what} has NaN or infinite pixels: repair it in the script that makes the dataset.")
    if not (np.issubdtype(image.dtype, np.floating) and image.min() >= 0 and image.max() <= 1):
        raise DataError(
            f"{what} holds {image.dtype} from {image.min():g} to {image.max():g}: "
            "expected uint8, or floats scaled to between 0 and 1."
        )


def _check_mask(mask: np.ndarray, shape: tuple[int, ...], what: str) -> None:
    if mask.shape != shape:
        raise DataError(f"{what} has the shape {mask.shape} and its image {shape}: make the two the same.")
    top = mask.max(initial=0)
    if top not in (0, 1, 255) or not ((mask == 0) | (mask == top)).all():
        raise DataError(
            f"{what} has {len(np.unique(mask))} different values up to {top:g}: "
            "expected a binary mask of 0 and 255 (or 0 and 1)."
        )


def _decode(case: Case, channels: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Read a case's image, [C, *S] float32 in [0, 1], and mask, [*S] uint8 of 0 and 1."""
    image, masks = _decode_all([case], channels)
    return image, masks[0]


def _decode_all(cases: Sequence[Case], channels: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Read the image that cases share, [C, *S] float32 in [0, 1], and their masks, [K, *S] uint8 of 0 and 1."""
    case = cases[0]
    image, masks = _read(case.image), [_read(one.mask) for one in cases]
    dims = len(case.spacing)
    if image.ndim == dims:
        image = image[None]
    elif image.ndim == dims + 1 == 3:
        image = np.moveaxis(image, -1, 0)
    else:
        raise DataError(f"{case.image} has {image.ndim} axes, expected {dims}: make the dataset again.")
    if channels is not None and len(image) != channels:
        if len(image) != 1:
            raise DataError(f"{case.image} has {len(image)} channels and {channels} was asked for: ask for 3.")
        image = np.repeat(image, channels, axis=0)
    if image.dtype in (np.uint8, np.uint16):
        image = image / np.float32(np.iinfo(image.dtype).max)
    elif image.dtype == bool:
        image = image.astype(np.float32)
    else:
        _check_range(image, str(case.image))
    for one, mask in zip(cases, masks, strict=True):
        _check_mask(mask, image.shape[1:], str(one.mask))
    return image.astype(np.float32), (np.stack(masks) > 0).astype(np.uint8)


def _resize(image: Tensor, mask: Tensor, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Resize [C, *S] and [K, *S]: the image linearly with antialiasing, the masks by nearest neighbour."""
    if tuple(image.shape[1:]) == size:
        return image, mask
    if len(size) == 2:
        # Pillow's antialiased bilinear filter, in a tenth of the time of MONAI's blur and resize.
        image = F.interpolate(image[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
    else:
        from monai.transforms import Resize

        image = Resize(size, mode="trilinear", anti_aliasing=True)(image).as_tensor()
    return image.clamp(0, 1), F.interpolate(mask[None], size, mode="nearest-exact")[0]


def _resample(
    image: Tensor, mask: Tensor, old: Sequence[float], spacing: float, size: tuple[int, ...], where: str
) -> tuple[Tensor, Tensor]:
    """Bring [C, *S] and [K, *S] to isotropic voxels of `spacing` mm, in the middle of a grid of `size` voxels."""
    grid = tuple(max(1, round(n * mm / spacing)) for n, mm in zip(image.shape[1:], old, strict=True))
    if any(n > most for n, most in zip(grid, size, strict=True)):
        raise DataError(
            f"{where} has {'x'.join(map(str, grid))} voxels of {spacing:g} mm and the grid {'x'.join(map(str, size))}: "
            "ask for a larger size or spacing."
        )
    image, mask = _resize(image, mask, grid)
    margins = [((most - n) // 2, most - n - (most - n) // 2) for n, most in zip(grid, size, strict=True)]
    pad = [side for margin in reversed(margins) for side in margin]
    return F.pad(image, pad), F.pad(mask, pad)


# ----------------------------------------------------------------------------------------------------------
# Batches
# ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageCache:
    """Cases decoded and resized once, resident on a device; an image that several cases share is there once.

    images: [M, C, *S] float32 in [0, 1]; masks: [N, 1, *S] uint8 of 0 and 1, of the N cases; rows: [M, K] which cases
    an image has, in their order, then -1; spacing: [M, dims] mm of the resized grid; outcomes: [M, 2] days and event,
    NaN where unknown. In 2-D, M = N and K = 1.
    """

    images: Tensor
    masks: Tensor
    rows: Tensor
    spacing: Tensor
    outcomes: Tensor
    cases: tuple[Case, ...]

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def load(
        cls,
        cases: Iterable[Case],
        size: int | tuple[int, ...],
        channels: int = 1,
        device: torch.device | str = "cpu",
        drop_empty: bool = False,
        spacing: float | None = None,
    ) -> Self:
        """Decode cases at `size` (image antialiased, masks nearest); `drop_empty` leaves out empty masks.

        With `spacing` volumes are resampled to isotropic voxels of so many mm and stand in the middle of a grid of
        `size`; without it they are resized to that grid, whatever their shape.
        """
        if channels not in (1, 3):
            raise DataError(f"Images with {channels} channels were asked for: ask for 1 or 3.")
        shared: dict[Path | str, list[Case]] = {}
        for case in cases:
            shared.setdefault(case.image or case.case_id, []).append(case)
        images, masks, rows, grids, outcomes, kept = [], [], [], [], [], []
        for group in shared.values():
            first = group[0]
            if first.image is None:  # a record: one voxel that shows nothing
                images.append(torch.zeros(channels, 1, 1, 1))
                found, here, grids = torch.zeros(1, 1, 1, 1, dtype=torch.uint8), group, [*grids, [1.0, 1.0, 1.0]]
            else:
                image, mask = _decode_all(group, channels)
                here = [case for case, one in zip(group, mask, strict=True) if one.any() or not drop_empty]
                if not here:
                    continue
                mask = mask[[one.any() or not drop_empty for one in mask]]
                grid = (size,) * (mask.ndim - 1) if isinstance(size, int) else tuple(size)
                if len(grid) != mask.ndim - 1:
                    raise DataError(f"{first.image} has {mask.ndim - 1} axes and the size asked for is {grid}.")
                pair = torch.from_numpy(image), torch.from_numpy(mask)
                if spacing:
                    resized = _resample(*pair, first.spacing, spacing, grid, str(first.image))
                    grids.append([spacing] * len(grid))
                else:
                    resized = _resize(*pair, grid)
                    sides = zip(first.spacing, mask.shape[1:], grid, strict=True)
                    grids.append([mm * old / new for mm, old, new in sides])
                images.append(resized[0])
                found = resized[1]
            masks.append(found)
            rows.append(torch.arange(len(kept), len(kept) + len(here)))
            outcomes.append(first.outcome or (math.nan, math.nan))
            kept += here
        if not kept:
            raise DataError("There is no case to load: choose another split, or keep cases with empty masks.")
        return cls(
            images=torch.stack(images).to(device),
            masks=torch.cat(masks)[:, None].to(device),
            rows=pad_sequence(rows, batch_first=True, padding_value=-1).to(device),
            spacing=torch.tensor(grids, device=device),
            outcomes=torch.tensor(outcomes, device=device),
            cases=tuple(kept),
        )

    def corrupted(self, name: str, strength: float) -> Self:
        """Return the cache as a worse camera would have given it: a name of CORRUPTIONS; 0 changes nothing."""
        if name not in CORRUPTIONS:
            raise DataError(f"Unknown corruption '{name}': use one of {', '.join(CORRUPTIONS)}.")
        if not strength >= 0:
            raise DataError(f"The corruption '{name}' has the strength {strength}: give 0 or more.")
        if strength == 0:
            return self
        shown = [self.cases[row] for row in self.rows[:, 0].tolist()]
        seeds = [zlib.crc32(f"{case.dataset}/{case.volume}".encode()) for case in shown]
        noise = [torch.randn(self.images.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        images = CORRUPTIONS[name](self.images, strength, torch.stack(noise).to(self.images.device))
        return replace(self, images=images.clamp(0, 1))

    def transposed(self) -> Self:
        """Return the cache with rows and columns of images and masks exchanged (2-D)."""
        images, masks = self.images.transpose(-1, -2), self.masks.transpose(-1, -2)
        return replace(self, images=images.contiguous(), masks=masks.contiguous(), spacing=self.spacing.flip(-1))


def _blur(images: Tensor, strength: float, noise: Tensor) -> Tensor:
    """Gaussian blur; the strength is σ in pixels."""
    from torchvision.transforms.v2.functional import gaussian_blur

    width = min(2 * math.ceil(3 * strength) + 1, 2 * (min(images.shape[-2:]) // 2) - 1)
    return gaussian_blur(images, [width, width], [strength, strength])


def _noise(images: Tensor, strength: float, noise: Tensor) -> Tensor:
    """Gaussian noise of this standard deviation, the same for a case at every strength but for its size."""
    return images + strength * noise


def _low_contrast(images: Tensor, strength: float, noise: Tensor) -> Tensor:
    """Draw every pixel towards its image's mean, but not the noise of a sensor (.02); 1 leaves only that."""
    mean = images.flatten(1).mean(1).view(-1, *[1] * (images.ndim - 1))
    return mean + (1 - min(strength, 1)) * (images - mean) + 0.02 * noise  # or a z-score would bring all of it back


CORRUPTIONS: dict[str, Callable[[Tensor, float, Tensor], Tensor]] = {
    "blur": _blur,
    "noise": _noise,
    "low_contrast": _low_contrast,
}


@dataclass(frozen=True)
class Batch:
    """What one training or evaluation step receives, of B images with up to K cases each.

    image [B, C, *S]; mask [B, K, *S] float32, -1 where an image has fewer cases; prompts of B·K cases, those of an
    image after one another; index [B] the images' numbers in the feed; outcome [B, 2] days and event, NaN if unknown.
    """

    image: Tensor
    mask: Tensor
    prompts: Prompts
    index: Tensor
    outcome: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def prompts_for(self, model: object, generator: torch.Generator):
        """What a model is asked: the texts, or what it draws from the masks itself if it has `draw` (SAM)."""
        return model.draw(self.mask, generator) if hasattr(model, "draw") else self.prompts


class Feed:
    """An image cache with its embedded prompts, from which batches are cut by index.

    `rewordings` are further prompts of the same cases: in training each image is read with those or these, by lot.
    `window` is the edge of the part of a volume that a training step sees.
    """

    def __init__(
        self,
        cache: ImageCache,
        prompts: Prompts,
        augment: str = "none",
        rewordings: Sequence[Prompts] = (),
        window: int | None = None,
    ) -> None:
        if augment not in AUGMENTATIONS:
            raise DataError(f"Unknown augmentation '{augment}': use one of {', '.join(AUGMENTATIONS)}.")
        for worded in (prompts, *rewordings):
            for role, present in worded.present.items():
                if len(present) != len(cache.cases):
                    raise DataError(
                        f"There are {len(present)} prompts of role '{role}' for {len(cache.cases)} cases: "
                        "embed the texts of exactly these cases."
                    )
        if window and window > min(cache.images.shape[2:]):
            raise DataError(
                f"A window of {window} was asked for and the grid is {'x'.join(map(str, cache.images.shape[2:]))}: "
                "load the volumes on a larger grid, which pads them, or ask for a smaller window."
            )
        self.cache = cache
        self.prompts = prompts.to(cache.images.device)
        self.rewordings = tuple(worded.to(cache.images.device) for worded in rewordings)
        self.augment = AUGMENTATIONS[augment]
        self.window = window

    def __len__(self) -> int:
        return len(self.cache)

    def batch(self, index: Tensor, step_seed: int | None = None) -> Batch:
        """Cut a batch; it is augmented only if a seed is given, and then as a function of that seed alone."""
        index = torch.as_tensor(index, device=self.cache.images.device)
        rows = self.cache.rows[index]
        rows = rows[:, : int((rows >= 0).sum(1).max())]
        cases = rows.clamp(min=0)  # where an image has fewer, any other stands in and its mask is struck out below
        image, mask = self.cache.images[index], self.cache.masks[cases, 0].float()
        prompts = self.prompts
        if step_seed is not None:
            generator = torch.Generator().manual_seed(step_seed)
            if self.window:
                image, mask = _cut(image, mask, self.window, generator)
            for step in self.augment:
                image, mask = step(image, mask, generator)
            if self.rewordings:
                chosen = torch.randint(len(self.rewordings) + 1, (len(index), 1), generator=generator)
                prompts = _by_lot((prompts, *self.rewordings), chosen.to(cases.device).expand_as(cases), cases)
                cases = torch.arange(cases.numel(), device=cases.device)
        mask = mask.masked_fill((rows < 0).view(*rows.shape, *[1] * (mask.ndim - 2)), -1)
        return Batch(image, mask, prompts[cases.flatten()], index, self.cache.outcomes[index])


def _by_lot(worded: Sequence[Prompts], chosen: Tensor, cases: Tensor) -> Prompts:
    """The prompts of cases [B, K], each from the one of `worded` that is chosen for it [B, K]."""

    def pick(name: str) -> dict[str, Tensor]:
        groups = [getattr(prompts, name) for prompts in worded]
        return {role: torch.stack([group[role] for group in groups])[chosen, cases].flatten(0, 1) for role in groups[0]}

    return Prompts(*(pick(name) for name in ("pooled", "present", "tokens", "token_mask")))


def _cut(image: Tensor, mask: Tensor, window: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cut a cube out of each volume; every second one is about a voxel of a structure, if there is any."""
    parts = []
    for number, (volume, structures) in enumerate(zip(image, mask, strict=True)):
        room = torch.tensor(volume.shape[1:]) - window
        start = (torch.rand(room.numel(), generator=generator) * (room + 1)).long()
        inside = structures.amax(0).nonzero() if number % 2 == 0 else structures.new_zeros(0, 3)
        if len(inside):
            voxel = inside[int(torch.randint(len(inside), (1,), generator=generator))].cpu()
            start = (voxel - window // 2).clamp(min=0).minimum(room)
        place = (slice(None), *(slice(int(at), int(at) + window) for at in start))
        parts.append((volume[place], structures[place]))
    return torch.stack([volume for volume, _ in parts]), torch.stack([structures for _, structures in parts])


# Augmentations work on whole batches with a few tensor operations, as MONAI's per-item transforms would cost
# more than the training step of a small model.


def _uniform(generator: torch.Generator, like: Tensor, low: float, high: float) -> Tensor:
    """[B, 1, ...] random numbers, drawn on the CPU so that every device sees the same ones."""
    numbers = torch.rand(len(like), generator=generator) * (high - low) + low
    return numbers.to(like.device).view(-1, *[1] * (like.ndim - 1))


def _flip(image: Tensor, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirror half of the images left to right."""
    chosen = _uniform(generator, image, 0, 1) < 0.5
    return torch.where(chosen, image.flip(-1), image), torch.where(chosen, mask.flip(-1), mask)


def _affine(image: Tensor, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Turn in the image plane by up to 15°, scale by up to 15 % and shift by up to 5 % of the image."""
    number, dims = len(image), image.ndim - 2
    draw = partial(torch.rand, generator=generator)
    angle = (draw(number) * 2 - 1) * (np.pi / 12)
    scale = 1 + (draw(number, 1, 1) * 2 - 1) * 0.15
    height, width = image.shape[-2:]
    turn = torch.eye(dims).repeat(number, 1, 1)
    turn[:, 0, 0] = turn[:, 1, 1] = angle.cos()
    # The grid's coordinates run over [-1, 1] on both axes, so an oblong image would be sheared without these.
    turn[:, 0, 1], turn[:, 1, 0] = -angle.sin() * height / width, angle.sin() * width / height
    shift = (draw(number, dims, 1) * 2 - 1) * 0.1
    theta = torch.cat([turn * scale, shift], dim=2).to(image.device)
    grid = F.affine_grid(theta, list(image.shape), align_corners=False)
    return (
        F.grid_sample(image, grid, mode="bilinear", align_corners=False),
        F.grid_sample(mask, grid, mode="nearest", align_corners=False),
    )


def _photometric(image: Tensor, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Change gamma, contrast and brightness, and add noise that differs in strength from image to image."""
    image = image.clamp_min(1e-6) ** _uniform(generator, image, -0.4, 0.4).exp()
    image = (image - 0.5) * _uniform(generator, image, 0.8, 1.2) + 0.5 + _uniform(generator, image, -0.1, 0.1)
    noise = torch.randn(image.shape, generator=generator).to(image.device)
    return (image + noise * _uniform(generator, image, 0, 0.05)).clamp(0, 1), mask


# `flip` swaps left and right: not for prompts that name a side.
AUGMENTATIONS: dict[str, tuple[Callable, ...]] = {
    "none": (),
    "flip": (_flip,),
    "geometric": (_affine,),
    "photometric": (_photometric,),
    "full": (_flip, _affine, _photometric),
}


# ----------------------------------------------------------------------------------------------------------
# Leakage
# ----------------------------------------------------------------------------------------------------------


def guard_leakage(train: Sequence[Case], test: Sequence[Case]) -> None:
    """Raise LeakageError if a case, a patient (of the same dataset) or an image's bytes are on both sides."""
    cases = {(case.dataset, case.case_id) for case in train}
    patients = {(case.dataset, case.patient_id) for case in train}
    for case in test:
        if (case.dataset, case.case_id) in cases:
            raise LeakageError(f"Case '{case.case_id}' of '{case.dataset}' is in both training and test data.")
        if (case.dataset, case.patient_id) in patients:
            raise LeakageError(
                f"Patient '{case.patient_id}' of '{case.dataset}' is in both training and test data "
                f"(test case '{case.case_id}'): split by patient."
            )
    # Equal files have equal sizes, so only the few whose size occurs on both sides need to be read.
    shown = [{case.image: case.image.stat().st_size for case in cases if case.image} for cases in (train, test)]
    common = set(shown[0].values()) & set(shown[1].values())
    trained = {sha256_file(image): image for image, size in shown[0].items() if size in common}
    for image, size in shown[1].items():
        if size in common and (twin := trained.get(sha256_file(image))):
            raise LeakageError(f"The test image {image} is the training image {twin}: take one of them out.")
