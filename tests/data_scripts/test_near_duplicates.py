"""Near-duplicates: found, named like patients, and kept out of training."""

import numpy as np
from near_duplicates import duplicate_groups, name_groups, repeats_of_held_out
from PIL import Image


def test_near_duplicates_survive_rescaling_and_noise_but_strangers_stay_apart(scene, rng):
    images = [scene()[0] for _ in range(6)]
    noisy = np.clip(images[0] + rng.integers(-12, 12, images[0].shape), 0, 255).astype(np.uint8)
    smaller = np.asarray(Image.fromarray(images[1]).resize((60, 45), Image.Resampling.BILINEAR))
    groups = duplicate_groups([*images, noisy, smaller])
    assert groups[6] == groups[0] and groups[7] == groups[1]
    assert len(set(groups.tolist())) == 6


def test_groups_are_named_after_their_first_case():
    names = name_groups(["b", "a", "c"], np.array([0, 0, 1]))
    assert names == ["group-a", "group-a", "c"]


def test_a_group_takes_the_patient_that_is_known_and_joins_patients_who_share_an_image():
    groups = np.array([0, 0, 1, 2, 2, 3])
    known = ["", "s2", "s2", "s3", "s1", ""]
    assert name_groups(list("abcdef"), groups, known) == ["s2", "s2", "s2", "s1", "s1", "f"]


def test_all_pairs_are_seen_also_across_stripes(rng):
    images = [rng.integers(0, 256, (20, 20), dtype=np.uint8) for _ in range(600)]
    groups = duplicate_groups([*images, images[3]], bits=4, correlation=0.999)
    assert groups[600] == groups[3] and len(set(groups.tolist())) == 600


def test_images_that_repeat_a_more_held_out_one_are_told():
    assert repeats_of_held_out(["a", "a", "b", "b", "c"], ["train", "test", "val", "train", "train"]) == [0, 3]
