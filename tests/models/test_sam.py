import hashlib

import pytest
import safetensors.torch
import torch
from matrix import image_for
from torch.nn import functional as F

from lib import models
from lib.models import build, sam
from lib.models.sam import SamPrompts, bounding_boxes, jitter, load_checkpoint, rasterise, scatter_points

# Not in the model matrix: its prompts are embeddings of texts by role, with a null for an absent one, and its images
# are segmented into several classes; SAM reads places, and an absent prompt is an empty mask. Its claims are below.

BOXES = torch.tensor([[[8.0, 10, 40, 50]], [[20, 4, 60, 30]], [[0, 0, 64, 64]], [[30, 30, 50, 60]]])
POINTS = torch.tensor([[20.0, 30], [5, 5], [0, 0]]).expand(4, 1, 3, 2)
LABELS = torch.tensor([1, 0, -1]).expand(4, 1, 3)
HERE = torch.ones(4, dtype=torch.bool)
NOWHERE = torch.full((1, 4), torch.nan)
BOX, BOTH = SamPrompts(present=HERE, boxes=BOXES), SamPrompts(present=HERE, boxes=BOXES, points=POINTS, labels=LABELS)
SPOT = SamPrompts(present=HERE, points=POINTS, labels=LABELS)


def make(**config) -> sam.Sam:
    torch.manual_seed(0)
    return build("sam", size="tiny", **config)


def mixed() -> SamPrompts:
    """A box, points, both and nothing, in one batch."""
    boxes, labels = BOXES.clone(), LABELS.clone()
    boxes[1] = boxes[3] = NOWHERE
    labels[0] = labels[3] = -1
    return SamPrompts(present=HERE, boxes=boxes, points=POINTS, labels=labels)


def scenes(batch=4, seed=0):
    """Ellipses with ragged borders, beside others that no prompt means."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    shapes = []
    for column in (18, 46):
        angle = torch.atan2(y - 32, x - column)
        bumps = sum(0.3 * torch.cos(k * angle + 6.3 * torch.rand(batch, 1, 1, generator=g)) for k in (2, 3, 5))
        shapes.append(((x - column) / 9) ** 2 + ((y - 32) / 16) ** 2 < (1 + bumps) ** 2)
    meant, other = shapes
    noise = 0.1 * torch.rand(batch, 64, 64, generator=g)
    return (0.2 + 0.5 * (meant | other) + noise)[:, None], meant[:, None].float()


def sentence(excinfo) -> None:
    assert str(excinfo.value).endswith(".") and "\n" not in str(excinfo.value)


# ---- the model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(64, 64), (65, 71), (40, 90), (150, 33)])
@pytest.mark.parametrize("input", ["sam", "medsam"])
def test_images_of_any_size_get_logits_of_that_size(channels, size, input):
    boxes = torch.tensor([[[3.0, 4, 20, 30]], [[10, 10, 30, 40]]])
    prediction = make(input=input)(image_for(2, channels, size), SamPrompts(present=HERE[:2], boxes=boxes))
    assert prediction.logits.shape == (2, 1, *size) and prediction.logits.isfinite().all()
    assert prediction.aux["quality"].shape == (2, 1)


def test_a_gradient_reaches_every_trainable_parameter():
    model = make().train()
    logits = model(image_for(), mixed()).logits
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []


def test_what_a_loss_on_one_mask_never_reaches_is_frozen():
    for config, expected in (
        ({}, {"no_mask_embed"}),
        (
            {"multimask": 3, "rasterise": False},
            {"mask_downscaling", "output_hypernetworks_mlps", "iou_prediction_head"},
        ),
    ):
        frozen = {n.split(".")[1] for n, p in make(**config).named_parameters() if not p.requires_grad}
        assert frozen == expected


@pytest.mark.parametrize("rasterise", [True, False])
def test_other_prompts_give_other_masks(rasterise):
    model, image = make(rasterise=rasterise).eval(), image_for(1).expand(4, -1, -1, -1)
    for prompts in (BOX, BOTH):
        logits = model(image, prompts).logits
        assert all((logits[i] - logits[0]).abs().max() > 1e-4 for i in (1, 2, 3))
    moved = SamPrompts(present=HERE, points=POINTS + torch.tensor([10.0, 5.0]), labels=LABELS)
    swapped = SamPrompts(present=HERE, points=POINTS, labels=LABELS[..., [1, 0, 2]])
    for other in (moved, swapped):
        assert (model(image, other).logits - model(image, SPOT).logits).abs().max() > 1e-4


def test_nothing_found_is_an_empty_mask_whatever_else_is_in_the_batch():
    model, image = make().eval(), image_for()
    for prompts in (BOX, BOTH, SPOT):
        absent = SamPrompts(**{**vars(prompts), "present": torch.tensor([True, False, True, False])})
        logits, aux = model(image, absent)
        assert (logits[[1, 3]] == sam.EMPTY).all() and not aux["quality"][[1, 3]].any()
        torch.testing.assert_close(logits[[0, 2]], model(image, prompts).logits[[0, 2]])
    assert (model(image, mixed()).logits[3] == sam.EMPTY).all()  # present, but neither box nor point


def test_a_batch_without_any_prompt_still_trains():
    model = make().train()
    F.softplus(model(image_for(), SamPrompts(present=~HERE, boxes=BOXES)).logits).mean().backward()


def test_places_stay_exact_in_mixed_precision():
    model, image = make().train(), image_for()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(image, mixed()).logits
    logits.square().mean().backward()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model(image, mixed()).logits, atol=0.1, rtol=0.1)


def test_a_batch_equals_its_images_one_by_one():
    model, image, prompts = make().eval(), image_for(), mixed()
    together = model(image, prompts)
    for i in range(4):
        alone = model(image[i : i + 1], prompts[i : i + 1])
        torch.testing.assert_close(together.logits[i : i + 1], alone.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.aux["quality"][i : i + 1], alone.aux["quality"])


def test_many_prompts_on_one_image_equal_each_alone():
    model, image = make().eval(), image_for(1)
    features, prompts = model.encode_image(image), mixed()
    kept = features.embedding.clone()
    several = SamPrompts(
        present=HERE[:1], **{n: vars(prompts)[n].transpose(0, 1) for n in ("boxes", "points", "labels")}
    )
    logits = model.decode(features, several).logits
    assert logits.shape == (1, 4, 64, 64) and torch.equal(features.embedding, kept)
    for i in range(4):
        torch.testing.assert_close(logits[:, i : i + 1], model(image, prompts[i : i + 1]).logits, atol=1e-5, rtol=1e-5)


def test_it_answers_as_the_released_code_does():
    from segment_anything.modeling import Sam as Released

    model = make(multimask=3, rasterise=False).eval()
    released = Released(model.image_encoder, model.prompt_encoder, model.mask_decoder).eval()
    image, spots, labels = torch.rand(1, 3, 48, 64), POINTS[0], LABELS[0]
    boxes = torch.tensor([[8.0, 10, 40, 44]])
    whole = {"image": 255 * image[0], "original_size": (48, 64)}
    for given in (
        {"boxes": boxes},
        {"points": spots, "labels": labels},
        {"boxes": boxes, "points": spots, "labels": labels},
    ):
        theirs = {"points": "point_coords", "labels": "point_labels", "boxes": "boxes"}
        (answer,) = released([whole | {theirs[n]: t for n, t in given.items()}], multimask_output=False)
        own, aux = model(image, SamPrompts(present=HERE[:1], **{name: t[None] for name, t in given.items()}))
        assert torch.equal(own > 0, answer["masks"])
        torch.testing.assert_close(aux["quality"], answer["iou_predictions"])


def test_the_switch_reads_only_its_kind():
    model, image = make().eval(), image_for()
    expected = {
        "box": model(image, BOX).logits,
        "points": model(image, SPOT).logits,
        "given": model(image, BOTH).logits,
    }
    for model.prompt, logits in expected.items():
        torch.testing.assert_close(model(image, BOTH).logits, logits)
    model.prompt = "points"
    with pytest.raises(ValueError, match="only prompts of the kind 'points'") as excinfo:
        model(image, BOX)
    sentence(excinfo)
    for switch, values in model.switches.items():
        assert getattr(make(), switch) == getattr(model.config, switch) in values


def test_a_few_scenes_can_be_overfitted():
    model, (image, mask) = make().train(), scenes()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        logits = model(image, model.draw(mask, generator)).logits
        p = logits.sigmoid()
        loss = F.binary_cross_entropy_with_logits(logits, mask) - 2 * (p * mask).sum() / (p + mask).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    hit = (logits > 0).float()
    filled = (rasterise(bounding_boxes(mask[:, 0] > 0), (64, 64)) > 0.5)[:, None].float()
    dsc, box = (2 * (m * mask).sum() / (m + mask).sum() for m in (hit, filled))
    assert dsc > 0.9 > box


def test_a_tiny_model_survives_the_file(tmp_path):
    model = make(kind="box", global_blocks=(1,), window=4)
    digest = models.save(tmp_path / "m.safetensors", model, "sam", {"size": "tiny"})
    for again in (models.load(tmp_path / "m.safetensors", digest)[0], load_checkpoint(tmp_path / "m.safetensors")):
        assert again.config == model.config and not again.training
        assert torch.equal(again(image_for(), BOTH).logits, model.eval()(image_for(), BOTH).logits)


@pytest.mark.parametrize(
    ("size", "millions"), [("vit_h", 641.1), ("vit_l", 312.3), ("vit_b", 93.7), ("medsam", 93.7), ("mobile", 9.8)]
)
def test_published_sizes_have_the_published_number_of_parameters(size, millions):
    with torch.device("meta"):
        model = sam.build_sam(size)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


# ---- prompts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"boxes": BOXES + 64},
        {"boxes": -BOXES - 1},
        {"boxes": BOXES[..., [2, 3, 0, 1]]},
        {"points": POINTS - 30, "labels": LABELS},
        {"points": POINTS + 60, "labels": LABELS},
    ],
)
def test_a_prompt_outside_the_image_is_one_sentence(wrong):
    with pytest.raises(ValueError, match="outside its image of 64x64") as excinfo:
        make()(image_for(), SamPrompts(present=HERE, **wrong))
    sentence(excinfo)
    make()(image_for(), SamPrompts(present=~HERE, **wrong))  # nothing was found, so nothing is read


def test_a_box_that_sticks_out_is_cut():
    model = make().eval()
    out, cut = (SamPrompts(present=HERE, boxes=torch.tensor([[b]] * 4)) for b in ([-9.0, 5, 80, 30], [0.0, 5, 64, 30]))
    assert torch.equal(model(image_for(), out).logits, model(image_for(), cut).logits)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"boxes": BOXES[:3]},
        {"boxes": BOXES[:, 0]},
        {"points": POINTS},
        {"points": POINTS, "labels": LABELS[..., :2]},
    ],
)
def test_prompts_of_other_shapes_are_one_sentence(wrong):
    with pytest.raises(ValueError, match="SamPrompts got the shapes") as excinfo:
        SamPrompts(present=HERE, **wrong)
    sentence(excinfo)


def test_prompts_are_picked_and_moved_like_texts():
    assert len(BOTH) == 4 and len(BOTH[1:3]) == 2 and len(BOTH[torch.tensor([0, 2, 3])]) == 3
    assert BOTH.to("meta").labels.is_meta and BOX.to("cpu").points is None


def test_a_rasterised_box_covers_its_pixels():
    drawn = rasterise(torch.tensor([[1.0, 2, 3, 4], [0.5, 0, 1, 1]]), (5, 6))
    assert drawn.shape == (2, 5, 6) and drawn[0].nonzero().tolist() == [[2, 1], [2, 2], [3, 1], [3, 2]]
    assert drawn[1].sum() == drawn[1, 0, 0] == 0.5


def test_boxes_of_masks():
    mask = torch.zeros(4, 8, 10, dtype=torch.bool)
    mask[0, 2:5, 3:7] = True
    mask[1, 1, 1] = mask[1, 6, 7] = True  # two parts share a box
    mask[2] = True
    boxes = bounding_boxes(mask)
    assert boxes[:3].tolist() == [[3, 2, 7, 5], [1, 1, 8, 7], [0, 0, 9, 7]] and boxes[3].isnan().all()


def test_jitter_keeps_to_its_share_and_to_the_image():
    boxes = torch.tensor([10.0, 20, 30, 60]).expand(500, 4)
    moved = jitter(boxes, 0.2, (64, 64), torch.Generator().manual_seed(0)) - boxes
    assert (moved.abs() <= torch.tensor([4.0, 8, 4, 8])).all() and (moved.abs().amax(0) > 3).all()
    wide = jitter(torch.tensor([[0.0, 0, 64, 64]] * 50), 0.2, (64, 64), torch.Generator().manual_seed(0))
    assert wide.min() >= 0 and wide.max() <= 64
    with pytest.raises(ValueError, match="The jitter is 0.5") as excinfo:
        jitter(boxes, 0.5, (64, 64), torch.Generator())
    sentence(excinfo)


def test_points_are_different_pixels_on_their_side_of_the_border():
    mask = torch.zeros(2, 9, 7, dtype=torch.bool)
    mask[0, 2:6, 1:5], mask[1, 3, 3] = True, True
    points, labels = scatter_points(mask, 4, 3, torch.Generator().manual_seed(0))
    assert labels.tolist() == [[1, 1, 1, 1, 0, 0, 0], [1, -1, -1, -1, 0, 0, 0]]
    for case in range(2):
        real = points[case][labels[case] >= 0].long()
        assert len(real.unique(dim=0)) == len(real)
        assert mask[case][real[:, 1], real[:, 0]].tolist() == (labels[case][labels[case] >= 0] == 1).tolist()


@pytest.mark.parametrize("kind", ["box", "points", "both", "any"])
def test_drawn_prompts_are_of_their_kind_and_repeat(kind):
    model, (_, mask) = make(kind=kind, negatives=2), scenes(40)
    mask[7] = 0
    prompts, again = (model.draw(mask, torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(t.nan_to_num(-1), vars(again)[n].nan_to_num(-1)) for n, t in vars(prompts).items())
    assert prompts.present.tolist() == [i != 7 for i in range(40)]
    found = prompts[prompts.present]
    boxed, pointed = ~found.boxes.isnan().any(-1)[:, 0], (found.labels == 1).any(-1)[:, 0]
    kinds = {(b, p) for b, p in zip(boxed.tolist(), pointed.tolist(), strict=True)}
    each = {"box": (True, False), "points": (False, True), "both": (True, True)}
    assert kinds == ({each[kind]} if kind != "any" else set(each.values()))
    assert make().eval()(image_for(40), prompts).logits.isfinite().all()


def test_wrong_settings_are_one_sentence():
    for config, words in (
        ({"size": "vit_x"}, "no size 'vit_x'.*vit_h"),
        ({"kind": "boxes"}, "SamConfig.kind is 'boxes'.*box, points, both, any"),
        ({"size": "tiny", "image_size": 60}, "image_size 60, patch 8"),
        ({"size": "tiny", "points": 0}, "points 0"),
    ):
        with pytest.raises(ValueError, match=words) as excinfo:
            build("sam", **config)
        sentence(excinfo)


# ---- published weights -----------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A tiny checkpoint, published under the name `ours`: its model, its file and what is known of it."""
    model, path = make().eval(), tmp_path / "ours" / "ours.pth"
    path.parent.mkdir()
    torch.save(model.state_dict(), path)
    content = path.read_bytes()
    known = sam.Checkpoint("tiny", "https://example.org/", len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(sam.CHECKPOINTS, "ours", known)
    monkeypatch.setenv(models.WEIGHTS, str(tmp_path))
    return model, path


def same(one, other) -> bool:
    return torch.equal(one(image_for(), BOTH).logits, other(image_for(), BOTH).logits)


def test_a_checkpoint_is_loaded_by_name_by_path_and_as_safetensors(published):
    model, path = published
    loaded = load_checkpoint("ours")
    assert same(loaded, model) and not loaded.training and loaded.provenance["backbone"].startswith("pretrained ours (")
    assert same(load_checkpoint(path), model)
    safetensors.torch.save_file(model.state_dict(), path.with_suffix(".safetensors"))
    path.unlink()
    assert same(load_checkpoint("ours"), model)
    other = path.with_suffix(".safetensors").rename(path.with_name("mine.safetensors"))
    assert same(load_checkpoint(other, size="tiny"), model)
    with pytest.raises(ValueError, match="does not say what it is .* vit_h") as excinfo:
        load_checkpoint(other)
    sentence(excinfo)


def refused(name, words, error=ValueError, **size):
    with pytest.raises(error, match=words) as excinfo:
        load_checkpoint(name, **size)
    sentence(excinfo)


def test_a_missing_checkpoint_is_one_sentence(published, monkeypatch):
    refused("none.pth", "no checkpoint none.pth.*sam_vit_h_4b8939", FileNotFoundError)
    refused("sam_vit_b_01ec64", "'sam_vit_b_01ec64' is not offered.*segment_anything", FileNotFoundError)
    monkeypatch.delenv(models.WEIGHTS)
    refused("ours", "'ours' is not offered", FileNotFoundError)


def test_a_changed_checkpoint_is_refused_unopened(published):
    _, path = published
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refused("ours", "has the sha256 .* was published.*example.org")
    path.write_bytes(content[:-50])
    refused("ours", "has the bytes .* was published")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was executed",))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused(tmp_path, zipped):
    torch.save({"a": Bomb()}, tmp_path / "m.pth", _use_new_zipfile_serialization=zipped)
    refused(tmp_path / "m.pth", "could run code", size="tiny")


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors"])
def test_a_damaged_file_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04 nothing more")
    refused(tmp_path / name, "damaged or no weight file", size="tiny")


def test_tensors_of_another_model_are_refused(published):
    _, path = published
    refused(path, "tensors of another model: .* differ, first 'image_encoder.*one of vit_h", size="small")
    for content in ([1], {"model": {}}, {**make().state_dict(), "more": torch.zeros(1)}):
        torch.save(content, path.with_name("m.pth"))
        refused(path.with_name("m.pth"), "tensors of another model", size="tiny")


def test_mobile_sam_is_named_tensor_by_tensor():
    encoder = "image_encoder."
    for theirs, ours in {
        "patch_embed.seq.0.c.weight": "patch_embed.conv1.conv.weight",
        "patch_embed.seq.2.bn.running_var": "patch_embed.conv2.bn.running_var",
        "layers.0.blocks.1.conv2.c.weight": "stages.0.blocks.1.conv2.conv.weight",
        "layers.0.downsample.conv1.c.weight": "stages.1.downsample.conv1.conv.weight",
        "layers.3.blocks.0.attn.attention_biases": "stages.3.blocks.0.attn.attention_biases",
        "neck.0.weight": "neck.0.weight",
    }.items():
        assert sam.mobile_name(encoder + theirs) == encoder + ours
    with torch.device("meta"):
        names = sam.build_sam("mobile").state_dict()
    assert encoder + "stages.1.downsample.conv1.conv.weight" in names and encoder + "neck.3.bias" in names
    assert sam.mobile_name("image_encoder.norm_head.weight") is None is sam.mobile_name("image_encoder.head.bias")
    assert sam.mobile_name("mask_decoder.iou_token.weight") == "mask_decoder.iou_token.weight"
