import pytest
import torch
from matrix import TEXT_DIM, ModelMatrix, image_for, prompts_for

from lib.models import build


class TestUNet(ModelMatrix):
    name = "unet"
    config = {}

    def test_prompts_are_ignored(self):
        model = self.make().eval()
        assert model.roles == () and not hasattr(model, "calibrate_text")

    def test_a_wrong_channel_count_is_one_sentence(self):
        with pytest.raises(ValueError, match=r"shape \(4, 2, 64, 64\).*load it with channels=1"):
            self.make()(image_for(channels=2), prompts_for((), 4))


class TestTextOnly(ModelMatrix):
    name = "text_only"
    config = {"text_dim": TEXT_DIM}
    overfit_dsc = 0.75  # a coarse map has no sharp border

    def test_the_image_is_never_seen(self):
        model = self.make().eval()
        prompts = prompts_for(model.roles, 2)
        one, other = (model(image_for(2, seed=s), prompts).logits for s in (0, 1))
        assert torch.equal(one, other)

    def test_without_prompts_every_image_gets_the_same_map(self):
        model = self.make().eval()
        logits = model(image_for(3), prompts_for(model.roles, 3).without()).logits
        torch.testing.assert_close(logits, logits[:1].expand_as(logits))

    def test_any_roles_can_be_probed(self):
        torch.manual_seed(0)
        model = build("text_only", size="tiny", roles=("report",), text_dim=TEXT_DIM)
        assert model.roles == ("report",)
        assert model(image_for(2), prompts_for(("report",), 2)).logits.shape == (2, 1, 64, 64)
