import pytest
import safetensors.torch
import torch
from matrix import TEXT_DIM, ModelMatrix, awake, image_for, prompts_for

from lib import models
from lib.models.blocks import NullablePrompt
from lib.models.nullbus import CLIPTower, UpFusion
from lib.text import Prompts

ROLES = ("global", "local")


def tiny(seed=0, **fields):
    torch.manual_seed(seed)
    return awake(models.build("nullbus", size="tiny", text_dim=TEXT_DIM, **fields)).eval()


class TestNullBUS(ModelMatrix):
    name = "nullbus"
    config = {"text_dim": TEXT_DIM}

    def test_a_wrong_channel_count_is_one_sentence(self):
        with pytest.raises(ValueError, match=r"shape \(4, 2, 64, 64\).*load it with channels=1"):
            self.make()(image_for(channels=2), prompts_for(ROLES, 4))

    def test_another_text_width_is_one_sentence(self):
        with pytest.raises(ValueError, match=r"text_dim=12 need \(4, 12\).*with that encoder"):
            self.make()(image_for(), prompts_for(ROLES, 4, dim=5))


# ---- nullable prompts, Eq. 1 ----------------------------------------------------------------------------


@pytest.mark.parametrize("branch", ["global", "local"])
def test_gradients_reach_a_null_only_where_its_prompt_is_absent(branch):
    other = "local" if branch == "global" else "global"

    def null_gradient(present):
        model = tiny().train()
        logits = model(image_for(), prompts_for(ROLES, 4, present={branch: present, other: [True] * 4})).logits
        logits.square().sum().backward()
        untouched = getattr(model, f"{other}_prompt").null.grad
        assert untouched is None or not untouched.any()
        return getattr(model, f"{branch}_prompt").null.grad

    assert not null_gradient([True] * 4).any()
    assert null_gradient([True, True, False, True]).any()


def test_presence_is_per_branch_and_per_sample():
    torch.manual_seed(0)
    prompt = NullablePrompt("local", 6)
    prompts = prompts_for(ROLES, 3, present={"global": [False] * 3, "local": [True, False, True]}, dim=6)
    z = prompt(prompts, 3)
    torch.testing.assert_close(z[[0, 2]], prompt.text(prompts.pooled["local"][[0, 2]]))
    torch.testing.assert_close(z[1], prompt.absent())


def test_text_and_learned_null_have_one_length_and_the_zero_null_is_zero():
    torch.manual_seed(0)
    prompt = NullablePrompt("local", 16)
    prompts = prompts_for(("local",), 4, present=[True, True, False, False], dim=16)
    torch.testing.assert_close(prompt(prompts, 4).norm(dim=1), torch.full((4,), 4.0))  # sqrt(16)
    prompt.kind = "zero"
    assert not prompt(prompts, 4)[2:].any() and prompt(prompts, 4)[:2].all()


def test_calibration_uses_present_prompts_only_and_spreads_what_varies():
    prompt = NullablePrompt("local", 8)
    generator = torch.Generator().manual_seed(0)
    sentences = 0.3 + 0.01 * torch.randn(64, 8, generator=generator)  # nearly parallel, as real sentences are
    sentences[:, 3] = 0.3  # a dimension that says nothing
    present = torch.arange(64) < 32
    shifted = torch.where(present[:, None], sentences, torch.full_like(sentences, 99.0))
    before = prompt.text(sentences[:32])
    prompt.calibrate(Prompts({"local": shifted}, {"local": present}))
    after = prompt.text(sentences[:32])
    torch.testing.assert_close(prompt.mean, sentences[:32].mean(0))
    assert torch.cosine_similarity(before[0], before[1], dim=0) > 0.99
    assert torch.cosine_similarity(after[:16], after[16:]).mean().abs() < 0.3
    assert prompt.std.min() > 0 and after[:, 3].abs().max() < 1e-3


@pytest.mark.parametrize("count", [0, 1, 5])
def test_text_that_never_varies_keeps_its_own_direction(count):
    prompt = NullablePrompt("local", 4)
    same = torch.tensor([0.1, 0.2, -0.3, 0.4]).expand(5, 4)
    prompt.calibrate(Prompts({"local": same}, {"local": torch.arange(5) < count}))
    assert not prompt.mean.any() and (prompt.std == 1).all()


def test_a_zero_null_can_be_fed_to_a_model_trained_with_a_learned_one():
    model = tiny()
    image, nothing = image_for(), prompts_for(ROLES, 4).without()
    learned = model(image, nothing).logits
    model.null_kind = "zero"
    assert not torch.allclose(model(image, nothing).logits, learned, atol=1e-4)
    model.null_kind = "learned"
    assert torch.equal(model(image, nothing).logits, learned)
    with pytest.raises(ValueError, match="no null_kind 'noise': use one of learned, zero"):
        model.null_kind = "noise"


def test_the_null_kind_does_not_touch_present_prompts():
    model, prompts = tiny(), prompts_for(ROLES, 2)
    learned = model(image_for(2), prompts).logits
    model.null_kind = "zero"
    assert torch.equal(model(image_for(2), prompts).logits, learned)


def test_a_model_trained_with_the_zero_null_never_trains_its_null():
    model = tiny(null_kind="zero").train()
    model(image_for(), prompts_for(ROLES, 4).without()).logits.sum().backward()
    assert model.null_kind == "zero" and model.local_prompt.null.grad is None


# ---- paths ----------------------------------------------------------------------------------------------


def test_training_starts_from_the_image_alone():
    torch.manual_seed(0)
    model = models.build("nullbus", size="tiny", text_dim=TEXT_DIM).eval()
    a, b = (model(image_for(2), prompts_for(ROLES, 2, seed=s)).logits for s in (1, 2))
    assert torch.equal(a, b)  # scale one and shift zero in both paths


def moves(model, features, part) -> bool:
    """Whether noise in one part of the features, or in the text of one role, changes the logits."""
    prompts = prompts_for(ROLES, len(features.stage5), seed=1)
    before = model.decode(features, prompts).logits
    if part in ROLES:
        other = prompts_for(ROLES, len(features.stage5), seed=2)
        prompts = Prompts({**prompts.pooled, part: other.pooled[part]}, prompts.present)
    elif part == "skips":
        features = features._replace(skips=tuple(map(torch.rand_like, features.skips)))
    else:
        features = features._replace(**{part: torch.rand_like(getattr(features, part))})
    return not torch.equal(model.decode(features, prompts).logits, before)


@pytest.mark.parametrize(
    ("switch", "moving", "still"),
    [
        ("use_global", ("stage4", "stage5", "skips", "local"), ("tokens", "global")),
        ("use_local", ("tokens", "global"), ("stage4", "stage5", "skips", "local")),
        ("use_tcm", ("tokens", "stage4", "stage5", "skips", "global"), ("local",)),
    ],
)
@pytest.mark.parametrize("configured", [True, False])
def test_a_path_switched_off_leaves_no_trace(switch, moving, still, configured):
    model = tiny(**({switch: False} if configured else {}))
    setattr(model, switch, False)
    features = model.encode_image(image_for(2))
    torch.manual_seed(1)
    assert {part: moves(model, features, part) for part in moving + still} == (
        dict.fromkeys(moving, True) | dict.fromkeys(still, False)
    )


def test_the_image_is_encoded_without_any_prompt():
    model = tiny()
    features = model.encode_image(image_for(2, 1, (65, 71)))
    assert features.size == (65, 71)
    assert features.tokens.shape == (2, 16, 48)  # 64² in patches of 16
    assert features.stage4.shape[-2:] == (5, 5) and features.stage5.shape[-2:] == (3, 3)


def test_a_split_convolution_is_the_convolution_of_the_concatenation():
    torch.manual_seed(0)
    stage = UpFusion(5, 3, 4)
    x, skip = torch.randn(2, 5, 8, 8), torch.randn(2, 3, 8, 8)
    whole = torch.cat([stage.from_below.weight, stage.from_skip.weight], dim=1)
    joined = torch.nn.functional.conv2d(torch.cat([x, skip], dim=1), whole, padding=1)
    torch.testing.assert_close(stage.from_below(x) + stage.take(skip), joined)


def test_paper_size_is_the_papers():
    with torch.device("meta"):
        model = models.build("nullbus", pretrained=False)
    assert (model.config.global_channels, model.config.local_channels[-2:]) == (2048, (1024, 2048))
    count = sum(p.numel() for p in model.resnet.parameters())
    assert count == 23_508_032  # ResNet-50 without its classifier
    assert len(model.tower.visual.transformer.resblocks) == 9


# ---- pretrained backbones -------------------------------------------------------------------------------

MINI_CLIP = {
    "global_backbone": "clip-vit-b16",
    "global_size": 32,
    "global_patch": 16,
    "global_width": 16,
    "global_depth": 2,
    "global_heads": 2,
}


@pytest.fixture
def offered(tmp_path, monkeypatch):
    """A local folder that offers a small stand-in for CLIP with one block more than the model keeps."""
    torch.manual_seed(5)
    tower = CLIPTower(32, 16, 16, 3, 2)
    path = tmp_path / "hub" / "clip-vit-b16" / "open_clip_model.safetensors"
    path.parent.mkdir(parents=True)
    tensors = {f"visual.{k}": v for k, v in tower.visual.state_dict().items()}
    safetensors.torch.save_file({**tensors, "token_embedding.weight": torch.zeros(2, 2)}, path)
    monkeypatch.setenv(models.WEIGHTS, str(tmp_path / "hub"))
    monkeypatch.delenv(models.DOWNLOAD, raising=False)
    return path


def test_offered_weights_are_taken_and_frozen(offered):
    model = tiny(**MINI_CLIP).train()
    stored = safetensors.torch.load_file(offered)
    assert torch.equal(model.tower.visual.class_embedding, stored["visual.class_embedding"])
    assert model.provenance["global_backbone"].startswith("pretrained clip-vit-b16 (")
    assert model.provenance["global_backbone"].endswith(", frozen") and not model.tower.training
    model(image_for(), prompts_for(ROLES, 4)).logits.sum().backward()
    assert all(not p.requires_grad and p.grad is None for p in model.tower.parameters())
    assert model.resnet.conv1.weight.grad.any() and model.global_path.project[0].weight.grad.any()


def test_offered_weights_can_be_trained_or_refused(offered):
    thawed = tiny(**MINI_CLIP, freeze_global=False).train()
    assert all(p.requires_grad for p in thawed.tower.parameters()) and thawed.tower.training
    assert thawed.external == {} and "frozen" not in thawed.provenance["global_backbone"]
    assert tiny(**MINI_CLIP, pretrained=False).provenance["global_backbone"] == "random start, trained"


def test_without_weights_the_tower_is_random_and_trained(monkeypatch):
    monkeypatch.delenv(models.WEIGHTS, raising=False)
    monkeypatch.delenv(models.DOWNLOAD, raising=False)
    model = tiny(**MINI_CLIP)
    assert model.provenance["global_backbone"] == "random start, trained"
    assert all(p.requires_grad for p in model.tower.parameters())
    with pytest.raises(FileNotFoundError, match=r"'clip-vit-b16' is not offered: put open_clip_model"):
        tiny(**MINI_CLIP, pretrained=True)


def test_every_parameter_of_a_trained_clip_tower_gets_a_gradient(monkeypatch):
    monkeypatch.delenv(models.WEIGHTS, raising=False)
    model = tiny(**MINI_CLIP).train()
    logits = model(image_for(), prompts_for(ROLES, 4)).logits
    (logits * torch.randn_like(logits)).sum().backward()
    assert [n for n, p in model.tower.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_frozen_backbone_is_not_stored_but_obtained_again(offered, tmp_path, monkeypatch):
    model = tiny(**MINI_CLIP)
    models.save(tmp_path / "m.safetensors", model, "nullbus")
    assert not any(k.startswith("tower.") for k in safetensors.torch.load_file(tmp_path / "m.safetensors"))
    image, prompts = image_for(2), prompts_for(ROLES, 2)
    again, meta = models.load(tmp_path / "m.safetensors")
    assert torch.equal(again(image, prompts).logits, model(image, prompts).logits)
    assert meta["external"]["tower"]["backbone"] == "clip-vit-b16" and again.external == model.external

    changed = safetensors.torch.load_file(offered)
    changed["visual.class_embedding"] += 1
    safetensors.torch.save_file(changed, offered)
    with pytest.raises(ValueError, match="another version of the backbone 'clip-vit-b16'"):
        models.load(tmp_path / "m.safetensors")
    monkeypatch.delenv(models.WEIGHTS)
    with pytest.raises(FileNotFoundError, match="'clip-vit-b16' is not offered"):
        models.load(tmp_path / "m.safetensors")


def test_a_random_tower_is_stored_even_where_weights_are_offered_later(offered, tmp_path, monkeypatch):
    model = tiny(**MINI_CLIP, pretrained=False)
    models.save(tmp_path / "m.safetensors", model, "nullbus")
    again, _ = models.load(tmp_path / "m.safetensors")
    assert torch.equal(again.tower.visual.class_embedding, model.tower.visual.class_embedding)
    assert again.provenance["global_backbone"] == "random start, trained" and again.external == {}


def test_a_pretrained_local_backbone_is_stored(tmp_path, monkeypatch):
    torch.manual_seed(1)
    widths = (64, 64, 128, 256, 512)
    source = models.build("nullbus", size="tiny", local_backbone="resnet10t", local_channels=widths).resnet
    folder = tmp_path / "hub" / "resnet10t"
    folder.mkdir(parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in source.state_dict().items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    monkeypatch.setitem(models.BACKBONES, "resnet10t", ("none", "none", "model.safetensors"))
    monkeypatch.setenv(models.WEIGHTS, str(tmp_path / "hub"))
    model = tiny(local_backbone="resnet10t", local_channels=widths)
    assert torch.equal(model.resnet.layer1[0].conv1.weight, source.layer1[0].conv1.weight)
    models.save(tmp_path / "m.safetensors", model, "nullbus")
    monkeypatch.delenv(models.WEIGHTS)
    again, _ = models.load(tmp_path / "m.safetensors")  # nothing needs to be offered any more
    assert torch.equal(again.resnet.layer1[0].conv1.weight, source.layer1[0].conv1.weight)
    assert again.provenance == model.provenance
