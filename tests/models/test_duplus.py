"""DuPLUS: what each prompt may change, what an image costs once, and what is refused."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from lib.losses.survival import cox, discrete, discrete_risk
from lib.models import Prediction, build, load, save
from lib.models.duplus import CONTEXT, MODALITY, TARGET
from lib.text import CaptionBank, Prompts
from tests.models.matrix import TEXT_DIM, image_for

torch.set_num_threads(1)

SIZE = (16, 16, 16)
CONFIG = {"size": "tiny", "text_dim": TEXT_DIM, "channels": (8, 16, 32), "hidden": 16, "dense": 16}
WORDS = torch.randn(3, TEXT_DIM, generator=torch.Generator().manual_seed(9))


def asked(images=2, targets=3, modality=0, seed=0):
    """Prompts of B·K cases: a context for each image, a target for each case, one modality for all or one for each."""
    generator = torch.Generator().manual_seed(seed)
    kinds = [modality] * images if isinstance(modality, int) else modality
    pooled = {
        CONTEXT: torch.randn(images, TEXT_DIM, generator=generator).repeat_interleave(targets, 0),
        TARGET: torch.randn(images * targets, TEXT_DIM, generator=generator),
        MODALITY: WORDS[kinds].repeat_interleave(targets, 0),
    }
    return Prompts(pooled, {role: torch.ones(images * targets, dtype=torch.bool) for role in pooled})


def make(seed=0, **fields):
    """A network that has been shown three modalities, and whose modulation is no longer the identity."""
    torch.manual_seed(seed)
    model = build("duplus", **CONFIG | fields)
    model.calibrate_text(asked(3, 2, modality=[0, 1, 2]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "prompt_proj.2.weight" in name:
                parameter.normal_(0, 0.3)
    return model


def volumes(batch=2, size=SIZE, seed=0):
    return image_for(batch, 1, size, seed)


def changed(prompts, role, rows, seed=5):
    text = prompts.pooled[role].clone()
    text[rows] = torch.randn(TEXT_DIM, generator=torch.Generator().manual_seed(seed))
    return dataclasses.replace(prompts, pooled={**prompts.pooled, role: text})


@pytest.mark.parametrize("modulation", ["film", "gate", "none"])
@pytest.mark.parametrize("fields", [{}, {"stride": 1}, {"stems": 1}, {"modulated_by": "target"}])
def test_logits_have_a_channel_for_each_target_and_every_weight_learns(modulation, fields):
    model = make(modulation=modulation, **fields).train()
    prompts = asked(3, modality=[0, 1, 2])
    logits, aux = model(volumes(3), prompts)
    assert logits.shape == (3, 3, *SIZE) and logits.isfinite().all()
    assert aux["dense"].shape == (9 if fields.get("modulated_by") else 3, 16)
    (logits * torch.randn(logits.shape)).sum().backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent == {"context.null", "target.null"}  # every prompt is there


def test_a_target_changes_its_own_map_alone():
    model, prompts = make().eval(), asked()
    with torch.no_grad():
        before = model(volumes(), prompts).logits
        after = model(volumes(), changed(prompts, TARGET, [1])).logits
    assert (after - before).abs().amax((2, 3, 4)).gt(1e-3).tolist() == [[False, True, False], [False] * 3]


def test_a_context_changes_all_maps_of_its_image_and_no_other():
    model, prompts = make().eval(), asked()
    with torch.no_grad():
        before = model(volumes(), prompts).logits
        after = model(volumes(), changed(prompts, CONTEXT, [0, 1, 2])).logits
    assert (after - before).abs().amax((2, 3, 4)).gt(1e-3).tolist() == [[True] * 3, [False] * 3]


def test_without_modulation_the_context_is_not_read():
    model, prompts = make(modulation="none").eval(), asked()
    with torch.no_grad():
        assert torch.equal(
            model(volumes(), prompts).logits, model(volumes(), changed(prompts, CONTEXT, range(6))).logits
        )


def test_each_image_passes_the_stem_of_its_modality():
    model = make().eval()
    image = volumes(3)
    with torch.no_grad():
        together = model(image, asked(3, modality=[2, 0, 1])).logits
        prompts = asked(3, modality=[2, 0, 1])
        for number in range(3):
            rows = torch.arange(3 * number, 3 * number + 3)
            torch.testing.assert_close(model(image[number : number + 1], prompts[rows]).logits[0], together[number])
        other = model(image, asked(3, modality=[2, 1, 1])).logits
    assert (other - together).abs().amax((1, 2, 3, 4)).gt(1e-3).tolist() == [False, True, False]


def test_one_backbone_pass_serves_any_number_of_targets():
    model, prompts = make().eval(), asked(2, 3)
    with torch.no_grad():
        features = model.encode_image(volumes(), prompts)
        assert len(features.volume) == 2  # and not six
        assert torch.equal(model.decode(features, prompts).logits, model(volumes(), prompts).logits)
        again = asked(2, 5, seed=4)
        assert model.decode(features, again).logits.shape == (2, 5, *SIZE)


def test_under_a_single_prompt_each_case_is_a_pass_of_its_own():
    model, prompts = make(modulated_by="target").eval(), asked()
    with torch.no_grad():
        whole = model(volumes(), prompts).logits
        alone = model(volumes()[1:], prompts[torch.tensor([5])]).logits
        assert torch.equal(whole, model(volumes(), changed(prompts, CONTEXT, range(6))).logits)
    torch.testing.assert_close(alone[0, 0], whole[1, 2])


def test_an_absent_context_is_its_null_whatever_the_text():
    model, prompts = make().eval(), asked()
    absent = prompts.without(CONTEXT)
    noise = dataclasses.replace(absent, pooled={**absent.pooled, CONTEXT: torch.full((6, TEXT_DIM), torch.nan)})
    with torch.no_grad():
        torch.testing.assert_close(model(volumes(), noise).logits, model(volumes(), absent).logits)


def test_fixed_classes_need_no_target_prompt():
    model = make(classes=3).eval()
    prompts = asked()
    with torch.no_grad():
        logits = model(volumes(), prompts).logits
        assert torch.equal(logits, model(volumes(), changed(prompts, TARGET, range(6))).logits)
    assert logits.shape == (2, 3, *SIZE)
    with pytest.raises(ValueError, match="outlines 3 fixed classes and was asked for 2"):
        model(volumes(), asked(2, 2))


def test_film_starts_at_the_identity_when_asked():
    torch.manual_seed(0)
    model = build("duplus", **CONFIG | {"identity": True})
    model.calibrate_text(asked(3, 2, modality=[0, 1, 2]))
    for gamma, beta in model.affine(asked()).values():
        assert (gamma == 1).all() and not beta.any()
    assert set(model.affine(asked())) == {"downs.0.0", "downs.1.0", "ups.0.0"}  # neither the stems nor the last stage
    torch.manual_seed(0)
    released = build("duplus", **CONFIG)
    assert all(not (gamma == 1).any() for gamma, _ in released.affine(asked()).values())


def test_the_paper_size_is_the_papers():
    model = build("duplus", stems=1)
    assert model.config.channels == (32, 64, 128, 256, 320) and model.controller.out_features == 153
    assert len(model.downs) == len(model.ups) == 4 and len(model.downs[0]) == 2
    assert "modulation" not in dict(model.ups[3][0].named_children())


def test_one_batch_can_be_overfitted_by_the_words():
    """Two structures that look alike: only the target prompt tells which is asked for."""
    model = make(stems=1, stride=1).train()
    grid = torch.stack(torch.meshgrid(*[torch.arange(16.0)] * 3, indexing="ij"))
    mask = torch.stack(
        [((grid - torch.tensor([8.0, 8.0, x]).view(3, 1, 1, 1)) ** 2).sum(0) < 14 for x in (4, 12)]
    ).float()
    image = (0.3 + 0.4 * mask.sum(0))[None, None].repeat(2, 1, 1, 1, 1) + 0.1 * volumes()
    mask = mask[None].repeat(2, 1, 1, 1, 1)
    prompts = asked(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        logits = model(image, prompts).logits
        p = logits.sigmoid()
        loss = F.binary_cross_entropy_with_logits(logits, mask) - 2 * (p * mask).sum() / (p + mask).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    hit = (logits > 0).float()
    assert 2 * (hit * mask).sum() / (hit + mask).sum() > 0.9


def test_weights_survive_the_file(tmp_path):
    model, prompts = make(seed=3).eval(), asked()
    digest = save(tmp_path / "m.safetensors", model, "duplus", CONFIG)
    again, _ = load(tmp_path / "m.safetensors", digest)
    with torch.no_grad():
        assert torch.equal(again(volumes(), prompts).logits, model(volumes(), prompts).logits)


@pytest.mark.parametrize(
    ("image", "prompts", "sentence"),
    [
        (volumes(2, (16, 16, 15)), asked(), r"\(2, 1, 16, 16, 15\): it needs .* multiples of 8, so pad or resample"),
        (volumes(2)[:, :, 0], asked(), "it needs \\[B, 1, D, H, W\\]"),
        (
            volumes(2),
            dataclasses.replace(asked(), pooled={**asked().pooled, MODALITY: -WORDS[[0] * 6]}),
            "not trained on",
        ),
        (volumes(2), asked().without(MODALITY), f"without its modality: give the role '{MODALITY}'"),
    ],
)
def test_what_cannot_be_read_is_refused(image, prompts, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()(image, prompts)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"modulation": "cross"}, "modulation is 'cross': use one of film, gate, none"),
        ({"modulated_by": "report"}, "modulated_by is 'report': use one of context, target"),
        ({"modulated_by": "target", "classes": 2}, "set DuPLUSConfig.classes to 0"),
        ({"channels": (6, 12, 24)}, r"channels is \(6, 12, 24\): .* a multiple of 8 and the last of 16"),
        ({"stems": 0}, "stems is 0: give 1 or more"),
        ({"stride": 4}, "stride is 4: give 1 or 2"),
    ],
)
def test_an_impossible_config_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        build("duplus", **CONFIG | fields)


def test_more_modalities_than_stems_are_refused():
    with pytest.raises(ValueError, match="name 3 modalities and DuPLUSConfig.stems is 2: raise it, or set 1"):
        build("duplus", **CONFIG | {"stems": 2}).calibrate_text(asked(3, modality=[0, 1, 2]))


# --- prognosis ----------------------------------------------------------------------------------------------------

RISK = {"size": "tiny", "channels": (8, 16, 32), "hidden": 16, "dense": 16, "stems": 1, "text_dim": 384, "rank": 4}
RECORDS = ["A 61-year-old man who smokes.", "A 48-year-old woman.", "A man of 70, grade 3.", None]
OUTCOMES = torch.tensor([[300.0, 1], [900, 0], [200, 1], [1200, 1]])


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    bank = CaptionBank("minilm-ids", tmp_path_factory.mktemp("captions"))
    context = ["a CT scan of the abdomen"] * 4
    return bank.prompts({"report": RECORDS, "context": context}, tokens=True)


def risk_model(**fields):
    torch.manual_seed(0)
    return build("duplus_prognosis", **RISK | fields)


def steps(model, image, prompts, count=3, loss=cox):
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(count):
        optimizer.zero_grad()
        loss(model(image, prompts).logits, OUTCOMES).backward()
        optimizer.step()
    return {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("mode", ["lora", "released", "frozen", "full"])
def test_lora_trains_and_the_backbone_does_not(records, mode):
    moved = steps(risk_model(text=mode), volumes(4), records)
    assert any(name.startswith("head.") for name in moved)
    assert not any(name.startswith("network.") for name in moved)
    adapters = {name for name in moved if ".lora_" in name}
    rest = {name for name in moved if name.startswith("text.")} - adapters
    assert (bool(adapters), bool(rest)) == (mode == "lora", mode == "full")


def test_each_part_is_read_only_where_it_is_used(records):
    image, other = volumes(4), volumes(4, seed=8)
    swapped = records[torch.tensor([2, 0, 1, 3])]
    for fields, sees in (
        ({}, (True, True)),
        ({"use_image": False}, (False, True)),
        ({"use_record": False}, (True, False)),
    ):
        model = risk_model(**fields)
        steps(model, image, records)
        model.eval()
        with torch.no_grad():
            own = model(image, records).logits
            found = [
                not torch.allclose(model(x, p).logits, own, atol=1e-6) for x, p in ((other, records), (image, swapped))
            ]
        assert own.shape == (4, 1) and tuple(found) == sees
    with pytest.raises(ValueError, match="sees nothing: set use_image or use_record"):
        risk_model(use_image=False, use_record=False)


def test_the_image_may_be_another_patients_or_none(records):
    model, image = risk_model(), volumes(4)
    steps(model, image, records)
    model.eval()
    with torch.no_grad():
        risks = {}
        for model.image in ("own", "another", "none"):
            risks[model.image] = model(image, records).logits
        model.image = "own"
        rolled = model(image.roll(1, 0), records).logits
    torch.testing.assert_close(rolled, risks["another"])
    assert not torch.allclose(risks["none"], risks["own"])


def test_features_made_once_give_the_same_risk(records, monkeypatch):
    model, image = risk_model().eval(), volumes(4, seed=21)
    dense = model.digest(image, records)
    assert dense.shape == (4, 16)
    monkeypatch.setattr(model.network, "encode_image", lambda *_: pytest.fail("encoded again"))
    assert torch.equal(model.digest(image, records), dense)
    with torch.no_grad():
        assert torch.equal(model(dense, records).logits, model(image, records).logits)


def test_records_are_standardised_as_the_encoder_reads_them_before_it_learns(records, tmp_path):
    model = risk_model(use_image=False)
    model.calibrate_text(records)
    words = model.text.eval().read(records, "report")[:3]
    torch.testing.assert_close(model.record_mean, words.mean(0))
    before = model.record_mean.clone(), model.record_std.clone()
    steps(model, volumes(4), records)
    assert torch.equal(model.record_mean, before[0]) and torch.equal(model.record_std, before[1])
    digest = save(tmp_path / "risk.safetensors", model, "duplus_prognosis", {**RISK, "use_image": False})
    again, _ = load(tmp_path / "risk.safetensors", digest)
    assert torch.equal(again.record_std, before[1])
    same = risk_model(use_image=False)
    same.calibrate_text(records[torch.tensor([0, 0, 0])])  # a record that never varies has no spread
    assert (same.record_std == 1).all() and not same.record_mean.any()
    risk_model(use_record=False).calibrate_text(records)


def test_training_and_evaluation_see_the_same_record(records):
    """No statistics of a batch: a record's risk does not depend on its company, nor on how often others were seen."""
    model = risk_model(use_image=False, dropout=0.0, text="frozen").train()
    model.calibrate_text(records)
    together = model(volumes(4), records).logits
    alone = model(volumes(1), records[torch.tensor([1])]).logits
    torch.testing.assert_close(alone[0], together[1])
    torch.testing.assert_close(model.eval()(volumes(4), records).logits, together)


def test_a_batch_of_one_trains(records):
    model = risk_model(intervals=3)
    model.calibrate_text(records)
    model.train()
    logits = model(volumes(1), records[torch.tensor([0])]).logits
    discrete(logits, OUTCOMES[:1], end=600.0).backward()
    assert logits.shape == (1, 3) and logits.isfinite().all()


def test_discrete_hazards_learn_and_their_first_orders_patients_as_all_do(records):
    model = risk_model(intervals=4)
    model.calibrate_text(records)
    start = discrete(model.eval()(volumes(4), records).logits, OUTCOMES, end=1000.0)
    moved = steps(model, volumes(4), records, 20, lambda logits, outcome: discrete(logits, outcome, end=1000.0))
    assert "baseline" in moved and any(".lora_" in name for name in moved)
    model.eval()
    with torch.no_grad():
        logits = model(volumes(4), records).logits
    assert logits.shape == (4, 4) and discrete(logits, OUTCOMES, end=1000.0) < start
    assert torch.equal(logits[:, 0].argsort(), discrete_risk(logits).argsort())
    torch.testing.assert_close(logits - logits[:, :1], (model.baseline - model.baseline[0]).expand(4, 4).detach())
    batch = SimpleNamespace(outcome=OUTCOMES)
    assert model.score(Prediction(logits, {}), batch).isfinite().all()
    with pytest.raises(ValueError, match="intervals is 0: give 1 or more"):
        risk_model(intervals=0)


def test_the_network_of_a_prognosis_is_a_trained_one(records, tmp_path):
    model = risk_model()
    torch.manual_seed(4)
    network = build("duplus", **{name: RISK[name] for name in RISK if name != "rank"})
    model.adopt_part("network", network)
    assert torch.equal(model.network.downs[0][0].conv1.weight, network.downs[0][0].conv1.weight)
    assert not any(p.requires_grad for p in model.network.parameters())
    digest = save(tmp_path / "risk.safetensors", model, "duplus_prognosis", RISK)
    assert (tmp_path / "risk.safetensors").stat().st_size < 12e6  # without MiniLM's own 90 MB
    again, _ = load(tmp_path / "risk.safetensors", digest)
    with torch.no_grad():
        assert torch.equal(again(volumes(4), records).logits, model.eval()(volumes(4), records).logits)
    with pytest.raises(ValueError, match="takes a part 'network' that is a DuPLUS, not 'sam'"):
        model.adopt_part("sam", network)
    with pytest.raises(ValueError, match="network is another one"):
        model.adopt_part("network", build("duplus", **{**CONFIG, "stems": 1}))


def test_the_score_is_the_concordance_of_the_batch():
    batch = SimpleNamespace(outcome=OUTCOMES)
    ranked = torch.tensor([[2.0], [1.0], [3.0], [0.0]])
    model = risk_model(use_image=False, text="frozen")
    assert model.score(Prediction(ranked, {}), batch).tolist() == [1.0] * 4
    assert model.score(Prediction(-ranked, {}), batch).tolist() == [0.0] * 4
    assert model.score(Prediction(ranked * 0, {}), batch).tolist() == [0.5] * 4
    batch.outcome = OUTCOMES * torch.tensor([1.0, 0.0])
    assert model.score(Prediction(ranked, {}), batch).tolist() == [0.5] * 4
