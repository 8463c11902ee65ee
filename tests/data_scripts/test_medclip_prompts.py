"""MedCLIP-SAMv2's prompt sets: their columns, origins and words, with and without the paper's lists."""

import argparse
import json
from pathlib import Path

import pytest
from medclip_prompts import MEANS, SUBJECTS, PromptSets, clean_caption, published_lists, published_prompts

from lib.files import DataError
from lib.text import SENTENCES, role_of


@pytest.fixture
def lists() -> dict[str, list[str]]:
    """Lists of two sentences for every name that the subjects ask for."""
    asked = [s.published for s in SUBJECTS.values()] + [
        k.published for s in SUBJECTS.values() for k in s.kinds.values()
    ]
    return {name: [f"One {name}.", f"Two {name}."] for name in asked if name}


def given(mirror: Path | None = None, archive: Path | None = None) -> argparse.Namespace:
    return argparse.Namespace(mirror=mirror, archive=archive)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_column_has_a_role_and_only_those_that_name_the_class_are_oracles(subject, lists):
    for sets in (PromptSets(subject), PromptSets(subject, lists)):
        kinds = sets.subject.kinds or {"": None}
        texts = {kind: sets.of(kind) for kind in kinds}
        for column, described in sets.columns.items():
            assert role_of(column) == described.role == "global"
            told = {texts[kind][column] for kind in kinds}
            assert described.origin == ("class-oracle" if len(told) > 1 else "template"), column
        assert all(set(row) == set(sets.columns) for row in texts.values())


def test_the_house_speaks_where_the_paper_is_absent():
    texts = PromptSets("breast").of("Malignant")
    assert texts["global@p0"] == "breast tumor" and texts["global@p1"] == "malignant breast tumor"
    assert texts["global@p3"].startswith("An ultrasound image of the breast showing an irregularly shaped")
    assert texts["global@classfree"] == "An ultrasound image of the breast with a tumor."
    assert texts["global@classoracle"] == "An ultrasound image of the breast with a malignant breast tumor."
    assert texts["global@wrong_organ"] == "An ultrasound image of the liver with a tumor."
    assert texts["global@wrong_modality"] == "A CT scan of the breast with a tumor."
    assert not {f"global@{name}" for name in MEANS} & set(texts)


def test_the_papers_sentences_are_taken_as_they_are_and_means_are_joined(lists):
    texts = PromptSets("brain", lists).of("glioma")
    assert texts["global@p2"] == "One brain_tumor_P2_prompts."
    assert texts["global@p3"] == "One glioma_brain_tumor_P3_prompts."
    assert texts["global@p5"].split(SENTENCES) == lists["glioma_brain_tumor_P3_prompts"]
    normal = PromptSets("brain", lists).of("normal")
    assert normal["global@p5"] is None and "no mass" in normal["global@p3"]


def test_computed_tomography_has_no_classes(lists):
    assert {column for column in PromptSets("ct", lists).columns if "@p" in column} == {
        "global@p0",
        "global@p2",
        "global@p4",
    }


def test_an_unknown_class_and_a_lacking_list_are_named(lists):
    with pytest.raises(DataError, match="'cyst' is not a class: expected benign, malignant, normal"):
        PromptSets("breast").of("cyst")
    del lists["brain_tumor_P2_prompts"]
    with pytest.raises(DataError, match="lack 'brain_tumor_P2_prompts'"):
        PromptSets("brain", lists)


def test_lists_are_found_in_a_mirror_beside_a_dataset_and_beside_an_archive(tmp_path, lists):
    folder = tmp_path / "texts" / "medclip_samv2"
    folder.mkdir(parents=True)
    (folder / "prompt_lists.json").write_text(json.dumps(lists))
    (folder / "breast_tumors_testing.json").write_text('{"000001.png": "A mass."}')
    assert published_lists(given(mirror=tmp_path)) == published_lists(given(mirror=tmp_path / "busi")) == lists
    assert published_lists(given(archive=tmp_path / "DatasetB.zip")) == lists
    assert published_prompts(given(mirror=tmp_path), "breast") == {"000001": "A mass."}
    assert published_lists(given(mirror=folder)) == {} == published_prompts(given(), "brain")
    (folder / "prompt_lists.json").write_text("[")
    with pytest.raises(DataError, match="prompt_lists.json is not a JSON table"):
        published_lists(given(mirror=tmp_path))


def test_the_mirrors_lists_serve_every_subject(mirrors):
    lists = published_lists(given(mirror=mirrors))
    if not lists:
        pytest.skip(f"{mirrors} holds no texts of MedCLIP-SAMv2: nothing to compare.")
    for subject in SUBJECTS:
        sets = PromptSets(subject, lists)
        for kind in sets.subject.kinds or {"": None}:
            means = [text for column, text in sets.of(kind).items() if column[-2:] in MEANS and text]
            assert all(20 <= len(text.split(SENTENCES)) <= 21 for text in means)
    assert len(published_prompts(given(mirror=mirrors), "brain")) == 600


def test_captions_lose_special_characters_and_short_ones_are_dropped():
    assert clean_caption("Axial  CT\n(arrow) – 3 cm mass*") == "Axial CT (arrow) 3 cm mass"
    assert clean_caption("Chest X-ray.") is None and clean_caption("*" * 40) is None
