"""Where does a tower look when it reads a sentence? M2IB and its rivals, behind one call.

Every method gets the same tower (lib.models.clip) and text features, and returns a map in [0, 1] for each image.
Nothing here is trained, and all of it is a function of its arguments: randomness comes from a seed alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from lib.models.clip import Tower

SHARP = 224  # side, in pixels, at which the released code scales a map before it resizes it to the image
METHODS = ("m2ib", "gradcam", "gscorecam", "rollout", "centre", "chance")


class Bottleneck(NamedTuple):
    """What M2IB leaves: the patches' saliency [N, rows, columns] in nats, and how it got there.

    losses: [steps, N, 3], capacity (before β), cosine similarity and total before each update; capacity and alpha:
    [N, T, D], the first at the last forward pass, the second after the last update.
    """

    patches: Tensor
    losses: Tensor
    capacity: Tensor
    alpha: Tensor


@contextmanager
def _gradients() -> Iterator[None]:
    """Saliency needs gradients wherever it is called, also while a model is evaluated."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def m2ib(
    tower: Tower,
    tokens: Tensor,
    text: Tensor,
    *,
    layer: int,
    beta: float = 0.1,
    steps: int = 10,
    copies: int = 10,
    lr: float = 1.0,
    seed: int = 0,
    noise: Tensor | None = None,
) -> Bottleneck:
    """Multi-modal information bottleneck (Wang et al. 2023) behind block `layer`, as the released code runs it.

    tokens: [N, T, D], the clean output of block `layer`; text: [N, E]. Each token's channel lets a share λ = σ(α) of
    the signal through and fills up with noise; α is chosen so that what passes still matches the text (cosine) at the
    least capacity, KL(N(λx, (1 - λ)²) || N(0, 1)), weighed by β. Images do not meet: a batch gives what one image at a
    time gives. noise: [steps, copies, T, D], drawn from `seed` by default, the same for every image.
    """
    frozen = [p for p in tower.parameters() if p.requires_grad]
    for parameter in frozen:  # their gradients would cost a third of the time, and reach the optimiser
        parameter.requires_grad_(False)
    try:
        with _gradients():
            shape = (steps, copies, *tokens.shape[1:])
            if noise is None:  # drawn on the CPU, so that every device draws the same
                noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(tokens)
            if noise.shape != shape:
                raise ValueError(f"The noise of M2IB has the shape {tuple(noise.shape)}: expected {shape}.")
            x, text = tokens.detach().clone()[:, None], text.detach().clone()[:, None]
            alpha = torch.full_like(x, 5.0, requires_grad=True)  # [N, 1, T, D]
            adam, losses = torch.optim.Adam([alpha], lr=lr), []
            for eps in noise.clone():
                # 1 - σ(α) is written as σ(-α), since σ(α) can round to 1, whose logarithm here would be infinite.
                mean, spread = alpha.sigmoid() * x, (-alpha).sigmoid()
                z = mean + spread * eps  # [N, copies, T, D]
                capacity = -0.5 * (1 + 2 * F.logsigmoid(-alpha) - mean**2 - spread**2)  # [N, 1, T, D]
                feature = tower.feature(tower.run(z.flatten(0, 1), layer + 1)).unflatten(0, z.shape[:2])
                fit = F.cosine_similarity(text, feature, dim=-1, eps=1e-6).mean(1)  # [N]
                cost = capacity.mean((1, 2, 3))
                total = beta * cost - fit
                losses.append(torch.stack([cost, fit, total], dim=-1).detach())
                adam.zero_grad()
                total.sum().backward()
                adam.step()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    capacity = capacity.detach()[:, 0]
    patches = capacity.nansum(-1)[:, tower.prefix :]  # NaN, as of an absent sentence, is skipped as released
    return Bottleneck(on_grid(tower, patches), torch.stack(losses), capacity, alpha.detach()[:, 0])


def gradcam(tower: Tower, tokens: Tensor, text: Tensor, *, layer: int) -> Tensor:
    """GradCAM [N, rows, columns] at the output of block `layer`: channels weighed by their mean gradient."""
    weight = _gradient(tower, tokens, text, layer).mean(1, keepdim=True)  # [N, 1, D]
    return on_grid(tower, (weight * tokens[:, tower.prefix :]).sum(-1).relu())


def gscorecam(tower: Tower, image: Tensor, tokens: Tensor, text: Tensor, *, layer: int, channels: int = 32) -> Tensor:
    """gScoreCAM (Chen et al. 2022): of the `channels` with the largest gradients, each is weighed by how well the
    image, masked by its map, matches the text. image: prepared, [N, 3, H, W].
    """
    strength = _gradient(tower, tokens, text, layer).abs().mean(1)  # [N, D]
    chosen = strength.topk(min(channels, strength.shape[1]), dim=1).indices
    patches = tokens[:, tower.prefix :]
    maps = on_grid(tower, patches.gather(2, chosen[:, None].expand(-1, patches.shape[1], -1)).mT)  # [N, k, h, w]
    masks = normalised(F.interpolate(maps, image.shape[-2:], mode="bilinear", align_corners=False))
    masked = (image[:, None] * masks[:, :, None]).flatten(0, 1)
    feature = tower.feature(tower.run(tower.tokens(masked))).unflatten(0, masks.shape[:2])  # [N, k, E]
    weight = F.cosine_similarity(text[:, None], feature, dim=-1)
    return (weight[..., None, None] * maps).sum(1).relu()


def rollout(tower: Tower, image: Tensor) -> Tensor:
    """Attention rollout (Abnar and Zuidema 2020) [N, rows, columns]: what the pooled token gathers from each patch.

    It never sees a sentence: attention alone, the control for every method that does. image: prepared.
    """
    tokens = tower.tokens(image)
    reached = torch.eye(tokens.shape[1], dtype=tokens.dtype, device=tokens.device).expand(len(tokens), -1, -1)
    for block in tower.trunk.blocks:
        reached = 0.5 * (reached + _attention(block, tokens) @ reached)  # half of each token is its residual
        tokens = block(tokens)
    read = (_pooling(tower, tower.trunk.norm(tokens))[:, None] @ reached)[:, 0]
    return on_grid(tower, read[:, tower.prefix :])


def _attention(block, tokens: Tensor) -> Tensor:
    """Mean over heads of a block's attention [N, T, T]."""
    attn = block.attn
    q, k, _ = rearrange(attn.qkv(block.norm1(tokens)), "n t (qkv h d) -> qkv n h t d", qkv=3, h=attn.num_heads)
    return (attn.q_norm(q) @ attn.k_norm(k).mT * attn.scale).softmax(-1).mean(1)


def _pooling(tower: Tower, tokens: Tensor) -> Tensor:
    """How much of each token the tower's pooled feature is made of: [N, T]."""
    trunk = tower.trunk
    if trunk.attn_pool is None and trunk.global_pool == "token":
        return F.one_hot(torch.zeros(len(tokens), dtype=torch.long), tokens.shape[1]).to(tokens)
    if trunk.attn_pool is None:
        return torch.full(tokens.shape[:2], 1 / tokens.shape[1]).to(tokens)
    pool = trunk.attn_pool
    q = rearrange(pool.q(pool.latent), "1 1 (h d) -> h 1 d", h=pool.num_heads)
    k = rearrange(pool.kv(tokens), "n t (kv h d) -> kv n h t d", kv=2, h=pool.num_heads)[0]
    return (pool.q_norm(q) @ pool.k_norm(k).mT * pool.scale).softmax(-1).mean(1)[:, 0]


def _gradient(tower: Tower, tokens: Tensor, text: Tensor, layer: int) -> Tensor:
    """Gradient [N, P, D] of the match with the text at the patches that leave block `layer`."""
    with _gradients():
        x = tokens.detach().clone().requires_grad_()
        match = F.cosine_similarity(tower.feature(tower.run(x, layer + 1)), text.detach().clone(), dim=-1)
        (gradient,) = torch.autograd.grad(match.sum(), x)
    return gradient[:, tower.prefix :]


# ---- one call for all ---------------------------------------------------------------------------------------


def saliency(
    tower: Tower,
    image: Tensor,
    text: Tensor,
    method: str = "m2ib",
    *,
    layer: int = -1,
    beta: float = 0.1,
    copies: int = 10,
    seed: int = 0,
    batch: int = 16,
) -> Tensor:
    """Map images [N, 1 or 3, H, W] in [0, 1] and text features [N, E] to saliency [N, H, W], from 0 to 1 in each image.

    layer: the block opened, negative from the end; a map without any contrast stays 0 everywhere.
    Raises ValueError for an unknown method, a layer that is not there, or another number of sentences than images.
    """
    layer = check_layer(tower, layer)
    if method not in METHODS:
        raise ValueError(f"There is no saliency method {method!r}: use one of {', '.join(METHODS)}.")
    if len(text) != len(image):
        raise ValueError(f"There are {len(text)} sentences for {len(image)} images: give one for each.")
    maps, noise = [], torch.Generator().manual_seed(seed)
    for start in range(0, len(image), batch):
        part, words = image[start : start + batch], text[start : start + batch]
        with torch.no_grad():
            prepared = tower.prepare(part)
            tokens = tower.run(tower.tokens(prepared), 0, layer + 1)
            match method:
                case "m2ib":
                    found = m2ib(tower, tokens, words, layer=layer, beta=beta, copies=copies, seed=seed).patches
                case "gradcam":
                    found = gradcam(tower, tokens, words, layer=layer)
                case "gscorecam":
                    found = gscorecam(tower, prepared, tokens, words, layer=layer)
                case "rollout":
                    found = rollout(tower, prepared)
                case "centre":
                    found = _centre(tower).expand(len(part), -1, -1)
                case "chance":
                    found = torch.stack([torch.rand(tower.grid, generator=noise) for _ in part])
        maps.append(enlarged(found.to(part), part.shape[-2:]))
    return torch.cat(maps)


def check_layer(tower: Tower, layer: int) -> int:
    """Count a layer from the start; raises ValueError where the tower is not that deep."""
    if not -tower.depth <= layer < tower.depth:
        raise ValueError(
            f"The tower has {tower.depth} blocks, so there is no layer {layer}: use 0 to {tower.depth - 1}."
        )
    return layer % tower.depth


def on_grid(tower: Tower, patches: Tensor) -> Tensor:
    """Lay patches [..., P] out as [..., rows, columns]."""
    return patches.unflatten(-1, tower.grid)


def normalised(maps: Tensor) -> Tensor:
    """Stretch each map [..., H, W] to [0, 1]; one without contrast becomes 0."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny), 0.0)


def enlarged(patches: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring patch maps [N, rows, columns] to images [N, H, W] from 0 to 1."""
    flat_is_zero = normalised(patches)[:, None]  # enlarging a constant would round it to something with contrast
    return normalised(F.interpolate(flat_is_zero, tuple(size), mode="bilinear", align_corners=False)[:, 0])


def _centre(tower: Tower) -> Tensor:
    """A bump in the middle that reaches the border at two standard deviations: [1, rows, columns]."""
    rows, columns = (torch.linspace(-2, 2, side) for side in tower.grid)
    return torch.exp(-0.5 * (rows[:, None] ** 2 + columns[None] ** 2))[None]


def faithfulness(tower: Tower, image: Tensor, text: Tensor, maps: Tensor, steps: int = 16) -> tuple[Tensor, Tensor]:
    """Deletion and insertion scores [N] (Petsiuk et al. 2018): the mean match with the text while pixels vanish into,
    or appear out of, a blurred image in the order of their saliency. Less, and more, is better.
    """
    with torch.no_grad():
        prepared = tower.prepare(image)
        side = prepared.shape[-1] // 4
        blurred = F.interpolate(
            F.adaptive_avg_pool2d(prepared, max(1, side // 4)), prepared.shape[-2:], mode="bilinear"
        )
        sized = F.interpolate(maps[:, None], prepared.shape[-2:], mode="bilinear", align_corners=False)
        # Ties are broken by place, so that a flat map removes row by row rather than everything at once.
        rank = sized.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1).view_as(sized)
        scores = []
        for share in torch.linspace(0, 1, steps + 1):
            gone = rank < share * rank[0].numel()
            pair = [torch.where(gone, blurred, prepared), torch.where(gone, prepared, blurred)]
            scores.append([F.cosine_similarity(tower.feature(tower.run(tower.tokens(x))), text, dim=-1) for x in pair])
    deletion, insertion = (torch.stack(curve).mean(0) for curve in zip(*scores, strict=True))
    return deletion, insertion
