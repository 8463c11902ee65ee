"""A fact is a number with the recipe that gives it again from the same records, and no other."""

import numpy as np
import pandas as pd
import pytest

from lib import ledger
from lib.facts import MEASURES, Fact, fact, seal
from lib.statistics import shown

A, B, C = (("a", "t"), ("b", "t"), ("c", "t"))


@pytest.fixture
def table():
    """Three arms with two seeds on two datasets, of which the second turns the order round."""
    rng, rows = np.random.default_rng(0), []
    for dataset, way in (("d", 1), ("e", -1)):
        base = rng.uniform(0.4, 0.6, 30)
        for place, arm in enumerate("abc"):
            for seed in range(2):
                dsc = base - way * 0.05 * place + rng.normal(0, 0.02, 30)
                same = {"arm": arm, "test": "t", "dataset": dataset, "seed": seed, "level": "P", "threshold": 0.5}
                rows.append(pd.DataFrame({"case_id": [f"c{i}" for i in range(30)], "dsc": dsc, "worded": True} | same))
    return pd.concat(rows, ignore_index=True).assign(patient_id=lambda t: t["case_id"])


@pytest.mark.parametrize(
    "what, given, text",
    [
        ("effect", (A, B), None),
        ("effect", ([A, B], [C]), None),
        ("mean", (A, B), None),
        ("share", ((B, C), (A, C)), None),
        ("ranked", ([C, B, A], 1), "a"),
        ("ranked", ([C, B, A], 2), "b"),
        ("among", ([A, B, C], A, 1), "1.000"),
        ("among", ([A, B, C], C, 1), "0.000"),
        ("tau", ([A, B, C],), "1.000 (1.000–1.000)"),
        ("spread", ([A, B, C],), None),
        ("patients", ([A, B],), "30"),
        ("seeds", ([A, B],), "2"),
    ],
)
def test_a_fact_of_some_rows_comes_again_from_all_of_them(table, what, given, text):
    one = fact(what, table[table["dataset"] == "d"], "dsc", *given)
    assert text in (None, one.text) and one.again(table) == one.text and str(one) == one.text
    assert what in MEASURES and one.where["dataset"] == ["d"]
    elsewhere = fact(what, table[table["dataset"] == "e"], "dsc", *given)
    assert elsewhere.again(table) == elsewhere.text
    assert (elsewhere.text == one.text) == (what in ("tau", "patients", "seeds") or given[-1] == 2)


def test_an_effect_is_that_of_the_ledger_and_may_average_sides(table):
    rows = table[table["dataset"] == "d"]
    assert fact("effect", rows, "dsc", A, B, digits=2).text == shown(ledger.effect(rows, "dsc", A, B), 2)
    halves = [ledger.effect(rows, "dsc", side, C)[0] for side in (A, B)]
    assert ledger.effect(rows, "dsc", [A, B], C)[0] == pytest.approx(np.mean(halves))
    with pytest.raises(ValueError, match=r"no scores of \('absent', 't'\)"):
        ledger.effect(rows, "dsc", [A, ("absent", "t")])


def test_fewer_seeds_are_part_of_the_recipe(table):
    first = table[table["seed"] == 0]
    one = fact("effect", first, "dsc", A)
    assert one.where["seed"] == [0] and one.again(table) == one.text != fact("effect", table, "dsc", A).text


def test_rows_where_the_structure_is_are_part_of_the_recipe(table):
    rows = table.assign(area_true=np.arange(len(table)) % 30 % 3)  # a case has the same area for every arm
    there = fact("mean", rows[rows["area_true"] > 0], "dsc", A, digits=6)
    assert there.where["present"] == [True] and there.again(rows) == there.text
    assert there.text != fact("mean", rows, "dsc", A, digits=6).text


def test_a_share_is_printed_in_percent(table):
    assert fact("among", table[table["dataset"] == "d"], "dsc", [A, B], A, 1, percent=True).text == "100 %"


def test_what_cannot_be_measured_is_said(table):
    with pytest.raises(ValueError, match="no measure 'guess': use one of effect, mean, share"):
        fact("guess", table, "dsc", A)
    with pytest.raises(ValueError, match="no measure 'guess'"):
        Fact("guess", [], {}, 2, False, "").again(table)
    with pytest.raises(ValueError, match="no scores of absent in t"):
        fact("ranked", table, "dsc", [A, ("absent", "t")], 1)


def test_a_seal_holds_name_text_and_facts():
    effect, tau = [{"what": "effect"}], [{"what": "tau"}]
    sealed = [("n", "text", effect), ("m", "text", effect), ("n", "Text", effect), ("n", "text", tau), ("n", "text")]
    assert len({seal(*what) for what in sealed}) == 5 and seal("n", "text") == seal("n", "text", [])
