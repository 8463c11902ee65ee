"""The common ground: every arm gets the same cases, prompts and budget, and looks are named once."""

from dataclasses import replace

import pytest

from lib import comparison
from lib.comparison import GROUNDS, SCALES, WORDINGS, arm, every_look, ground, looks
from lib.models.entries import ENTRIES
from lib.runs import key, run
from lib.text import PERTURBATIONS

TINY = replace(SCALES["smoke"][2], limit=6, val_limit=2, test_limit=3, steps=2, batch=2)


def test_arms_differ_in_what_they_name_alone():
    on = GROUNDS["phantom_bus"]
    arms = [arm(entry, on, TINY, 0, entry=entry) for entry in ENTRIES]
    alike = {(a.train, a.prompts, a.tests, a.loss, a.budget, a.size, a.limit, a.augment, a.worded) for a in arms}
    assert len(alike) == 1
    assert {a.arm for a in arms if a.tokens} == {"attention", "tokens"}  # those that read words
    assert all(dict(a.config)["roles"] == ("local",) for a in arms)


def test_images_are_also_given_to_the_papers_networks():
    flat, deep = (comparison.methods(GROUNDS[name], TINY, 0) for name in ("phantom_bus", "phantom_torso_ct"))
    assert [a.arm for a in flat] == [*ENTRIES, "nullbus", "uavls", "unet"] and [a.arm for a in deep] == [*ENTRIES]
    assert flat[0] == arm("none", GROUNDS["phantom_bus"], TINY, 0, entry="none", text_dim=384)
    assert dict(flat[-3].config)["roles"] == ("global", "local") and flat[-2].tokens and not flat[-1].tokens
    assert len({(a.train, a.prompts, a.loss, a.budget) for a in flat}) == 1


def test_a_network_is_found_by_name_and_differs_in_what_is_asked_alone():
    on = GROUNDS["phantom_bus"]
    plain, null = (
        comparison.network("uavls", on, TINY, 0, name="uavls" + suffix, **more)
        for suffix, more in {"": {}, "-empty": {"dropout": 0.5, "absent": "empty"}}.items()
    )
    assert plain == next(a for a in comparison.methods(on, TINY, 0) if a.arm == "uavls")
    assert (null.arm, null.prompt_dropout, dict(null.config)["absent"]) == ("uavls-empty", 0.5, "empty")
    assert replace(null, arm="uavls", prompt_dropout=0.0, config=plain.config) == plain
    with pytest.raises(ValueError, match="no network 'unet' for 'phantom_torso_ct': use one of none"):
        comparison.network("unet", GROUNDS["phantom_torso_ct"], TINY, 0)


def test_looks_are_known_perturbations_or_texts_that_somebody_wrote():
    assert {name for name in WORDINGS} <= set(PERTURBATIONS)
    for on in GROUNDS.values():
        tests = looks(on, TINY, every_look(on))
        assert len({test.name for test in tests}) == len(tests)
        assert [test.name for test in tests if test.uncertainty] == ["present", "absent"]
        assert {test.prompts.perturbation for test in tests if test.name in dict(on.published)} == {
            f"published:{variant}" for _, variant in on.published
        }


def test_a_ground_must_be_known_and_have_its_column(tiny_dataset, monkeypatch):
    with pytest.raises(ValueError, match="no common ground on 'mars': use one of phantom_bus"):
        ground("mars", tiny_dataset.parent)
    name = tiny_dataset.name
    monkeypatch.setitem(comparison.GROUNDS, name, replace(GROUNDS["phantom_bus"], dataset=name))
    assert ground(name, tiny_dataset.parent).dims == 2
    monkeypatch.setitem(comparison.GROUNDS, name, replace(GROUNDS["phantom_cxr"], dataset=name))
    with pytest.raises(ValueError, match="no prompt column 'report'"):
        ground(name, tiny_dataset.parent)


def test_an_arm_runs_and_its_name_is_no_part_of_its_key(tiny_dataset, tmp_path):
    on = replace(GROUNDS["phantom_bus"], dataset=tiny_dataset.name, published=())
    one = arm("film", on, TINY, 0, entry="film", encoder="hash", text_dim=64, tests=looks(on, TINY))
    places = {"data": tiny_dataset.parent, "root": tmp_path / "runs"}
    record = run(one, **places)
    assert set(record.cases["test"]) == {"present", "absent"} and record.cases["dsc"].between(0, 1).all()
    assert key(one, *places.values()) == key(replace(one, arm="another name"), *places.values())
