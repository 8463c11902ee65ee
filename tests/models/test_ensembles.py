"""An ensemble answers with the mean of its members, whether they were trained apart or are moments of one training."""

import json

import pytest
import torch
from matrix import image_for, prompts_for

from lib.models import build, load, save

torch.set_num_threads(1)

DIM = 12
MEMBER = {"size": "tiny", "entry": "film", "text_dim": DIM, "channels": [8, 16], "extra": 4000}


def make(**fields):
    torch.manual_seed(0)
    return build("ensemble", settings=json.dumps(MEMBER), **fields).eval()


def of_parts(count=3):
    """An ensemble of networks that were trained elsewhere, and those networks."""
    model = make(members=count, trained=False)
    parts = []
    for number in range(count):
        torch.manual_seed(number)
        parts.append(build("entries", **MEMBER).eval())
        model.adopt_part(str(number), parts[-1])
    return model, parts


def asked(seed=0):
    return image_for(2, 1, (32, 32)), prompts_for(("local",), 2, seed, dim=DIM)


def test_the_answer_is_the_mean_probability_of_the_members():
    model, parts = of_parts()
    image, prompts = asked()
    answers = torch.stack([part(image, prompts).logits.sigmoid() for part in parts])
    found = model(image, prompts)
    torch.testing.assert_close(found.logits.sigmoid(), answers.mean(0))
    torch.testing.assert_close(found.aux["spread"], answers.std(0, correction=0))
    assert model.learner is None
    model.use = "first"
    torch.testing.assert_close(model(image, prompts).logits, parts[0](image, prompts).logits)


def test_moments_of_a_training_become_members_and_survive_the_file(tmp_path):
    model = make()
    image, prompts = asked()
    alone = model(image, prompts).logits
    torch.testing.assert_close(alone, model.net(image, prompts).logits)
    states = [{name: t + 0.05 * i for name, t in model.learner.state_dict().items()} for i in range(3)]
    model.adopt_snapshots(states)
    together = model(image, prompts).logits
    assert len(model.members) == 3 and not torch.allclose(together, alone)
    torch.testing.assert_close(model.members[0](image, prompts).logits, alone)
    save(tmp_path / "m.safetensors", model, "ensemble")
    torch.testing.assert_close(load(tmp_path / "m.safetensors")[0](image, prompts).logits, together)


def test_jitter_asks_one_network_about_other_contrasts():
    model = make()
    image, prompts = asked()
    model.use = "jitter"
    answers = [model.net(image**exponent, prompts).logits.sigmoid() for exponent in model.config.jitters]
    torch.testing.assert_close(model(image, prompts).logits.sigmoid(), torch.stack(answers).mean(0))


def test_an_image_is_encoded_once_whatever_is_asked(monkeypatch):
    model, _ = of_parts()
    image, prompts = asked()
    features, before = model.encode_image(image), model(image, prompts).logits
    for member in model.members:
        monkeypatch.setattr(member, "encode_image", lambda image: pytest.fail("encoded again"))
    assert torch.equal(model.decode(features, prompts).logits, before)
    assert not torch.equal(model.decode(features, asked(seed=3)[1]).logits, before)


def test_what_cannot_be_is_one_sentence():
    with pytest.raises(ValueError, match="needs members"):
        make(trained=False)
    model, parts = of_parts()
    with pytest.raises(ValueError, match="3 networks has no place '3'"):
        model.adopt_part("3", parts[0])
