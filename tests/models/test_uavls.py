import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from matrix import TEXT_DIM, ModelMatrix, awake, image_for, prompts_for
from torch import nn

from lib import models
from lib.losses import loss
from lib.models.uavls import CHOICES, SSMix, SubpixelHead, count_parameters, load_released, released_name
from lib.text import CaptionBank, Prompts
from tests.golden.test_golden import FOLDER, read_case

ROLES = ("report",)


def tiny(seed=0, **fields):
    torch.manual_seed(seed)
    return awake(models.build("uavls", size="tiny", **{"text_dim": TEXT_DIM, **fields})).eval()


def words_for(batch=2, length=7, seed=0, dim=TEXT_DIM, lengths=None) -> Prompts:
    """Prompts with a random embedding per word; `lengths` says how many words each has."""
    pooled = prompts_for(ROLES, batch, seed, dim=dim)
    mask = torch.arange(length) < torch.tensor(lengths or [length] * batch)[:, None]
    tokens = torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed)) * mask[..., None]
    return Prompts(pooled.pooled, pooled.present, {"report": tokens}, {"report": mask})


def absent_in(prompts: Prompts, row: int) -> Prompts:
    present = prompts.present["report"].clone()
    present[row] = False
    return Prompts(prompts.pooled, {"report": present}, prompts.tokens, prompts.token_mask)


class TestUAVLS(ModelMatrix):
    name = "uavls"
    config = {"text_dim": TEXT_DIM}

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("size", [(32, 32), (64, 96)])
    def test_forward_and_backward_at_any_size(self, channels, size):
        super().test_forward_and_backward_at_any_size(channels, size)

    def test_decoding_an_encoded_image_equals_the_forward_pass(self):
        model = self.make().eval()
        image, prompts = image_for(2, 1, (64, 96)), words_for(2)
        features = model.encode_image(image)
        model.decode(features, words_for(2, seed=5))  # decoding leaves the features as they were
        assert torch.equal(model.decode(features, prompts).logits, model(image, prompts).logits)

    @pytest.mark.parametrize(
        "fields",
        [
            {"modab": False},
            {"mixer": "linear"},
            {"combine": "gate"},
            {"fusion": "addition"},
            {"self_attention": "languide"},
            {"mixer": "linear", "self_attention": "languide", "fusion": "addition"},
            {"absent": "empty"},
            {"normalise": "imagenet"},
        ],
        ids=lambda fields: " ".join(f"{name}={value}" for name, value in fields.items()),
    )
    def test_every_ablation_trains_and_survives_the_file(self, fields, tmp_path):
        model = tiny(**fields).train()
        prompts = words_for(4, lengths=[7, 3, 7, 1])
        logits, aux = model(image_for(), prompts)
        (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert silent == [] and logits.isfinite().all()
        models.save(tmp_path / "m.safetensors", model, "uavls")
        again, _ = models.load(tmp_path / "m.safetensors")
        assert torch.equal(again(image_for(), prompts).logits, model.eval()(image_for(), prompts).logits)


# ---- images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(65, 71), (64, 80), (96, 100)])
def test_a_size_that_cannot_be_halved_five_times_is_one_sentence(size):
    with pytest.raises(ValueError, match=r"image is \d+x\d+, but UA-VLS halves it five times: resize it .*such as"):
        tiny()(image_for(2, 1, size), words_for())


def test_a_wrong_channel_count_is_one_sentence():
    with pytest.raises(ValueError, match=r"shape \(2, 2, 64, 64\).*load it with channels=1"):
        tiny()(image_for(2, 2), words_for())


def test_brightness_and_contrast_of_an_image_do_not_matter():
    model, image = tiny(), image_for(2)
    torch.testing.assert_close(model(0.3 + 0.5 * image, words_for()).logits, model(image, words_for()).logits)


def test_a_plain_image_gives_finite_logits_and_gradients():
    model = tiny().train()
    logits = model(torch.full((2, 1, 64, 64), 0.4), words_for()).logits
    logits.sum().backward()
    assert logits.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_maps_are_four_scales_and_read_no_text():
    shapes = [tuple(map_.shape[1:]) for map_ in tiny().encode_image(image_for(2, 1, (64, 96)))]
    assert shapes == [(16, 16, 24), (24, 8, 12), (32, 4, 6), (48, 2, 3)]


# ---- text ------------------------------------------------------------------------------------------------


def test_a_longer_prompt_is_cut_with_one_warning():
    model, image, long = tiny(), image_for(2), words_for(2, 30)
    with pytest.warns(UserWarning, match="'report' prompt has 30 tokens and this model reads 24: the rest is cut off"):
        logits = model(image, long).logits
    cut = Prompts(
        long.pooled,
        long.present,
        {"report": long.tokens["report"][:, :24]},
        {"report": long.token_mask["report"][:, :24]},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no second one, and none for what fits
        assert torch.equal(model(image, long).logits, logits)
        assert torch.equal(tiny()(image, cut).logits, logits)


def test_padding_does_not_change_a_prompt():
    model, image = tiny(), image_for(2)
    short = words_for(2, 5)
    noise = torch.full((2, 3, TEXT_DIM), float("nan"))
    padded = Prompts(
        short.pooled,
        short.present,
        {"report": torch.cat([short.tokens["report"], noise], dim=1)},
        {"report": torch.arange(8) < torch.tensor([[5], [5]])},
    )
    assert torch.equal(model(image, padded).logits, model(image, short).logits)


def test_the_order_of_words_matters():
    model, image, prompts = tiny(), image_for(2), words_for()
    turned = {"report": prompts.tokens["report"].flip(1)}
    other = Prompts(prompts.pooled, prompts.present, turned, prompts.token_mask)
    assert (model(image, other).logits - model(image, prompts).logits).abs().max() > 1e-4


def test_another_text_width_is_one_sentence():
    with pytest.raises(ValueError, match=r"text_dim=12 need \(2, words, 12\).*with that encoder"):
        tiny()(image_for(2), words_for(2, dim=5))


@pytest.mark.parametrize("encoder", ["hash", "minilm"])
def test_the_words_of_any_encoder_are_read(encoder, tmp_path):
    bank = CaptionBank(encoder, tmp_path)
    texts = {"report": ["Bilateral pulmonary infection, two infected areas, all left lung.", "", None]}
    prompts = bank.prompts(texts, tokens=True)
    model = tiny(text_dim=prompts.tokens["report"].shape[2])
    model.calibrate_text(prompts)
    logits = model(image_for(1).expand(3, -1, -1, -1), prompts).logits
    assert logits.isfinite().all()
    assert all((a - b).abs().max() > 1e-4 for a, b in [(logits[0], logits[1]), (logits[1], logits[2])])


@pytest.mark.parametrize("absent", CHOICES["absent"])
def test_an_absent_prompt_is_skipped_or_read_as_no_words_for_its_own_image_only(absent):
    model, image, prompts = tiny(), image_for(3), words_for(3)
    model.absent = absent
    some, none = model(image, absent_in(prompts, 1)).logits, model(image, prompts.without()).logits
    torch.testing.assert_close(some[1], none[1])
    torch.testing.assert_close(some[[0, 2]], model(image, prompts).logits[[0, 2]])
    no_words = Prompts(
        prompts.pooled,
        prompts.present,
        {"report": torch.zeros(3, 2, TEXT_DIM)},
        {"report": torch.zeros(3, 2, dtype=torch.bool)},
    )
    equal = torch.allclose(model(image, no_words).logits, none, atol=1e-5)
    assert equal == (absent == "empty")


def test_the_model_without_modab_is_the_model_without_text():
    model, image = tiny(), image_for(2)
    plain = tiny(modab=False)
    plain.load_state_dict({name: t for name, t in model.state_dict().items() if ".modab." not in name})
    assert plain.roles == () and plain(image, words_for()).aux == {}
    torch.testing.assert_close(plain(image, words_for()).logits, model(image, words_for().without()).logits)
    torch.testing.assert_close(plain(image, words_for()).logits, model(image, Prompts({}, {})).logits)


def test_skipped_text_leaves_its_block_untrained():
    model = tiny().train()
    model(image_for(2), words_for().without()).logits.square().sum().backward()
    assert not any(p.grad is not None and p.grad.any() for stage in model.stages for p in stage.modab.parameters())
    assert all(p.grad.any() for stage in model.stages for p in stage.up.parameters())


def test_calibration_standardises_present_words_and_can_be_declined():
    prompts = words_for(16, 5, lengths=[5, 2] * 8)
    shifted = Prompts(
        prompts.pooled,
        {"report": torch.arange(16) < 8},
        {"report": 3 + 0.1 * prompts.tokens["report"]},
        prompts.token_mask,
    )
    model = tiny()
    model.calibrate_text(shifted)
    there = shifted.token_mask["report"] & shifted.present["report"][:, None]
    words = model.words(shifted, 16).tokens[:, :5]
    assert not words[~there].any()
    torch.testing.assert_close(words[there].mean(0), torch.zeros(TEXT_DIM), atol=1e-4, rtol=0)
    torch.testing.assert_close(words[there].std(0, correction=0), torch.ones(TEXT_DIM), atol=1e-3, rtol=0)

    for model, given in ((tiny(standardise_text=False), shifted), (tiny(), shifted[:0]), (tiny(), shifted.without())):
        model.calibrate_text(given)
        assert not model.text_mean.any() and (model.text_std == 1).all()


# ---- parts -----------------------------------------------------------------------------------------------


def test_the_multiplied_head_is_the_head():
    torch.manual_seed(0)
    head, x = SubpixelHead(5, 3, 2).double(), torch.randn(2, 5, 4, 6, dtype=torch.float64)
    nn.init.normal_(head.expand.weight)
    plain, fast = head.out(head.upsample(x)), head(x)
    torch.testing.assert_close(fast, plain)
    weights = torch.randn_like(plain)
    of_fast, of_plain = (torch.autograd.grad((y * weights).sum(), list(head.parameters())) for y in (fast, plain))
    torch.testing.assert_close(of_fast, of_plain)
    smooth = torch.nn.functional.pad(torch.pixel_shuffle(head.expand(x), 4), (3, 0, 3, 0))
    torch.testing.assert_close(head.upsample(x), torch.nn.functional.avg_pool2d(smooth, 4, stride=1))


def test_gating_multiplies_what_concatenation_joins():
    torch.manual_seed(0)
    text = torch.randn(2, 24, 8)
    assert SSMix(8, 24, 9)(text).shape == SSMix(8, 24, 9, combine="gate")(text).shape == (2, 9, 8)
    gate = SSMix(8, 24, 9, combine="gate")
    with torch.no_grad():
        gate.conv1d_z.weight.zero_()
    assert not gate(text).any()


def test_attention_dropout_at_test_is_a_switch():
    model, image, prompts = tiny(), image_for(2), words_for()
    still = model(image, prompts).logits
    assert torch.equal(model(image, prompts).logits, still)
    model.test_dropout = True
    torch.manual_seed(0)
    a, b = model(image, prompts).logits, model(image, prompts).logits
    torch.manual_seed(0)
    assert torch.equal(model(image, prompts).logits, a) and not torch.allclose(a, b, atol=1e-5)
    torch.testing.assert_close(model(image, prompts.without()).logits, model(image, prompts.without()).logits)
    model.test_dropout = False
    assert torch.equal(model(image, prompts).logits, still)
    assert tiny(test_dropout=True).stages[0].modab.self_attn.at_test


@pytest.mark.parametrize("mixer", CHOICES["mixer"])
def test_attention_is_returned_only_when_asked_and_shares_itself_out_among_words(mixer):
    model, image, prompts = tiny(mixer=mixer), image_for(2, 1, (64, 96)), absent_in(words_for(), 1)
    logits, aux = model(image, prompts)
    assert set(aux) == {"alpha"} and aux["alpha"].shape == (3,) and not aux["alpha"].requires_grad
    model.attention_maps = True
    again, aux = model(image, prompts)
    torch.testing.assert_close(again, logits)
    sizes = {1: (24, 2, 3), 2: (12, 4, 6), 3: (9, 8, 12)}
    for i, (length, *grid) in sizes.items():
        assert aux[f"attention_{i}"].shape == (2, length, *grid) and aux[f"words_{i}"].shape == (2, 24, *grid)
        for kind in ("attention", "words"):
            whole = aux[f"{kind}_{i}"].sum(1)
            torch.testing.assert_close(whole, torch.tensor([1.0, 0.0])[:, None, None].expand(2, *grid))


def test_mixed_precision_stays_near_full_precision():
    model, image, prompts = tiny(), image_for(2), words_for()
    with torch.autocast("cpu", torch.bfloat16):
        half = model(image, prompts).logits
    expected = model(image, prompts).logits
    assert (half - expected).abs().mean() < 0.05 * expected.abs().mean() + 0.02


def test_a_small_set_is_learned_from_image_and_text():
    """Two discs in each image, and only the text says which one is meant."""
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    discs = [((rows - 32) ** 2 + (columns - c) ** 2 < 100).float() for c in (16, 48)]
    image = (0.2 + 0.5 * (discs[0] + discs[1]) + 0.1 * image_for(8)).clamp(0, 1)
    side = torch.arange(8) % 2
    mask = torch.stack([discs[s] for s in side])[:, None]
    said = torch.randn(2, 6, TEXT_DIM, generator=torch.Generator().manual_seed(3))[side]
    there = torch.ones(8, 6, dtype=torch.bool)
    prompts = Prompts({"report": said[:, 0]}, {"report": there[:, 0]}, {"report": said}, {"report": there})
    torch.manual_seed(0)
    model = models.build("uavls", size="tiny", text_dim=TEXT_DIM)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        value = loss("seu")(model(image, prompts).logits, mask)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        hit = (model(image, prompts).logits > 0).float()
        other = (model(image, prompts[torch.arange(8).roll(1)]).logits > 0).float()

    def dice(found):
        return 2 * (found * mask).sum() / (found + mask).sum()

    assert dice(hit) > 0.9 and dice(other) < 0.3


# ---- the released code -----------------------------------------------------------------------------------


def test_released_layout_has_the_released_number_of_parameters():
    with torch.device("meta"):
        model = models.build("uavls", pretrained=False)
    counts = count_parameters(model)
    assert sum(counts.values()) == 43_434_612
    rounded = {name: round(n / 1e6, 2) for name, n in counts.items()}
    assert rounded == {
        "encoder": 27.82,
        "stage 1": 11.13,
        "stage 2": 2.94,
        "stage 3": 0.81,
        "head": 0.33,
        "unused": 0.40,
    }
    assert sum(p.numel() for p in model.parameters()) == sum(counts.values()) - counts["unused"]


def released_checkpoint(channels, depths, seed=0):
    """A checkpoint in the released layout: transformers' ConvNeXt, the golden weights in the last stage, chance."""
    from transformers import ConvNextConfig, ConvNextModel

    torch.manual_seed(seed)
    encoder = ConvNextModel(
        ConvNextConfig(hidden_sizes=list(channels), depths=list(depths), layer_scale_init_value=0.5)
    )
    encoder.eval()
    case = read_case(FOLDER / "uavls_decoder_c16.json")
    donor = models.build("uavls", size="tiny", channels=channels, depths=depths, states=16, heads=4).state_dict()
    weights = {f"model.encoder.model.{name}": tensor for name, tensor in encoder.state_dict().items()}
    weights |= {"model.encoder.project_head.weight": torch.zeros(512, channels[-1])}
    for ours, released in (("stages.0", "decoder16"), ("stages.1", "decoder8")):
        for name, tensor in donor.items():
            if name.startswith(ours):
                name = name.replace(f"{ours}.modab", "guide_layer").replace(f"{ours}.up", "decoder")
                weights[f"model.{released}.{name}"] = tensor
    for name in [name for name in case.arrays if name.startswith("param:")]:
        tensor = case.tensor(name)
        weights[f"model.decoder4.{name.removeprefix('param:')}"] = (
            tensor.float() if tensor.is_floating_point() else tensor
        )
    weights["model.decoder4.guide_layer.vis_pos.pe"] = torch.zeros(1, 5000, 16)
    for part, released in (("expand", "decoder1.conv_block"), ("out", "out.conv.conv")):
        weights |= {f"model.{released}.{kind}": donor[f"head.{part}.{kind}"] for kind in ("weight", "bias")}
    return weights, encoder, case


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no reference numbers in {FOLDER}")
def test_a_released_checkpoint_is_read_by_its_names():
    channels, depths = (8, 16, 32, 48), (1, 1, 2, 1)
    weights, encoder, case = released_checkpoint(channels, depths)
    model = models.build("uavls", size="tiny", channels=channels, depths=depths, states=16, heads=4).eval()
    left_out = load_released(model, weights)
    assert sorted(left_out) == [
        "model.decoder4.guide_layer.vis_pos.pe",
        "model.encoder.model.layernorm.bias",
        "model.encoder.model.layernorm.weight",
        "model.encoder.project_head.weight",
    ]
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        hidden = encoder(image, output_hidden_states=True).hidden_states[1:]
        for ours, theirs in zip(model.encoder(image), hidden, strict=True):
            torch.testing.assert_close(ours, theirs)
        stage, words = model.stages[2].double(), model.words(Prompts({}, {}), 2)
        assert words is None
        x, skip = case.tensor("vis"), case.tensor("skip")
        x, skip = (t.transpose(1, 2).unflatten(2, (side, side)) for t, side in ((x, 4), (skip, 8)))
        y, _ = stage(x, skip, None)
    expected = case.array("y_no_text")
    np.testing.assert_allclose(y.flatten(2).transpose(1, 2).numpy(), expected, atol=1e-5, rtol=1e-5)

    with pytest.raises(ValueError, match="not of the released layout .*: 1 tensors differ, first 'head.out.bias'"):
        load_released(model, {name: t for name, t in weights.items() if name != "model.out.conv.conv.bias"})
    with pytest.raises(ValueError, match="released layout"):
        load_released(models.build("uavls", size="tiny"), weights)


def test_names_of_the_released_code_are_told_apart():
    assert released_name("model.decoder16.guide_layer.text_project.2.A_log") == "stages.0.modab.text_project.2.A_log"
    assert released_name("encoder.model.encoder.stages.2.layers.8.pwconv2.bias") == (
        "encoder.model.stages.2.blocks.8.mlp.fc2.bias"
    )
    assert released_name("decoder8.guide_layer.txt_pos.pe") is None


# ---- building --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"mixer": "mamba"}, "UAVLSConfig.mixer is 'mamba', but it must be one of ssmix, linear"),
        ({"roles": ("report", "target")}, r"roles is \('report', 'target'\), but it needs 1 entries"),
        ({"lengths": (24, 12)}, r"lengths is \(24, 12\), but it needs 3 entries"),
        ({"channels": (16, 24, 31, 48)}, "has the width 31, which 2 heads and two halves cannot share"),
        ({"backbone": "vit"}, "no backbone 'vit' of UA-VLS: use convnext-tiny or narrow"),
    ],
)
def test_a_wrong_field_is_one_sentence(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        models.build("uavls", size="tiny", **fields)


def test_an_offered_backbone_is_taken_trained_and_stored(tmp_path, monkeypatch):
    sizes = {"backbone": "convnext-tiny"}
    source = models.build("uavls", size="tiny").encoder.model
    folder = tmp_path / "hub" / "convnext-tiny"
    folder.mkdir(parents=True)
    classifier = {"head.fc.weight": torch.zeros(3, 48)}
    tensors = {name: tensor.contiguous() for name, tensor in source.state_dict().items()}
    safetensors.torch.save_file(tensors | classifier, folder / "model.safetensors")
    monkeypatch.setenv(models.WEIGHTS, str(tmp_path / "hub"))
    monkeypatch.delenv(models.DOWNLOAD, raising=False)
    model = models.build("uavls", size="tiny", **sizes)
    assert all(torch.equal(t, source.state_dict()[name]) for name, t in model.encoder.model.state_dict().items())
    assert model.provenance["backbone"].startswith("pretrained convnext-tiny (")
    assert all(p.requires_grad for p in model.encoder.parameters()) and model.external == {}
    refused = models.build("uavls", size="tiny", pretrained=False, **sizes)
    assert refused.provenance["backbone"] == "random start, trained"

    models.save(tmp_path / "m.safetensors", model, "uavls")
    monkeypatch.delenv(models.WEIGHTS)
    again, _ = models.load(tmp_path / "m.safetensors")  # nothing needs to be offered any more
    assert torch.equal(again.encoder.model.stem[0].weight, source.stem[0].weight)
    assert again.provenance == model.provenance
    with pytest.raises(FileNotFoundError, match="'convnext-tiny' is not offered: put model.safetensors into"):
        models.build("uavls", size="tiny", pretrained=True, **sizes)


def test_the_pretrained_file_has_the_names_that_are_looked_for():
    """The published timm file, by its names: the encoder takes all it needs and leaves the classifier."""
    from timm import create_model

    with torch.device("meta"):
        whole = create_model("convnext_tiny").state_dict()
        ours = models.build("uavls", pretrained=False).encoder.model.state_dict()
    assert ours.keys() <= whole.keys() and all(ours[name].shape == whole[name].shape for name in ours)
    assert all(name.startswith("head.") for name in whole.keys() - ours.keys())
