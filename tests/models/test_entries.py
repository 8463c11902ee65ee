"""The common network: every way in has as many parameters, is moved by text alone, and never encodes an image twice."""

import pytest
import torch
from matrix import image_for, prompts_for
from torch.nn import functional as F

from lib.models import build, load, save
from lib.models.entries import ENTRIES, Box, drawn_box, parameters_of_entry
from lib.text import Prompts

torch.set_num_threads(1)

DIM = 12
READING = [entry for entry in ENTRIES if entry != "none"]
SIZES = {2: (33, 39), 3: (16, 12, 17)}


def make(entry, dims=2, seed=0, **fields):
    """A small network whose text acts: no weight at its zero start."""
    torch.manual_seed(seed)
    fields = {"size": "tiny", "text_dim": DIM, "extra": 20_000, "channels": (8, 16, 32)} | fields
    model = build("entries", entry=entry, dims=dims, **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)
    return model


def asked(count, seed=0, present=None, words=True, roles=("local",)):
    """Prompts with a sentence each and, if asked for, up to five words."""
    prompts = prompts_for(roles, count, seed, present, dim=DIM)
    if not words:
        return prompts
    generator = torch.Generator().manual_seed(seed + 1)
    there = {role: torch.arange(5) < 2 + torch.arange(count)[:, None] % 4 for role in roles}
    there = {role: mask & prompts.present[role][:, None] for role, mask in there.items()}
    tokens = {role: torch.randn(count, 5, DIM, generator=generator) * there[role][..., None] for role in roles}
    return Prompts(prompts.pooled, prompts.present, tokens, there)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("entry", ENTRIES)
def test_logits_have_a_channel_for_each_target_and_every_weight_learns(entry, dims):
    model = make(entry, dims).train()
    prompts = asked(4, present=[True, True, True, False])
    logits = model(image_for(2, 1, SIZES[dims]), prompts).logits
    assert logits.shape == (2, 2, *SIZES[dims]) and logits.isfinite().all()
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("roles", [("local",), ("context", "target")])
def test_every_way_in_has_as_many_parameters(dims, roles):
    found = {
        entry: parameters_of_entry(model.config, model.hidden)
        for entry in ENTRIES
        for model in [build("entries", size="tiny", entry=entry, dims=dims, roles=roles)]
    }
    assert max(abs(count - 100_000) for count in found.values()) < 10_000  # a head's width comes in fours
    wider = build("entries", size="tiny", entry="film", extra=200_000)
    assert parameters_of_entry(wider.config, wider.hidden) > 1.9 * found["film"]


@pytest.mark.parametrize("words", [True, False])
@pytest.mark.parametrize("entry", READING)
def test_words_move_the_mask_and_absent_ones_are_the_null(entry, words):
    model = make(entry).eval()
    image, prompts = image_for(2, 1, (32, 32)), asked(2, words=words)
    assert not torch.allclose(model(image, prompts).logits, model(image, asked(2, seed=5, words=words)).logits)
    nothing = model(image, prompts.without()).logits
    unsaid = asked(2, present=[False, False], words=words)
    torch.testing.assert_close(nothing, model(image, unsaid).logits)
    model.null_kind = "zero"
    assert not torch.allclose(nothing, model(image, prompts.without()).logits)


def test_the_control_reads_no_text():
    model = make("none").eval()
    one, other = (model(image_for(2, 1, (32, 32)), asked(2, seed=seed)).logits for seed in (0, 5))
    assert model.roles == () and torch.equal(one, other)


@pytest.mark.parametrize("entry", ENTRIES)
def test_cases_of_a_batch_do_not_mix(entry):
    model = make(entry).eval()
    image, prompts = image_for(3, 1, (32, 32)), asked(6)
    whole = model(image, prompts).logits
    alone = model(image[1:2], prompts[torch.tensor([2, 3])]).logits
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
def test_an_image_is_encoded_once_for_all_its_targets(dims, monkeypatch):
    model = make("film", dims).eval()
    image, prompts = image_for(1, 1, SIZES[dims]), asked(3)
    features = model.encode_image(image)
    monkeypatch.setattr(model, "encode_image", lambda image: pytest.fail("encoded again"))
    one_by_one = [model.decode(features, prompts[torch.tensor([i])]).logits for i in range(3)]
    torch.testing.assert_close(model.decode(features, prompts).logits, torch.cat(one_by_one, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("entry", READING)
def test_which_target_is_meant_can_be_learned_from_its_words(entry):
    """Two equal discs, of which the sentence names one: an image alone cannot do better than both or neither."""
    model = make(entry, channels=(8, 16), extra=8_000).train()
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    discs = torch.stack([(rows - 8) ** 2 + (columns - at) ** 2 < 9 for at in (4, 12)]).float()
    image, mask = 0.2 + 0.6 * discs.sum(0).expand(2, 1, 16, 16), discs[:, None]
    prompts = asked(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(image, prompts).logits, mask).backward()
        optimizer.step()
    found = model.eval()(image, prompts).logits > 0
    truth = mask > 0
    dice = 2 * (found & truth).sum() / (found.sum() + truth.sum())
    assert dice > 0.9


def test_a_box_lies_about_the_place_that_the_text_is_like():
    """Where one place of the deepest map answers, the box is about that place and no larger than it need be."""
    config = make("box").config
    box = Box(config, 8)
    with torch.no_grad():
        box.place.weight.zero_()
        box.place.bias.fill_(-1.0)
        box.place.weight[:, 0] = 2.0
        box.text.weight.zero_()
        box.text.bias.fill_(1.0)
    deep = torch.zeros(1, config.channels[-1], 8, 8)
    deep[0, 0, 2, 5] = 1.0
    text = make("box").read(asked(1), 1)
    middle, half = box(deep, text)[0].unbind(1)
    torch.testing.assert_close(middle, torch.tensor([-3 / 8, 3 / 8]), atol=1e-3, rtol=0)
    drawn = drawn_box(box(deep, text), (16, 16))[0]
    assert drawn[4:6, 10:12].min() > 0.5 and drawn[12, 2] < 1e-3 and (half < 0.2).all()


@pytest.mark.parametrize("dims", [2, 3])
def test_a_drawn_box_covers_its_inside(dims):
    size = (20, 30, 24)[:dims]
    box = torch.tensor([[[0.0, 0.5]] * dims, [[0.5, 0.25]] * dims])
    drawn = drawn_box(box, size) > 0.5
    for one, share in zip(drawn, (0.5, 0.25), strict=True):
        torch.testing.assert_close(one.float().mean(), torch.tensor(share**dims), atol=0.03, rtol=0)


def test_what_is_saved_comes_back(tmp_path):
    model = make("tokens", 3, stride=2).eval()
    save(tmp_path / "m.safetensors", model, "entries")
    again, _ = load(tmp_path / "m.safetensors")
    image, prompts = image_for(1, 1, SIZES[3]), asked(2)
    assert torch.equal(model(image, prompts).logits, again(image, prompts).logits)


def test_what_is_wrong_is_one_sentence():
    for fields, sentence in (
        ({"entry": "mamba"}, "no way in 'mamba'"),
        ({"dims": 4}, "dims is 4"),
        ({"roles": ()}, "needs a role"),
    ):
        with pytest.raises(ValueError, match=sentence):
            build("entries", **({"size": "tiny", "text_dim": DIM} | fields))
    with pytest.raises(ValueError, match=r"shape \(2, 1, 16, 16, 16\).*H, W"):
        make("film")(image_for(2, 1, (16, 16, 16)), asked(2))
