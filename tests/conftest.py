"""What several tests share: a small dataset folder on disk, and a model small enough to train in a second."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the tests run several at a time

import numpy as np
import pytest
import torch
from torch import nn

from lib.data import DatasetWriter
from lib.models import Prediction

torch.set_num_threads(1)

TINY_CARD = {
    "title": "Discs left and right",
    "modality": "none",
    "dims": 2,
    "classes": {"disc": 1},
    "level": "P",
    "licence": "CC0-1.0",
    "citation": "none",
    "source": "made by a test",
    "splits": "by patient",
    "prompts": {
        "global": {"role": "global", "origin": "template", "source": "a constant sentence"},
        "local": {"role": "local", "origin": "metadata", "source": "the side of the disc"},
        "local@contradictory": {"role": "local", "origin": "human", "source": "the other side, every second case"},
    },
}


def write_tiny_dataset(folder, splits=None, side=24, seed=0):
    """Write images of a bright disc on each side, of which the mask and the local prompt tell one."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side]
    with DatasetWriter(folder, TINY_CARD) as writer:
        for split, count in (splits or {"train": 12, "val": 4, "test": 6}).items():
            for i in range(count):
                right = bool(rng.random() < 0.5)
                row = rng.integers(7, side - 7)
                discs = [(rows - row) ** 2 + (columns - centre) ** 2 < 16 for centre in (side // 4, 3 * side // 4)]
                image = 0.3 + 0.4 * (discs[0] | discs[1]) + rng.normal(0, 0.05, (side, side))
                words = ("disc on the left", "disc on the right")
                writer.add(
                    case_id=f"{split}{i:02d}",
                    patient_id=f"{split}{i // 2:02d}",
                    split=split,
                    image=image.clip(0, 1),
                    mask=discs[right],
                    spacing=(0.5, 0.5),
                    prompts={
                        "global": "a picture of two discs",
                        "local": words[right] if i % 3 else None,
                        "local@contradictory": words[not right] if i % 3 and i % 2 else None,
                    },
                )
    return folder


@pytest.fixture
def tiny_dataset(tmp_path):
    """A dataset folder of 22 images of 24 x 24 pixels: tmp_path/data/tiny."""
    (tmp_path / "data").mkdir()
    return write_tiny_dataset(tmp_path / "data" / "tiny")


VOLUME_CARD = TINY_CARD | {
    "title": "Two balls in a box",
    "dims": 3,
    "classes": {"left": 1, "right": 2, "third": 3},
    "prompts": {
        role: {"role": role, "origin": "template", "source": "a word"}
        for role in ("context", "target", "attribute.modality")
    }
    | {"target@other": {"role": "target", "origin": "template", "source": "the word of the other ball"}},
}


def write_volumes(folder, splits=None, sides=(16, 16, 16), spacing=(2.0, 2.0, 2.0), modalities=("CT", "MR"), seed=0):
    """Write volumes of a ball on each side, bright in CT and dark in MR; every third has a class labelled as absent."""
    rng = np.random.default_rng(seed)
    grid = np.mgrid[tuple(slice(side) for side in sides)]
    with DatasetWriter(folder, VOLUME_CARD) as writer:
        for split, count in (splits or {"train": 6, "val": 2, "test": 4}).items():
            for i in range(count):
                modality = modalities[i % len(modalities)]
                centres = {"left": 0.27, "right": 0.73}
                masks = {
                    name: sum((g - side * at) ** 2 for g, side, at in zip(grid, sides, (0.5, 0.5, place), strict=True))
                    < (min(sides) * 0.18 + rng.random()) ** 2
                    for name, place in centres.items()
                }
                sign = 1 if modality == "CT" else -1
                image = 0.5 + sign * 0.3 * (masks["left"] | masks["right"]) + rng.normal(0, 0.03, sides)
                if i % 3 == 2:
                    masks["third"] = np.zeros(sides, bool)
                writer.add_volume(
                    case_id=f"{split}{i}",
                    patient_id=f"{split}{i}",
                    split=split,
                    image=image.clip(0, 1),
                    masks=masks,
                    spacing=spacing,
                    prompts={
                        name: {
                            "context": f"a {modality} scan of a box",
                            "target": f"the {name} ball",
                            "target@other": {"left": "the right ball", "right": "the left ball"}.get(name),
                            "attribute.modality": modality,
                        }
                        for name in masks
                    },
                    outcome=(100.0 + i, i % 2 == 0),
                )
    return folder


@pytest.fixture
def volumes(tmp_path):
    """A dataset folder of 12 volumes of 16 voxels a side, with two or three structures each: tmp_path/data/balls."""
    (tmp_path / "data").mkdir(exist_ok=True)
    return write_volumes(tmp_path / "data" / "balls")


class TinyModel(nn.Module):
    """A convolution, a norm with running statistics, dropout, and the local prompt added to every pixel."""

    roles = ("local",)
    switches = {"prompt_gain": (0.0, 1.0)}

    def __init__(self, dim: int = 8, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.text = nn.Linear(dim, width)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Conv2d(width, 1, 3, padding=1)
        self.prompt_gain = 1.0

    def encode_image(self, image):
        return self.stem(image)

    def decode(self, features, prompts):
        word = self.text(prompts.pooled["local"]) * self.prompt_gain
        return Prediction(self.head(self.dropout(features + word[..., None, None])), {})

    def forward(self, image, prompts):
        return self.decode(self.encode_image(image), prompts)


@pytest.fixture
def tiny_model():
    """A function that builds the same small model each time."""

    def build(**sizes):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return TinyModel(**sizes)

    return build
