"""The baselines of Malenia: one network for all lesions, and SAM with the box of the true mask in every slice."""

import pytest
import torch
from torch.nn import functional as F

from lib import losses, models
from lib.data import Batch
from lib.models import build
from lib.text import Prompts

DICE_BCE = losses.loss("dice_bce")


def prompts(number: int) -> Prompts:
    """Texts of `number` cases, which neither model reads."""
    return Prompts({"class": torch.ones(number, 4)}, {"class": torch.ones(number).bool()})


def make(name, seed=0, **config):
    torch.manual_seed(seed)
    return build(name, size="tiny", **config)


def scene(batch=2):
    """Volumes [B, 1, 16, 20, 24] with a box-like lesion, a ball, and none: masks [B, 3, 16, 20, 24]."""
    generator = torch.Generator().manual_seed(0)
    z, y, x = torch.meshgrid(*(torch.arange(n) + 0.5 for n in (16, 20, 24)), indexing="ij")
    ball = ((z - 8) ** 2 + (y - 13) ** 2 + (x - 17) ** 2 < 20).float()
    box = ((z > 4) & (z < 9) & (y > 3) & (y < 9) & (x > 4) & (x < 9)).float()
    mask = torch.stack([box, ball, torch.zeros_like(box)]).expand(batch, -1, -1, -1, -1).clone()
    image = 0.2 + 0.5 * mask.amax(1, keepdim=True) + 0.1 * torch.rand(batch, 1, 16, 20, 24, generator=generator)
    return image, mask


# ---- lesion or rest --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16, 16), (9, 20, 13)])
def test_rest_answers_every_case_alike_at_any_size(size):
    model = make("lesion_or_rest").eval()
    image = torch.rand(2, 1, *size)
    logits = model(image, prompts(6)).logits
    assert logits.shape == (2, 3, *size) and torch.equal(logits[:, 0], logits[:, 2])
    assert torch.equal(model.decode(model.encode_image(image), prompts(6)).logits, logits)


def test_rest_learns_all_lesions_as_one_mask():
    image, mask = scene()
    mask[1, 2] = -1  # a volume with fewer cases
    model = make("lesion_or_rest").train()
    batch = Batch(image, mask, prompts(6), torch.arange(2), torch.full((2, 2), torch.nan))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model.objective(batch, DICE_BCE).backward()
        optimizer.step()
    drawn = model(image, prompts(6)).logits[:, 0] > 0
    true = mask.amax(1) > 0
    assert 2 * (drawn & true).sum() / (drawn.sum() + true.sum()) > 0.8


def test_rest_refuses_too_few_widths():
    with pytest.raises(ValueError, match="needs 4 widths"):
        build("lesion_or_rest", size="tiny", channels=(8,))


# ---- SAM, slice by slice ---------------------------------------------------------------------------------


def test_slices_are_asked_with_the_box_of_their_own_mask():
    _, mask = scene()
    model = make("sam_slices")
    drawn = model.draw(mask, torch.Generator().manual_seed(0))
    boxes = drawn.boxes[:, 0].view(2, 3, 16, 4)
    there = drawn.present.view(2, 3, 16)
    assert torch.equal(there, mask.flatten(3).any(-1))
    assert boxes[0, 0, 6].tolist() == [4, 3, 9, 9]  # x0, y0, x1, y1
    assert (drawn.labels == -1).all()  # a box and no points


def test_slices_without_a_lesion_are_empty():
    image, mask = scene()
    model = make("sam_slices").eval()
    logits = model(image, model.draw(mask, torch.Generator().manual_seed(0))).logits
    there = mask.flatten(3).any(-1)
    assert logits.shape == mask.shape and (logits[~there] < -20).all()
    assert (logits[there] > -20).any()


def test_a_slice_is_read_as_sam_reads_it():
    image, mask = scene()
    model = make("sam_slices").eval()
    asked = model.draw(mask, torch.Generator().manual_seed(0))
    logits = model(image, asked).logits
    row = 1 * 3 * 16 + 1 * 16 + 8  # second volume, the ball, slice 8
    alone = model.sam(image[1, :, 8][None], asked[[row]]).logits[0, 0]
    torch.testing.assert_close(logits[1, 1, 8], alone, atol=1e-4, rtol=1e-4)


def test_slices_can_be_learned_and_survive_the_file(tmp_path):
    image, mask = scene()
    model = make("sam_slices").train()
    asked = model.draw(mask, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    first = None
    for _ in range(25):
        optimizer.zero_grad()
        loss = DICE_BCE(model(image, asked).logits, mask)
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    assert loss.item() < 0.7 * first
    digest = models.save(tmp_path / "m.safetensors", model, "sam_slices", {"size": "tiny"})
    again, _ = models.load(tmp_path / "m.safetensors", digest)
    assert torch.equal(again(image, asked).logits, model.eval()(image, asked).logits)


def test_the_oracle_may_be_made_less_exact():
    _, mask = scene()
    model = make("sam_slices", jitter=0.2)
    exact, loose = (
        (setattr(model, "jitter", share), model.draw(mask, torch.Generator().manual_seed(0)).boxes)[1]
        for share in (0.0, 0.2)
    )
    there = ~exact.isnan().any(-1)
    assert model.config.jitter == 0.2 and (F.l1_loss(exact[there], loose[there]) > 0.05)


def test_an_unknown_sam_is_refused():
    with pytest.raises(ValueError, match="must be one of vit_h"):
        build("sam_slices", size="tiny", sam="huge")
