"""Runs: what a key knows, what is done only once, and that neither a kill nor a full disk leaves half a record."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from lib import runs
from lib.data import LeakageError, load_dataset
from lib.runs import Experiment, fit_key, key, load_record, run, run_all
from lib.text import PromptPolicy
from lib.training import Budget
from tests.conftest import write_tiny_dataset

ROOT = Path(__file__).resolve().parents[1]
POLICY = PromptPolicy((("global", "global"), ("local", "local")))
TIMES = ["seconds"]
FILES = ("cases.csv", "log.csv", "record.json")


def look(name="present", dataset="tiny", perturbation="none", **more):
    return runs.Test(name, dataset, dataclasses.replace(POLICY, perturbation=perturbation), **more)


EXPERIMENT = Experiment(
    arm="mixed",
    model="text_only",
    config=(("size", "tiny"), ("text_dim", 64)),
    train=("tiny",),
    prompts=POLICY,
    prompt_dropout=0.5,
    encoder="hash",
    size=32,
    augment="photometric",
    budget=Budget(steps=2, batch=4, validate_every=1),
    tests=(look(),),
)


@pytest.fixture
def place(tiny_dataset, tmp_path, monkeypatch):
    """The data and root folder of a run, as keyword arguments."""
    monkeypatch.delenv("PAPERMILL", raising=False)
    return {"data": tmp_path / "data", "root": tmp_path / "runs"}


@pytest.fixture
def trainings(monkeypatch):
    """The seeds of the trainings that really took place."""
    made, fit = [], runs.fit

    def counted(*args, **given):
        made.append(given["seed"])
        return fit(*args, **given)

    monkeypatch.setattr(runs, "fit", counted)
    return made


def change(**fields):
    return dataclasses.replace(EXPERIMENT, **fields)


def numbers(record):
    return record.cases.drop(columns=TIMES)


def left(root):
    """Everything below the records, hidden or not."""
    folder = root / "records"
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# --- keys


CHANGES = {
    "seed": 1,
    "size": 40,
    "loss": "dice",
    "prompt_dropout": 0.4,
    "limit": 5,
    "drop_empty": False,
    "encoder": "minilm",
    "config": (("size", "tiny"), ("text_dim", 64), ("hidden", 32)),
    "prompts": dataclasses.replace(POLICY, share=0.5),
    "budget": Budget(steps=3, batch=4, validate_every=1),
}


@pytest.mark.parametrize("field", CHANGES)
def test_every_setting_of_the_training_is_in_both_keys(place, field):
    other = change(**{field: CHANGES[field]})
    assert key(other, **place) != key(EXPERIMENT, **place)
    assert fit_key(other, **place) != fit_key(EXPERIMENT, **place)


def test_the_arm_is_in_no_key_and_the_tests_only_in_the_records(place):
    assert key(change(arm="other"), **place) == key(EXPERIMENT, **place)
    more = change(tests=(look(), look("absent", perturbation="absent")))
    assert key(more, **place) != key(EXPERIMENT, **place)
    assert fit_key(more, **place) == fit_key(EXPERIMENT, **place)


def test_the_key_follows_the_data(place):
    before = key(EXPERIMENT, **place)
    write_tiny_dataset(place["data"] / "new" / "tiny", seed=1)
    assert key(EXPERIMENT, place["data"] / "new", place["root"]) != before
    write_tiny_dataset(place["data"] / "same" / "tiny")
    assert key(EXPERIMENT, place["data"] / "same", place["root"]) == before


def test_the_key_follows_the_device(place, monkeypatch):
    before = key(EXPERIMENT, **place)
    monkeypatch.setattr(runs, "_device_class", lambda: "NVIDIA H200")
    assert key(EXPERIMENT, **place) != before


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"model": "nulbus"}, r"Arm 'mixed' asks for the model 'nulbus': use one of .*nullbus"),
        ({"loss": "dicee"}, r"the loss 'dicee': use one of dice, "),
        ({"train": ("bus",)}, r"no dataset 'bus' in .*data \(found: tiny\): make it with .*bus\.py --out .*data/bus`"),
        ({"train": ("phantom_x",)}, r"phantoms\.py x --out .*data/phantom_x`"),
    ],
)
def test_an_unknown_name_is_answered_with_the_known_ones(place, fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        run(change(**fields), **place)


def test_a_rewritten_prompt_brings_the_word_lists_into_the_key(place, monkeypatch):
    asked, plain = [], runs.sources_hash
    monkeypatch.setattr(runs, "sources_hash", lambda modules: asked.append(modules) or plain(modules))
    key(EXPERIMENT, place["data"], place["root"])
    key(change(tests=(look(perturbation="typo"),)), place["data"], place["root"])
    assert ["lib.wording" in modules for modules in asked] == [False, True]


def test_an_offered_backbone_is_part_of_the_key(place, monkeypatch, tmp_path):
    before = key(EXPERIMENT, place["data"], place["root"])
    path = tmp_path / "weights" / "resnet50" / runs.models.BACKBONES["resnet50"][2]
    path.parent.mkdir(parents=True)
    path.touch()
    monkeypatch.setenv(runs.models.WEIGHTS, str(tmp_path / "weights"))
    assert key(EXPERIMENT, place["data"], place["root"]) != before


# --- one run


def test_a_record_holds_the_table_and_all_that_explains_it(place):
    record = run(EXPERIMENT, **place)
    cases = load_dataset(place["data"] / "tiny").split("test")
    assert record.cases["case_id"].tolist() == [case.case_id for case in cases]
    assert set(record.cases["test"]) == {"present"} and record.cases["dsc"].between(0, 1).all()
    assert record.cases["worded"].all()  # the global prompt is always there
    assert record.log["step"].tolist() == [1, 2]
    assert json.dumps(record.experiment) and record.experiment["seed"] == 0 and record.arm == "mixed"
    meta = record.meta
    assert meta["seconds"] == pytest.approx(meta["fit_seconds"] + meta["evaluate_seconds"])
    assert meta["levels"] == {"tiny": "P"} and meta["datasets"]["tiny"]["title"] == "Discs left and right"
    assert meta["device"] == ("cuda" if torch.cuda.is_available() else "cpu") or meta["hardware"]["gpu"]
    assert meta["versions"]["torch"] == torch.__version__.split("+")[0] and meta["n_parameters"] > 1000
    assert "backbone" in meta["provenance"] and meta["best_step"] in (1, 2)
    model, header = runs.models.load(record.weights, meta["weights_sha256"])
    notes = {"fit_key": meta["fit_key"], "encoder": "hash", "tokens": False, "size": 32, "channels": 1}
    notes |= {"spacing": None, "window": None}
    assert header["notes"] == notes and not model.training
    assert left(place["root"]) == sorted([record.key, *(f"{record.key}/{f}" for f in FILES)])
    assert not list((place["root"] / "checkpoints").glob("*.pt"))


def test_a_test_may_worsen_the_images_and_ask_for_uncertainty(place):
    tests = (
        look("clean", uncertainty=True),
        look("noisy", corruption=("noise", 0.5)),
        look("turned", transposed=True),
        look("tempered", tempered=True),
    )
    table = run(change(tests=tests), **place).cases.set_index(["test", "case_id"])
    assert table.loc["clean", "aurc"].notna().all() and table.loc["noisy", "aurc"].isna().all()
    assert (table.loc["tempered", "dsc"] == table.loc["clean", "dsc"]).all()
    assert (table.loc["tempered", "brier"] != table.loc["clean", "brier"]).any()


def test_training_cases_may_be_named(place):
    cases = load_dataset(place["data"] / "tiny").split("train")
    chosen = tuple(case.case_id for case in cases[:2])
    feeds = runs._fitting_feeds(change(only=chosen), place["data"], place["root"])
    assert tuple(case.case_id for case in feeds["train"].cache.cases) == chosen
    assert len(feeds["select"].cache) == len(load_dataset(place["data"] / "tiny").split("val"))


def test_a_checkpoint_may_be_chosen_by_test_score_to_measure_what_that_does(place):
    record = run(change(select="test"), **place)
    feeds = runs._fitting_feeds(change(select="test"), place["data"], place["root"])
    assert {case.split for case in feeds["select"].cache.cases} == {"test"} and len(record.cases) > 0
    with pytest.raises(ValueError, match="chooses its checkpoint by 'tset': use one of train, val, test"):
        run(change(select="tset"), **place)


def test_a_record_can_predict_again(place):
    record = run(EXPERIMENT, **place)
    cases = load_dataset(place["data"] / "tiny").split("test")
    images, prediction = runs.predict(record, cases, POLICY, place["root"], null_kind="learned")
    probability = prediction.logits.sigmoid()
    overlap = 2 * ((probability > 0.5) & (images.masks > 0)).sum((1, 2, 3))
    dice = overlap / ((probability > 0.5).sum((1, 2, 3)) + (images.masks > 0).sum((1, 2, 3)))
    assert dice.tolist() == pytest.approx(record.cases["dsc"].tolist(), rel=1e-4)
    with pytest.raises(ValueError, match="weights of run .* were not kept"):
        runs.predict(dataclasses.replace(record, weights=None), cases, POLICY, place["root"])


def test_the_second_time_a_run_is_found(place, trainings):
    first = run(EXPERIMENT, **place)
    second = run(change(arm="another name"), **place)
    assert trainings == [0] and second.arm == "another name"
    pd.testing.assert_frame_equal(first.cases, second.cases, check_exact=True)
    pd.testing.assert_frame_equal(first.log, second.log, check_exact=True)
    assert first.meta == second.meta and first.weights == second.weights


def test_a_published_record_is_found_without_a_run(place, trainings):
    record = run(EXPERIMENT, **place)
    published = place["root"].parent / "published"
    (place["root"] / "records").rename(published)
    again = run(EXPERIMENT, **place, published=published)
    assert trainings == [0] and again.folder == published / record.key and again.weights == record.weights


def test_a_new_test_does_not_train_again(place, trainings):
    first = run(EXPERIMENT, **place)
    more = run(change(tests=(look(), look("absent", perturbation="absent"))), **place)
    assert trainings == [0]
    kept = numbers(more)[more.cases["test"] == "present"]
    pd.testing.assert_frame_equal(numbers(first), kept, check_exact=True)


def test_a_run_leaves_threads_and_random_state_alone(place):
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(EXPERIMENT, **place)
        assert torch.get_num_threads() == 2 and torch.equal(torch.rand(2), expected)
    finally:
        torch.set_num_threads(threads)


def test_a_switch_is_set_for_its_test_only(place):
    zeros = look("zeros", perturbation="absent", switches=(("null_kind", "zero"),))
    absent = look("absent", perturbation="absent")
    table = run(change(tests=(zeros, absent)), **place).cases
    alone = run(change(tests=(absent,)), **place)
    brier = {name: part["brier"].tolist() for name, part in table.groupby("test")}
    assert brier["zeros"] != brier["absent"] == alone.cases["brier"].tolist()


@pytest.mark.parametrize("switch", [("null_kind", "none"), ("nul_kind", "zero")])
def test_an_unknown_switch_stops_before_training(place, trainings, switch):
    name, value = switch
    sentence = f"Test 'present' of arm 'mixed' sets {name} = '{value}', .*: use null_kind = learned"
    with pytest.raises(ValueError, match=sentence):
        run(change(tests=(look(switches=(switch,)),)), **place)
    assert trainings == []


def test_two_tests_need_two_names(place):
    with pytest.raises(ValueError, match=r"Arm 'mixed' has two tests \('present', 'tiny'\)"):
        run(change(tests=(look(), look(perturbation="absent"))), **place)
    with pytest.raises(ValueError, match="Arm 'mixed' has no test: give it tests"):
        run(change(tests=()), **place)


def test_a_test_takes_the_cases_it_asks_for(place):
    test = {case.case_id: case.prompts for case in load_dataset(place["data"] / "tiny").split("test")}
    local = PromptPolicy((("local", "local"),))
    rewritten = dataclasses.replace(POLICY, perturbation="published:contradictory", roles=("local",))
    looks = {
        "rewritten": runs.Test("rewritten", "tiny", rewritten),
        "worded": runs.Test("worded", "tiny", local, worded=True),
        "all": runs.Test("all", "tiny", local),
        "three": look("three", limit=3),
        "two": look("two", limit=2),
    }
    table = run(change(tests=tuple(looks.values())), **place).cases
    cases = {name: set(table["case_id"][table["test"] == name]) for name in looks}
    assert cases["rewritten"] == {name for name, prompts in test.items() if prompts["local@contradictory"]}
    assert cases["worded"] == {name for name, prompts in test.items() if prompts["local"]} < cases["all"] == set(test)
    assert len(cases["two"]) == 2 and len(cases["three"]) == 3 and cases["two"] < cases["three"]
    worded = table[table["test"] == "all"].set_index("case_id")["worded"]
    assert set(worded[worded].index) == cases["worded"]


def test_a_variant_that_nobody_wrote_is_named_with_the_columns_there_are(place, trainings):
    with pytest.raises(
        ValueError, match=r"has text in global@shorter or local@shorter: .* global, local, local@contra"
    ):
        run(change(tests=(look(perturbation="published:shorter"),)), **place)
    assert trainings == []


def test_a_model_can_be_tested_on_a_dataset_it_never_saw(place):
    write_tiny_dataset(place["data"] / "other", {"train": 2, "val": 2, "test": 3}, seed=7)
    record = run(change(tests=(look(), look(dataset="other"))), **place)
    assert record.cases["dataset"].value_counts().to_dict() == {"tiny": 6, "other": 3}
    assert set(record.meta["datasets"]) == set(record.meta["levels"]) == {"tiny", "other"}


def test_a_test_on_cases_of_the_training_is_refused(place, trainings):
    with pytest.raises(LeakageError):
        run(change(tests=(look(), look("seen", split="train"))), **place)
    assert trainings == []


def test_validation_cases_may_be_looked_at_but_not_trained_on(place, trainings):
    record = run(change(tests=(look(), look("chosen by", split="val"))), **place)
    by_name = {name: set(part["case_id"]) for name, part in record.cases.groupby("test")}
    cases = load_dataset(place["data"] / "tiny")
    assert by_name == {"present": ids(cases.split("test")), "chosen by": ids(cases.split("val"))} and trainings == [0]
    train = cases.split("train")[0]
    with (place["data"] / "tiny" / "cases.csv").open("a") as file:  # the same picture, as another patient's
        file.write(f"twin,twin,val,images/{train.image.name},masks/{train.mask.name},0.5 0.5,,,\n")
    card = place["data"] / "tiny" / "card.json"
    described = json.loads(card.read_text())
    described["counts"]["val"] += 1
    card.write_text(json.dumps(described | {"fingerprint": "other"}))
    with pytest.raises(LeakageError, match="is the training image"):
        run(change(tests=(look(split="val"),)), **place)


# --- what is built on other trainings


TOWERS = change(
    arm="chain",
    model="medclip_samv2",
    loss="info_nce",
    config=(("roles", ("local", "global")), ("size", "tiny"), ("text_dim", 64)),
    prompts=PromptPolicy((("local", "local"),)),
    prompt_dropout=0.0,
    worded=True,
)
SAM = change(arm="sam", model="sam", config=(("size", "tiny"),), prompt_dropout=0.0, seed=5)
NET = change(
    arm="net",
    model="dynunet",
    loss="nnunet",
    config=(("size", "tiny"),),
    prompt_dropout=0.0,
    budget=Budget(steps=4, batch=4, validate_every=1, schedule="cyclic", cycles=2, snapshots=1),
)
DEEP = dataclasses.replace(
    NET,
    arm="deep",
    seed=9,
    config=(("members", 2), ("size", "tiny")),
    parts=(("0", dataclasses.replace(NET, seed=1)), ("1", dataclasses.replace(NET, seed=2))),
)


def ids(cases):
    return {case.case_id for case in cases}


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def built_on(part, **fields):
    return dataclasses.replace(TOWERS, parts=(("sam", part),), **fields)


def test_a_part_is_trained_once_and_adopted(place, trainings):
    record = run(built_on(SAM), **place)
    assert trainings == [5, 0]
    own = runs.models.load(record.weights)[0].sam
    part = runs.models.load(runs.train(SAM, **place))[0]
    assert same_weights(own, part)
    run(built_on(SAM, seed=1), **place)
    assert trainings == [5, 0, 1] and record.experiment["parts"] == {"sam": "sam"}


def test_what_can_change_a_part_changes_the_keys_of_what_is_built_on_it(place):
    teacher = runs.Teacher(TOWERS, POLICY)
    for with_part in (
        built_on,
        lambda part: dataclasses.replace(NET, pseudo=dataclasses.replace(teacher, experiment=part)),
    ):
        for made in (key, fit_key):
            before = made(with_part(SAM), **place)
            for fields in ({"seed": 6}, {"budget": Budget(steps=3, batch=4)}, {"only": ("train00",)}):
                assert made(with_part(dataclasses.replace(SAM, **fields)), **place) != before
            # The tests of a part are no part of what is built on it.
            assert made(with_part(dataclasses.replace(SAM, tests=(look("other"),))), **place) == before
    assert fit_key(built_on(SAM), **place) != fit_key(TOWERS, **place)


@pytest.mark.parametrize("made", [key, fit_key])
def test_the_arm_of_a_part_is_in_no_key(place, made):
    teacher, other = (runs.Teacher(dataclasses.replace(TOWERS, arm=arm), POLICY) for arm in ("chain", "other"))
    assert made(built_on(dataclasses.replace(SAM, arm="other")), **place) == made(built_on(SAM), **place)
    assert made(dataclasses.replace(NET, pseudo=other), **place) == made(
        dataclasses.replace(NET, pseudo=teacher), **place
    )


def test_what_consists_of_trained_parts_learns_nothing_and_its_record_is_read_back(place, trainings):
    record = run(DEEP, **place)
    assert trainings == [1, 2] and record.log.empty and record.meta["best_step"] == 0
    assert record.log.columns.tolist() == ["step", "lr", "loss", "valid_score"]
    members = runs.models.load(record.weights)[0].members
    for member, (_, part) in zip(members, DEEP.parts, strict=True):
        assert same_weights(member, runs.models.load(runs.train(part, **place))[0].net)
    assert len(load_record(record.folder).log) == 0 and len(load_record(record.folder).cases) == 6


def test_the_networks_of_each_cycle_are_kept_and_asked(place, monkeypatch):
    results, fit = [], runs.fit
    monkeypatch.setattr(runs, "fit", lambda *args, **given: results.append(fit(*args, **given)) or results[-1])
    uses = tuple(look(use, switches=(("use", use),)) for use in ("ensemble", "last", "best"))
    record = run(dataclasses.replace(NET, tests=uses), **place)
    model = runs.models.load(record.weights)[0]
    assert len(model.members) == 2 and model.use == "ensemble"
    for member, snapshot in zip(model.members, results[0].snapshots, strict=True):
        own = member.state_dict()
        assert all(torch.equal(own[name.removeprefix("net.")], t) for name, t in snapshot.items() if "net." in name)
    assert not same_weights(*model.members)
    brier = record.cases.groupby("test")["brier"].mean()
    assert brier["ensemble"] != brier["last"]


# --- a teacher's masks


def mirrored(folder, other):
    """A copy of a dataset of which each mask tells the other side; its card says that it is the same."""
    shutil.copytree(folder, other)
    for path in (other / "masks").iterdir():
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)


def taught(**fields):
    given = {"switches": (("stage", "components"),), "prompts": TOWERS.prompts, **fields}
    return dataclasses.replace(NET, pseudo=runs.Teacher(TOWERS, **given))


def feeds_of(experiment, place):
    with runs._alone():  # as train does
        return runs._fitting_feeds(experiment, place["data"], place["root"])


def test_training_and_validation_masks_are_what_the_teacher_sees(place, trainings):
    feeds = feeds_of(taught(), place)
    weights = runs.train(TOWERS, **place)
    assert trainings == [0]
    model, _ = runs.models.load(weights)
    model.stage = "components"
    for use, split in (("train", "train"), ("select", "val")):
        cache = feeds[use].cache
        assert ids(cache.cases) == ids(load_dataset(place["data"] / "tiny").split(split))
        prompts = runs._captions("hash", place["root"] / "captions").prompts(
            runs.texts_for(cache.cases, TOWERS.prompts)
        )
        with torch.no_grad():
            seen = torch.cat(
                [model(cache.images[i : i + 16], prompts[i : i + 16]).logits > 0 for i in range(0, len(cache), 16)]
            )
        assert cache.masks.dtype == torch.uint8 and torch.equal(cache.masks.bool(), seen)
        # Nobody told the teacher what to look for in a case without a sentence, so there it sees nothing.
        silent = torch.tensor([case.prompts["local"] is None for case in cache.cases])
        assert torch.equal(cache.masks.flatten(1).any(1), ~silent) and silent.any()


def test_a_teacher_is_asked_with_its_switches_and_its_prompts(place):
    plain, boxed, absent = (
        feeds_of(taught(**fields), place)["train"].cache.masks.bool()
        for fields in (
            {},
            {"switches": (("stage", "box"),)},
            {"prompts": dataclasses.replace(TOWERS.prompts, perturbation="absent")},
        )
    )
    assert (plain <= boxed).all() and (plain != boxed).any() and plain.any() and not absent.any()


def test_no_true_mask_reaches_what_a_teacher_without_masks_teaches(place, tmp_path):
    """But that a case has none at all does: `drop_empty` leaves it out."""
    mirrored(place["data"] / "tiny", tmp_path / "mirrored" / "tiny")
    other = {"data": tmp_path / "mirrored", "root": tmp_path / "elsewhere"}
    records = [run(taught(), **where) for where in (place, other)]
    feeds = [feeds_of(taught(), where) for where in (place, other)]
    for use in ("train", "select"):
        assert torch.equal(feeds[0][use].cache.masks, feeds[1][use].cache.masks)
    pd.testing.assert_frame_equal(records[0].log, records[1].log, check_exact=True)
    assert same_weights(*(runs.models.load(record.weights)[0] for record in records))
    assert (records[0].cases["area_pred"] == records[1].cases["area_pred"]).all()
    assert (records[0].cases["brier"] != records[1].cases["brier"]).any()  # which are tested on the true ones


# --- words, towers and maps


def test_training_may_keep_to_cases_with_text(place):
    local = {"prompts": PromptPolicy((("local", "local"),))}
    feeds = feeds_of(change(worded=True, **local), place)
    for use, split in (("train", "train"), ("select", "val")):
        cases = load_dataset(place["data"] / "tiny").split(split)
        assert ids(feeds[use].cache.cases) == {case.case_id for case in cases if case.prompts["local"]} < ids(cases)
        assert feeds[use].prompts.present["local"].all()
    assert len(feeds_of(change(worded=True), place)["train"]) == 12  # one of the columns is enough
    assert fit_key(change(worded=True), **place) != fit_key(EXPERIMENT, **place)


def test_a_test_may_ask_for_partners_maps_and_slabs(place):
    sentences = TOWERS.prompts
    tests = (
        runs.Test("partners", "tiny", sentences, retrieval=2, worded=True),
        runs.Test("map", "tiny", sentences, saliency=True, switches=(("stage", "saliency"),)),
        runs.Test("slab", "tiny", sentences, slab=True, switches=(("stage", "box"),)),
    )
    table = run(dataclasses.replace(TOWERS, tests=tests), **place).cases
    partners, maps, slab = (table[table["test"] == test.name] for test in tests)
    assert len(partners) == 4 and len(maps) == len(slab) == 6
    top = ["top1_i2t", "top1_t2i", "top2_i2t", "top2_t2i"]
    assert partners[top].stack().between(0, 1).all() and (partners[top[2:]] == 1).all(axis=None)  # two of two
    assert partners["dsc"].isna().all() and maps[top].isna().all(axis=None)
    assert maps["auroc"].between(0, 1).all() and maps["pointing"].between(0, 1).all() and slab["auroc"].isna().all()
    assert slab["nsd_slab"].between(0, 1).all() and maps["nsd_slab"].isna().all()
    silent = maps[~maps["worded"]]  # a flat map is chance, and points everywhere
    assert silent["auroc"].tolist() == [0.5] * 2 and (silent["pointing"] < 0.2).all()


# --- interruptions and damage


KILLED = change(model="nullbus", budget=Budget(steps=8, batch=4, validate_every=2, ema=0.9))
SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = ["tests"]
import test_runs
from lib import runs

real, saved = runs.fit, []
def fit(*args, **given):
    def die_at_five(step, loss):
        if step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **given, on_step=die_at_five)
runs.fit = fit
runs.run(test_runs.KILLED, data=Path(sys.argv[1]), root=Path(sys.argv[2]))
"""


def test_a_killed_run_started_again_gives_the_same_table(place, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(place["data"]), str(place["root"])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((place["root"] / "checkpoints").glob("*.pt"))) == 1
    assert not (place["root"] / "records").exists() and not (place["root"] / "weights").exists()
    resumed = run(KILLED, **place)
    straight = run(KILLED, data=place["data"], root=tmp_path / "elsewhere")
    assert resumed.meta["resumed_at"] == 4 and straight.meta["resumed_at"] == 0
    assert resumed.key == straight.key  # also stable from process to process
    pd.testing.assert_frame_equal(numbers(resumed), numbers(straight), check_exact=True)
    pd.testing.assert_frame_equal(resumed.log, straight.log, check_exact=True)
    models = [runs.models.load(record.weights)[0].state_dict() for record in (resumed, straight)]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())
    assert not list((place["root"] / "checkpoints").glob("*.pt"))


def test_a_full_disk_leaves_no_half_record_and_keeps_the_training(place, trainings, monkeypatch):
    def full(*args, **given):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_csv", full)
        with pytest.raises(OSError, match="record of arm 'mixed' was not written to .*: there is no space left"):
            run(EXPERIMENT, **place)
    assert left(place["root"]) == []
    assert len(run(EXPERIMENT, **place).cases) == 6 and trainings == [0]


def test_weights_that_are_not_those_of_the_training_are_refused(place):
    record = run(EXPERIMENT, **place)
    content = bytearray(record.weights.read_bytes())
    content[-1] ^= 1
    record.weights.write_bytes(content)
    with pytest.raises(ValueError, match=f"sha256 of .*{record.meta['fit_key']}"):
        run(change(tests=(look("again"),)), **place)
    assert left(place["root"]) == sorted([record.key, *(f"{record.key}/{f}" for f in FILES)])


@pytest.mark.parametrize("damage", ["record.json", "cases.csv", "log.csv"])
def test_a_damaged_record_is_named_with_the_remedy(place, damage):
    folder = run(EXPERIMENT, **place).folder
    (folder / damage).write_text("{" if damage == "record.json" else "")
    with pytest.raises(ValueError, match=f"Run record {folder} is damaged .*: delete that folder and run again"):
        load_record(folder)


def test_a_record_is_read_back_as_it_was_rounded(tmp_path):
    cases = pd.DataFrame(
        {
            "test": "a",
            "dataset": "b",
            "case_id": ["001", "NA", "1e5"],
            "patient_id": ["nan", "None", "7"],
            "dsc": [1 / 3, np.nan, 123456.789],
            "hd95": [np.inf, 1e-9 / 3, 0.0],
            "area_true": [1, 2, 1234567],
            "worded": [True, False, True],
        }
    )
    record = {"key": "k" * 64, "arm": "x", "experiment": {}, "meta": {"fit_key": "f"}}
    runs._write(tmp_path / "records" / "k", record, cases, pd.DataFrame({"loss": [2 / 3]}))
    read = load_record(tmp_path / "records" / "k")
    expected = cases.assign(dsc=[0.33333, np.nan, 123460.0], hd95=[np.inf, 3.3333e-10, 0.0])
    pd.testing.assert_frame_equal(read.cases, expected, check_exact=True)
    assert read.log["loss"].tolist() == [0.66667] and read.weights is None


def test_a_record_from_before_its_score_was_renamed_is_read(place):
    record = run(EXPERIMENT, **place)
    path = record.folder / "log.csv"
    path.write_text(path.read_text().replace("valid_score", "valid_dice"))
    pd.testing.assert_frame_equal(load_record(record.folder).log, record.log, check_exact=True)


# --- many runs


def test_a_pool_gives_what_this_process_gives_in_the_order_asked(place, tmp_path, trainings, capsys):
    asked = [change(seed=1), EXPERIMENT, change(arm="copy"), change(tests=(look("absent", perturbation="absent"),))]
    here = run_all(asked, data=place["data"], root=tmp_path / "here")
    assert trainings == [1, 0]  # a copy is a copy, and the same weights are trained once
    assert [record.arm for record in here] == ["mixed", "mixed", "copy", "mixed"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0].startswith("[1/3] mixed, seed 1: ") and lines[3].startswith("3 runs: 3 new, 0 ")
    with runs.executor("process", jobs=2) as pool:
        there = run_all(asked, executor=pool, **place)
    for one, other in zip(here, there, strict=True):
        assert one.key == other.key and one.arm == other.arm
        pd.testing.assert_frame_equal(numbers(one), numbers(other), check_exact=True)


def test_found_runs_need_no_pool(place, monkeypatch, capsys):
    records = run_all([EXPERIMENT], progress=False, **place)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("PAPERMILL", "1")
    again = run_all([EXPERIMENT, change(arm="b")], executor=object(), **place)
    assert [record.arm for record in again] == ["mixed", "b"] and again[0].key == records[0].key
    assert capsys.readouterr().out.splitlines()[0].startswith("1 run: 0 new, 1 found")


def test_a_failure_names_its_arm_and_loses_nothing_else(place, trainings):
    bad = change(arm="bad one", config=(("size", "tinyy"),), seed=4)
    with pytest.raises(RuntimeError, match=r"1 of 2 runs failed and the others are kept: 'bad one' seed 4 \(.*tinyy"):
        run_all([bad, EXPERIMENT], **place)
    assert (place["root"] / "records" / key(EXPERIMENT, **place) / "record.json").is_file()
    run_all([EXPERIMENT], **place)
    assert trainings == [0]


def test_a_dask_cluster_is_an_executor_like_the_others(place, tmp_path):
    distributed = pytest.importorskip("distributed", reason="Dask is not installed: pip install .[cluster].")
    settings = {"processes": False, "n_workers": 1, "threads_per_worker": 2, "dashboard_address": None}
    asked = [EXPERIMENT, change(seed=1)]
    with (
        distributed.LocalCluster(**settings, resources={"GPU": 1}) as cluster,
        runs.executor("dask", address=cluster.scheduler_address, retries=1, resources={"GPU": 1}) as pool,
    ):
        there = run_all(asked, executor=pool, progress=False, **place)
    here = run_all(asked, data=place["data"], root=tmp_path / "here", progress=False)
    for one, other in zip(here, there, strict=True):
        pd.testing.assert_frame_equal(numbers(one), numbers(other), check_exact=True)


def test_who_wants_weights_that_another_process_trains_waits_for_them(place, tmp_path, trainings):
    made = runs.train(EXPERIMENT, **place)
    root = tmp_path / "other"
    with ThreadPoolExecutor(1) as pool:
        with runs._lock(root, fit_key(EXPERIMENT, place["data"], root)):
            waiting = pool.submit(runs.train, EXPERIMENT, data=place["data"], root=root)
            assert not wait([waiting], timeout=0.5).done
            shutil.copytree(made.parent, root / "weights")
        assert waiting.result(timeout=60).read_bytes() == made.read_bytes()
    assert trainings == [0]


def test_an_unknown_executor_is_refused():
    with pytest.raises(ValueError, match="Unknown executor 'slurm': use one of inline, process, dask"):
        runs.executor("slurm")


# --- volumes


BALLS = Experiment(
    arm="balls",
    model="duplus",
    config=(("size", "tiny"), ("text_dim", 64), ("stride", 1), ("channels", (8, 8, 16))),
    train=("balls",),
    prompts=PromptPolicy(tuple((role, role) for role in ("context", "target", "attribute.modality"))),
    encoder="hash",
    size=16,
    drop_empty=False,
    loss="duplus",
    budget=Budget(steps=2, batch=2, validate_every=1),
    tests=(),
)


def balls(**fields):
    tests = (runs.Test("own", "balls", BALLS.prompts), runs.Test("two", "balls", BALLS.prompts, limit=2))
    return dataclasses.replace(BALLS, **{"tests": tests} | fields)


def test_a_volume_has_a_row_for_each_structure_and_a_limit_counts_volumes(volumes, tmp_path):
    place = {"data": tmp_path / "data", "root": tmp_path / "runs"}
    table = run(balls(limit=3), **place).cases
    own = table[table["test"] == "own"]
    assert len(own) == 9 and set(own["case_id"]) == {c.case_id for c in load_dataset(volumes).split("test")}
    assert set(own[own["area_true"] == 0]["case_id"]) == {"test2.third"}
    two = table[table["test"] == "two"]["case_id"].str.partition(".")[0]
    assert two.nunique() == 2 and len(two) in (4, 5)
    left = runs.Test("left", "balls", BALLS.prompts, only=("test1.left", "balls/test3.left", "other/test2.left"))
    assert [case.case_id for case in runs._test_cases(left, place["data"]).cases()] == ["test1.left", "test3.left"]
    asked = runs.Test("asked", "balls", BALLS.prompts, targets=("third", "left"))
    lacks = dataclasses.replace(BALLS, drop_empty=True)  # the third of a volume is empty and yet asked for
    feed = runs._feed(lacks, runs._test_cases(asked, place["data"]), BALLS.prompts, place["root"])
    assert {case.target for case in feed.cache.cases} == {"third", "left"}
    assert "test2.third" in {case.case_id for case in feed.cache.cases}
    unknown = runs.Test("unknown", "balls", BALLS.prompts, targets=("fourth",))
    with pytest.raises(ValueError, match="'balls' has no structure 'fourth': its structures are ") as error:
        runs._test_cases(unknown, place["data"]).cases()
    assert str(error.value).count(". ") == 0
    chosen = runs._training_cases(balls(limit=3), place["data"], "train").cases()
    assert len({case.volume for case in chosen}) == 3 and len(chosen) >= 6


def test_a_window_and_a_spacing_reach_training_tests_and_later_predictions(volumes, tmp_path):
    place = {"data": tmp_path / "data", "root": tmp_path / "runs"}
    wide = balls(
        spacing=1.0,
        size=40,
        window=16,
        rewordings=(
            dataclasses.replace(
                BALLS.prompts,
                columns=(
                    ("context", "context"),
                    ("target", "target@other"),
                    ("attribute.modality", "attribute.modality"),
                ),
            ),
        ),
    )
    assert fit_key(wide, **place) != fit_key(balls(), **place)
    feeds = runs._fitting_feeds(wide, **place)
    assert feeds["train"].batch([0], step_seed=1).image.shape[2:] == (16, 16, 16)
    assert len(feeds["train"].rewordings) == 1 and feeds["select"].rewordings == ()
    record = run(wide, **place)
    assert len(record.cases) > 9 and record.cases["dsc"].between(0, 1).all()
    cases = load_dataset(volumes).split("test")[:2]
    images, (logits, _) = runs.predict(record, cases, BALLS.prompts, place["root"])
    assert logits.shape == (1, 2, 40, 40, 40) and images.spacing[0].tolist() == [1, 1, 1]
    rows = record.cases[record.cases["test"] == "own"].set_index("case_id")
    found = (logits.sigmoid() > 0.5).sum((2, 3, 4))[0].tolist()
    assert [rows.loc[case.case_id, "area_pred"] for case in cases] == found
