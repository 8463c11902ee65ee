"""The text encoder that learns: MiniLM at the start, trained where it should be, and never stored twice."""

import copy

import pytest
import torch
from torch import nn

from lib import models
from lib.models.lora import ENCODER, LoraText, LoraTextConfig
from lib.text import CaptionBank, encoder

torch.set_num_threads(1)

SENTENCES = (
    "liver",
    "A 63-year-old man, current smoker, with a tumour of 12.5 cm (stage T3b), treated by radical nephrectomy.",
    "",
    "HPV-positive carcinoma of the tonsil; T2 N2b M0 " * 8,
)
FROZEN = 22_565_376  # MiniLM without its pooler, which sentence embeddings do not use
ADAPTERS = 6 * 32 * (3 * 2 * 384 + 2 * 384 + 2 * (384 + 1536))


@pytest.fixture(scope="module")
def built():
    """Each mode built once; tests take copies."""
    made = {}

    def build(mode):
        if mode not in made:
            torch.manual_seed(0)
            made[mode] = LoraText(LoraTextConfig(mode))
        return copy.deepcopy(made[mode])

    return build


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return CaptionBank(ENCODER, tmp_path_factory.mktemp("captions"))


@pytest.fixture(scope="module")
def sentences(bank):
    return bank.prompts({"report": list(SENTENCES)}, tokens=True)


def numbers(model):
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def learn(model, prompts, steps=3):
    """Take a few steps towards another direction; returns the parameters that changed."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    head = nn.Linear(384, 1)
    optimiser = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-3)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        (head(model.read(prompts, "report")).squeeze(1) - torch.arange(len(prompts))).square().mean().backward()
        optimiser.step()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


# --- ids as tokens ------------------------------------------------------------------------------------------------


def test_ids_are_exact_and_survive_the_bank(bank, sentences):
    direct = encoder(ENCODER).encode(SENTENCES)
    assert direct.pooled.shape == (4, 1) and not direct.pooled.any()
    assert sentences.tokens["report"].dtype == torch.float32
    assert torch.equal(sentences.tokens["report"], direct.tokens)
    ids = direct.tokens[0, direct.mask[0], 0].tolist()
    assert ids == [101, 11290, 102]  # [CLS] liver [SEP]
    assert direct.tokens.max() > 2048, "half precision would have told these ids apart"
    again = CaptionBank(ENCODER, bank.folder)
    assert again.path != CaptionBank("minilm", bank.folder).path
    read = again.prompts({"report": list(SENTENCES)}, tokens=True)
    assert torch.equal(read.tokens["report"], direct.tokens)
    assert torch.equal(read.token_mask["report"], direct.mask)


# --- at the start -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["lora", "frozen", "full", "released"])
def test_every_mode_starts_as_the_frozen_encoder(built, sentences, mode):
    model = built(mode).eval()
    expected = encoder("minilm").encode(SENTENCES).pooled
    torch.testing.assert_close(model.read(sentences, "report"), expected, atol=1e-5, rtol=0)


def test_an_embedding_does_not_depend_on_its_company_and_an_absent_one_is_zero(built, bank):
    model = built("lora")
    prompts = bank.prompts({"report": [SENTENCES[1], None, SENTENCES[3]]}, tokens=True)
    together = model.eval().read(prompts, "report")
    assert not together[1].any()
    for i in (0, 2):
        torch.testing.assert_close(model.read(prompts[[i]], "report")[0], together[i], atol=1e-6, rtol=0)
    model.train()
    value = model.read(prompts, "report").square().sum() + model.read(prompts.without(), "report").sum()
    value.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert model.read(prompts[[1]], "report").shape == (1, 384)
    nobody = bank.prompts({"report": [None, None]}, tokens=True)
    assert not model.read(nobody, "report").any()


def test_parameters_of_each_mode(built):
    assert numbers(built("frozen")) == (FROZEN, 0)
    assert numbers(built("full")) == (FROZEN, FROZEN)
    assert numbers(built("lora")) == (FROZEN + ADAPTERS, ADAPTERS)
    assert numbers(built("released")) == (FROZEN + ADAPTERS, 0)


# --- in training --------------------------------------------------------------------------------------------------


def test_lora_trains_its_adapters_and_nothing_else(built, sentences):
    model = built("lora")
    before = model.eval().read(sentences, "report").detach()
    changed = learn(model, sentences)
    adapters = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert changed == adapters and len(adapters) == 6 * 6 * 2
    assert (model.eval().read(sentences, "report") - before).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["frozen", "released"])
def test_frozen_and_released_never_learn(built, sentences, mode):
    model = built(mode)
    before = model.eval().read(sentences, "report")
    assert learn(model, sentences) == set()
    assert torch.equal(model.eval().read(sentences, "report"), before)


def test_full_changes_every_layer(built, sentences):
    model = built("full")
    changed = learn(model, sentences, steps=1)
    assert len(changed) > 95 and all(any(f"layer.{i}." in name for name in changed) for i in range(6))


def test_dropout_acts_only_in_training_and_only_on_adapters(built, sentences):
    model = built("lora")
    learn(model, sentences, 1)
    model.train()
    assert not torch.equal(model.read(sentences, "report"), model.read(sentences, "report"))
    frozen = built("full").train()
    assert torch.equal(frozen.read(sentences, "report"), frozen.read(sentences, "report"))


# --- on disk ------------------------------------------------------------------------------------------------------


class Prognosis(nn.Module):
    """A model with a text encoder inside, as `lib.models` sees one."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.text, self.head = LoraText(config), nn.Linear(384, 1)
        self.provenance = self.text.provenance


def build_prognosis(**given):
    given.pop("pretrained", None)
    return Prognosis(LoraTextConfig(**given))


@pytest.mark.parametrize("mode", ["lora", "frozen", "full"])
def test_a_file_holds_what_trains_and_reads_back_alike(built, sentences, tmp_path, monkeypatch, mode):
    monkeypatch.setitem(models.MODELS, "prognosis", f"{__name__}:build_prognosis")
    model = build_prognosis(mode=mode)
    learn(model.text, sentences, steps=1)
    path = tmp_path / "model.safetensors"
    models.save(path, model, "prognosis")
    stored = {"lora": ADAPTERS, "frozen": 0, "full": FROZEN}[mode] + 385
    assert 4 * stored < path.stat().st_size < 4 * stored + 40_000
    torch.manual_seed(7)
    again, header = models.load(path)
    assert header["provenance"] == {"text": f"pretrained minilm (53aa51172d14), {mode}"}
    assert torch.equal(again.text.read(sentences, "report"), model.text.eval().read(sentences, "report"))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_a_state_with_a_part_missing_is_refused(built):
    model = built("lora")
    state = model.state_dict()
    assert all(".lora_" in name for name in state) and len(state) == 72
    model.load_state_dict(state)
    state.popitem()
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)


def test_what_cannot_be_read_is_one_sentence(bank, built):
    with pytest.raises(ValueError, match="cannot learn by 'qlora': use one of lora, frozen, full, released"):
        LoraText(LoraTextConfig("qlora"))
    plain = bank.prompts({"report": ["liver"]})
    with pytest.raises(ValueError, match="came with no tokens, and a text encoder that learns reads float32 ids"):
        built("frozen").read(plain, "report")
    tokens = encoder("hash").encode(["liver"])
    wrong = type(plain)(plain.pooled, plain.present, {"report": tokens.tokens}, {"report": tokens.mask})
    with pytest.raises(ValueError, match=r"came with tokens torch.float32 \(1, 2, 64\)"):
        built("frozen").read(wrong, "report")
