"""Attributes: values that are checked, sentences that are equal where values are, and reports read by rules."""

import csv
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.attributes import (
    ATTRIBUTES,
    FINDINGS,
    NO_FEATURES,
    PLACES,
    TABLE,
    VOCABULARY,
    Attributes,
    agreement,
    decode,
    described,
    features,
    knowledge,
    parse,
    prompts,
    sentence,
)

APART, CLOSE = VOCABULARY["relation"]
FINDING = st.sampled_from([value for value, _ in FINDINGS])
LESIONS = st.builds(
    Attributes,
    **{name: st.none() | st.sampled_from(VOCABULARY[name]) for name in ATTRIBUTES if name != "features"},
    features=st.none() | st.just(NO_FEATURES) | FINDING,
)
REPORT = (
    "Contrast-enhanced CT: An irregular mixed hyperdense lesion is seen in the right kidney, with heterogeneous "
    "internal density, indistinct margins, and areas of low attenuation. The lesion is closely related to the liver."
)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    """The released table in words."""
    mirror = Path(os.environ.get("MIRROR_DIR", Path(__file__).resolve().parents[2] / "shared" / "data"))
    table = mirror / "texts" / "malenia_attributes" / "attributes.csv"
    if not table.is_file():
        pytest.skip(f"There is no attribute table at {table}: set MIRROR_DIR to have it tested.")
    with open(table, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def row(lesion: str = "renal cyst", report: str = "A lesion.", **values: str) -> dict[str, str]:
    """A row of a table in words."""
    said = {"shape": "round-like", "density": "hypodense"} | values
    return {"lesion": lesion, "report": report} | {column: said.get(name, "") for name, column in TABLE.items()}


# --- values ------------------------------------------------------------------------------------------------


def test_codes_become_words_and_codes_out_of_the_key_become_none():
    codes = {"location": 2, "shape": "1", "density": "3.0", "variation": "12", "enhancement": 4, "surface": ""}
    said = decode("renal cyst", codes)
    assert said == Attributes(location="right kidney", shape="round-like", density="hyperdense")
    assert decode("lung cancer", codes).location == "left lower lobe"
    assert decode("renal cyst", {"location": "1、2", "shape": "0", "relation": "-1"}) == Attributes()


def test_what_is_no_value_and_no_lesion_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"^The attribute 'shape' of a lesion is 'oval': use round-like or irregular"):
        Attributes(shape="oval")
    with pytest.raises(ValueError, match=r"^'gallstone' is no lesion of the released table: use renal cell carcinoma"):
        decode("gallstone", {})
    with pytest.raises(ValueError, match=r"^'colour' is no attribute of a lesion: use location, shape"):
        sentence("colour", "red")
    assert Attributes(location="left atrium", features="a calcified rim").location == "left atrium"  # open


@given(LESIONS)
def test_a_lesion_has_eight_columns_and_a_sentence_for_each_value(lesion):
    said = prompts(lesion, "@known")
    assert list(said) == [f"attribute.{name}@known" for name in ATTRIBUTES]
    for name, text in zip(ATTRIBUTES, said.values(), strict=True):
        assert (text is None) == (getattr(lesion, name) is None)
        assert text is None or (text.endswith(".") and text.count(".") == 1 and len(text) < 80)


def test_equal_values_have_equal_sentences_and_different_ones_have_different_ones():
    for name, values in VOCABULARY.items():
        assert len({sentence(name, value) for value in values}) == len(values)
    assert sentence("shape", "round-like") == "The shape of the lesion is round-like."
    assert sentence("surface", "ill-defined margin") == "The lesion has an ill-defined margin."
    assert sentence("density", None) is None


# --- reports -----------------------------------------------------------------------------------------------


@given(LESIONS)
def test_the_sentences_of_a_lesion_are_read_back(lesion):
    said = [text for text in prompts(lesion).values() if text]
    read = parse(" ".join(said))
    for name in ATTRIBUTES[:-1]:
        if name != "enhancement":  # "with contrast agent" is how every scan is spoken of, not how reports put it
            assert getattr(read, name) == getattr(lesion, name), name
    if said:
        assert read.features == (lesion.features or NO_FEATURES)


@given(st.text(max_size=200))
def test_any_text_can_be_read(text):
    read = parse(text)
    assert read == Attributes() if not text.strip() else read.features is not None


def test_a_report_is_read_for_all_it_says():
    assert parse(REPORT) == Attributes(
        location="right kidney",
        shape="irregular",
        density="hyperdense",
        variation="heterogeneous",
        enhancement="contrast-enhanced CT",
        surface="ill-defined margin",
        relation=CLOSE,
        features="hypodense areas",
    )


@pytest.mark.parametrize("report", [None, "", "  \n"])
def test_an_empty_report_says_nothing(report):
    assert parse(report) == Attributes() and features(report) is None


@pytest.mark.parametrize(
    ("report", "name", "value"),
    [
        ("Indistinct margin with the parenchyma, and no close relationship with adjacent organs.", "relation", APART),
        (
            "A sharp border, closely related to the psoas muscle with indistinct borders.",
            "surface",
            VOCABULARY["surface"][0],
        ),
        ("A roughly round lesion with well-defined margins.", "surface", VOCABULARY["surface"][0]),
        ("An inhomogeneous lesion.", "variation", "heterogeneous"),
        ("Unenhanced CT: a lesion.", "enhancement", "non-contrast CT"),
        ("A lesion. No pancreatic duct dilatation is seen.", "features", NO_FEATURES),
        ("The pancreatic duct is dilated, with calcification.", "features", None),
    ],
)
def test_rules_that_could_mislead_one_another_do_not(report, name, value):
    wanted = value or "calcification and dilatation of the pancreatic duct"
    assert getattr(parse(report), name) == wanted


# --- tables ------------------------------------------------------------------------------------------------


def test_what_is_usual_in_a_disease_is_what_most_of_its_rows_say():
    table = [
        row(),
        row(shape="irregular"),
        row(density=""),
        row("lung cancer", report="With cavitation.", density="isodense"),
    ]
    table[0]["location"] = "left kidney"
    usual = knowledge(table)
    assert usual["renal cyst"] == Attributes(shape="round-like", density="hypodense", features=NO_FEATURES)
    assert usual["lung cancer"].features == "cavitation" and list(knowledge(table, ["lung cancer"])) == ["lung cancer"]


def test_tables_that_lack_something_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"^The attribute table has no row of 'lung cancer': use renal cyst\.$"):
        knowledge([row()], ["lung cancer"])
    with pytest.raises(ValueError, match=r"lacks 'density_variation': give the table in words"):
        described({name: text for name, text in row().items() if name != "density_variation"})


def test_agreement_counts_right_wrong_and_unsaid():
    table = [
        row(report="A round hypodense lesion."),
        row(report="An irregular lesion.", variation="homogeneous"),
        row(report="", shape=""),
    ]
    found = agreement(table)
    assert found.loc["shape"].to_dict() == {"n": 2, "said": 2, "right": 1, "wrong": 1, "unsaid": 0}
    assert found.loc["density"].to_dict() == {"n": 3, "said": 1, "right": 1, "wrong": 0, "unsaid": 2}
    assert found.loc["variation", "unsaid"] == 1 and found.loc["relation", "n"] == 0


def test_the_released_codes_and_words_are_the_same(rows):
    for one in rows:
        codes = {name: one[f"{column}_code"] for name, column in TABLE.items()}
        assert replace(decode(one["lesion"], codes), features=described(one).features) == described(one), one["id"]
    assert set(knowledge(rows)) == set(PLACES)


def test_the_parser_agrees_with_the_released_table_about_as_often_as_its_reports_do(rows):
    found = agreement(rows)
    assert (found["said"] + found["unsaid"] == found["n"]).all() and (found["n"] > 425).all()
    assert (found["wrong"] / found["said"] < 0.04).all()  # most of these are reports that contradict their row
    silent = found["unsaid"] / found["n"]
    assert (silent.drop(["relation", "variation"]) < 0.06).all() and 0.5 < silent["relation"] < 0.65
