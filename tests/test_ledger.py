"""Claims become verdicts only through intervals."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import ledger
from lib.statistics import Interval

CLAIM = {
    "id": "x-1", "paper": "x", "kind": "mechanism", "statement": "a beats b", "source": "here",
    "contrast": {"metric": "dsc", "a": {"arm": "a", "test": "t"}, "b": {"arm": "b", "test": "t"}, "expect": "more"},
}  # fmt: skip


def record(arm, seed, dsc, level="P", worded=True):
    """A run record of one test with these per-case scores, one patient a case."""
    cases = pd.DataFrame(
        {"dataset": "d", "case_id": [f"c{i}" for i in range(len(dsc))],
         "patient_id": [f"p{i}" for i in range(len(dsc))],
         "test": "t", "threshold": 0.5, "dsc": dsc, "fpr": np.asarray(dsc) / 10, "worded": worded}
    )  # fmt: skip
    return SimpleNamespace(
        key=f"{arm}{seed}", arm=arm, cases=cases, experiment={"seed": seed}, meta={"levels": {"d": level}}
    )


def two_arms(gap, noise=0.02, n=40, seeds=3):
    rng = np.random.default_rng(0)
    base = rng.uniform(0.5, 0.8, n)
    return [record("b", s, base + rng.normal(0, noise, n)) for s in range(seeds)] + [
        record("a", s, base + gap + rng.normal(0, noise, n)) for s in range(seeds)
    ]


@pytest.mark.parametrize("gap, expected", [(0.1, "supported"), (-0.1, "not supported"), (0.0, "inconclusive")])
def test_a_contrast_decides_only_when_the_interval_lies_on_one_side(gap, expected):
    verdict = ledger.judge(ledger.Claim(**CLAIM), ledger.collect(two_arms(gap)), "P")
    assert verdict.verdict == expected
    assert verdict.effect[1] <= verdict.effect[0] <= verdict.effect[2]
    assert abs(verdict.effect[0] - gap) < 0.02
    assert (verdict.n_cases, verdict.n_patients, verdict.n_seeds) == (40, 40, 3)
    assert verdict.keys == ("a0", "a1", "a2", "b0", "b1", "b2")


def test_too_few_patients_decide_nothing_however_narrow_the_interval():
    for patients, expected in ((5, "inconclusive"), (6, "supported")):
        verdict = ledger.judge(ledger.Claim(**CLAIM), ledger.collect(two_arms(0.3, n=patients)), "P")
        assert verdict.verdict == expected and verdict.effect[1] > 0.1 and verdict.n_patients == patients


@pytest.mark.parametrize(
    "expect, margin, interval, expected",
    [
        ("more", 0, (0.01, 0.3), "supported"),
        ("more", 0.05, (0.01, 0.3), "inconclusive"),
        ("more", -0.02, (-0.01, 0.01), "supported"),
        ("less", 0, (-0.3, -0.01), "supported"),
        ("less", 0, (0.01, 0.3), "not supported"),
        ("equal", 0.1, (-0.05, 0.05), "supported"),
        ("equal", 0.1, (0.2, 0.3), "not supported"),
        ("equal", 0.1, (0.05, 0.3), "inconclusive"),
    ],
)
def test_decide(expect, margin, interval, expected):
    contrast = ledger.Contrast(metric="dsc", a={"arm": "a", "test": "t"}, value=0, expect=expect, margin=margin)
    low, high = interval
    effect = Interval(mean=(low + high) / 2, low=low, high=high, n_cases=9, n_patients=9, n_seeds=1)
    assert ledger.decide(effect, contrast) == expected


def test_missing_arms_and_levels_read_not_run():
    table = ledger.collect(two_arms(0.1))
    claim = ledger.Claim(**CLAIM)
    assert ledger.judge(claim, table, "R").verdict == "not run"
    assert ledger.judge(replace(claim, levels=("F",)), table, "P").verdict == "not run"
    assert ledger.judge(claim, table[table["arm"] == "a"], "P").verdict == "not run"
    assert [v.verdict for v in ledger.verdicts([claim], [])] == ["not run"]


def test_a_side_may_name_its_own_metric():
    contrast = {"metric": "dsc", "a": {"arm": "a", "test": "t"}, "b": {"arm": "a", "test": "t", "metric": "fpr"}}
    claim = ledger.Claim(**CLAIM | {"contrast": contrast | {"expect": "more"}})
    verdict = ledger.judge(claim, ledger.collect(two_arms(0.1)), "P")
    assert verdict.b == pytest.approx(verdict.a / 10)


def test_undefined_scores_leave_both_sides():
    records = two_arms(0.1)
    records[0].cases.loc[3, "dsc"] = np.nan
    assert ledger.judge(ledger.Claim(**CLAIM), ledger.collect(records), "P").n_cases == 39


def test_only_worded_cases_when_asked():
    records = two_arms(0.1)
    for one in records:
        one.cases["worded"] = np.arange(40) < 10
    contrast = CLAIM["contrast"] | {"cases": "worded"}
    verdict = ledger.judge(ledger.Claim(**CLAIM | {"contrast": contrast}), ledger.collect(records), "P")
    assert verdict.n_cases == 10


def test_only_present_structures_when_asked():
    records = two_arms(0.1)
    for i, one in enumerate(records):
        one.cases["area_true"] = np.where(np.arange(40) < 10, 0, 50)
        one.cases.loc[one.cases["area_true"] == 0, "dsc"] = float(i % 2)
    claim = ledger.Claim(**CLAIM | {"contrast": CLAIM["contrast"] | {"cases": "present"}})
    verdict = ledger.judge(claim, ledger.collect(records), "P")
    assert verdict.n_cases == 30 and verdict.effect[0] == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("times, expected", [(0.8, "supported"), (1.0, "not supported")])
def test_two_kinds_of_case_are_compared_by_their_patients(times, expected):
    rng = np.random.default_rng(0)
    seen = [record("a", s, rng.normal(0.7, 0.02, 40)) for s in range(2)]
    unseen = [record("a", s, rng.normal(0.62, 0.02, 30)) for s in range(2)]
    for one in unseen:
        one.cases["test"], one.cases["case_id"] = "u", [f"u{i}" for i in range(30)]
    sides = {"a": {"arm": "a", "test": "u"}, "b": {"arm": "a", "test": "t"}, "times": times}
    claim = ledger.Claim(**CLAIM | {"contrast": CLAIM["contrast"] | sides | {"pairing": "patient"}})
    verdict = ledger.judge(claim, ledger.collect([*seen, *unseen]), "P")
    assert verdict.verdict == expected
    assert verdict.effect[0] == pytest.approx(0.62 - times * 0.7, abs=0.02)
    assert (verdict.n_cases, verdict.n_patients, verdict.n_seeds) == (70, 40, 2)
    assert ledger.judge(claim, ledger.collect(seen), "P").verdict == "not run"


def test_a_share_of_nothing_is_refused():
    contrast = {"metric": "dsc", "a": {"arm": "a", "test": "t"}, "value": 0.5, "expect": "more", "times": 0.8}
    with pytest.raises(ValueError, match="which this contrast does not have"):
        ledger.Contrast(**contrast)


def test_a_wrong_row_is_named(tmp_path):
    path = tmp_path / "claims.yml"
    path.write_text("- {id: odd, paper: x, kind: rumour}\n")
    with pytest.raises(ValueError, match="row odd is not a valid claim"):
        ledger.load_claims(path)


def test_the_books_claims_are_valid_and_have_sources(pytestconfig):
    for name in ("claims.yml", "audit.yml"):
        claims = ledger.load_claims(pytestconfig.rootpath / "book" / name)
        assert claims and all(claim.source for claim in claims)


def test_the_book_lists_what_the_papers_say_and_what_was_seen_of_them(pytestconfig):
    claims, audits = (ledger.load_claims(pytestconfig.rootpath / "book" / name) for name in ("claims.yml", "audit.yml"))
    papers = ("nullbus", "uavls", "duplus", "medclip_samv2", "malenia")
    assert len(claims) >= 90 and min(sum(c.paper == paper for c in claims) for paper in papers) >= 12
    assert [c.id for c in claims if not c.needs] == []
    assert [c.id for c in claims if c.kind == "number" and not (c.paper_value or c.published)] == []
    observed = [a for a in audits if a.topic != "control"]
    assert len(observed) >= 25 and {a.paper for a in observed} == set(papers)
    assert [a.id for a in audits if not (a.check and a.matters)] == []


def test_a_published_value_is_what_its_row_quotes(pytestconfig):
    """`published` is a number beside a quotation: the one must be found in the other, as a share or in per cent."""
    for claim in ledger.load_claims(pytestconfig.rootpath / "book/claims.yml"):
        quoted = f"{claim.paper_value} {claim.source} {claim.statement}"
        for value in (claim.published, claim.against):
            ways = [f"{value:g}".lstrip("0"), f"{100 * value:.4g}"] if value is not None else [""]
            assert any(way in quoted for way in ways), f"{claim.id}: {value} is not in {quoted!r}"


def test_a_row_without_a_contrast_is_not_judged():
    bare = ledger.Claim(**{key: value for key, value in CLAIM.items() if key != "contrast"} | {"id": "x-bare"})
    records = two_arms(0.1)
    together = ledger.verdicts([bare, ledger.Claim(**CLAIM)], records)
    assert together == ledger.verdicts([ledger.Claim(**CLAIM)], records)
    assert ledger.verdicts([bare], records) == []


def test_a_verdict_names_the_runs_and_data_of_its_own_sides_only():
    records = two_arms(0.1)
    for r in records:  # arm a under b's test, and the other way round, on other data
        test = {"a": "u", "b": "t"}[r.arm]
        elsewhere = r.cases.assign(dataset="e", test="t" if test == "u" else "u")
        r.cases = pd.concat([r.cases.assign(test=test), elsewhere], ignore_index=True)
        r.meta["levels"]["e"] = "P"
    crossed = {"a": {"arm": "a", "test": "u"}, "b": {"arm": "b", "test": "t"}}
    claim = ledger.Claim(**CLAIM | {"contrast": CLAIM["contrast"] | crossed})
    verdict = ledger.judge(claim, ledger.collect(records), "P")
    assert (verdict.dataset, verdict.n_cases, len(verdict.keys)) == ("d", 40, 6)


def test_every_claim_names_arms_of_its_chapter(pytestconfig):
    for name in ("claims.yml", "audit.yml"):
        for claim in ledger.load_claims(pytestconfig.rootpath / "book" / name):
            cells = json.loads((pytestconfig.rootpath / f"notebooks/{claim.paper}.ipynb").read_text())["cells"]
            code = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
            for arm in (claim.contrast.a, claim.contrast.b) if claim.contrast else ():
                assert arm is None or f'"{arm.arm}"' in code, f"{claim.id} names the arm {arm.arm}"


def test_summary_averages_seeds_and_cases():
    frame = ledger.summary(ledger.collect(two_arms(0.1, noise=0.0)), "dsc").set_index("arm")
    assert frame.loc["a", "mean"] - frame.loc["b", "mean"] == pytest.approx(0.1)
    assert (frame["low"] < frame["mean"]).all() and (frame["mean"] < frame["high"]).all()


def test_changes_compare_the_same_cases_under_two_tests():
    records = two_arms(0.1)
    for r in records:
        other = r.cases.iloc[:25].assign(test="u", dsc=lambda t: t["dsc"] - 0.05)
        r.cases = pd.concat([r.cases, other], ignore_index=True)
    found = ledger.changes(ledger.collect(records), "a", {"u": "t", "absent": "t"}, "dsc")
    assert found["test"].tolist() == ["u"] and found["n_cases"].tolist() == [25]
    assert found["mean"][0] == pytest.approx(-0.05) and found["low"][0] == pytest.approx(-0.05)


def test_an_effect_is_a_mean_or_a_paired_difference():
    table = ledger.collect(two_arms(0.1))
    mean, low, high = ledger.effect(table, "dsc", ("a", "t"), ("b", "t"))
    assert low < mean < high and abs(mean - 0.1) < 0.02
    assert ledger.effect(table, "dsc", ("a", "t"))[0] == pytest.approx(table.query("arm == 'a'")["dsc"].mean())
    with pytest.raises(ValueError, match="no scores of .*'absent'"):
        ledger.effect(table, "dsc", ("a", "absent"))


def test_pooled_dice_weighs_pixels_and_not_images():
    one = record("a", 0, np.zeros(2))
    one.cases = one.cases.assign(area_true=[90, 10], area_pred=[90, 10], area_both=[90, 0])
    found = ledger.pooled(ledger.collect([one])).set_index("metric")["mean"]
    assert found["pooled_dice"] == pytest.approx(0.9) and found["pooled_iou"] == pytest.approx(90 / 110)


@given(st.integers(0, 1000))
@settings(deadline=None, max_examples=15)
def test_pooled_iou_is_dice_over_two_minus_dice(seed):
    rng = np.random.default_rng(seed)
    one = record("a", 0, np.zeros(12))
    both = rng.integers(1, 50, 12)
    one.cases = one.cases.assign(area_true=both + 7, area_pred=both + rng.integers(0, 9, 12), area_both=both)
    found = ledger.pooled(ledger.collect([one])).set_index("metric")
    for end in ("mean", "low", "high"):
        dice, iou = found.loc["pooled_dice", end], found.loc["pooled_iou", end]
        assert iou == pytest.approx(dice / (2 - dice), rel=1e-3)


# --- a metric that is no mean of cases


def cohort(arm, seed, noise, n=80):
    """A run record of risks: the log hazard that made the times, under more or less noise."""
    truth = np.random.default_rng(7).normal(size=n)
    days = np.random.default_rng(8).exponential(1000 * np.exp(-1.5 * truth)) + 1
    risk = truth + np.random.default_rng([seed, 9]).normal(0, noise, n)
    names = [f"p{i}" for i in range(n)]
    cases = pd.DataFrame({"dataset": "d", "case_id": names, "patient_id": names, "test": "t", "threshold": 0.5})
    cases = cases.assign(risk=risk, time=days, event=(np.arange(n) % 4 > 0).astype(float))
    return SimpleNamespace(
        key=f"{arm}{seed}", arm=arm, cases=cases, experiment={"seed": seed}, meta={"levels": {"d": "P"}}
    )


def order_claim(**contrast):
    side = {"arm": "a", "test": "t"}
    return ledger.Claim(**{**CLAIM, "contrast": {"metric": "cindex", "a": side, "expect": "more", **contrast}})


def test_concordances_are_compared_on_the_same_patients_and_seeds():
    records = [cohort(arm, seed, noise) for arm, noise in (("a", 0.1), ("b", 2.0)) for seed in (0, 1)]
    table = ledger.collect(records)
    better = ledger.judge(order_claim(b={"arm": "b", "test": "t"}), table, "P")
    assert better.verdict == "supported" and better.effect[1] > 0.05
    assert better.effect[0] == pytest.approx(better.a - better.b) and better.a > 0.75 > better.b
    assert (better.n_cases, better.n_seeds, better.keys) == (80, 2, ("a0", "a1", "b0", "b1"))
    same = ledger.judge(order_claim(b={"arm": "a", "test": "t"}), table, "P")
    assert same.effect == (0, 0, 0) and same.verdict == "inconclusive"


def test_a_concordance_is_compared_with_a_number_and_is_not_run_without_risks():
    table = ledger.collect([cohort("a", 0, 0.1), *two_arms(0.1)])
    above = ledger.judge(order_claim(value=0.5), table, "P")
    assert above.verdict == "supported" and above.b == 0.5 and above.effect[0] == pytest.approx(above.a - 0.5)
    assert ledger.judge(order_claim(b={"arm": "c", "test": "t"}), table, "P").verdict == "not run"
    assert ledger.judge(order_claim(value=0.5), ledger.collect(two_arms(0.1)), "P").verdict == "not run"


# --- many claims at once


def contrast(**more):
    return ledger.Contrast(metric="dsc", a={"arm": "a", "test": "t"}, value=0, **more)


@pytest.mark.parametrize("expect, margin", [("more", 0.0), ("more", 0.02), ("less", 0.0), ("equal", 0.03)])
@given(centre=st.floats(-0.2, 0.2), spread=st.floats(0.001, 0.2), seed=st.integers(0, 50))
@settings(deadline=None, max_examples=40)
def test_whatever_is_decided_has_a_p_of_at_most_five_percent(expect, margin, centre, spread, seed):
    draws = np.random.default_rng(seed).normal(centre, spread, 2000)
    low, high = np.quantile(draws, [0.025, 0.975])
    asked = contrast(expect=expect, margin=margin)
    p = ledger.p_value(draws, asked)
    assert 2 / 2000 <= p <= 1
    effect = Interval(centre, low, high, 9, 9, 1)
    if ledger.decide(effect, asked) != "inconclusive":
        assert p <= ledger.ALPHA
    elif p < 0.045:  # at the very edge, an interpolated quantile and a count of draws may differ
        pytest.fail(f"undecided with p = {p}")


def test_p_has_known_values():
    draws = np.arange(-10, 190) / 100  # 10 of 200 below zero
    assert ledger.p_value(draws, contrast(expect="more")) == pytest.approx(2 * 11 / 200)
    assert ledger.p_value(draws, contrast(expect="more", margin=-1)) == pytest.approx(2 / 200)
    assert ledger.p_value(draws, contrast(expect="less")) == pytest.approx(2 * 11 / 200)
    assert ledger.p_value(draws, contrast(expect="equal", margin=5)) == pytest.approx(2 / 200)
    assert ledger.p_value(draws, contrast(expect="equal", margin=1)) == pytest.approx(2 * 90 / 200)


def family(*ps, level="P"):
    claim = ledger.Claim(**CLAIM)
    return [ledger.Verdict(claim=claim, level=level, verdict="supported" if p else "not run", p=p) for p in ps]


def test_holm_runs_over_what_was_judged_at_one_level():
    results = ledger.corrected([*family(0.01, None, 0.04, 0.03), *family(0.04, level="R")])
    assert [v.p_holm for v in results] == [pytest.approx(0.03), None, pytest.approx(0.06), pytest.approx(0.06), 0.04]
    words = ["supported", "not run", "inconclusive", "inconclusive", "supported"]
    assert [v.corrected for v in results] == words
    assert [v.verdict for v in results] == ["supported", "not run", *["supported"] * 3]


def test_holm_takes_a_verdict_back_and_never_makes_one():
    undecided = ledger.Verdict(claim=ledger.Claim(**CLAIM), level="P", verdict="inconclusive", p=0.2, p_holm=0.01)
    assert undecided.corrected == "inconclusive"
    few = ledger.verdicts([ledger.Claim(**CLAIM)], two_arms(0.3, n=5))[0]
    assert few.p is None and few.p_holm is None and few.corrected == "inconclusive"


def test_more_claims_make_the_same_evidence_weaker():
    claims = [ledger.Claim(**CLAIM)] + [
        ledger.Claim(**CLAIM | {"id": f"x-{i}", "contrast": CLAIM["contrast"] | {"margin": 0.006}}) for i in range(9)
    ]
    records = two_arms(0.013, noise=0.02, n=40)
    alone, together = ledger.verdicts(claims[:1], records)[0], ledger.verdicts(claims, records)[0]
    assert alone.p == together.p == alone.p_holm < together.p_holm


@pytest.mark.parametrize(
    "change, said",
    [
        ({"kind": "rumour"}, "kind is 'rumour', and must be one of 'number'"),
        ({"statement": 3}, "statement is 3, and must be of the kind str"),
        ({"levels": ["P", "Q"]}, "levels is 'Q'"),
        ({"colour": "red"}, "colour"),
        ({"kind": "audit"}, "an audit, and nothing else, needs a topic"),
        ({"published": "high"}, "published is 'high', and must be of the kind float"),
        ({"kind": "number"}, "a number of a paper can be judged at level F alone"),
        ({"n_published": 113}, "about a `published` value, which is not given"),
        ({"check": "look"}, "`check` and `matters` are for audits"),
        ({"contrast": CLAIM["contrast"] | {"a": {"arm": "a"}}}, "test"),
        ({"contrast": CLAIM["contrast"] | {"margin": "much"}}, "margin is 'much'"),
    ],
)
def test_what_is_wrong_in_a_row_is_said(tmp_path, change, said):
    path = tmp_path / "claims.yml"
    path.write_text(json.dumps([CLAIM | change]))
    with pytest.raises(ValueError, match=f"row x-1 is not a valid claim: .*{said}"):
        ledger.load_claims(path)
