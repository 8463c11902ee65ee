"""The explorer answers words with masks, and every mistake with one sentence."""

import base64
import io
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lib import models
from lib.data import load_dataset
from lib.text import CaptionBank
from lib.widgets import explore
from lib.widgets.explorer import key, png
from tests.conftest import write_tiny_dataset, write_volumes


def talkative(**config):
    """A tiny NullBUS whose modulation is not at its identity start, so that words change its output."""
    torch.manual_seed(0)
    model = models.build("nullbus", size="tiny", **config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.eval()


@pytest.fixture(scope="module")
def explorer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explorer")
    models.save(folder / "m.safetensors", talkative(text_dim=64), "nullbus", encoder="hash", size=32)
    dataset = load_dataset(write_tiny_dataset(folder / "tiny"))
    return explore(folder / "m.safetensors", dataset, n=3, captions=folder / "captions")


def test_words_change_the_mask_and_absence_is_another_answer(explorer):
    case = {"global": None, "local": "irregular hypoechoic mass"}
    one, two = explorer.probability(0, case), explorer.probability(0, case | {"local": "round anechoic cyst"})
    absent = explorer.probability(0, {"global": None, "local": None})
    assert one.shape == (32, 32) and one.min() >= 0 and one.max() <= 1
    assert not np.allclose(one, two) and not np.allclose(one, absent)
    np.testing.assert_array_equal(absent, explorer.probability(0, {}))


def test_an_image_is_encoded_once(explorer, monkeypatch):
    explorer.probability(1, {"local": "a mass"})
    monkeypatch.setattr(explorer._model, "encode_image", lambda image: pytest.fail("encoded again"))
    explorer.probability(1, {"local": "another mass"})


def test_a_request_is_answered_under_its_own_number(explorer):
    explorer.request = {"id": 7, "case": 0, "prompts": {"global": None, "local": "a mass"}}
    assert explorer.answer["id"] == 7 and explorer.answer["error"] == "" and explorer.answer["milliseconds"] > 0
    image = Image.open(io.BytesIO(base64.b64decode(explorer.answer["probability"].split(",")[1])))
    np.testing.assert_allclose(np.asarray(image) / 255, explorer.probability(0, {"local": "a mass"}), atol=1 / 255)


@pytest.mark.parametrize(
    "case, prompts, sentence", [(0, {"colour": "red"}, "Unknown prompt role"), (99, {}, "Case 99 is not shown")]
)
def test_a_mistake_is_one_sentence(explorer, case, prompts, sentence):
    answer = explorer.ask(case, prompts)
    assert answer["error"].startswith(sentence) and "\n" not in answer["error"]


def test_an_error_of_the_model_becomes_its_sentence(explorer, monkeypatch):
    def broken(features, prompts):
        raise RuntimeError("shape mismatch\n  in layer 3")

    monkeypatch.setattr(explorer._model, "decode", broken)
    assert explorer.ask(0, {}) == {"error": "shape mismatch in layer 3"}


def test_precomputed_answers_equal_live_ones(explorer):
    explorer.precompute(alternatives=1)
    own = [explorer.cases[0]["prompts"][role] for role in explorer.roles]
    for texts in (own, [None, None]):
        stored = explorer.table[key(0, texts)]
        assert stored["probability"] == png(explorer.probability(0, dict(zip(explorer.roles, texts, strict=True))))


def test_many_roles_are_answered_one_change_at_a_time(explorer, monkeypatch):
    explorer.precompute(alternatives=1)
    every = set(explorer.table)
    monkeypatch.setattr("lib.widgets.explorer.ALL", 1)
    explorer.precompute(alternatives=1)
    own = [case["prompts"] for case in explorer.cases]
    changed = [
        (json.loads(name)[1:], [own[json.loads(name)[0]][role] for role in explorer.roles]) for name in explorer.table
    ]
    assert set(explorer.table) <= every
    assert all(
        texts == [None] * len(texts) or sum(a != b for a, b in zip(texts, mine, strict=True)) <= 1
        for texts, mine in changed
    )
    assert {json.loads(name)[0] for name in explorer.table} == set(range(len(own)))


def test_a_bare_model_needs_its_encoder_and_size(tiny_dataset):
    with pytest.raises(ValueError, match="needs encoder= and size="):
        explore(talkative(text_dim=64), load_dataset(tiny_dataset))


@pytest.mark.skipif(shutil.which("node") is None, reason="node checks that both halves name answers alike")
def test_both_halves_name_an_answer_alike():
    texts = ['say "ä" — 264×213', None, "a/b\\c"]
    script = f"process.stdout.write(JSON.stringify([3, ...{json.dumps(texts)}]))"
    said = subprocess.run(["node", "-e", script], capture_output=True, text=True, check=True).stdout
    assert said == key(3, texts)


def test_the_module_asks_for_nothing_from_the_network():
    source = (Path(models.__file__).parents[1] / "widgets" / "explorer.js").read_text("utf-8")
    assert "http" not in source and "import " not in source


def test_of_a_volume_three_slices_are_shown_and_a_target_costs_no_second_pass(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = models.build("duplus", size="tiny", text_dim=64, channels=(8, 16, 32)).eval()
    dataset = load_dataset(write_volumes(tmp_path / "balls"))
    bank = CaptionBank("hash", tmp_path / "captions")
    words = {"attribute.modality": ["CT", "MR"], "context": ["a", "b"], "target": ["c", "d"]}
    model.calibrate_text(bank.prompts(words))
    models.save(tmp_path / "m.safetensors", model, "duplus", encoder="hash", size=16, spacing=None)
    explorer = explore(tmp_path / "m.safetensors", dataset, n=2, captions=tmp_path / "captions")
    own = explorer.cases[1]["prompts"]
    left, right = (explorer.probability(case, own) for case in (0, 1))
    assert left.shape == (16, 48) and explorer.cases[0]["image"] != explorer.cases[1]["image"]  # through its own ball
    truth = Image.open(io.BytesIO(base64.b64decode(explorer.cases[0]["truth"].split(",")[1])))
    assert np.asarray(truth)[:, :16].any() and np.asarray(truth)[:, 16:32].any() and np.asarray(truth)[:, 32:].any()
    assert "without its modality" in explorer.ask(0, own | {"attribute.modality": None})["error"]
    monkeypatch.setattr(explorer._model, "encode_image", lambda image, prompts: pytest.fail("encoded again"))
    explorer.probability(0, own | {"target": "the other ball"})
    shown = explore(tmp_path / "m.safetensors", dataset, n=8, captions=tmp_path / "captions").cases
    assert len(shown) == 8  # the structure that the third volume lacks has text, and is passed over
