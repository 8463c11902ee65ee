"""The claims that every model of `lib.models` must pass; a new paper is not done until it is in this matrix.

A model's test file subclasses `ModelMatrix` and names the model. Stored outputs are written anew, after a
deliberate change of a model, by `python tests/models/matrix.py`.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lib.models import MODELS, build, load, save
from lib.text import Prompts

torch.set_num_threads(1)

TEXT_DIM = 12
STORED = Path(__file__).with_name("outputs.json")
# Without stored outputs: one reads no embeddings, the other's masks jump, and the rest read volumes.
APART = (
    "sam",
    "medclip_samv2",
    "duplus",
    "duplus_prognosis",
    "malenia",
    "lesion_or_rest",
    "sam_slices",
    "entries",
    "ensemble",
)
BIOMEDCLIP = {  # the sizes of the folder that the fixture `biomedclip` writes
    "tower": "biomedclip",
    "pool": "token",
    "side": 32,
    "patch": 8,
    "width": 16,
    "depth": 2,
    "heads": 2,
    "mlp_ratio": 4.0,
    "dim": 8,
    "text_dim": 8,
}


def prompts_for(roles, batch, seed=0, present=None, dim=TEXT_DIM) -> Prompts:
    """Random embeddings; `present` is one bool per sample for every role, or per role by name."""
    generator = torch.Generator().manual_seed(seed)
    marks = present if isinstance(present, dict) else dict.fromkeys(roles, present)
    masks = {r: torch.ones(batch).bool() if marks[r] is None else torch.tensor(marks[r]) for r in roles}
    pooled = {r: torch.randn(batch, dim, generator=generator) * masks[r][:, None] for r in roles}
    return Prompts(pooled, masks)


def mixed(roles, batch) -> dict[str, list[bool]]:
    """Every combination of presence over a batch of four or more: two roles absent in different samples."""
    return {role: [(i >> k) % 2 == 0 for i in range(batch)] for k, role in enumerate(roles)}


def image_for(batch=4, channels=1, size=(64, 64), seed=0):
    return torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


def awake(model, seed=0):
    """As after some training: no weight left at its zero start, so that text acts, and settled batch norms."""
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(0, 0.1, generator=generator)
        for norm in norms:
            norm.momentum = 1.0
        model.train()
        if norms:
            dim = getattr(model.config, "text_dim", TEXT_DIM)
            model(image_for(), prompts_for(model.roles, 4, present=mixed(model.roles, 4), dim=dim))
        for norm in norms:
            norm.momentum = 0.1
    return model


class ModelMatrix:
    """Subclass with `name`, `config`, and `overfit_dsc`: the Dice score that 60 steps on one batch must reach."""

    name: str
    config: dict
    overfit_dsc = 0.9

    def make(self, seed=0):
        torch.manual_seed(seed)
        return awake(build(self.name, size="tiny", **self.config))

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("size", [(64, 64), (65, 71)])
    def test_forward_and_backward_at_any_size(self, channels, size):
        model = self.make().train()
        logits, aux = model(image_for(4, channels, size), prompts_for(model.roles, 4))
        assert logits.shape == (4, 1, *size) and logits.isfinite().all() and isinstance(aux, dict)
        logits.square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    def test_several_classes(self):
        torch.manual_seed(0)
        model = build(self.name, size="tiny", classes=3, **self.config)
        assert model(image_for(), prompts_for(model.roles, 4)).logits.shape == (4, 3, 64, 64)

    def test_a_gradient_reaches_every_trainable_parameter(self):
        model = self.make().train()
        prompts = prompts_for(model.roles, 4, present=mixed(model.roles, 4))
        logits = model(image_for(), prompts).logits
        (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        silent = [
            name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
        ]
        assert silent == []

    def test_frozen_stays_frozen(self):
        model = self.make().train()
        for p in list(model.parameters())[::2]:  # whatever a caller freezes, on top of the model's own
            p.requires_grad_(False)
        before = {n: p.clone() for n, p in model.named_parameters()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(image_for(), prompts_for(model.roles, 4, present=mixed(model.roles, 4))).logits.sum().backward()
        optimizer.step()
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved and moved <= {n for n, p in model.named_parameters() if p.requires_grad}

    def test_swapping_a_prompt_changes_the_output(self):
        model = self.make().eval()
        a, b = prompts_for(model.roles, 2, seed=1), prompts_for(model.roles, 2, seed=2)
        image = image_for(2)
        first = model(image, a).logits
        for role in model.roles:
            swapped = Prompts({**a.pooled, role: b.pooled[role]}, a.present)
            assert (model(image, swapped).logits - first).abs().amax((1, 2, 3)).min() > 1e-4, role
        if not model.roles:
            assert torch.equal(model(image, prompts_for(("global",), 2)).logits, first)

    def test_an_absent_prompt_is_the_null_whatever_its_text(self):
        model = self.make().eval()
        image = image_for(3)
        everything = prompts_for(model.roles, 3, seed=1)
        for role in model.roles:
            present = {r: everything.present[r].clone() for r in model.roles}
            present[role][1] = False
            noise = {**everything.pooled, role: everything.pooled[role].clone()}
            noise[role][1] = torch.tensor(float("nan"))  # the worst text that could leak
            with_noise = model(image, Prompts(noise, present)).logits
            nothing = model(image, everything.without(role)).logits
            full = model(image, everything).logits
            torch.testing.assert_close(with_noise[1], nothing[1])
            torch.testing.assert_close(with_noise[[0, 2]], full[[0, 2]])
            assert not torch.allclose(nothing[1], full[1], atol=1e-4)
            without_role = Prompts(
                {r: t for r, t in everything.pooled.items() if r != role},
                {r: t for r, t in everything.present.items() if r != role},
            )
            torch.testing.assert_close(model(image, without_role).logits, nothing)

    def test_decoding_an_encoded_image_equals_the_forward_pass(self):
        model = self.make().eval()
        image, prompts = image_for(2, 1, (65, 71)), prompts_for(model.roles, 2)
        features = model.encode_image(image)
        model.decode(features, prompts_for(model.roles, 2, seed=5))  # decoding leaves the features as they were
        assert torch.equal(model.decode(features, prompts).logits, model(image, prompts).logits)

    def test_one_batch_can_be_overfitted(self):
        model = self.make().train()
        rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
        centres = torch.tensor([(20, 20), (40, 24), (24, 44), (44, 40)])
        mask = torch.stack([((rows - r) ** 2 + (columns - c) ** 2 < 144).float() for r, c in centres])[:, None]
        image = (0.3 + 0.4 * mask + 0.2 * image_for()).clamp(0, 1)
        prompts = prompts_for(model.roles, 4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(60):
            logits = model(image, prompts).logits
            p = logits.sigmoid()
            loss = F.binary_cross_entropy_with_logits(logits, mask) - 2 * (p * mask).sum() / (p + mask).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        hit = (logits > 0).float()
        assert 2 * (hit * mask).sum() / (hit + mask).sum() > self.overfit_dsc

    def test_a_batch_of_one_trains(self):
        model = self.make().train()
        logits = model(image_for(1), prompts_for(model.roles, 1)).logits
        logits.mean().backward()
        assert logits.shape == (1, 1, 64, 64) and logits.isfinite().all()

    def test_weights_survive_the_file(self, tmp_path):
        model = self.make(seed=3)
        if model.roles:
            model.calibrate_text(prompts_for(model.roles, 16, seed=4))
        model.train()(image_for(), prompts_for(model.roles, 4))  # running statistics move
        digest = save(tmp_path / "m.safetensors", model, self.name, {"size": "tiny", **self.config}, seed=3)
        again, meta = load(tmp_path / "m.safetensors", digest)
        image, prompts = image_for(2), prompts_for(model.roles, 2, present=mixed(model.roles, 2))
        assert torch.equal(again(image, prompts).logits, model.eval()(image, prompts).logits)
        assert not again.training and again.config == model.config and again.provenance == model.provenance
        assert meta["name"] == self.name and meta["notes"] == {"seed": 3}

    def test_switches_are_attributes_with_their_values(self):
        model = self.make()
        for switch, values in model.switches.items():
            assert getattr(model, switch) == getattr(model.config, switch) in values

    def test_stored_outputs_match(self):
        match_stored(self.name)


def match_stored(name: str) -> None:
    """Claim that a model computes what it did when its outputs were stored."""
    stored = json.loads(STORED.read_text())[name]
    torch.testing.assert_close(outputs(name), torch.tensor(stored), atol=1e-4, rtol=1e-4)


def outputs(name: str) -> torch.Tensor:
    """A dozen logits of the tiny model, or a clip's few, with fixed weights, image and prompts."""
    torch.manual_seed(0)
    text = {} if name in ("unet", "dynunet") else {"text_dim": TEXT_DIM}
    model = awake(build(name, size="tiny", **text)).eval()
    with torch.no_grad():
        logits = model(image_for(2), prompts_for(model.roles, 2, present=mixed(model.roles, 2))).logits
    return (logits if name == "clip" else logits[:, 0, 5::30, 7::23]).flatten()


if __name__ == "__main__":
    written = {name: [round(v, 6) for v in outputs(name).tolist()] for name in MODELS if name not in APART}
    STORED.write_text(json.dumps(written, indent=1) + "\n")
    print(f"Wrote {STORED}.")
