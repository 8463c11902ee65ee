"""Maps of where a tower looks: of any size, under any pooling, image by image, and without a trace in the tower."""

import pytest
import torch
from matrix import image_for
from torch.nn import functional as F

from lib.models import build
from lib.models import saliency as module
from lib.models.clip import Tower
from lib.models.saliency import METHODS, enlarged, faithfulness, m2ib, normalised, rollout, saliency

POOLS = ("map", "token", "avg")
READERS = ("m2ib", "gradcam", "gscorecam")  # the methods that read the sentence
FEW = {"copies": 2}
INSIDE = {"layer": 1, **FEW}  # behind the last block of a tower with a class token, no patch is read any more


def make(pool="map", seed=0) -> Tower:
    torch.manual_seed(seed)
    return build("clip", size="tiny", pool=pool, width=32).eval().tower


def text_for(batch, seed=0, dim=128):
    return torch.randn(batch, dim, generator=torch.Generator().manual_seed(seed))


def opened(tower, image, layer=1):
    with torch.no_grad():
        return tower.run(tower.tokens(tower.prepare(image)), 0, layer + 1)


def sentence(excinfo) -> None:
    assert str(excinfo.value).endswith(".") and "\n" not in str(excinfo.value)


# ---- what all methods share ------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("channels", "size"), [(1, (50, 77)), (3, (131, 64))])
def test_images_of_any_size_get_maps_from_zero_to_one(method, pool, channels, size):
    maps = saliency(make(pool), image_for(2, channels, size), text_for(2), method, **INSIDE)
    assert maps.shape == (2, *size) and not maps.requires_grad
    assert all((low, high) == (0, 1) or method == "gscorecam" and high == 0 for low, high in map(torch.aminmax, maps))


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_equals_its_images_and_its_sentences_one_by_one(method, pool):
    tower, words = make(pool).double(), text_for(3).double()
    images = image_for(3).double()
    images[2], words[2] = images[1], -words[1]  # one image under opposite sentences
    together = saliency(tower, images, words, method, **INSIDE)
    torch.testing.assert_close(saliency(tower, images, words, method, batch=2, **INSIDE), together)
    if method == "chance":  # each image of a call has noise of its own
        assert not torch.equal(together[1], together[2])
        return
    for i in range(3):
        torch.testing.assert_close(
            saliency(tower, images[i : i + 1], words[i : i + 1], method, **INSIDE)[0], together[i]
        )
    assert torch.allclose(together[1], together[2]) == (method not in READERS)


@pytest.mark.parametrize("method", METHODS)
def test_a_map_is_a_function_of_its_arguments(method):
    tower, image, words = make(), image_for(2), text_for(2)
    state = torch.get_rng_state()
    one, again, other = (saliency(tower, image, words, method, seed=s, **INSIDE) for s in (0, 0, 1))
    assert torch.equal(one, again) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, other) == (method not in ("m2ib", "chance"))
    other, counted = (saliency(tower, image, words, method, layer=layer, **FEW) for layer in (0, -2))
    assert torch.equal(other, one) == (method not in READERS) and torch.equal(counted, one)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_is_evaluated_and_trained_around_it_without_a_trace(method):
    tower, image, words = make(), image_for(2), text_for(2).requires_grad_()
    expected = saliency(tower, image, words, method, **INSIDE)
    for number, parameter in enumerate(tower.parameters()):
        parameter.requires_grad_(number % 3 > 0)
        parameter.grad = torch.full_like(parameter, 7.0) if number % 2 else None
    before = [(p.requires_grad, p.grad, p.clone()) for p in tower.parameters()]
    with torch.inference_mode():
        found = saliency(tower, image_for(2), words, method, **INSIDE)
    torch.testing.assert_close(found, expected)
    for parameter, (wanted, gradient, value) in zip(tower.parameters(), before, strict=True):
        assert parameter.requires_grad is wanted and parameter.grad is gradient and torch.equal(parameter, value)
        assert gradient is None or (gradient == 7).all()
    assert words.grad is None
    tower(image).sum().backward()  # training goes on


def test_a_map_without_contrast_stays_zero_and_the_others_are_stretched():
    maps = torch.stack([torch.full((4, 4), 0.3), torch.arange(16.0).view(4, 4), torch.arange(16.0).view(4, 4) * 1e-30])
    stretched = normalised(maps)
    assert not stretched[0].any()
    torch.testing.assert_close(stretched[1], torch.arange(16.0).view(4, 4) / 15)
    torch.testing.assert_close(stretched[2], stretched[1])
    large = enlarged(maps, (9, 31))  # where a constant of .3 is rounded up here and down there
    assert large.shape == (3, 9, 31) and not large[0].any() and large[1].max() == 1
    assert not normalised(torch.full((1, 2, 2), torch.nan)).any()


def test_an_image_without_content_or_an_absent_sentence_gives_no_nan():
    tower = make("token")
    image, words = torch.zeros(3, 1, 64, 64), text_for(3)
    image[1] = image_for(1)
    words[1], words[2] = 0, torch.nan
    for method in METHODS:
        maps = saliency(tower, image, words, method, **FEW)
        assert maps.isfinite().all() and maps.min() >= 0 and maps.max() <= 1
        together = saliency(tower, image[:2], words[:2], method, **FEW)  # nor does it spread to the others
        torch.testing.assert_close(maps[:2], together, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "gradcamm"}, "no saliency method 'gradcamm': use one of m2ib, gradcam, gscorecam, rollout"),
        ({"layer": 3}, "has 3 blocks, so there is no layer 3: use 0 to 2"),
        ({"layer": -4}, "there is no layer -4"),
        ({"text": text_for(3)}, "There are 3 sentences for 2 images: give one for each"),
    ],
)
def test_what_cannot_be_mapped_is_one_sentence(change, words):
    with pytest.raises(ValueError, match=words) as excinfo:
        saliency(**{"tower": make(), "image": image_for(2), "text": text_for(2), **change})
    sentence(excinfo)


# ---- the bottleneck --------------------------------------------------------------------------------------


def test_the_bottleneck_is_its_equation():
    tower = make("token").double()
    tokens, words = opened(tower, image_for(2).double()), text_for(2).double()
    found = m2ib(tower, tokens, words, layer=1, beta=0.5, steps=3, copies=2)
    noise = torch.randn(3, 2, *tokens.shape[1:], generator=torch.Generator().manual_seed(0)).double()
    for i in range(2):
        alpha = torch.full_like(tokens[i], 5.0, requires_grad=True)
        adam = torch.optim.Adam([alpha], lr=1.0)
        for step in range(3):
            share = alpha.sigmoid()
            passed = torch.distributions.Normal(share * tokens[i], 1 - share)
            cost = torch.distributions.kl_divergence(passed, torch.distributions.Normal(0.0, 1.0))
            feature = tower.feature(tower.run(passed.mean + passed.stddev * noise[step], 2))
            fit = F.cosine_similarity(words[i][None], feature).mean()
            total = 0.5 * cost.mean() - fit
            torch.testing.assert_close(found.losses[step, i], torch.stack([cost.mean(), fit, total]).detach())
            adam.zero_grad()
            total.backward()
            adam.step()
        torch.testing.assert_close(found.alpha[i], alpha.detach())
        torch.testing.assert_close(found.patches[i].flatten(), cost.sum(-1)[1:].detach())


def test_a_higher_price_lets_less_pass():
    tower = make()
    tokens, words = opened(tower, image_for(2)), text_for(2)
    cheap, dear = (m2ib(tower, tokens, words, layer=1, beta=beta, copies=2) for beta in (0.01, 10.0))
    assert (dear.capacity.mean((1, 2)) < cheap.capacity.mean((1, 2))).all()
    assert (dear.losses[-1, :, 2] < dear.losses[0, :, 2]).all()


def test_the_noise_is_the_seeds_or_the_callers():
    tower = make()
    tokens, words = opened(tower, image_for(2)), text_for(2)
    noise = torch.randn(10, 2, *tokens.shape[1:], generator=torch.Generator().manual_seed(5))
    drawn, given = (
        m2ib(tower, tokens, words, layer=1, seed=5, **FEW),
        m2ib(tower, tokens, words, layer=1, noise=noise, **FEW),
    )
    assert torch.equal(drawn.patches, given.patches) and drawn.losses.shape == (10, 2, 3)
    with pytest.raises(
        ValueError, match=r"noise of M2IB has the shape \(10, 2, 64, 32\): expected \(10, 10, 64, 32\)"
    ) as e:
        m2ib(tower, tokens, words, layer=1, noise=noise)
    sentence(e)
    assert all(p.requires_grad for p in tower.parameters())


@pytest.mark.parametrize("beta", [0.0, 1e-6, 0.1])
def test_channels_that_open_wide_stay_finite_in_single_precision(beta):
    tower = make()
    tokens, words = opened(tower, image_for(2)), text_for(2)
    found = m2ib(tower, tokens, words, layer=1, beta=beta, steps=40, lr=4.0, copies=2)
    assert beta or found.alpha.max() > 30  # where σ(α) is 1 in float32
    assert found.alpha.isfinite().all() and found.patches.isfinite().all() and found.losses.isfinite().all()


# ---- the rivals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", POOLS)
def test_rollout_is_the_product_of_the_towers_own_attentions(pool, monkeypatch):
    tower, seen = make(pool), []
    for block in tower.trunk.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, given, out: seen.append(given[0].mean(1)))
    prepared = tower.prepare(image_for(2))
    with torch.no_grad():
        tokens = tower.run(tower.tokens(prepared))
        found = rollout(tower, prepared)
    product = torch.eye(tokens.shape[1])
    for attention in seen[:3]:
        product = (0.5 * attention + 0.5 * torch.eye(tokens.shape[1])) @ product
    read = module._pooling(tower, tower.trunk.norm(tokens))
    torch.testing.assert_close(read.sum(1), torch.ones(2))
    torch.testing.assert_close(product.sum(-1), torch.ones(2, tokens.shape[1]))
    whole = torch.einsum("nt, ntp -> np", read, product)
    torch.testing.assert_close(whole.sum(1), torch.ones(2))
    torch.testing.assert_close(found.flatten(1), whole[:, tower.prefix :])


@pytest.mark.parametrize("pool", POOLS)
def test_a_tower_is_read_where_it_pools(pool):
    tower = make(pool)
    tokens = opened(tower, image_for(2), layer=2).requires_grad_()
    (gradient,) = torch.autograd.grad(tower.feature(tokens).square().sum(), tokens)
    with torch.no_grad():
        share = module._pooling(tower, tower.trunk.norm(tokens))
    assert torch.equal(share > 0, gradient.abs().sum(-1) > 0)
    if pool == "map":  # what attention pooling gives its values, asked for with the identity as values
        at = tower.trunk.attn_pool
        q, k = at.q(at.latent), at.kv(tower.trunk.norm(tokens)).chunk(2, dim=-1)[0]
        q, k = (x.expand(2, -1, -1).unflatten(-1, (at.num_heads, -1)).transpose(1, 2) for x in (q, k))
        values = torch.eye(tokens.shape[1]).expand(2, at.num_heads, -1, -1)
        expected = F.scaled_dot_product_attention(q, k, values).mean(1)[:, 0]
        torch.testing.assert_close(share, expected.detach())


def test_gradcam_sees_what_raises_the_match_and_not_what_lowers_it():
    tower, image, words = make(), image_for(1), text_for(1)
    tokens = opened(tower, image).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cosine_similarity(tower.feature(tower.run(tokens, 2)), words).sum(), tokens)
    score = (gradient.mean(1) * tokens).sum(-1)[0].detach()
    one, other = (module.gradcam(tower, tokens.detach(), sign * words, layer=1).flatten() for sign in (1, -1))
    torch.testing.assert_close(one, score.clamp_min(0))
    torch.testing.assert_close(other, (-score).clamp_min(0))


def test_behind_the_last_block_of_a_tower_with_a_class_token_no_patch_is_read():
    tower, image, words = make("token"), image_for(2), text_for(2)
    assert not saliency(tower, image, words, "gradcam").any()
    assert torch.equal(*(saliency(tower, image, sign * words, "m2ib", **FEW) for sign in (1, -1)))


def test_gscorecam_weighs_each_map_by_what_it_shows():
    tower, image, words = make(), image_for(2), text_for(2)
    prepared, tokens = tower.prepare(image), opened(tower, image)
    with torch.no_grad():
        found = module.gscorecam(tower, prepared, tokens, words, layer=1, channels=1)
        strength = module._gradient(tower, tokens, words, 1).abs().mean(1)
        for i, channel in enumerate(strength.argmax(1).tolist()):
            single = tokens[i, :, channel].unflatten(0, tower.grid)
            mask = enlarged(single[None], (64, 64))
            feature = tower.feature(tower.run(tower.tokens(prepared[i : i + 1] * mask)))
            expected = (F.cosine_similarity(feature, words[i : i + 1]) * single).relu()
            torch.testing.assert_close(found[i], expected, atol=1e-5, rtol=1e-4)


def test_the_centre_is_in_the_middle_and_the_same_everywhere():
    maps = saliency(make(), image_for(2, 1, (64, 96)), text_for(2), "centre")
    torch.testing.assert_close(maps, maps.flip(1).flip(2))
    assert torch.equal(maps[0], maps[1]) and maps[0, 32, 48] == 1 and maps[0, 0, 0] == 0


# ---- faithfulness ----------------------------------------------------------------------------------------


class Corner:
    """A tower that looks at nothing but the detail in one corner."""

    prepare = tokens = run = staticmethod(lambda image: image)

    @staticmethod
    def feature(image):
        detail = image[:, :, :32, :32].std((1, 2, 3))
        return torch.stack([detail, torch.full_like(detail, 0.2)], dim=1)


def test_the_map_of_what_the_tower_sees_is_more_faithful_than_any_other():
    image, words = image_for(3, 1, (64, 64)), torch.tensor([[1.0, 0]]).expand(3, -1)
    true = torch.zeros(3, 64, 64)
    true[:, :32, :32] = 1
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    right, chance, wrong = (faithfulness(Corner, image, words, maps) for maps in (true, noise, 1 - true))
    assert (right[0] < chance[0]).all() and (chance[0] < wrong[0]).all()  # deletion: less is better
    assert (right[1] > chance[1]).all() and (chance[1] > wrong[1]).all()  # insertion: more is better
    # What the best map leaves out first, the worst leaves in longest.
    for scores in (right, wrong):
        assert (scores[0] - scores[1]).abs().min() > 0.2
    assert (chance[0] - chance[1]).abs().max() < 0.1


def test_faithfulness_ends_at_the_whole_image_and_at_the_blurred_one():
    tower, image, words = make(), image_for(2, 1, (50, 77)), text_for(2)
    maps = saliency(tower, image, words, "gradcam")
    with torch.no_grad():
        whole = F.cosine_similarity(tower(image), words)
        deletion, insertion = faithfulness(tower, image, words, maps, steps=1)  # only both ends, in either order
    torch.testing.assert_close(deletion, insertion)
    flat = torch.full((2, 50, 77), 0.5)
    alone = [faithfulness(tower, image[i : i + 1], words[i : i + 1], flat[i : i + 1]) for i in range(2)]
    for found, apart in zip(faithfulness(tower, image, words, flat), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(found, torch.cat(apart))
    assert not torch.allclose(whole, deletion)
