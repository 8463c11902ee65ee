"""From a sentence to a mask: what each stage hands on, what no sentence gives, and which weights a file holds."""

import hashlib

import pytest
import torch
from matrix import BIOMEDCLIP, TEXT_DIM, image_for, prompts_for
from torch import nn

from lib import models
from lib.losses import loss
from lib.models import build, sam
from lib.models import medclip_samv2 as module
from lib.models.coarse import boxes
from lib.models.medclip_samv2 import STAGES, SURE, filled_boxes
from lib.text import CaptionBank

# Not in the model matrix: it learns from sentences rather than from masks, and an absent sentence is an empty mask
# instead of a null embedding. Its numbers are those of the towers, of SAM and of the clean-up, which have tests of
# their own; a mask jumps where a saliency passes a threshold, so that no outputs are stored.

IMAGE, SIZE = image_for(4, 1, (50, 77)), (50, 77)


def make(seed=1, **config):  # not 0, from which the untrained control is drawn
    torch.manual_seed(seed)
    return build("medclip_samv2", size="tiny", **{"text_dim": TEXT_DIM, "copies": 2, **config}).eval()


@pytest.fixture(scope="module")
def shared():
    return make()


@pytest.fixture
def model(shared):
    """One model for the tests that only look; its switches are put back."""
    before = {name: getattr(shared, name) for name in shared.switches}
    yield shared
    for name, value in before.items():
        setattr(shared, name, value)


def some(present=None, seed=0, batch=4):
    return prompts_for(("global",), batch, seed=seed, present=present)


def sentence(excinfo) -> None:
    assert str(excinfo.value).endswith(".") and "\n" not in str(excinfo.value)


# ---- the stages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_stage_answers_in_the_size_of_the_image(model, stage, channels):
    model.stage = stage
    logits, aux = model(IMAGE.expand(-1, channels, -1, -1), some())
    assert logits.shape == (4, 1, *SIZE) and logits.isfinite().all()
    assert aux["saliency"].shape == aux["coarse"].shape == (4, *SIZE) and aux["coarse"].dtype == torch.bool
    assert aux["found"].all() and aux["saliency"].amax((1, 2)).tolist() == [1] * 4
    with torch.inference_mode():
        torch.testing.assert_close(model(IMAGE, some()).logits, logits)


def test_a_stage_hands_on_what_the_next_one_reads(model):
    chains = {}
    for model.stage in STAGES:
        chains[model.stage] = model.chain(model.encode_image(IMAGE), some())
    maps = chains["sam"].saliency
    assert all(torch.equal(chain.saliency, maps) for chain in chains.values())
    torch.testing.assert_close(chains["saliency"].logits[:, 0].sigmoid(), maps.clamp(1e-4, 1 - 1e-4))
    binary, best, boxed = ((chains[stage].logits[:, 0] > 0) for stage in ("binary", "components", "box"))
    assert torch.equal(best, chains["sam"].coarse) and torch.equal(boxed, filled_boxes(best))
    assert (best <= binary).all() and (best <= boxed).all() and not torch.equal(best, binary)
    assert all(
        set(chains[stage].logits.unique().tolist()) == {-SURE, SURE} for stage in ("binary", "components", "box")
    )
    asked = chains["sam"].prompts.boxes[:, 0]
    assert asked.tolist() == [boxes(mask.numpy())[0].tolist() for mask in best]
    low, high = model.sam(IMAGE, chains["sam"].prompts).logits, chains["sam"].logits
    assert ((high == low) | (high == -SURE)).all()  # SAM's answer, of which parts may be left out


def test_sam_keeps_as_many_components_as_the_coarse_mask_has(model, monkeypatch):
    drawn = torch.full((2, 1, 20, 20), -3.0)
    drawn[:, :, 1:4, 1:4], drawn[:, :, 8:14, 8:14], drawn[:, :, 17, 17] = 2.0, 1.0, 4.0
    monkeypatch.setattr(model.sam, "decode", lambda features, prompts: models.Prediction(drawn.clone(), {}))
    coarse = torch.zeros(2, 20, 20, dtype=torch.bool)
    coarse[:, 2, 2] = coarse[1, 15, 2] = True
    logits = model.segment(None, None, coarse)
    assert (logits > 0).sum((1, 2, 3)).tolist() == [36, 36 + 9]
    assert (logits[0, 0, 1:4, 1:4] == -SURE).all() and torch.equal(logits[drawn < 0], drawn[drawn < 0])


def test_a_box_is_filled_from_the_first_to_the_last_pixel():
    masks = torch.rand(5, 12, 17, generator=torch.Generator().manual_seed(0)) > 0.97
    masks[0], masks[1] = False, True
    for mask, filled in zip(masks, filled_boxes(masks), strict=True):
        expected = torch.zeros_like(mask)
        if mask.any():
            (top, left), (bottom, right) = mask.nonzero().amin(0), mask.nonzero().amax(0)
            expected[top : bottom + 1, left : right + 1] = True
        assert torch.equal(filled, expected)


# ---- what is not found -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", [{}, {"contrast": True, "sam_prompt": "both", "trained": False}], ids=["plain", "all"])
def test_a_case_without_a_sentence_is_an_empty_mask_among_the_others(model, stage, how):
    for name, value in {"stage": stage, **how}.items():
        setattr(model, name, value)
    logits, aux = model(IMAGE, some([True, False, True, False]))
    assert logits.shape == (4, 1, *SIZE) and aux["found"].tolist() == [True, False, True, False]
    assert (logits[[1, 3]] < 0).all() and not aux["coarse"][[1, 3]].any() and not aux["saliency"][[1, 3]].any()
    alone = model(IMAGE[[0, 2]], some()[[0, 2]])
    torch.testing.assert_close(alone.aux["saliency"], aux["saliency"][[0, 2]], atol=1e-2, rtol=1e-2)
    nothing = model(IMAGE, some([False] * 4))
    assert (nothing.logits < 0).all() and not nothing.aux["found"].any()


@pytest.mark.parametrize("stage", STAGES)
def test_flat_saliency_is_an_empty_mask_and_no_error(model, stage, monkeypatch):
    maps = torch.rand(4, *SIZE, generator=torch.Generator().manual_seed(0))
    maps[1], maps[2] = 0.0, 0.4
    monkeypatch.setattr(module, "saliency", lambda *args, **options: maps)
    model.stage = stage
    logits, aux = model(IMAGE, some())
    assert aux["found"].tolist() == [True, False, False, True] and (logits[1:3] < 0).all()
    assert (logits[[0, 3]] > 0).any()


@pytest.mark.parametrize("cleanup", module.CLEANUPS)
def test_a_contrast_however_faint_is_cleaned_up_like_any_other(model, cleanup, monkeypatch):
    first, second = torch.full((2, 4, *SIZE), 0.5)
    first[:2, 10:20, 10:20] += 2e-7
    answers = iter([first, second])
    monkeypatch.setattr(module, "saliency", lambda *args, **options: next(answers))
    model.stage, model.cleanup, model.contrast = "components", cleanup, True
    aux = model(IMAGE, some()).aux
    assert aux["found"].tolist() == [True, True, False, False]
    assert aux["coarse"].sum((1, 2)).tolist()[2:] == [0, 0] and aux["coarse"][:2, 12:18, 12:18].all()


def test_contrast_leaves_what_the_words_add(model):
    model.stage = "saliency"
    plain = model(IMAGE, some()).aux["saliency"]
    average = module.saliency(model.clip.tower, IMAGE, model.clip.average_text(4), layer=1, beta=1.0, copies=2)
    model.contrast = True
    left = (plain - average).clamp_min(0)
    torch.testing.assert_close(model(IMAGE, some()).aux["saliency"], left / left.amax((1, 2), keepdim=True))
    model.method = "rollout"  # which never reads a sentence, so that nothing is left
    assert not model(IMAGE, some()).aux["found"].any()


# ---- switches and parts ----------------------------------------------------------------------------------


def test_switches_are_attributes_with_their_values(model):
    for switch, values in model.switches.items():
        assert getattr(model, switch) == getattr(model.config, switch) in values


@pytest.mark.parametrize(
    ("switch", "what"),
    [
        ("stage", "logits"),
        ("method", "saliency"),
        ("layer", "saliency"),
        ("beta", "saliency"),
        ("cleanup", "coarse"),
        ("components", "coarse"),
        ("sam_prompt", "logits"),
        ("contrast", "saliency"),
        ("trained", "saliency"),
    ],
)
def test_a_switch_changes_what_it_names(model, switch, what):
    seen = []
    for value in model.switches[switch]:
        setattr(model, switch, value)
        prediction = model(IMAGE[:2], some(batch=2))
        assert prediction.logits.shape == (2, 1, *SIZE) and prediction.logits.isfinite().all()
        seen.append({"logits": prediction.logits, **prediction.aux}[what].float())
    assert any((other - seen[0]).abs().max() > 1e-3 for other in seen[1:])


def test_another_sentence_gives_another_map(model):
    model.stage = "saliency"
    one, other, again = (model(IMAGE, some(seed=seed)).logits for seed in (1, 2, 1))
    assert (one - other).abs().amax((1, 2, 3)).min() > 1e-3 and torch.equal(one, again)


def test_the_untrained_control_is_the_same_each_time_and_is_not_stored(tmp_path):
    model = make()
    model.calibrate_text(some(batch=16))
    names, state = set(model.state_dict()), torch.get_rng_state()
    trained = model(IMAGE, some()).aux["saliency"]
    model.trained = False
    with torch.inference_mode():
        control = model(IMAGE, some()).aux["saliency"]
    assert torch.equal(model(IMAGE, some()).aux["saliency"], control) and (control - trained).abs().max() > 1e-2
    assert torch.equal(torch.get_rng_state(), state) and set(model.state_dict()) == names
    models.save(tmp_path / "m.safetensors", model, "medclip_samv2")
    again, _ = models.load(tmp_path / "m.safetensors")
    assert again.trained  # a switch of a test is not part of the weights
    again.trained = False
    assert torch.equal(again(IMAGE, some()).aux["saliency"], control)
    torch.testing.assert_close(model.towers.prompts[0].mean, model.clip.prompts[0].mean)


def test_a_trained_sam_is_taken_over_and_any_other_part_refused():
    model, part = make(), build("sam", size="tiny")
    before, kept = model(IMAGE, some()).logits, model.sam
    model.adopt_part("sam", part.eval())
    assert model.sam is kept and all(torch.equal(t, part.state_dict()[n]) for n, t in model.sam.state_dict().items())
    assert (model(IMAGE, some()).logits - before).abs().max() > 1e-3
    assert model.provenance["sam"] == "trained from scratch" and not any(
        p.requires_grad for p in model.sam.parameters()
    )
    for name, wrong, words in (
        ("sam", nn.Linear(2, 2), r"a part 'sam' that is a SAM, not 'sam' \(Linear\)"),
        ("clip", part, r"not 'clip' \(Sam\)"),
        ("sam", build("sam", size="small"), "SAM is another one .* train the size 'tiny'"),
    ):
        with pytest.raises(ValueError, match=words) as excinfo:
            model.adopt_part(name, wrong)
        sentence(excinfo)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"stage": "boxes"}, "no stage 'boxes': use one of saliency, binary, components, box, sam"),
        ({"method": "cam"}, "no method 'cam': use one of m2ib"),
        ({"cleanup": "crf"}, "no cleanup 'crf': use one of otsu, two_means, threshold"),
        ({"sam_prompt": "boxes"}, "no sam_prompt 'boxes': use one of box, points, both"),
        ({"layer": 7}, "has 3 blocks, so there is no layer 7: use 0 to 2"),
        ({"sam": "vit_x"}, "no size 'vit_x' of SamConfig"),
        ({"pool": "max"}, "no pool 'max'"),
        ({"depths": 1}, "MedClipSamConfig has no field 'depths'"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(config, words):
    with pytest.raises(ValueError, match=words) as excinfo:
        make(**config)
    sentence(excinfo)


# ---- training and files ----------------------------------------------------------------------------------


def test_training_moves_the_towers_alone():
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.learner.parameters(), lr=0.01)
    prediction = model.learner.train()(IMAGE, some())
    loss("dhn_nce")(prediction.logits, None).backward()
    optimizer.step()
    moved = {name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"clip"} and model.learner is model.clip
    model.eval()(IMAGE, some())  # looking changes no gradient and no parameter's kind
    assert all(p.requires_grad == ("null" not in name) for name, p in model.clip.named_parameters())


def test_decoding_an_encoded_image_equals_the_forward_pass(model):
    prompts = some([True, True, False, True])
    features = model.encode_image(IMAGE)
    model.decode(features, some(seed=5))
    assert torch.equal(model.decode(features, prompts).logits, model(IMAGE, prompts).logits)
    model.stage = "box"
    light = model.encode_image(IMAGE)
    model.stage = "sam"
    assert light.sam is None and torch.equal(model.decode(light, prompts).logits, model(IMAGE, prompts).logits)


def test_weights_survive_the_file(tmp_path):
    model = make(seed=3, roles=("local", "global"), stage="box", components=2, contrast=True)
    prompts = prompts_for(model.roles, 4)
    model.calibrate_text(prompts_for(model.roles, 16, seed=4))
    digest = models.save(tmp_path / "m.safetensors", model, "medclip_samv2", seed=3)
    again, meta = models.load(tmp_path / "m.safetensors", digest)
    for model.stage in ("saliency", "sam"):
        again.stage = model.stage
        assert torch.equal(again(IMAGE, prompts).logits, model(IMAGE, prompts).logits)
    assert again.provenance == model.provenance and meta["external"] == {} and meta["notes"] == {"seed": 3}
    assert (again.components, again.contrast, again.learner.training) == (2, True, False)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A tiny SAM published under the name `ours`, with its file."""
    torch.manual_seed(9)
    path = tmp_path / "weights" / "ours" / "ours.pth"
    path.parent.mkdir(parents=True)
    torch.save(build("sam", size="tiny").state_dict(), path)
    content = path.read_bytes()
    known = sam.Checkpoint("tiny", "https://example.org/", len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(sam.CHECKPOINTS, "ours", known)
    monkeypatch.setenv(models.WEIGHTS, str(tmp_path / "weights"))
    return path


def test_a_published_sam_is_not_stored_but_obtained_again(published, tmp_path, monkeypatch):
    model, path = make(sam="ours"), tmp_path / "m.safetensors"
    assert model.provenance["sam"].startswith("pretrained ours (") and model.external == {"sam": "ours"}
    models.save(path, model, "medclip_samv2")
    with models.safetensors.safe_open(path, "pt") as file:
        assert not any(name.startswith("sam.") for name in file.keys())  # noqa: SIM118
    again, _ = models.load(path)
    assert torch.equal(again(IMAGE, some()).logits, model(IMAGE, some()).logits)
    assert again.provenance == model.provenance and not any(p.requires_grad for p in again.sam.parameters())

    torch.save(build("sam", size="tiny").state_dict(), published)
    monkeypatch.setitem(sam.CHECKPOINTS, "ours", sam.Checkpoint("tiny", "https://example.org/"))
    with pytest.raises(ValueError, match="another version of the backbone 'ours'") as excinfo:
        models.load(path)
    sentence(excinfo)
    published.unlink()
    with pytest.raises(FileNotFoundError, match="checkpoint 'ours' is not offered") as excinfo:
        models.load(path)
    sentence(excinfo)


def test_biomedclip_and_a_published_sam_run_through_the_same_code(published, biomedclip, tmp_path):
    model = make(**BIOMEDCLIP, sam="ours", layer=0)
    prompts = CaptionBank("biomedclip", tmp_path / "captions").prompts(
        {"global": ["a breast tumor", "a brain tumor", None, "a tumor"]}
    )
    logits, aux = model(IMAGE, prompts)
    assert logits.shape == (4, 1, *SIZE) and aux["found"].tolist() == [True, True, False, True]
    assert model.provenance["backbone"] == "biomedclip" and model.provenance["sam"].startswith("pretrained ours")
    assert not torch.equal(aux["saliency"][0], aux["saliency"][1])
    models.save(tmp_path / "m.safetensors", model, "medclip_samv2")
    (biomedclip / "open_clip_pytorch_model.bin").unlink()  # the towers are stored, as they may have been trained
    again, _ = models.load(tmp_path / "m.safetensors")
    assert torch.equal(again(IMAGE, prompts).logits, logits)
    model.trained = False
    assert (model(IMAGE, prompts).aux["saliency"] - aux["saliency"]).abs().max() > 1e-3
