"""Whatever weights come in, the tower computes what their own code computes; and pairs find each other."""

import pytest
import torch
from matrix import BIOMEDCLIP, TEXT_DIM, image_for, match_stored, prompts_for
from torch import nn

from lib import models
from lib.losses import loss
from lib.losses.contrastive import retrieved
from lib.models import Prediction, build
from lib.models.clip import Tower, pretrained_tower
from lib.text import CaptionBank, Prompts, encoder

# Not in the model matrix: it compares images with sentences and segments nothing, so that an absent sentence has no
# null and an image no mask. What holds for every model is claimed below.


def make(seed=0, **config):
    torch.manual_seed(seed)
    return build("clip", size="tiny", **{"text_dim": TEXT_DIM, **config})


def shaken(module: nn.Module) -> nn.Module:
    """Random everywhere, also where a layer starts at 0 or 1, so that no tensor can be lost unseen."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    return module.eval()


def sentence(excinfo) -> None:
    assert str(excinfo.value).endswith(".") and "\n" not in str(excinfo.value)


def agrees(tower: Tower, original) -> None:
    image = image_for(2, 3, (32, 32))
    with torch.no_grad():
        torch.testing.assert_close(tower(image), original(tower.prepare(image)), atol=1e-4, rtol=1e-4)
    assert tower.grid == (4, 4) and tower.prefix == 1


# ---- towers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_a_hugging_face_clip_gives_its_own_features(activation):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, projection_dim=8)
    config = CLIPVisionConfig(image_size=32, patch_size=8, hidden_act=activation, layer_norm_eps=1e-3, **sizes)
    theirs = shaken(CLIPVisionModelWithProjection(config))
    tower = Tower.from_hf(theirs.state_dict(), heads=2, activation=activation, eps=1e-3)
    agrees(tower, lambda image: theirs(pixel_values=image).image_embeds)
    assert tower.depth == 3


@pytest.mark.parametrize("quick", [False, True])
def test_an_open_clip_tower_gives_its_own_features(quick):
    from open_clip.transformer import QuickGELU, VisionTransformer

    torch.manual_seed(0)
    activation = QuickGELU if quick else nn.GELU
    theirs = shaken(VisionTransformer(32, 8, 16, 2, 2, 2.5, output_dim=8, act_layer=activation))
    state = {f"visual.{name}": tensor for name, tensor in theirs.state_dict().items()}
    agrees(Tower.from_open_clip(state | {"logit_scale": torch.ones(())}, heads=2, quick_gelu=quick), theirs)


def test_a_timm_tower_of_open_clip_gives_its_own_features():
    from open_clip.timm_model import TimmModel

    torch.manual_seed(0)
    theirs = shaken(TimmModel("vit_tiny_patch16_224", 8, pool="", proj="linear"))  # as in BiomedCLIP
    tower = Tower.from_open_clip({f"visual.{name}": t for name, t in theirs.state_dict().items()}, heads=3)
    image = image_for(1, 3, (224, 224))
    with torch.no_grad():
        torch.testing.assert_close(tower(image), theirs(tower.prepare(image)), atol=1e-4, rtol=1e-4)
    assert (tower.grid, tower.prefix, tower.depth) == ((14, 14), 1, 12)


def test_weights_of_another_kind_are_one_sentence():
    convolutions = {"visual.conv1.weight": torch.zeros(4, 3, 3, 3), "visual.layer1.0.conv1.weight": torch.zeros(4)}
    for state in ({"text.proj": torch.zeros(1)}, convolutions):
        with pytest.raises(ValueError, match="no vision transformer below 'visual.': give an open_clip model") as error:
            Tower.from_open_clip(state, heads=2)
        sentence(error)
    with pytest.raises(ValueError, match="lack 'visual_projection.weight': give a CLIPVisionModelWithProj") as error:
        Tower.from_hf({}, heads=2)
    sentence(error)


@pytest.mark.parametrize("pool", ["map", "token", "avg"])
def test_a_tower_opened_at_any_block_gives_the_same_feature(pool):
    tower = make(pool=pool).eval().tower
    image = image_for(2, 3, (50, 77))
    tokens = tower.tokens(tower.prepare(image))
    for layer in range(tower.depth + 1):
        torch.testing.assert_close(tower.feature(tower.run(tower.run(tokens, 0, layer), layer)), tower(image))
    assert tokens.shape[1] == tower.prefix + tower.grid[0] * tower.grid[1] and tower.prefix == (pool == "token")
    grey = image_for(2)
    assert torch.equal(tower(grey), tower(grey.expand(-1, 3, -1, -1)))


# ---- sentences -------------------------------------------------------------------------------------------


def test_the_first_role_that_is_present_is_read():
    model = make(roles=("local", "global")).eval()
    given = prompts_for(
        model.roles, 4, present={"local": [True, False, True, False], "global": [True, True, False, False]}
    )
    text, present = model.encode_text(given)
    only = {
        role: model.encode_text(Prompts({role: t}, {role: given.present[role]}))[0] for role, t in given.pooled.items()
    }
    assert present.tolist() == [True, True, True, False]
    torch.testing.assert_close(text[:3], torch.stack([only["local"][0], only["global"][1], only["local"][2]]))
    with pytest.raises(ValueError, match="none of the roles local, global: feed one of them") as error:
        model.encode_text(prompts_for(("report",), 2))
    sentence(error)


def test_training_needs_a_sentence_for_every_image_and_looking_does_not():
    model, image = make(), image_for(3)
    some = prompts_for(model.roles, 3, present=[True, False, False])
    with pytest.raises(ValueError, match="2 of 3 training cases have no sentence in the roles global: train") as error:
        model.train()(image, some)
    sentence(error)
    logits, aux = model.eval()(image, some)
    assert logits.shape == (3, 3) and aux["image"].shape == aux["text"].shape == (3, 128)
    assert logits.abs().max() <= 1 + 1e-6


def test_other_sentences_and_other_images_give_other_similarities():
    model, image = make().eval(), image_for(3)
    one, other = (model(image, prompts_for(model.roles, 3, seed=s)).logits for s in (1, 2))
    assert (one - other).abs().min() > 1e-4
    assert torch.equal(model.decode(model.encode_image(image), prompts_for(model.roles, 3, seed=1)).logits, one)


def test_equal_sentences_are_partners_and_never_rivals():
    text = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 2]])
    similarity = torch.tensor([[0.1, 0.9, 0, 0], [0.9, 0.1, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0.6, 0.9]])
    # Image 2 finds both of its candidates equally near, which is no find; sentence 2 is nearer to image 3.
    assert retrieved(similarity, text, 1).tolist() == [[True, True, False, True], [True, True, False, True]]
    assert retrieved(similarity, text, 2).all()
    assert not retrieved(similarity, torch.eye(4), 1)[:, :2].any()
    score = make().score(Prediction(similarity, {"text": text}), None)
    assert score.tolist() == [1, 1, 0, 1]


def test_calibration_removes_what_all_sentences_share():
    prompts = prompts_for(("global",), 16)
    shifted = Prompts({"global": 3 * prompts.pooled["global"] + 5}, prompts.present)
    one, other = make().eval(), make().eval()
    one.calibrate_text(prompts)
    other.calibrate_text(shifted)
    torch.testing.assert_close(one.encode_text(prompts)[0], other.encode_text(shifted)[0], atol=1e-4, rtol=1e-4)
    mean = prompts.pooled["global"].mean(0)
    average = Prompts({"global": mean.expand(2, -1)}, {"global": torch.ones(2, dtype=torch.bool)})
    torch.testing.assert_close(one.average_text(2), one.encode_text(average)[0], atol=1e-4, rtol=1e-4)


# ---- learning --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["map", "token", "avg"])
def test_a_gradient_reaches_every_trainable_parameter(pool):
    model = make(pool=pool, roles=("local", "global")).train()
    present = {"local": [True, False, True, False], "global": [True, True, False, True]}
    prompts = prompts_for(model.roles, 4, present=present)
    loss("dhn_nce")(model(image_for(), prompts).logits, None).backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []


def test_a_few_pairs_find_each_other_after_some_steps():
    model = make().train()
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    places = [(16, 16), (16, 48), (32, 32), (48, 16), (48, 48), (32, 12)]
    discs = torch.stack([((rows - r) ** 2 + (columns - c) ** 2 < 100).float() for r, c in places])[:, None]
    image, prompts = (0.3 + 0.4 * discs + 0.2 * image_for(6)), prompts_for(model.roles, 6)
    model.calibrate_text(prompts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = model.score(model(image, prompts), None).mean()
    for _ in range(40):
        optimizer.zero_grad()
        loss("dhn_nce")(model(image, prompts).logits, None).backward()
        optimizer.step()
    prediction = model.eval()(image, prompts)
    assert model.score(prediction, None).mean() == 1 > before
    torch.testing.assert_close(prediction.logits.argmax(1), torch.arange(6))


@pytest.mark.parametrize("pool", ["map", "token", "avg"])
def test_weights_survive_the_file(tmp_path, pool):
    model = make(pool=pool, roles=("local", "global")).eval()
    model.calibrate_text(prompts_for(model.roles, 16, seed=4))
    digest = models.save(tmp_path / "m.safetensors", model, "clip", {"size": "tiny"})
    again, meta = models.load(tmp_path / "m.safetensors", digest)
    prompts = prompts_for(model.roles, 4)
    assert torch.equal(again(image_for(), prompts).logits, model(image_for(), prompts).logits)
    assert torch.equal(again.average_text(1), model.average_text(1)) and meta["external"] == {}
    assert again.config.width == model.config.width and not again.training


def test_switches_are_attributes_with_their_values():
    model = make()
    for switch, values in model.switches.items():
        assert getattr(model, switch) == getattr(model.config, switch) in values


def test_stored_outputs_match():
    match_stored("clip")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"pool": "max"}, "no pool 'max': use one of map, token, avg"),
        ({"tower": "clip"}, "no tower 'clip': use one of book, biomedclip, clip-vit-b16"),
        ({"deep": 3}, "ClipConfig has no field 'deep'"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(config, words):
    with pytest.raises(ValueError, match=words) as error:
        make(**config)
    sentence(error)


# ---- pretrained pairs ------------------------------------------------------------------------------------


def test_biomedclip_runs_through_the_code_of_the_book(biomedclip, tmp_path):
    model = make(**BIOMEDCLIP).eval()
    texts = ["a breast tumor", "a brain tumor", None]
    prompts = CaptionBank("biomedclip", tmp_path / "captions").prompts({"global": texts})
    image = image_for(3, 1, (50, 77))
    logits, aux = model(image, prompts)
    own = encoder("biomedclip").encode(texts[:2]).pooled
    expected = nn.functional.cosine_similarity(model.tower(image)[:, None], own[None], dim=-1)
    torch.testing.assert_close(logits[:, :2], expected)
    assert torch.equal(aux["text"][:2], own) and model.provenance == {"backbone": "biomedclip"}
    model.calibrate_text(prompts)  # a pretrained pair reads sentences as they are, whatever the average
    assert torch.equal(model(image, prompts).logits, logits)
    torch.testing.assert_close(model.average_text(1)[0], own.mean(0))


def test_a_pretrained_tower_is_stored_whole_once_it_is_trained(biomedclip, tmp_path, monkeypatch):
    from open_clip.transformer import QuickGELU, VisionTransformer

    plain = shaken(VisionTransformer(32, 8, 16, 2, 2, 4.0, output_dim=8, act_layer=QuickGELU)).state_dict()
    (biomedclip.parent / "clip-vit-b16").mkdir()
    named = {f"visual.{name}": tensor for name, tensor in plain.items()}
    torch.save(named, biomedclip.parent / "clip-vit-b16" / "pytorch_model.bin")
    for tower in ("biomedclip", "clip-vit-b16"):
        model, path = make(**{**BIOMEDCLIP, "tower": tower}).eval(), tmp_path / f"{tower}.safetensors"
        with torch.no_grad():
            model.tower.project.weight += 1
        models.save(path, model, "clip")
        with monkeypatch.context() as elsewhere:
            elsewhere.delenv(models.WEIGHTS)
            again, _ = models.load(path)
        dim = 1e-3 * image_for(2)  # hardly any contrast, where even the epsilon of a norm is seen
        assert torch.equal(again.tower(dim), model.tower(dim)) and again.provenance == {"backbone": tower}


@pytest.mark.parametrize(
    "other",
    [
        {"width": 32},
        {"depth": 1},
        {"depth": 3},
        {"patch": 4},
        {"side": 64},
        {"dim": 16},
        {"mlp_ratio": 2.0},
        {"pool": "map"},
    ],
    ids=str,
)
def test_a_tower_of_another_size_than_the_config_is_one_sentence(biomedclip, other):
    with pytest.raises(ValueError, match="The folder of 'biomedclip' holds .* set side, patch, width, depth") as error:
        make(**{**BIOMEDCLIP, **other})
    sentence(error)


def test_a_pretrained_tower_that_is_not_here_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv(models.WEIGHTS, str(tmp_path))
    monkeypatch.delenv(models.DOWNLOAD, raising=False)
    with pytest.raises(FileNotFoundError, match="'biomedclip' is not on this machine: put the files of") as error:
        make(**BIOMEDCLIP)
    sentence(error)


def test_a_pair_without_its_vocabulary_reads_nothing(biomedclip, tmp_path):
    assert pretrained_tower(make(**BIOMEDCLIP).config).depth == 2
    words = (biomedclip / "vocab.txt").read_text().splitlines()
    (biomedclip / "vocab.txt").unlink()  # transformers alone would make up a tokenizer of five tokens
    with pytest.raises(FileNotFoundError, match="'biomedclip' needs .*vocab.txt: fetch it") as error:
        CaptionBank("biomedclip", tmp_path / "captions").embed(["a breast tumor"])
    sentence(error)
    (biomedclip / "vocab.txt").write_text("\n".join(words[:5]) + "\n")
    with pytest.raises(ValueError, match="vocabulary of 5 in .* expected 30522") as error:
        CaptionBank("biomedclip", tmp_path / "captions").embed(["a breast tumor"])
    sentence(error)
