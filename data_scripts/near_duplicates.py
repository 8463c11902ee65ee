"""Images that nearly repeat one another: found, grouped as if of one patient, and kept on one side of a split."""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

HELD_OUT = {"train": 0, "val": 1, "test": 2}


def duplicate_groups(images: Sequence[np.ndarray], bits: int = 60, correlation: float = 0.955) -> np.ndarray:
    """Number the groups of near-duplicate images, [N] int; an image unlike all others is a group of its own.

    images: [H, W] uint8 each. Two are near-duplicates if their 16×16 difference hashes differ in at most `bits` of
    256 bits or their 32×32 thumbnails correlate by at least `correlation`. The defaults are those of BUSI: all its
    pairs near these limits were looked at; within them every pair shows the same scan or the same lesion, and a
    little beyond them the first unrelated pairs appear. No two of 1,273 BUS-BRA images of different patients are
    that much alike.
    """
    hashes, thumbnails = [], []
    for image in images:
        picture = Image.fromarray(image)
        grid = np.asarray(picture.resize((17, 16), Image.Resampling.LANCZOS), np.int16)
        hashes.append((grid[:, 1:] > grid[:, :-1]).ravel())
        thumbnail = np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR), np.float32).ravel()
        thumbnail = thumbnail - thumbnail.mean()
        thumbnails.append(thumbnail / max(np.linalg.norm(thumbnail), 1e-6))
    hashed, small = np.array(hashes, np.float32), np.array(thumbnails)
    pairs = [np.empty((2, 0), int)]
    for start in range(0, len(hashed), 512):  # in stripes, as all pairs of thousands of images fill the memory
        some, thumbs = hashed[start : start + 512], small[start : start + 512]
        differing = some @ (1 - hashed).T + (1 - some) @ hashed.T
        one, other = np.nonzero((differing <= bits) | (thumbs @ small.T >= correlation))
        pairs.append(np.stack([one + start, other]))
    one, other = np.concatenate(pairs, axis=1)
    alike = coo_array((np.ones(len(one), bool), (one, other)), shape=(len(hashed),) * 2)
    return connected_components(alike, directed=False)[1]


def name_groups(case_ids: Sequence[str], groups: np.ndarray, known: Sequence[str] = ()) -> list[str]:
    """A patient id per image: the known one of its group, else its own case id or `group-` and the group's first.

    known: patient ids as far as they are known, "" where not; patients who share a group become one.
    """
    first_with: dict[str, int] = {}
    shared = [first_with.setdefault(p, i) if p else i for i, p in enumerate(known or [""] * len(case_ids))]
    representative = [int(np.flatnonzero(groups == group)[0]) for group in groups]
    own = np.arange(len(case_ids))
    links = coo_array(
        (np.ones(2 * len(own), bool), (np.tile(own, 2), np.concatenate([shared, representative]))),
        shape=(len(own),) * 2,
    )
    members: dict[int, list[int]] = {}
    for i, group in enumerate(connected_components(links, directed=False)[1]):
        members.setdefault(int(group), []).append(i)
    names = [""] * len(case_ids)
    for group in members.values():
        patients = sorted({known[i] for i in group if known and known[i]})
        alone = case_ids[group[0]] if len(group) == 1 else f"group-{min(case_ids[i] for i in group)}"
        for i in group:
            names[i] = patients[0] if patients else alone
    return names


def repeats_of_held_out(patients: Sequence[str], splits: Sequence[str]) -> list[int]:
    """Which images belong to a patient (or group) that has images in a more held-out split."""
    furthest: dict[str, int] = {}
    for patient, split in zip(patients, splits, strict=True):
        furthest[patient] = max(furthest.get(patient, 0), HELD_OUT[split])
    return [i for i, (p, s) in enumerate(zip(patients, splits, strict=True)) if HELD_OUT[s] < furthest[p]]
