"""Malenia: what words may change, how tokens are matched and named, what is a negative, and what is refused."""

import math
import warnings

import pytest
import torch
from torch.nn import functional as F

from lib import losses
from lib.data import Batch
from lib.losses.queries import assignment_cost
from lib.models import build, load, save
from lib.models.malenia import CHOICES, places, remoteness, sinusoids, spread
from lib.text import Prompts
from tests.models.matrix import TEXT_DIM

torch.set_num_threads(1)

SIZE = (16, 16, 16)
DICE_BCE = losses.loss("dice_bce")
ROLES = tuple(f"attribute.{name}" for name in ("shape", "density", "surface"))
CONFIG = {"size": "tiny", "text_dim": TEXT_DIM, "roles": ROLES, "channels": (4, 8, 8, 8), "width": 16, "heads": 2}
# Two values of each attribute, as embeddings.
VALUES = torch.randn(len(ROLES), 2, TEXT_DIM, generator=torch.Generator().manual_seed(3))


def said(codes, present=None) -> Prompts:
    """Prompts of cases whose attributes have these values: codes [R, A] of 0 and 1."""
    codes = torch.tensor(codes)
    there = torch.ones(codes.shape, dtype=torch.bool) if present is None else torch.tensor(present)
    pooled = {role: VALUES[a, codes[:, a]] * there[:, a, None] for a, role in enumerate(ROLES)}
    return Prompts(pooled, {role: there[:, a] for a, role in enumerate(ROLES)})


ALL = [[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)]


def make(seed=0, **fields):
    """A model that has seen every value."""
    torch.manual_seed(seed)
    model = build("malenia", **CONFIG | fields)
    model.calibrate_text(said(ALL))
    return model


def scene(lesions=((5, 5, 5), (10, 10, 11)), codes=((0, 1, 0), (1, 0, 1)), empty=1, batch=2, seed=0):
    """A batch of volumes with balls whose brightness is the second code, and rows that hold none."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) + 0.5 for n in SIZE), indexing="ij"))
    balls = [((grid - torch.tensor(c).view(3, 1, 1, 1)) ** 2).sum(0) < 9 for c in lesions]
    mask = torch.stack([ball.float() for ball in balls] + [torch.zeros(SIZE)] * empty)
    bright = sum((0.5 if code[1] else -0.3) * ball for ball, code in zip(balls, codes, strict=True))
    image = 0.4 + bright + 0.05 * torch.rand(batch, 1, *SIZE, generator=generator)
    rows = [*codes, *[(0, 0, 0)] * empty] * batch
    mask = mask.expand(batch, -1, -1, -1, -1).clone()
    return Batch(image.clamp(0, 1), mask, said(rows), torch.arange(batch), torch.full((batch, 2), torch.nan))


def train(model, batch, steps, lr=1e-2):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.objective(batch, DICE_BCE)
        loss.backward()
        optimizer.step()
    return loss.item()


def dice(logits, mask):
    drawn, true = logits > 0, mask > 0.5
    return 2 * (drawn & true).flatten(2).sum(-1) / (drawn.flatten(2).sum(-1) + true.flatten(2).sum(-1)).clamp_min(1)


# ---- shapes, words, files --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16, 16), (11, 16, 21)])
def test_any_size_and_number_of_prompts(size):
    model = make().eval()
    image = torch.rand(2, 1, *size)
    logits, aux = model(image, said(ALL[:6]))
    assert logits.shape == (2, 3, *size) and logits.isfinite().all()
    assert aux["names"].shape == (2, 8) and aux["scores"].shape == (2, 8, 3) and len(aux["token_masks"]) == 3
    assert aux["mask_branch"].shape == aux["text_branch"].shape == logits.shape


def test_decoding_an_encoded_image_equals_the_forward_pass():
    model, image = make().eval(), torch.rand(2, 1, *SIZE)
    features = model.encode_image(image)
    model.decode(features, said(ALL[4:]))  # leaves the features as they were
    assert torch.equal(model.decode(features, said(ALL[:4])).logits, model(image, said(ALL[:4])).logits)


def test_an_absent_attribute_is_null_whatever_its_text():
    model, image = make().eval(), torch.rand(1, 1, *SIZE)
    here = [[True, False, True], [True, True, True]]
    clean = said(ALL[:2], here)
    dirty = Prompts({**clean.pooled}, clean.present)
    dirty.pooled[ROLES[1]][0] = torch.nan
    torch.testing.assert_close(model(image, dirty).logits, model(image, clean).logits)
    gone = {role: tensor for role, tensor in clean.pooled.items() if role != ROLES[1]}
    without = Prompts(gone, {role: clean.present[role] for role in gone})
    same = clean.without(ROLES[1])
    torch.testing.assert_close(model(image, without).logits, model(image, same).logits)


def test_weights_and_the_values_of_training_survive_the_file(tmp_path):
    model = make(seed=2).eval()
    digest = save(tmp_path / "m.safetensors", model, "malenia", dict(CONFIG))
    again, _ = load(tmp_path / "m.safetensors", digest)
    image = torch.rand(1, 1, *SIZE)
    assert torch.equal(again(image, said(ALL[:3])).logits, model(image, said(ALL[:3])).logits)
    assert torch.equal(again.vocabulary.isnan(), model.vocabulary.isnan())
    assert (~model.vocabulary.isnan().any(-1)).sum(1).tolist() == [2, 2, 2]


def test_a_gradient_reaches_every_parameter():
    for fields in ({}, {"cmki": "none"}, {"describe": "token", "attribute_heads": False, "anchored": 0.0}):
        model = make(**fields).train()
        model.objective(scene(), DICE_BCE).backward()
        silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        assert [name for name in silent if not name.startswith("prompts.")] == []  # nulls: no word is absent here


def test_switches_are_attributes_with_their_values():
    model = make()
    for name, values in model.switches.items():
        assert getattr(model, name) in values == CHOICES[name]


# ---- matching and naming ---------------------------------------------------------------------------------


def test_tokens_are_matched_one_to_one_at_the_least_cost():
    model = make()
    batch = scene()
    volume, row = model._lesions(batch.mask)
    truth = batch.mask[volume, row]
    masks = -6 + torch.zeros(2, 8, *SIZE)
    masks[0, 3], masks[0, 5] = 12 * truth[1] - 6, 12 * truth[0] - 6
    masks[1, 0], masks[1, 7] = 12 * truth[2] - 6, 12 * truth[3] - 6
    assert volume.tolist() == [0, 0, 1, 1] and row.tolist() == [0, 1, 0, 1]
    assert model._matched(masks, truth, volume).tolist() == [5, 3, 0, 7]
    cost = assignment_cost(masks[0], truth[:2])
    assert cost.shape == (8, 2) and cost.argmin(0).tolist() == [5, 3]


def test_each_prompt_gets_the_tokens_that_its_words_fit_best():
    model = make().eval()
    texts, present = (x[None] for x in model._embedded(said([[0, 0, 0], [0, 1, 1], [1, 1, 0]])))
    tokens = texts[:, [2, 0, 1, 1]]
    for naming in ("similarity", "values"):
        model.naming = naming
        assert model.scores(tokens, texts, present).argmax(-1).tolist() == [[2, 0, 1, 1]]
    paragraph = make(alignment="paragraph").eval()
    texts, present = (x[None] for x in paragraph._embedded(said([[0, 0, 0], [0, 1, 1], [1, 1, 0]])))
    turned = texts[:, [2, 0, 1, 1]].roll(1, 2)  # each word under another attribute: the paragraph is the same
    assert paragraph.scores(turned, texts, present).argmax(-1).tolist() == [[2, 0, 1, 1]]


@pytest.mark.parametrize("naming", ["similarity", "values"])
def test_the_words_of_a_prompt_that_is_asked_alone_choose_among_tokens(naming):
    model = make(naming=naming).eval()
    texts, _ = model._embedded(said(ALL))
    tokens = texts[None, :, :]
    for code in range(len(ALL)):
        asked, present = (x[None] for x in model._embedded(said(ALL[code : code + 1])))
        assert model.scores(tokens, asked, present)[0, :, 0].argmax() == code


def test_values_say_how_probable_an_attribute_is_and_not_how_often_it_is_asked():
    model = make(naming="values").eval()
    texts, present = (x[None] for x in model._embedded(said([[0, 0, 0], [1, 0, 0], [1, 1, 1]])))
    scores = model.scores(texts[:, :1], texts, present)[0, 0]
    assert scores.argmax() == 0 and (scores <= 1e-6).all()  # logarithms of probabilities
    only = present.clone()
    only[..., 1:] = False
    texts = texts[:, [0, 1, 1]]  # the second value twice
    twice = model.scores(texts[:, :1], texts, only)[0, 0].exp()
    once = model.scores(texts[:, :1], texts[:, :2], only[:, :2])[0, 0].exp()
    torch.testing.assert_close(twice[:2], once)
    torch.testing.assert_close(once.sum(), torch.tensor(1.0))  # there are no other values


def test_a_value_that_training_lacked_takes_its_share_of_the_probability():
    model = build("malenia", **CONFIG, naming="values").eval()
    model.calibrate_text(said([[0, 0, 0]]))
    texts, present = (x[None] for x in model._embedded(said([[0, 0, 0], [1, 1, 1], [1, 1, 1]])))
    alone, three = model.scores(texts, texts[:, :1], present[:, :1]), model.scores(texts, texts, present)
    torch.testing.assert_close(alone, torch.zeros_like(alone))  # the one value that there is
    torch.testing.assert_close(three[..., :2], model.scores(texts, texts[:, :2], present[:, :2]))
    assert (three[0, 0, 0] > three[0, 0, 1]) and (three[0, 1, 1] > three[0, 1, 0])


def test_a_single_prompt_is_answered_by_one_token_and_none_by_all():
    model, image = make().eval(), torch.rand(1, 1, *SIZE)
    alone = model(image, said(ALL[:1]))
    assert alone.logits.shape == (1, 1, *SIZE) and (alone.logits > -12).any()
    model.naming = "none"
    every = model(image, said(ALL[:2])).logits
    assert torch.equal(every[:, 0], every[:, 1]) and (every[:, :1].clamp_min(-12) >= alone.logits - 1e-4).all()


def test_the_mean_of_two_branches_lies_between_them():
    model, image = make().eval(), torch.rand(1, 1, *SIZE)
    both = model(image, said(ALL[:1]))
    p, m, t = (x.sigmoid() for x in (both.logits, both.aux["mask_branch"], both.aux["text_branch"]))
    torch.testing.assert_close(p, (m + t) / 2, atol=1e-4, rtol=1e-3)
    model.branch = "mask"
    assert torch.equal(model(image, said(ALL[:1])).logits, both.aux["mask_branch"])
    model.branch = "text"
    assert torch.equal(model(image, said(ALL[:1])).logits, both.aux["text_branch"])
    model.branch, model.ensemble = "both", "logit"
    mean = (both.aux["mask_branch"] + both.aux["text_branch"]) / 2
    drawn = model(image, said(ALL[:1])).logits
    torch.testing.assert_close(drawn[mean > -9], mean[mean > -9])  # below, no token draws


# ---- learning --------------------------------------------------------------------------------------------


def test_it_learns_to_find_two_lesions_and_to_tell_them_apart():
    model, batch = make(seed=1), scene()
    train(model, batch, 120)
    model.eval()
    rows = [0, 1, 3, 4]  # those of the lesions
    found = dice(model(batch.image, batch.prompts[rows]).logits, batch.mask[:, :2])
    swapped = dice(model(batch.image, batch.prompts[[1, 0, 4, 3]]).logits, batch.mask[:, :2])
    assert found.mean() > 0.75 and swapped.mean() < 0.15


def test_equal_values_are_neither_positive_nor_negative():
    model = make()
    texts, present = model._embedded(said([[0, 1, 0], [0, 0, 1]]))
    similarity, positive, negative = model._against_vocabulary(texts, texts, present)
    assert similarity.shape == (2, model.config.values, 3)
    assert positive.sum((1, 2)).tolist() == [3, 3] and negative.sum((1, 2)).tolist() == [3, 3]
    assert not (positive & negative).any()
    torch.testing.assert_close(similarity[positive], torch.ones(6))


@pytest.mark.parametrize("alignment, expected", [("mp_nce", "less"), ("naive", "more")])
def test_naive_negatives_push_a_lesion_from_words_that_are_true_of_it(alignment, expected):
    model = make(alignment=alignment, negatives="batch")
    texts, present = model._embedded(said([[0, 1, 0], [0, 0, 1]]))
    described = texts.detach().clone().requires_grad_()
    loss = model._alignment(described, texts.detach(), present, None, None, None)
    (gradient,) = torch.autograd.grad(loss, described)
    pushed = (gradient[0, 0] * texts[0, 0]).sum()  # of the value that both lesions have: descent goes against it
    assert (pushed > 1e-4) == (expected == "more")


def test_a_paragraph_is_one_vector_and_a_single_positive_one_attribute():
    torch.manual_seed(0)
    for alignment in ("paragraph", "single"):
        model = make(alignment=alignment)
        texts, present = model._embedded(said([[0, 1, 0], [1, 0, 1]]))
        right = model._alignment(texts, texts, present, None, None, None)
        wrong = model._alignment(texts.flip(0), texts, present, None, None, None)
        assert right < wrong


def test_only_the_last_levels_are_trained():
    for levels in (1, 2, 3):
        model = make(levels=levels).train()
        model.objective(scene(), DICE_BCE).backward()
        drawn = [any(p.grad is not None and p.grad.any() for p in block.draw.parameters()) for block in model.blocks]
        assert drawn == [n >= 3 - levels for n in range(3)]


def test_points_cost_about_what_all_voxels_do():
    model, batch = make(upsampled=True).eval(), scene()
    torch.manual_seed(0)
    whole = model.objective(batch, DICE_BCE).item()
    sampled = make(upsampled=True, points=2000).eval().objective(batch, DICE_BCE).item()
    assert sampled == pytest.approx(whole, rel=0.2) and sampled != whole


def test_a_query_model_reads_no_text():
    model, batch = make(naming="none"), scene()
    model.objective(batch, DICE_BCE).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.describers.parameters())


def test_tokens_are_spread_and_attend_near_their_places():
    anchors = spread(8)
    assert anchors.shape == (8, 3) and anchors.abs().max() <= 0.8
    assert F.pdist(anchors).min() > 0.3
    model, level = make(), torch.zeros(1, 16, 4, 4, 4)
    where = F.pad(model.anchors, (0, 1))[None]
    nearest = torch.cdist(model.anchors, places((4, 4, 4), anchors)).argmin(1)
    assert torch.equal(model._bias(level, where, None)[0].argmax(1), nearest)
    assert torch.equal(model._kept(torch.zeros(1, 8, 4, 4, 4), where)[0].flatten(1).argmax(1), nearest)
    assert make(anchored=0.0)._bias(level, where, None) is None
    assert sinusoids(places((4, 4, 4), anchors), 16).shape == (64, 16)


def test_distance_is_measured_in_reaches():
    where = torch.tensor([[[0.0, 0, 0, 0], [0, 0, 0, math.log(0.5)], [1, 0, 0, 0]]])
    away = remoteness(where, (2, 1, 1))[0, :, :, 0, 0]
    torch.testing.assert_close(away, torch.tensor([[0.25, 0.25], [1, 1], [2.25, 0.25]]), atol=1e-5, rtol=1e-4)


def test_masked_attention_looks_where_the_last_mask_lies():
    model = make(masked_attention=True, anchored=0.0)
    mask = -torch.ones(1, 8, 4, 4, 4)
    mask[0, 2, 0, 0, 0] = 1
    bias = model._bias(torch.zeros(1, 16, 4, 4, 4), torch.zeros(1, 8, 4), mask)[0]
    assert bias[2, 0] == 0 and bias[2].isinf().sum() == 63 and (bias[3] == 0).all()  # an empty mask hides nothing


def test_a_token_that_found_nothing_answers_nothing():
    model, image = make().eval(), torch.rand(1, 1, *SIZE)
    features = model.encode_image(image)
    features.masks[-1] = features.masks[-1] * 0 - 1
    assert (model.decode(features, said(ALL[:2])).logits < -11).all()


# ---- bad input -------------------------------------------------------------------------------------------


def test_more_lesions_than_tokens_warns_and_keeps_the_largest():
    model, batch = make(tokens=1), scene()
    batch.mask[:, 1, 10, 10, 10] = 0
    batch.mask[:, 0, 5:7, 5:7, 9:12] = 1
    with pytest.warns(UserWarning, match="more than the 1 lesions"):
        volume, row = model._lesions(batch.mask)
    assert volume.tolist() == [0, 1] and row.tolist() == [0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(tokens=2)._lesions(batch.mask)


def test_a_batch_without_a_lesion_teaches_empty_masks():
    model, batch = make(), scene()
    empty = Batch(batch.image, torch.zeros_like(batch.mask), batch.prompts, batch.index, batch.outcome)
    empty.mask[1] = -1  # and one without any row
    loss = model.objective(empty, DICE_BCE)
    loss.backward()
    assert loss > 0 and loss.isfinite()


def test_roles_that_it_was_not_built_for_are_refused():
    prompts = Prompts({"report": torch.zeros(1, TEXT_DIM)}, {"report": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(ValueError, match="not 'report'"):
        make()(torch.rand(1, 1, *SIZE), prompts)


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"naming": "guess"}, "must be one of similarity"),
        ({"channels": (4, 8, 8)}, "three scales need 4 widths"),
        ({"levels": 4}, "give 1 to 3 levels"),
        ({"tokens": 0}, "at least one token"),
        ({"roles": ()}, "at least one token and role"),
        ({"heads": 3}, "3 heads do not divide"),
    ],
)
def test_a_wrong_config_is_one_sentence(fields, sentence):
    with pytest.raises(ValueError, match=sentence) as excinfo:
        build("malenia", **CONFIG | fields)
    assert str(excinfo.value).endswith(".") and "\n" not in str(excinfo.value)


def test_only_an_image_network_of_the_same_widths_is_adopted():
    rest = build("lesion_or_rest", size="tiny", channels=CONFIG["channels"], width=CONFIG["width"])
    model = make()
    model.adopt_part("image", rest)
    assert torch.equal(model.pyramid.stem.conv.weight, rest.pyramid.stem.conv.weight)
    assert "lesion from rest" in model.provenance["image"]
    for name, part in (("image", build("lesion_or_rest", size="tiny")), ("text", rest)):
        with pytest.raises(ValueError, match="whose network has the same widths"):
            model.adopt_part(name, part)
