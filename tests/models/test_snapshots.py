"""nnU-Net's network and what it was before: who answers, what is averaged, how it is stored, and where it doubts."""

import math

import pytest
import torch
from matrix import image_for, match_stored, prompts_for

from lib import models
from lib.data import Feed, ImageCache, load_dataset
from lib.losses import loss
from lib.models import build
from lib.models.snapshots import USES, SnapshotUNet, ensemble, entropy, outer_ring, ring_uncertainty
from lib.text import Prompts
from lib.training import Budget, fit

# Not in the model matrix: no prompt reaches it, it segments one class, and in training it answers at several levels.

NOTHING, IMAGE = Prompts({}, {}), image_for(2, 1, (40, 56))


def make(seed=0, **config) -> SnapshotUNet:
    torch.manual_seed(seed)
    return build("dynunet", size="tiny", **config).eval()


@pytest.fixture
def model():
    """A network with six others, two of each of three cycles."""
    model = make()
    model.adopt_snapshots([make(seed).state_dict() for seed in range(1, 7)])
    return model


def alone(seed, image=IMAGE):
    return make(seed)(image, NOTHING).logits


def sentence(excinfo) -> None:
    assert str(excinfo.value).endswith(".") and "\n" not in str(excinfo.value)


# ---- the network -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(64, 64), (65, 71), (33, 90), (9, 5)])
def test_images_of_any_size_get_logits_of_that_size(channels, size):
    net = make()
    image = image_for(2, channels, size)
    assert net(image, NOTHING).logits.shape == (2, 1, *size)
    assert net.train()(image, NOTHING).logits.shape == (2, 2, 1, *size)


@pytest.mark.parametrize("supervised", [0, 1, 2])
def test_training_supervises_the_finest_level_and_some_below(supervised):
    net = make(supervised=supervised)
    answer = net(IMAGE, NOTHING).logits
    logits = net.train()(IMAGE, NOTHING).logits
    assert logits.shape == ((2, 1 + supervised, 1, 40, 56) if supervised else (2, 1, 40, 56))
    torch.testing.assert_close(logits[:, 0] if supervised else logits, answer)
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    silent = [n for n, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []


def test_nnunets_loss_leaves_the_coarsest_level_out():
    net = make(supervised=2).train()
    loss("nnunet")(net(IMAGE, NOTHING).logits, (image_for(2, 1, (40, 56), seed=1) > 0.5).float()).backward()
    heads = [head.conv.conv.weight.grad for head in net.net.deep_supervision_heads]
    assert heads[0].any() and not heads[1].any()


def test_prompts_are_ignored(model):
    assert model.roles == () and not hasattr(model, "calibrate_text")
    assert torch.equal(model(IMAGE, prompts_for(("global",), 2)).logits, model(IMAGE, NOTHING).logits)
    assert torch.equal(model.decode(model.encode_image(IMAGE), NOTHING).logits, model(IMAGE, NOTHING).logits)


def test_a_few_scenes_can_be_overfitted():
    net = make().train()
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    mask = torch.stack([((rows - r) ** 2 + (columns - 30) ** 2 < 144).float() for r in (20, 40)])[:, None]
    image = 0.3 + 0.4 * mask + 0.2 * image_for(2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss("nnunet")(net(image, NOTHING).logits, mask).backward()
        optimizer.step()
    found = (net.eval()(image, NOTHING).logits > 0).float()
    assert 2 * (found * mask).sum() / (found + mask).sum() > 0.9


def test_stored_outputs_match():
    match_stored("dynunet")


@pytest.mark.parametrize(
    ("config", "words"), [({"depth": 3}, "DynUNetConfig has no field 'depth'"), ({"size": "huge"}, "no size 'huge'")]
)
def test_what_cannot_be_built_is_one_sentence(config, words):
    with pytest.raises(ValueError, match=words) as excinfo:
        build("dynunet", **config)
    sentence(excinfo)


# ---- who answers -----------------------------------------------------------------------------------------


def test_the_ensemble_is_the_mean_of_its_members_probabilities(model):
    answers = torch.stack([alone(seed) for seed in range(1, 7)])
    assert model.use == "ensemble"
    torch.testing.assert_close(model(IMAGE, NOTHING).logits.sigmoid(), answers.sigmoid().mean(0))
    model.use = "last_cycle"
    torch.testing.assert_close(model(IMAGE, NOTHING).logits.sigmoid(), answers[4:].sigmoid().mean(0))
    model.use = "last"
    torch.testing.assert_close(model(IMAGE, NOTHING).logits, answers[5])
    model.use = "best"
    torch.testing.assert_close(model(IMAGE, NOTHING).logits, alone(0))


def test_flips_are_the_mean_over_the_images_four_mirrors(model):
    model.use = "flips"
    turned = [alone(0, IMAGE.flip(axes)).flip(axes).sigmoid() for axes in ((), (-1,), (-2,), (-2, -1))]
    answer = model(IMAGE, NOTHING).logits
    torch.testing.assert_close(answer.sigmoid(), torch.stack(turned).mean(0))
    torch.testing.assert_close(model(IMAGE.flip(-1), NOTHING).logits.flip(-1), answer, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("use", USES)
def test_every_use_is_a_switch_for_images_of_any_size(model, use):
    assert model.switches == {"use": USES}
    model.use = use
    logits = model(image_for(1, 3, (33, 70)), NOTHING).logits
    assert logits.shape == (1, 1, 33, 70) and logits.isfinite().all()


def test_without_members_there_is_nobody_else_to_ask():
    net = make()
    assert net.use == "best" and net.learner is net
    for net.use in ("ensemble", "last_cycle", "last"):
        with pytest.raises(
            ValueError, match=f"saved without others to average, so it has no '{net.use}': set"
        ) as error:
            net(IMAGE, NOTHING)
        sentence(error)
    net.use = "flips"
    assert net(IMAGE, NOTHING).logits.shape == (2, 1, 40, 56)


def test_sure_members_stay_finite():
    model = make(members=2)
    for member in model.members:
        for parameter in member.output_block.parameters():
            parameter.data.mul_(1e6)
    assert model(IMAGE, NOTHING).logits.isfinite().all()


# ---- where the members come from -------------------------------------------------------------------------


def test_snapshots_of_a_training_become_the_members_and_survive_the_file(tiny_dataset, tmp_path):
    source = load_dataset(tiny_dataset)
    train, valid = (Feed(ImageCache.load(source.split(split), 16), NOTHING) for split in ("train", "val"))
    budget = Budget(steps=12, batch=4, lr=0.02, validate_every=2, schedule="cyclic_full", cycles=3, snapshots=2)
    net = make()
    trained = fit(net.learner, loss("nnunet"), train, valid, budget, seed=0, device="cpu")
    best = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.adopt_snapshots(trained.snapshots)
    assert net.config.members == len(net.members) == 6 and net.use == "ensemble" and net.learner is None
    image = train.cache.images[:3]
    answers = []
    for state in trained.snapshots:
        member = make()
        member.load_state_dict(state)
        answers.append(member(image, NOTHING).logits)
    torch.testing.assert_close(net(image, NOTHING).logits.sigmoid(), torch.stack(answers).sigmoid().mean(0))
    assert (answers[0] - answers[5]).abs().max() > 1e-3
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in best.items())

    models.save(tmp_path / "m.safetensors", net, "dynunet", {"size": "tiny"})
    again, _ = models.load(tmp_path / "m.safetensors")
    for net.use in USES:
        again.use = net.use
        assert torch.equal(again(image, NOTHING).logits, net(image, NOTHING).logits), net.use
    assert again.config == net.config


def test_a_tensor_with_two_names_is_stored_once(model, tmp_path):
    # DynUNet reaches each of its blocks also through the skip layers that wrap it.
    path = tmp_path / "m.safetensors"
    models.save(path, model, "dynunet")
    bare = sum(4 * parameter.numel() for parameter in model.parameters())  # counts shared ones once
    named = sum(4 * tensor.numel() for tensor in model.state_dict().values())
    assert named > 1.5 * bare and bare <= path.stat().st_size < 1.25 * bare
    assert models.load(path)[0].config.members == 6


def test_networks_trained_apart_make_a_deep_ensemble():
    model, parts = make(members=2), [make(seed) for seed in (7, 8)]
    assert model.learner is None and model.use == "ensemble"
    for number, part in enumerate(parts):
        model.adopt_part(str(number), part)
    mean = torch.stack([part(IMAGE, NOTHING).logits.sigmoid() for part in parts]).mean(0)
    torch.testing.assert_close(model(IMAGE, NOTHING).logits.sigmoid(), mean)
    for name, part in (("2", parts[0]), ("first", parts[0]), ("0", model.net)):
        with pytest.raises(ValueError, match=f"An ensemble of 2 networks has no place '{name}' for") as excinfo:
            model.adopt_part(name, part)
        sentence(excinfo)


# ---- doubt -----------------------------------------------------------------------------------------------


def test_entropy_is_in_bits_and_finite_at_certainty():
    p = torch.tensor([0.5, 0.25, 0.9, 0.0, 1.0])
    expected = [-sum(q * math.log2(q) for q in (x, 1 - x)) for x in (0.5, 0.25, 0.9)]
    assert entropy(p)[:3].tolist() == pytest.approx(expected, rel=1e-5) and expected[0] == 1
    assert entropy(p)[3:].tolist() == pytest.approx([0, 0], abs=1e-5)


def test_the_ring_is_what_touches_the_mask_from_outside():
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(13, 17, generator=generator) * torch.rand(13, 17, generator=generator)
    mask = probability > 0.6
    around = [
        (r, c)
        for r in range(13)
        for c in range(17)
        if not mask[r, c] and mask[max(0, r - 1) : r + 2, max(0, c - 1) : c + 2].any()
    ]
    assert outer_ring(mask).nonzero().tolist() == [list(place) for place in around]
    doubt = [entropy(probability[place]).item() for place in around]
    assert ring_uncertainty(probability, 0.6) == pytest.approx(sum(doubt) / len(doubt))
    whole = 100 * entropy(probability).sum().item() / (255 * len(around))
    assert ring_uncertainty(probability, 0.6, released=True) == pytest.approx(whole)


@pytest.mark.parametrize("value", [0.1, 0.9])
@pytest.mark.parametrize("released", [False, True])
def test_without_a_ring_there_is_no_score(value, released):
    assert math.isnan(ring_uncertainty(torch.full((5, 5), value), released=released))


def test_the_mean_of_probabilities_is_over_members():
    probabilities = torch.rand(5, 2, 1, 4, 4)
    torch.testing.assert_close(ensemble(probabilities), sum(probabilities) / 5)
