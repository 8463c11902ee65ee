"""Claims about lib.text: what reaches a model, what a perturbation does, which encoders load, what a bank keeps."""

import csv
import errno
import json
import os
import pickle
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lib import text
from lib.text import (
    PERTURBATIONS,
    ROLES,
    TEMPLATES,
    CaptionBank,
    PromptPolicy,
    Prompts,
    encoder,
    has_variant,
    render,
    role_of,
    texts_for,
    untouched,
)
from lib.wording import DESCRIPTORS, GLOSSARY

MIRROR = Path(os.environ.get("MIRROR_DIR", Path(__file__).resolve().parents[2] / "shared/data"))
QUICK = settings(deadline=None, max_examples=50)  # a busy machine is no failure
BUS = "Ultrasound of a breast mass, irregular shape, indistinct margin, hypoechoic, posterior shadowing."
BOX = "Ultrasound shows a tumor approximately 12×30 pixels near (301, 87)."


@dataclass(frozen=True)
class Case:
    case_id: str
    prompts: dict = field(default_factory=dict)
    patient_id: str = ""
    dataset: str = "d"


def cases_of(*texts, **columns):
    return [Case(f"c{i}", {"local": t, **columns}, f"p{i}") for i, t in enumerate(texts)]


def local(perturbation="none", **fields):
    return PromptPolicy((("local", "local"),), perturbation, **fields)


def perturbed(perturbation, *texts, **fields):
    return texts_for(cases_of(*texts), local(perturbation, **fields))["local"]


def one_sentence(error):
    return "\n" not in str(error.value) and len(str(error.value)) < 500


# --- roles and prompts ----------------------------------------------------------------------------------------


def prompts(size=6, tokens=True):
    present = {"global": torch.arange(size) % 3 != 0, "local": torch.arange(size) % 2 == 0}
    pooled = {role: torch.randn(size, 4) * there[:, None] for role, there in present.items()}
    mask = present["local"][:, None] & torch.ones(size, 3, dtype=torch.bool)
    some = ({"local": torch.randn(size, 3, 5) * mask[..., None]}, {"local": mask}) if tokens else ()
    return Prompts(pooled, present, *some)


def same(a, b):
    groups = ("pooled", "present", "tokens", "token_mask")
    return all(
        getattr(a, g).keys() == getattr(b, g).keys()
        and all(torch.equal(getattr(a, g)[r], getattr(b, g)[r]) for r in getattr(a, g))
        for g in groups
    )


def test_a_column_names_its_role():
    assert [role_of(c) for c in ("local", "class@pathology", "attribute.margin@coded")] == [
        "local",
        "class",
        "attribute.margin",
    ]
    for wrong in ("locl", "attribute.", "", "@mask", "Local"):
        with pytest.raises(ValueError, match="global, local, report") as error:
            role_of(wrong)
        assert one_sentence(error)


@pytest.mark.parametrize(
    "fields",
    [
        {"pooled": {"local": torch.zeros(2, 4)}, "present": {}},
        {"pooled": {"local": torch.zeros(2, 4)}, "present": {"local": torch.ones(3, dtype=torch.bool)}},
        {"pooled": {"local": torch.zeros(2, 4)}, "present": {"local": torch.ones(2)}},
        {"pooled": {"local": torch.zeros(4)}, "present": {"local": torch.ones(4, dtype=torch.bool)}},
        {"pooled": {"local": torch.zeros(2, 4).double()}, "present": {"local": torch.ones(2, dtype=torch.bool)}},
        {
            "pooled": {"local": torch.zeros(2, 4), "global": torch.zeros(1, 4)},
            "present": {"local": torch.ones(2, dtype=torch.bool), "global": torch.ones(1, dtype=torch.bool)},
        },
        {
            "pooled": {"local": torch.zeros(2, 4)},
            "present": {"local": torch.ones(2, dtype=torch.bool)},
            "tokens": {"local": torch.zeros(2, 3, 4)},
        },
        {
            "pooled": {"local": torch.zeros(2, 4)},
            "present": {"local": torch.ones(2, dtype=torch.bool)},
            "tokens": {"local": torch.zeros(2, 3, 4)},
            "token_mask": {"local": torch.ones(2, 2, dtype=torch.bool)},
        },
    ],
    ids=["roles", "length", "mask dtype", "axes", "dtype", "batches", "no token mask", "token mask shape"],
)
def test_prompts_that_do_not_fit_together_are_refused(fields):
    with pytest.raises(ValueError, match="Prompts") as error:
        Prompts(**fields)
    assert one_sentence(error)


@QUICK
@given(st.floats(0, 1), st.integers(0, 2**32))
def test_dropout_only_takes_away_and_leaves_nothing_behind(p, seed):
    before = prompts()
    after = before.drop(p, torch.Generator().manual_seed(seed))
    for role, there in after.present.items():
        assert not (there & ~before.present[role]).any()
        assert not after.pooled[role][~there].any()
        assert torch.equal(after.pooled[role][there], before.pooled[role][there])
    assert not after.tokens["local"][~after.present["local"]].any()
    assert torch.equal(after.token_mask["local"].any(1), after.present["local"])


def test_dropout_is_independent_per_sample_and_per_role():
    there = torch.ones(20_000, dtype=torch.bool)
    whole = Prompts({r: torch.ones(20_000, 1) for r in ("global", "local")}, {"global": there, "local": there})
    after = whole.drop(0.3, torch.Generator().manual_seed(0)).present
    kept = torch.stack([after["global"], after["local"]]).float()
    assert torch.allclose(kept.mean(1), torch.tensor(0.7), atol=0.015)
    assert abs(torch.corrcoef(kept)[0, 1]) < 0.03
    assert not whole.drop(1.0, torch.Generator()).present["local"].any()
    assert same(whole.drop(0.0, torch.Generator()), whole)
    with pytest.raises(ValueError, match="probability"):
        whole.drop(1.5, torch.Generator())


def test_dropout_does_not_depend_on_the_order_of_roles():
    first = prompts(tokens=False)
    turned = Prompts(dict(reversed(first.pooled.items())), dict(reversed(first.present.items())))
    a, b = (x.drop(0.5, torch.Generator().manual_seed(3)) for x in (first, turned))
    assert all(torch.equal(a.present[r], b.present[r]) for r in a.present)


def test_without_removes_the_named_roles():
    before = prompts()
    after = before.without("local")
    assert not after.present["local"].any() and not after.tokens["local"].any()
    assert torch.equal(after.pooled["global"], before.pooled["global"])
    assert not any(t.any() for t in before.without().pooled.values())
    with pytest.raises(ValueError, match="report"):
        before.without("report")


@QUICK
@given(st.lists(st.integers(0, 5), max_size=8))
def test_selecting_rows_commutes_with_removing_roles(index):
    whole = prompts()
    assert same(whole[index].without("global"), whole.without("global")[index])
    assert len(whole[index]) == len(index)


def test_rows_are_selected_by_slice_list_and_tensor():
    whole = prompts()
    assert same(whole[1:3], whole[[1, 2]]) and same(whole[1:3], whole[torch.tensor([1, 2])])
    assert same(whole.to("cpu"), whole) and len(Prompts({}, {})) == 0


# --- templates ------------------------------------------------------------------------------------------------


def test_unknown_fields_drop_their_clause():
    template = TEMPLATES["breast_ultrasound"]["local"]
    blank = dict.fromkeys(("shape", "margin", "echo", "posterior", "birads"))
    assert render(template, **blank | {"shape": "oval", "birads": 4.0}) == (
        "Ultrasound of a breast mass, oval shape, BI-RADS 4."
    )
    assert render(template, **blank | {"margin": "", "echo": float("nan")}) is None
    assert render("{a} and[ {b}]", a=None, b="x") is None
    assert render("a mass") == "A mass"
    with pytest.raises(ValueError, match="needs the fields"):
        render(template, shape="oval")


def test_every_template_belongs_to_a_role_and_renders():
    for templates in TEMPLATES.values():
        for column, template in templates.items():
            role_of(column)
            named = {name for _, name, _, _ in text.string.Formatter().parse(template) if name}
            filled = render(template, **dict.fromkeys(named, "x"))
            assert filled and not set("[]{}") & set(filled)


# --- policies and perturbations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"columns": (("local", "locl"),)}, "unknown role 'locl'"),
        ({"columns": (("local@mask", "local"),)}, "without @variant"),
        ({"columns": (("local", "local"), ("local", "global"))}, "twice"),
        ({"columns": (("local", "local"),), "roles": ("global",)}, "perturbs the roles"),
        ({"columns": (("local", "local"),), "perturbation": "typos"}, "none, absent, empty, shuffled, paraphrase"),
        ({"columns": (("local", "local"),), "perturbation": "published:"}, "Unknown perturbation"),
        ({"columns": (("local", "local"),), "share": 1.2}, "between 0 and 1"),
    ],
)
def test_a_wrong_policy_is_refused(fields, words):
    with pytest.raises(ValueError, match=words) as error:
        PromptPolicy(**fields)
    assert one_sentence(error)


def test_a_role_may_be_fed_from_any_column():
    cases = [Case("a", {"global": "g", "local": None, "local@mask": "m"})]
    policy = PromptPolicy((("global", "local@mask"), ("local", "local")))
    assert texts_for(cases, policy) == {"global": ["m"], "local": [None]}
    with pytest.raises(ValueError, match=r"'report'.*\['global', 'local', 'local@mask'\]") as error:
        texts_for(cases, PromptPolicy((("report", "report"),)))
    assert one_sentence(error)


PER_TEXT = [name for name in PERTURBATIONS if name != "shuffled"]
WORDS = st.lists(
    st.sampled_from(
        [*(w for rows in DESCRIPTORS.values() for row in rows for w in row), "mass,", "tumor", "at", "BI-RADS 4"]
    ),
    max_size=12,
).map(" ".join)


@QUICK
@given(st.sampled_from(list(PERTURBATIONS)), st.lists(st.none() | WORDS, min_size=2, max_size=6), st.integers(0, 99))
def test_perturbations_are_deterministic_and_give_no_text_to_the_silent(name, texts, seed):
    if name == "shuffled" and sum(t is not None for t in texts) == 1:
        texts = [*texts, "another"]
    cases = cases_of(*texts)
    first, again = (texts_for(cases, local(name, seed=seed))["local"] for _ in range(2))
    assert first == again
    assert all(after is None for before, after in zip(texts, first, strict=True) if before is None)
    assert all((after is None) == (name == "absent") for b, after in zip(texts, first, strict=True) if b is not None)


@QUICK
@given(st.sampled_from(PER_TEXT), st.lists(WORDS, min_size=1, max_size=6), st.data())
def test_a_case_gets_the_same_text_in_any_company(name, texts, data):
    cases = cases_of(*texts)
    index = data.draw(st.lists(st.integers(0, len(cases) - 1), max_size=6))
    whole = texts_for(cases, local(name, share=0.5))["local"]
    assert texts_for([cases[i] for i in index], local(name, share=0.5)) == {"local": [whole[i] for i in index]}


@QUICK
@given(st.text(st.sampled_from("abzQ ,.é1-"), min_size=1).filter(lambda t: any(c.isascii() and c.isalpha() for c in t)))
def test_a_typo_always_shows(written):
    assert perturbed("typo", written) != [written]


def test_typos_hit_about_a_seventh_of_the_words():
    long = " ".join(["ultrasound"] * 100)
    (found,) = perturbed("typo", long)
    assert sum(a != b for a, b in zip(long.split(" "), found.split(" "), strict=True)) == 15


SHAPES = PromptPolicy(tuple((f"attribute.{name}",) * 2 for name in ("shape", "surface")))


def shaped(number):
    says = {"attribute.shape": ("round", "irregular", "long"), "attribute.surface": ("sharp", "blurred")}
    return [Case(f"c{i}", {role: values[i % len(values)] for role, values in says.items()}) for i in range(number)]


@pytest.mark.parametrize("name", ["omission", "noise"])
def test_a_share_of_the_attributes_is_omitted_or_wrong_each_by_its_own_lot(name):
    cases = shaped(600)
    true, found = texts_for(cases, SHAPES), texts_for(cases, replace(SHAPES, perturbation=f"{name}:0.3"))
    assert found == texts_for(cases, replace(SHAPES, perturbation=f"{name}:0.3"))
    hit = {role: [a != b for a, b in zip(true[role], found[role], strict=True)] for role in true}
    assert all(0.24 < sum(changed) / 600 < 0.36 for changed in hit.values())
    both = sum(a and b for a, b in zip(*hit.values(), strict=True))
    assert 0.05 < both / 600 < 0.14, "the attributes of a case are drawn together"
    wrong = {text for role in found for text, changed in zip(found[role], hit[role], strict=True) if changed}
    assert wrong == ({None} if name == "omission" else {"round", "irregular", "long", "sharp", "blurred"})
    assert all(set(found[role]) <= {*true[role], None} for role in found)


def test_a_share_of_nothing_changes_nothing_and_of_all_changes_all():
    cases = shaped(12)
    assert texts_for(cases, replace(SHAPES, perturbation="noise:0")) == texts_for(cases, SHAPES)
    every = texts_for(cases, replace(SHAPES, perturbation="omission:1", roles=("attribute.shape",)))
    assert every["attribute.shape"] == [None] * 12
    assert every["attribute.surface"] == texts_for(cases, SHAPES)["attribute.surface"]


@pytest.mark.parametrize("share", ["", "2", "-0.1", "some", "nan"])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match=r"has no share: write noise:0.2") as error:
        replace(SHAPES, perturbation=f"noise:{share}")
    assert one_sentence(error)


def test_noise_among_equal_texts_is_refused():
    with pytest.raises(ValueError, match="needs two different texts, but the given cases have 1") as error:
        texts_for(shaped(1), replace(SHAPES, perturbation="noise:0.5"))
    assert one_sentence(error)


@pytest.mark.parametrize("descriptor", DESCRIPTORS)
def test_a_wrong_attribute_is_another_value_of_the_same_descriptor(descriptor):
    for row in DESCRIPTORS[descriptor]:
        for word in row:
            for seed in range(4):
                (found,) = perturbed("wrong_attribute", word, seed=seed)
                assert found not in row and found not in ("", word)


def test_a_wrong_attribute_contradicts_every_clause():
    before = BUS.removesuffix(".") + ", BI-RADS 4A, left upper part"
    for seed in range(10):
        (after,) = perturbed("wrong_attribute", before, seed=seed)
        pairs = list(zip(before.split(", "), after.split(", "), strict=True))
        assert pairs[0][0] == pairs[0][1] and all(a != b for a, b in pairs[1:])
        assert "right" in after and "BI-RADS 4" not in after
    assert perturbed("wrong_attribute", BOX) == ["Ultrasound shows a tumor approximately 25×61 pixels near (87, 301)."]


@QUICK
@given(WORDS.filter(bool))
def test_a_wrong_attribute_differs_wherever_there_is_one(written):
    cases = cases_of(written)
    has_one = any(
        written not in ("mass,", "tumor", "at") and w not in ("mass,", "tumor", "at") for w in written.split()
    )
    assert untouched(cases, local("wrong_attribute"))["local"] == [not has_one]


def test_what_a_perturbation_could_not_change_is_reported():
    cases = cases_of("Tumor present.", BUS, None)
    assert untouched(cases, local("wrong_attribute")) == {"local": [True, False, False]}
    assert untouched(cases, local("paraphrase")) == {"local": [False, False, False]}


def test_a_paraphrase_keeps_every_word_and_has_several_forms():
    forms = {perturbed("paraphrase", BUS, seed=seed)[0] for seed in range(40)}
    assert len(forms) > 8
    bag = set(BUS.lower().replace(",", "").rstrip(".").split())
    for form in forms:
        assert form != BUS and bag <= set(form.lower().replace(",", "").rstrip(".").split())
    assert all("(301, 87)" in perturbed("paraphrase", BOX, seed=seed)[0] for seed in range(5))


def test_synonyms_and_glossary_leave_the_numbers_alone():
    (synonym,) = perturbed("synonym", "Hypoechoic mass, irregular shape, BI-RADS 4")
    assert (
        synonym.startswith(("Low-echo", "Echo-poor")) and synonym.endswith("BI-RADS 4") and "irregular" not in synonym
    )
    languages = {perturbed("other_language", "malignant tumor at the top left, BI-RADS 4", seed=s)[0] for s in range(9)}
    assert languages == {"bösartig Tumor oben links, BI-RADS 4", "maligno tumor arriba a la izquierda, BI-RADS 4"}
    assert all(len(translations) == 2 and all(translations) for translations in GLOSSARY.values())


def test_empty_is_present_and_absent_is_not():
    assert perturbed("empty", BUS, None) == ["", None]
    assert perturbed("absent", BUS, None) == [None, None]


@QUICK
@given(st.lists(st.sampled_from(["p1", "p2", "p3", "p4"]), min_size=2, max_size=12), st.integers(0, 99))
def test_shuffled_gives_another_patients_text(patients, seed):
    cases = [Case(f"c{i}", {"local": f"{p}-{i}"}, p) for i, p in enumerate(patients)]
    if len(set(patients)) == 1:
        with pytest.raises(ValueError, match="two patients") as error:
            texts_for(cases, local("shuffled", seed=seed))
        assert one_sentence(error)
        return
    found = texts_for(cases, local("shuffled", seed=seed))["local"]
    assert all(t.split("-")[0] != p for t, p in zip(found, patients, strict=True))
    turned = texts_for(cases[::-1], local("shuffled", seed=seed))["local"]
    assert found == turned[::-1]


def test_shuffled_stays_within_a_dataset_and_prefers_other_words():
    cases = [Case(f"{d}{i}", {"local": f"{d} {i % 2}"}, f"p{i}", d) for d in "ab" for i in range(6)]
    found = texts_for(cases, local("shuffled"))["local"]
    assert all(f[0] == c.dataset and f != c.prompts["local"] for f, c in zip(found, cases, strict=True))


def test_a_perturbation_touches_only_the_roles_it_is_for():
    cases = [Case(f"c{i}", {"local": BUS, "global": "g"}, f"p{i}") for i in range(3)]
    policy = PromptPolicy((("global", "global"), ("local", "local")), "empty", roles=("local",))
    assert texts_for(cases, policy) == {"global": ["g"] * 3, "local": [""] * 3}


def test_published_variants_are_read_where_they_exist():
    cases = [Case("a", {"local": "x", "local@contradictory": "not x"}), Case("b", {"local": "y"})]
    cases.append(Case("c", {"local": "z", "local@contradictory": None}))
    assert texts_for(cases, local("published:contradictory")) == {"local": ["not x", None, None]}
    assert has_variant(cases, "local", "contradictory") == [True, False, False]
    with pytest.raises(ValueError, match="local@missing"):
        texts_for(cases, local("published:missing"))


def test_a_share_of_the_cases_keeps_all_its_roles_and_grows_with_the_share():
    cases = [Case(f"c{i}", {"local": "l", "global": "g"}, f"p{i}") for i in range(2000)]
    columns = (("local", "local"), ("global", "global"))

    def kept(share, seed=0):
        texts = texts_for(cases, PromptPolicy(columns, share=share, seed=seed))
        assert [t is None for t in texts["local"]] == [t is None for t in texts["global"]]
        return {c.case_id for c, t in zip(cases, texts["local"], strict=True) if t is not None}

    assert not kept(0.0) and len(kept(1.0)) == 2000
    assert abs(len(kept(0.5)) - 1000) < 100 and kept(0.1) < kept(0.5) < kept(0.9)
    assert kept(0.5) != kept(0.5, seed=1)


@pytest.mark.parametrize("dataset", ["busi", "bus_bra"])
def test_published_captions_are_perturbed_as_promised(dataset):
    table = MIRROR / dataset / "metadata.csv"
    if not table.is_file():
        pytest.skip(f"{table} is absent: set MIRROR_DIR to the folder of the real datasets.")
    with table.open(encoding="utf-8") as file:
        texts = sorted({row["text_medclipseg"] for row in csv.DictReader(file)} - {""})
    assert all(a != b for a, b in zip(perturbed("typo", *texts), texts, strict=True))
    for name in ("wrong_attribute", "paraphrase", "synonym", "other_language"):
        changed = sum(a != b for a, b in zip(perturbed(name, *texts), texts, strict=True))
        assert changed / len(texts) > 0.98, name


# --- encoders -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm():
    return encoder("minilm")


def test_minilm_is_the_published_model(minilm):
    found = minilm.encode(["a small benign mass in the breast", ""])
    # sentence-transformers 6.2.0 on the same files.
    assert torch.allclose(found.pooled[:, :3], torch.tensor(MINILM_REFERENCE), atol=2e-5)
    assert torch.allclose(found.pooled.norm(dim=1), torch.ones(2))
    assert (minilm.dim, found.tokens.shape, found.mask.sum(1).tolist()) == (384, (2, 9, 384), [9, 2])
    assert not found.pooled.requires_grad and minilm.revision == text.MINILM_SHA256[:12]


MINILM_REFERENCE = [[0.095619, 0.022325, -0.022109], [-0.118838, 0.048299, -0.002548]]


def test_meaning_is_nearer_than_wording(minilm):
    a, b, c = minilm.encode(["hypoechoic breast mass", "echo-poor lesion of the breast", "round red polyp"]).pooled
    assert a @ b > a @ c + 0.2


def test_an_embedding_does_not_depend_on_its_company(minilm):
    texts = [BUS, "mass", BOX, "", "One small irregular-shaped tumor at the top left."]
    together = minilm.encode(texts)
    for i, written in enumerate(texts):
        alone = minilm.encode([written])
        assert torch.allclose(alone.pooled[0], together.pooled[i], atol=1e-6)
        assert torch.allclose(alone.tokens[0], together.tokens[i][together.mask[i]], atol=1e-5)
    assert len(minilm.encode([]).pooled) == 0
    assert minilm.encode(["mass " * 600]).mask.sum() == 256


@pytest.mark.parametrize("name", ["hash", "minilm"])
def test_an_encoder_is_deterministic(name, minilm):
    chosen = minilm if name == "minilm" else encoder("hash")
    a, b = chosen.encode(["a mass", "a polyp"]), chosen.encode(["a mass", "a polyp"])
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_hash_knows_shared_words():
    found = encoder("hash").encode(["oval mass", "oval mass, left", "three red polyps", "", "MASS oval"])
    near, far = found.pooled[0] @ found.pooled[1], found.pooled[0] @ found.pooled[2]
    assert near > 0.7 > far + 0.2
    assert torch.allclose(found.pooled[0], found.pooled[4])
    assert found.mask.sum(1).tolist() == [3, 4, 4, 1, 3] and found.pooled[3].norm() == pytest.approx(1)
    assert found.pooled.shape == (5, 64) and not found.tokens[~found.mask].any()


def test_an_unknown_encoder_lists_the_names():
    for ask in (encoder, CaptionBank, text.revision):
        with pytest.raises(ValueError, match="hash, minilm, cxr-bert, clinical-bert, clip-vit-b16") as error:
            ask("minilmm")
        assert one_sentence(error)


def test_other_minilm_weights_are_refused(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    monkeypatch.setattr(text, "_local_folder", lambda name: tmp_path)
    with pytest.raises(ValueError, match="sha256.*expected 53aa51172d14.*reinstall") as error:
        encoder("minilm")
    assert one_sentence(error)


# Tiny models with random weights in the layout of the published folders: loading is exercised without a network.

TINY_BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
WORDPIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "mass", "oval", "Oval"]


def vocabulary(folder, size):
    words = [*WORDPIECES, *(f"[unused{i}]" for i in range(size - len(WORDPIECES)))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")


def tiny_bert(size, seed=0):
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(vocab_size=size, **TINY_BERT)
    return config, BertModel(config, add_pooling_layer=False).eval()


@pytest.fixture
def folder_of(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPT_TO_MASK_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.delenv("PROMPT_TO_MASK_DOWNLOAD", raising=False)

    def make(name):
        folder = tmp_path / "weights" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    return make


def write_cxr_bert(folder):
    config, model = tiny_bert(30522)
    described = config.to_dict() | {"model_type": "cxr-bert", "auto_map": {"AutoModel": "modeling.CXRBertModel"}}
    described |= {"architectures": ["CXRBertModel"], "projection_size": 128, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(described))
    save_file({f"bert.{k}": v for k, v in model.state_dict().items()}, folder / "model.safetensors")
    vocabulary(folder, 30522)
    return model


@torch.no_grad()
def test_cxr_bert_loads_as_a_plain_bert(folder_of):
    model = write_cxr_bert(folder_of("cxr-bert"))
    found = encoder("cxr-bert").encode(["Oval mass", "a"])
    states = model(torch.tensor([[2, 7, 6, 3]])).last_hidden_state[0]
    assert torch.allclose(found.tokens[0], states, atol=1e-5)
    assert torch.allclose(found.pooled[0], states[0], atol=1e-5)  # the start token
    assert found.mask.tolist() == [[True] * 4, [True] * 3 + [False]]


@torch.no_grad()
def test_clinical_bert_is_cased_and_read_from_a_checked_pickle(folder_of):
    folder = folder_of("clinical-bert")
    config, model = tiny_bert(28996)
    (folder / "config.json").write_text(config.to_json_string())
    old = {f"bert.{k.replace('LayerNorm.weight', 'LayerNorm.gamma')}": v for k, v in model.state_dict().items()}
    torch.save(old, folder / "pytorch_model.bin")
    vocabulary(folder, 28996)
    found = encoder("clinical-bert").encode(["Oval mass"])
    states = model(torch.tensor([[2, 8, 6, 3]])).last_hidden_state[0]
    assert torch.allclose(found.pooled[0], states.mean(0), atol=1e-5)


@torch.no_grad()
def test_biomedclip_matches_open_clip(folder_of):
    from open_clip.hf_model import HFTextEncoder

    folder = folder_of("biomedclip")
    config, model = tiny_bert(30522)
    config.save_pretrained(folder)
    vocabulary(folder, 30522)
    reference = HFTextEncoder(
        str(folder), 8, pooler_type="cls_last_hidden_state_pooler", proj_type="mlp", pretrained=False
    ).eval()
    state = {f"text.{k}": v for k, v in reference.state_dict().items()} | {"logit_scale": torch.ones(())}
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    found = encoder("biomedclip")
    expected = torch.nn.functional.normalize(reference(torch.tensor([[2, 7, 6, 3, 0, 0]])), dim=-1)
    assert found.dim == 8 and torch.allclose(found.encode(["oval mass"]).pooled, expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("two_towers", [False, True])
def test_clip_matches_open_clip_with_quickgelu(folder_of, two_towers):
    import open_clip

    folder = folder_of("clip-vit-b16")
    tower = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "patch_size": 16, "head_width": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": tower}))
    torch.manual_seed(0)
    kind = open_clip.model.CustomTextCLIP if two_towers else open_clip.model.CLIP
    reference = kind(**tower, quick_gelu=True).eval()
    save_file({k: v.contiguous() for k, v in reference.state_dict().items()}, folder / "open_clip_model.safetensors")
    texts = ["an oval mass", "", BUS]
    expected = reference.encode_text(open_clip.tokenizer.SimpleTokenizer()(texts), normalize=True)
    found = encoder("clip-vit-b16").encode(texts)
    assert torch.allclose(found.pooled, expected, atol=1e-5)
    assert found.mask.sum(1).tolist()[:2] == [5, 2] and found.tokens.shape[-1] == 16


@torch.no_grad()
def test_clipmd_matches_the_clip_text_tower(folder_of):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    folder = folder_of("clipmd")
    config = CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, projection_dim=8
    )
    torch.manual_seed(0)
    reference = CLIPTextModelWithProjection(config).eval()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "clip", "projection_dim": 8, "text_config": config.to_dict()})
    )
    save_file({k: v.contiguous() for k, v in reference.state_dict().items()}, folder / "model.safetensors")
    found = encoder("clipmd").encode(["an oval mass", BUS + BUS * 9])
    ids = torch.tensor([text._clip_tokeniser(77)("an oval mass")])
    expected = torch.nn.functional.normalize(reference(input_ids=ids).text_embeds, dim=-1)
    assert torch.allclose(found.pooled[:1], expected, atol=1e-5)
    assert found.mask.sum(1).tolist() == [5, 77]


def drop_a_layer(folder):
    _, model = tiny_bert(30522)
    kept = {f"bert.{k}": v for k, v in model.state_dict().items() if "output.dense.weight" not in k}
    save_file(kept, folder / "model.safetensors")


def other_width(folder):
    (folder / "config.json").write_text(json.dumps(TINY_BERT | {"vocab_size": 30522, "hidden_size": 32}))


def hide_code(folder):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (folder / "executed",))

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(), protocol=2))


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda f: (f / "vocab.txt").unlink(), "needs .*vocab.txt"),
        (lambda f: vocabulary(f, 30000), "vocabulary of 30000 .*expected 30522"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x00" * 64), "cannot be read"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (drop_a_layer, "lack 2 parameters .*first"),
        (other_width, "do not fit the configuration"),
        (hide_code, "cannot be read"),
    ],
    ids=["no vocabulary", "short vocabulary", "no weights", "damaged", "bad json", "missing", "width", "pickle"],
)
def test_a_wrong_folder_is_one_sentence(folder_of, damage, words):
    folder = folder_of("cxr-bert")
    write_cxr_bert(folder)
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        encoder("cxr-bert")
    assert one_sentence(error)
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("name", ["cxr-bert", "clinical-bert", "clip-vit-b16", "biomedclip", "clipmd"])
def test_an_absent_encoder_says_where_its_files_go(folder_of, name):
    with pytest.raises(FileNotFoundError, match=rf"PROMPT_TO_MASK_WEIGHTS/{name}.*PROMPT_TO_MASK_DOWNLOAD=1") as error:
        encoder(name)
    assert one_sentence(error)


@pytest.fixture
def hub(folder_of, monkeypatch, tmp_path):
    """A hub that serves the tiny CXR-BERT and writes down what it was asked for."""
    import huggingface_hub

    asked = {}
    served = tmp_path / "snapshot"
    served.mkdir()
    write_cxr_bert(served)
    offered = ["config.json", "vocab.txt", "pytorch_model.bin", "model.safetensors", "modeling_cxrbert.py"]

    def snapshot(repo, **options):
        asked.update(options, repo=repo)
        return str(served)

    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo, revision: offered)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setenv("PROMPT_TO_MASK_DOWNLOAD", "1")
    return asked


def test_a_download_is_pinned_and_takes_safetensors_and_no_code(hub):
    assert encoder("cxr-bert").dim == 16
    assert hub == {
        "repo": "microsoft/BiomedVLP-CXR-BERT-specialized",
        "revision": "f1cc2c6b7fac60f3724037746a129a5baf194dbc",
        "allow_patterns": ["config.json", "vocab.txt", "model.safetensors"],
    }


def test_an_unpinned_model_needs_the_readers_revision(hub, monkeypatch):
    for given_revision in (None, "main"):
        if given_revision:
            monkeypatch.setenv("PROMPT_TO_MASK_REVISION_CLIPMD", given_revision)
        with pytest.raises(ValueError, match="PROMPT_TO_MASK_REVISION_CLIPMD to a full commit hash") as error:
            encoder("clipmd")
        assert one_sentence(error) and not hub


def test_a_failing_hub_is_one_sentence(hub, monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise OSError("a long\nstory")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", offline)
    with pytest.raises(ConnectionError, match="check the connection") as error:
        encoder("biomedclip")
    assert one_sentence(error)


# --- the caption bank -----------------------------------------------------------------------------------------


@pytest.fixture
def encoded(monkeypatch):
    """Every string that the hash encoder was asked to encode, in order."""
    log = []
    original = text.HashEncoder.encode
    monkeypatch.setattr(text.HashEncoder, "encode", lambda self, t: (log.extend(t), original(self, t))[1])
    return log


def test_a_string_is_encoded_once_and_for_all(tmp_path, encoded):
    bank = CaptionBank("hash", tmp_path)
    bank.embed(["a", "b", "a"])
    bank.embed(iter(["b", "c"]))
    later = CaptionBank("hash", tmp_path)
    later.embed(["c", "a", ""])
    assert encoded == ["a", "b", "c", ""]
    assert later.strings == ["a", "b", "c", ""] and later.dim == 64
    assert [p.name for p in tmp_path.iterdir()] == ["hash-1.npz"]


def test_a_bank_holds_no_pickle_and_names_its_weights(tmp_path, minilm, monkeypatch):
    monkeypatch.setattr(text, "encoder", lambda name: minilm)
    bank = CaptionBank("minilm", tmp_path)
    bank.embed(["mass", 'größe ≥ 3 mm\n"x"'])
    assert bank.path.name == "minilm-53aa51172d14.npz"
    with np.load(bank.path, allow_pickle=False) as file:
        assert all(file[key].dtype != object for key in file.files) and file["pooled"].dtype == np.float32
    assert CaptionBank("minilm", tmp_path).strings == ["mass", 'größe ≥ 3 mm\n"x"']


def test_prompts_are_looked_up_with_their_presence(tmp_path):
    bank = CaptionBank("hash", tmp_path)
    found = bank.prompts({"local": ["a mass", None, ""], "global": [None, None, "a mass"]})
    expected = encoder("hash").encode(["a mass", ""]).pooled
    assert found.present["local"].tolist() == [True, False, True]  # an empty string is present
    assert torch.equal(found.pooled["local"][[0, 2]], expected) and not found.pooled["local"][1].any()
    assert torch.equal(found.pooled["global"][2], expected[0])
    assert found.tokens == {} and found.pooled["local"].dtype == torch.float32
    nobody = CaptionBank("hash", tmp_path / "new").prompts({"local": [None, None]})
    assert nobody.pooled["local"].shape == (2, 64) and not nobody.present["local"].any()


def test_a_prompt_of_several_sentences_is_the_mean_of_their_embeddings(tmp_path, encoded):
    bank = CaptionBank("hash", tmp_path)
    several = text.SENTENCES.join(["a mass", "on the left", "a cyst"])
    found = bank.prompts({"local": [several, None, "a mass"]})
    assert encoded == ["a mass", "on the left", "a cyst"] == bank.strings  # no sentence twice, and not the whole
    single = bank.prompts({"local": encoded}).pooled["local"]
    torch.testing.assert_close(found.pooled["local"][0], single.mean(0))
    assert torch.equal(found.pooled["local"][2], single[0]) and found.present["local"].tolist() == [True, False, True]
    with pytest.raises(ValueError, match="The prompt 'a mass | .* is the mean of sentences, which has no") as error:
        bank.prompts({"local": [several, None, "a mass"]}, tokens=True)
    assert one_sentence(error)


def test_embeddings_can_be_trained_through(tmp_path):
    found = CaptionBank("hash", tmp_path).prompts({"local": ["a mass"]}, tokens=True)
    weight = torch.ones(64, requires_grad=True)
    (found.pooled["local"] @ weight + (found.tokens["local"] @ weight).sum()).sum().backward()
    assert weight.grad.any()


def test_tokens_are_kept_in_half_precision_and_only_when_asked_for(tmp_path, encoded):
    bank = CaptionBank("hash", tmp_path)
    bank.embed(["a b"])
    with np.load(bank.path) as file:
        assert file["tokens"].size == 0
    found = bank.prompts({"local": ["a b", None, "c"], "global": [None, None, None]}, tokens=True)
    assert encoded == ["a b", "a b", "c"]  # its tokens were not there before
    exact = encoder("hash").encode(["a b"]).tokens[0]
    assert torch.allclose(found.tokens["local"][0], exact, atol=1e-3) and found.tokens["local"].dtype == torch.float32
    assert found.token_mask["local"].sum(1).tolist() == [3, 0, 2] and not found.tokens["local"][1].any()
    assert found.tokens["global"].shape == (3, 0, 64)
    with np.load(bank.path) as file:
        assert file["tokens"].dtype == np.float16 and len(file["tokens"]) == 5
    again = CaptionBank("hash", tmp_path).prompts({"local": ["a b", None, "c"]}, tokens=True)
    assert torch.equal(again.tokens["local"], found.tokens["local"])


def test_banks_that_share_a_folder_add_up(tmp_path, encoded):
    one, two = CaptionBank("hash", tmp_path), CaptionBank("hash", tmp_path)
    one.embed(["a", "b"])
    two.embed(["b", "c"])
    assert encoded == ["a", "b", "c"]  # `two` found `b` in the file before encoding
    assert CaptionBank("hash", tmp_path).strings == ["a", "b", "c"]
    assert torch.equal(two.prompts({"local": ["a", "c"]}).pooled["local"], encoder("hash").encode(["a", "c"]).pooled)


def test_writing_at_once_never_damages_the_bank(tmp_path):
    def work(k):
        bank = CaptionBank("hash", tmp_path)
        for i in range(8):
            bank.embed([f"{k}-{i}", f"shared-{i}"], tokens=bool(k % 2))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    bank = CaptionBank("hash", tmp_path)  # a lost update may leave strings out, which are embedded again
    assert set(bank.strings) >= {f"shared-{7}"} and len(list(tmp_path.iterdir())) == 1
    assert torch.equal(bank.prompts({"local": ["3-0"]}).pooled["local"], encoder("hash").encode(["3-0"]).pooled)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"no archive", "object"])
def test_a_damaged_bank_is_one_sentence(tmp_path, damage):
    bank = CaptionBank("hash", tmp_path)
    bank.embed(["a", "b"])
    if damage == "object":
        np.savez(bank.path, strings=np.array([{}], dtype=object))
    else:
        bank.path.write_bytes(damage(bank.path.read_bytes()))
    with pytest.raises(ValueError, match=r"hash-1\.npz is damaged.*delete it") as error:
        CaptionBank("hash", tmp_path)
    assert one_sentence(error)


def test_a_full_disk_leaves_the_old_bank_and_nothing_else(tmp_path, monkeypatch):
    bank = CaptionBank("hash", tmp_path)
    bank.embed(["a"])

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match=r"could not be saved \(No space left on device\): free some space") as error:
        bank.embed(["b"])
    assert one_sentence(error)
    assert [p.name for p in tmp_path.iterdir()] == ["hash-1.npz"]
    assert CaptionBank("hash", tmp_path).strings == ["a"]


def test_what_is_no_caption_is_refused(tmp_path):
    bank = CaptionBank("hash", tmp_path)
    with pytest.raises(TypeError, match="must be a string, given nan"):
        bank.embed(["a", float("nan")])
    with pytest.raises(ValueError, match="different numbers of texts"):
        bank.prompts({"local": ["a"], "global": []})
    with pytest.raises(ValueError, match="unknown role 'locl'"):
        bank.prompts({"locl": ["a"]})


def test_a_bank_is_read_where_its_encoder_is_absent(folder_of, tmp_path):
    folder = folder_of("cxr-bert")
    write_cxr_bert(folder)
    bank = CaptionBank("cxr-bert", tmp_path / "bank")
    expected = bank.prompts({"local": ["oval mass"]}).pooled["local"]
    assert bank.path.name == f"cxr-bert-{text.revision('cxr-bert')}.npz"
    folder.rename(folder.with_name("gone"))
    travelled = CaptionBank("cxr-bert", tmp_path / "bank")
    assert torch.equal(travelled.prompts({"local": ["oval mass"]}).pooled["local"], expected)
    with pytest.raises(FileNotFoundError, match="PROMPT_TO_MASK_WEIGHTS/cxr-bert"):
        travelled.embed(["a new string"])
    (tmp_path / "bank/cxr-bert-000000000000.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="banks of several weights"):
        CaptionBank("cxr-bert", tmp_path / "bank")


def test_other_weights_get_another_bank(folder_of, tmp_path):
    folder = folder_of("cxr-bert")
    write_cxr_bert(folder)
    first = CaptionBank("cxr-bert", tmp_path).path
    _, model = tiny_bert(30522, seed=1)
    save_file({f"bert.{k}": v for k, v in model.state_dict().items()}, folder / "model.safetensors")
    assert CaptionBank("cxr-bert", tmp_path).path != first


def test_roles_are_those_of_the_design():
    assert ROLES == ("global", "local", "report", "context", "target", "class")
