"""Experiments and their run records: each is made once, and found again by a key of all that can change its numbers.

runs/records/<key>/ holds record.json, cases.csv and log.csv; runs/weights/<fit key>.safetensors the trained weights
with a .json of what the training cost; runs/checkpoints/ the trainings under way. Weights have a key of their own,
without the tests, so that a new test of a trained model never trains it again.
"""

import errno
import hashlib
import json
import os
import platform
import shutil
import subprocess
import threading
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache, lru_cache
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import psutil
import torch
from filelock import FileLock
from torch import nn

from lib import losses, models
from lib.data import SPLITS, Case, Dataset, Feed, ImageCache, guard_leakage, load_dataset
from lib.evaluation import evaluate, fit_temperature, predictions, retrieval
from lib.files import atomic_write, sha256_file
from lib.keys import HOME, sources_hash, step_source
from lib.records import Record, load_record
from lib.text import CaptionBank, PromptPolicy, texts_for
from lib.training import Budget, Fit, fit
from lib.wording import REWRITES

VERSIONS = ("torch", "torchvision", "monai", "timm", "open_clip_torch", "transformers", "lightning", "numpy", "scipy")
CODE = ("lib", "notebooks", "data_scripts", "requirements.lock")  # what a commit must hold for its number to mean it
DIGITS = 5  # significant digits kept in a record


@dataclass(frozen=True)
class Test:
    """One look at a trained model: some cases of a dataset, read with some prompts."""

    name: str
    dataset: str
    prompts: PromptPolicy
    split: str = "test"
    corruption: tuple[str, float] | None = None  # a name of lib.data.CORRUPTIONS and its strength
    transposed: bool = False
    uncertainty: bool = False  # also lib.evaluation.uncertainty_scores
    tempered: bool = False  # logits divided by the temperature that fits the validation cases best
    saliency: bool = False  # also lib.evaluation.saliency_scores
    slab: bool = False  # also lib.evaluation.slab_surface_dice
    retrieval: int | None = None  # instead: find partners among this many pairs, lib.evaluation.retrieval
    seed: int = 0  # of what is random in the model, such as dropout switched on
    switches: tuple[tuple[str, object], ...] = ()  # attributes of the model, set during this test only
    thresholds: tuple[float, ...] = (0.5,)
    worded: bool = False  # only cases that have text in the policy's columns
    limit: int | None = None  # the first images in an order that depends on nothing but their names
    tolerance: float = 2.0  # of the surface Dice, in mm
    only: tuple[str, ...] = ()  # cases by id or dataset/id, of which `limit` takes the first
    targets: tuple[str, ...] = ()  # structures that are asked for together in each volume, also those that it lacks


@dataclass(frozen=True)
class Experiment:
    """One training and the tests of what it learned."""

    arm: str  # the chapter's name for it, which is no part of any key
    model: str
    train: tuple[str, ...]  # dataset folders
    prompts: PromptPolicy
    tests: tuple[Test, ...]
    config: tuple[tuple[str, object], ...] = ()
    loss: str = "dice_bce"
    prompt_dropout: float = 0.0
    encoder: str = "minilm"
    size: int = 96
    channels: int = 1
    augment: str = "none"
    budget: Budget = Budget()
    seed: int = 0
    drop_empty: bool = True  # leave out cases without a lesion, in training and tests
    limit: int | None = None  # training images per dataset, chosen as in Test
    only: tuple[str, ...] = ()  # training cases by id or dataset/id, where they are chosen in another way
    tokens: bool = False  # give the model the words' embeddings beside the sentence's
    select: str = "val"  # the split that chooses the checkpoint; "train" and "test" are for measuring what that does
    select_limit: int | None = None  # its images per dataset, chosen as in Test
    transposed: bool = False  # train on images with rows and columns exchanged
    parts: tuple[tuple[str, "Experiment"], ...] = ()  # models trained before, which this one is built on
    pseudo: "Teacher | None" = None  # whose masks take the place of the true ones, in training and validation
    worded: bool = False  # train on cases that have text in one of the policy's columns only
    rewordings: tuple[PromptPolicy, ...] = ()  # other texts of the same roles, for training alone
    spacing: float | None = None  # mm of a volume's voxels, which then stand in a grid of `size`; None resizes to it
    window: int | None = None  # edge of the part of a volume that the model sees at a time


@dataclass(frozen=True)
class Teacher:
    """A trained model and how it is asked for the masks that another one learns from."""

    experiment: Experiment
    prompts: PromptPolicy
    switches: tuple[tuple[str, object], ...] = ()
    seed: int = 0


# ---- keys -----------------------------------------------------------------------------------------------------------


def key(experiment: Experiment, data: Path = Path("data"), root: Path = Path("runs")) -> str:
    """Name a run by its experiment, the data, the sources, the pinned packages and the device class."""
    return _key(experiment, data, root, "arm")


def fit_key(experiment: Experiment, data: Path = Path("data"), root: Path = Path("runs")) -> str:
    """Name the trained weights: as `key`, without the tests and what only they need."""
    return _key(experiment, data, root, "arm", "tests")


def _key(experiment: Experiment, data: Path, root: Path, *left_out: str) -> str:
    code = []
    for kind, name, known in (("model", experiment.model, models.MODELS), ("loss", experiment.loss, losses.LOSSES)):
        stem = name.partition("@")[0]  # a loss may carry weights: seu@entropy=0.3
        if stem not in known:
            raise ValueError(f"Arm '{experiment.arm}' asks for the {kind} '{name}': use one of {', '.join(known)}.")
        code.append(known[stem])
    modules = ["lib.data", "lib.text", "lib.training", "lib.models:build", "lib.losses:loss", *code]
    steps = [shuffled, _Selection, _training_cases, _feed, _fitting_feeds, _digested, train]
    names, policies = set(experiment.train), [experiment.prompts, *experiment.rewordings]
    if "tests" not in left_out:
        modules += ["lib.evaluation"]
        steps += [_test_cases, _judge, _write]
        names |= {test.dataset for test in experiment.tests}
        policies += [test.prompts for test in experiment.tests]
    if any(policy.perturbation in REWRITES for policy in policies):
        modules += ["lib.wording"]
    lock = HOME / "requirements.lock"
    nested = {f"part {name}": part for name, part in experiment.parts}
    if experiment.pseudo:
        nested["teacher"] = experiment.pseudo.experiment
        steps += [_taught]
    alone = replace(experiment, parts=(), pseudo=experiment.pseudo and replace(experiment.pseudo, experiment=None))
    facts = {
        "experiment": {name: value for name, value in asdict(alone).items() if name not in left_out},
        "nested": {name: fit_key(other, data, root) for name, other in nested.items()},
        "datasets": {name: dataset(data, name).card.fingerprint for name in sorted(names)},
        "sources": [*code, sources_hash(tuple(modules)), *map(step_source, steps)],
        "backbones": {name: models.BACKBONES[name] for name in models.offered()},
        "encoder": _captions(experiment.encoder, Path(root) / "captions").path.stem,  # name and weights
        "lock": sha256_file(lock) if lock.is_file() else "none",
        "device": _device_class(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _settings(experiment: Experiment) -> dict:
    """The fields of an experiment for its record, where those that it builds on are named by their arms."""
    settings = asdict(replace(experiment, parts=(), pseudo=None))
    settings["parts"] = {name: part.arm for name, part in experiment.parts}
    if taught := experiment.pseudo:
        settings["pseudo"] = {**asdict(replace(taught, experiment=None)), "experiment": taught.experiment.arm}
    return settings


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _device_class() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


# ---- material -------------------------------------------------------------------------------------------------------


def dataset(data: Path, name: str) -> Dataset:
    """Read a dataset folder, once per process; raises ValueError with the folders there are."""
    card = Path(data) / name / "card.json"
    if not card.is_file():
        script = f"phantoms.py {name[8:]}" if name.startswith("phantom_") else f"{name}.py"
        there = ", ".join(sorted(path.parent.name for path in Path(data).glob("*/card.json"))) or "none"
        raise ValueError(
            f"There is no dataset '{name}' in {data} (found: {there}): "
            f"make it with `python data_scripts/{script} --out {card.parent}`."
        )
    return _dataset(card.parent, card.stat().st_mtime_ns)


@lru_cache(maxsize=16)
def _dataset(folder: Path, written: int) -> Dataset:
    """`written` is the time of the card: a dataset made again is read again."""
    return load_dataset(folder)


def shuffled(cases: Iterable[Case]) -> list[Case]:
    """Order cases by the hash of their images' names, so that a smaller limit takes a part of what a larger one takes.

    The cases of a volume stay together, in their order.
    """
    return sorted(cases, key=lambda case: hashlib.sha256(case.volume.encode()).digest())


@dataclass(frozen=True)
class _Selection:
    """Which cases: a split of some folders; with text in one column of each group; of the ids in `only` and of the
    structures in `targets`, if there are any; at most `limit` per folder.
    """

    folders: tuple[tuple[Path, int], ...]
    split: str
    worded: tuple[tuple[str, ...], ...] = ()
    limit: int | None = None
    only: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()

    def cases(self) -> list[Case]:
        chosen = []
        for folder in self.folders:
            source = _dataset(*folder)
            cases = [
                case
                for case in source.split(self.split)
                if all(any(case.prompts.get(column) is not None for column in group) for group in self.worded)
            ]
            if not cases:
                raise ValueError(
                    f"No case of the split '{self.split}' of '{source.card.name}' has text in "
                    f"{' and '.join(' or '.join(group) for group in self.worded)}: "
                    f"its prompt columns are {', '.join(source.card.prompts) or 'none'}."
                )
            if wanted := set(self.only):
                cases = [c for c in cases if c.case_id in wanted or f"{c.dataset}/{c.case_id}" in wanted]
            if asked := set(self.targets):
                if unknown := asked - source.card.classes.keys():
                    raise ValueError(
                        f"'{source.card.name}' has no structure '{min(unknown)}': "
                        f"its structures are {', '.join(source.card.classes)}."
                    )
                cases = [case for case in cases if case.target in asked]
            volumes = set(list(dict.fromkeys(case.volume for case in shuffled(cases)))[: self.limit])
            chosen += [case for case in cases if case.volume in volumes]
        return chosen


def _folders(data: Path, names: Iterable[str]) -> tuple[tuple[Path, int], ...]:
    roots = [dataset(data, name).root for name in names]
    return tuple((root, (root / "card.json").stat().st_mtime_ns) for root in roots)


def _training_cases(experiment: Experiment, data: Path, split: str) -> _Selection:
    part = (
        {"limit": experiment.limit, "only": experiment.only} if split == "train" else {"limit": experiment.select_limit}
    )
    if experiment.worded:
        part["worded"] = (tuple(column for _, column in experiment.prompts.columns),)
    return _Selection(_folders(data, experiment.train), split, **part)


def _test_cases(test: Test, data: Path) -> _Selection:
    columns = tuple(column for _, column in test.prompts.columns)
    variant = test.prompts.perturbation.partition("published:")[2]
    roles = test.prompts.roles or tuple(role for role, _ in test.prompts.columns)
    groups = [columns] if test.worded else []
    if variant:  # only the cases whose text somebody rewrote in this way
        groups.append(tuple(f"{role}@{variant}" for role in roles))
    return _Selection(_folders(data, [test.dataset]), test.split, tuple(groups), test.limit, test.only, test.targets)


@lru_cache(maxsize=8)
def _images(
    selection: _Selection, size: int, channels: int, drop_empty: bool, spacing: float | None, device: str
) -> ImageCache:
    return ImageCache.load(selection.cases(), size, channels, device, drop_empty, spacing)


@lru_cache(maxsize=4)
def _captions(name: str, folder: Path) -> CaptionBank:
    return CaptionBank(name, folder)


def _feed(
    experiment: Experiment,
    selection: _Selection,
    policy: PromptPolicy,
    root: Path,
    augment: str = "none",
    corruption: tuple[str, float] | None = None,
    transposed: bool = False,
    rewordings: tuple[PromptPolicy, ...] = (),
) -> Feed:
    dropped = experiment.drop_empty and not selection.targets
    grid = experiment.size, experiment.channels, dropped, experiment.spacing
    images = _images(selection, *grid, _device())
    captions = _captions(experiment.encoder, root / "captions")
    worded = [captions.prompts(texts_for(images.cases, one), experiment.tokens) for one in (policy, *rewordings)]
    if corruption:
        images = images.corrupted(*corruption)
    if transposed:
        images = images.transposed()
    return Feed(images, worded[0], augment, worded[1:], experiment.window)


def _fitting_feeds(experiment: Experiment, data: Path, root: Path) -> dict[str, Feed]:
    """What a model is trained on, and what its checkpoint is chosen by."""
    feeds = {
        use: _feed(
            experiment,
            _training_cases(experiment, data, split),
            experiment.prompts,
            root,
            augment,
            transposed=experiment.transposed,
            rewordings=experiment.rewordings if use == "train" else (),
        )
        for use, split, augment in (("train", "train", experiment.augment), ("select", experiment.select, "none"))
    }
    return {use: _taught(feed, experiment, data, root) for use, feed in feeds.items()} if experiment.pseudo else feeds


def _taught(feed: Feed, experiment: Experiment, data: Path, root: Path) -> Feed:
    """The feed with the masks that the teacher sees in its images; where it sees nothing, the mask is empty."""
    teacher = experiment.pseudo
    weights = train(teacher.experiment, data=data, root=root)
    model, _ = models.load(weights, json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))["sha256"])
    if hasattr(model, "draw"):
        raise ValueError(
            f"Arm '{teacher.experiment.arm}' is asked with true masks, so it cannot teach: choose another."
        )
    for name, value in teacher.switches:
        setattr(model, name, value)
    captions = _captions(teacher.experiment.encoder, root / "captions")
    texts = captions.prompts(texts_for(feed.cache.cases, teacher.prompts), teacher.experiment.tokens)
    torch.manual_seed(teacher.seed)
    masks = [logits > 0 for _, logits, _ in predictions(model, Feed(feed.cache, texts), device=_device())]
    taught = copy(feed)
    taught.cache = replace(feed.cache, masks=torch.cat(masks).to(feed.cache.masks))
    return taught


def _digested(model: nn.Module, feed: Feed) -> Feed:
    """The feed with what a model's frozen part makes of each image in its place, if it has `digest`: made once."""
    if not hasattr(model, "digest"):
        return feed
    model.to(_device()).eval()
    with torch.inference_mode():
        parts = [
            model.digest(batch.image, batch.prompts)
            for batch in (feed.batch(index) for index in torch.arange(len(feed)).split(16))
        ]
    digested = copy(feed)
    digested.cache = replace(feed.cache, images=torch.cat(parts).clone())
    return digested


# ---- running --------------------------------------------------------------------------------------------------------

_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def _alone() -> Iterator[None]:
    """One run at a time in a process, on one CPU thread, so that the same key gives the same numbers anywhere.

    The threads of a process share the random state, which is put back, and the thread count, which sums depend on.
    """
    with _ONE_AT_A_TIME, torch.random.fork_rng(devices=[]):
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _lock(root: Path, name: str) -> FileLock:
    """Chapters that run at the same time share arms: the second one waits, and finds what the first one made."""
    (root / "locks").mkdir(parents=True, exist_ok=True)
    return FileLock(root / "locks" / name)


def train(experiment: Experiment, *, data: Path = Path("data"), root: Path = Path("runs")) -> Path:
    """Return the weights of an experiment, trained now (or further, after a kill) if they are not there."""
    data, root = Path(data), Path(root)
    name = fit_key(experiment, data, root)
    path = root / "weights" / f"{name}.safetensors"
    checkpoint = root / "checkpoints" / f"{name}.pt"
    with _alone(), _lock(root, name):
        if not (path.is_file() and path.with_suffix(".json").is_file()):
            built_on = {part: train(other, data=data, root=root) for part, other in experiment.parts}
            feeds = _fitting_feeds(experiment, data, root)
            torch.manual_seed(experiment.seed)
            model = models.build(experiment.model, **dict(experiment.config))
            for part, made in built_on.items():
                model.adopt_part(part, models.load(made)[0])
            feeds = {use: _digested(model, feed) for use, feed in feeds.items()}
            if hasattr(model, "calibrate_text"):
                model.calibrate_text(feeds["train"].prompts.to("cpu"))
            learner = getattr(model, "learner", model)
            trained = Fit.none()  # what consists of trained parts only has nothing to learn
            if learner is not None:
                trained = fit(
                    learner,
                    losses.loss(experiment.loss),
                    feeds["train"],
                    feeds["select"],
                    experiment.budget,
                    seed=experiment.seed,
                    prompt_dropout=experiment.prompt_dropout,
                    checkpoint=checkpoint,
                    device=_device(),
                )
            if trained.snapshots:
                model.adopt_snapshots(trained.snapshots)
            notes = {
                "fit_key": name,
                "encoder": experiment.encoder,
                "tokens": experiment.tokens,
                "size": experiment.size,
                "channels": experiment.channels,
                "spacing": experiment.spacing,
                "window": experiment.window,
            }
            facts = {
                "sha256": models.save(path, model, experiment.model, dict(experiment.config), **notes),
                "seconds": trained.seconds,
                "peak_memory_mb": trained.peak_memory_mb,
                "best_step": trained.best_step,
                "resumed_at": trained.resumed_at,
                "n_parameters": sum(p.numel() for p in model.parameters()),
                "n_trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "provenance": getattr(model, "provenance", {}),
                "log": trained.log.to_dict("records"),
            }
            atomic_write(path.with_suffix(".json"), json.dumps(facts))
        checkpoint.unlink(missing_ok=True)
    return path


def run(
    experiment: Experiment, *, data: Path = Path("data"), root: Path = Path("runs"), published: Path | None = None
) -> Record:
    """Return the record of an experiment: found by its key, else from its trained weights, else from a new training.

    `published` is a second folder of records to look in. Raises one sentence before training for a dataset,
    column, switch or split that the tests ask for and is not there, and LeakageError.
    """
    data, root = Path(data), Path(root)
    name = key(experiment, data, root)
    if found := _find(name, experiment, root, published):
        return found
    with _alone(), _lock(root, name):
        if found := _find(name, experiment, root, published):
            return found
        _check_tests(experiment)
        selections = [_test_cases(test, data) for test in experiment.tests]
        for of_val in (True, False):  # a look at validation cases is there to choose settings by, as the checkpoint was
            looks = [
                look for look, test in zip(selections, experiment.tests, strict=True) if (test.split == "val") == of_val
            ]
            learned = _learned_from(experiment, data, {"train"} if of_val else {"train", experiment.select})
            guard_leakage(learned, [case for look in looks for case in look.cases()])
        feeds = [
            _feed(experiment, selection, test.prompts, root, corruption=test.corruption, transposed=test.transposed)
            for selection, test in zip(selections, experiment.tests, strict=True)
        ]
        weights = train(experiment, data=data, root=root)
        facts = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
        model, _ = models.load(weights, facts["sha256"])
        started = time.perf_counter()
        temperature = 1.0
        if any(test.tempered for test in experiment.tests):
            chosen_by = _feed(experiment, _training_cases(experiment, data, "val"), experiment.prompts, root)
            temperature = fit_temperature(model, chosen_by, device=_device())
        tables = [
            _judge(model, _digested(model, feed), test, temperature if test.tempered else 1.0)
            for feed, test in zip(feeds, experiment.tests, strict=True)
        ]
        evaluate_seconds = time.perf_counter() - started
        log = pd.DataFrame(facts.pop("log") or Fit.none().log)  # a table without columns could not be read back
        meta = {
            "fit_key": weights.stem,
            "weights_sha256": facts.pop("sha256"),
            "fit_seconds": facts["seconds"],
            "evaluate_seconds": evaluate_seconds,
            "temperature": temperature,
            **facts,
            "seconds": facts["seconds"] + evaluate_seconds,
            **_surroundings(experiment, data),
        }
        settings = _settings(experiment)
        record = {"key": name, "arm": settings.pop("arm"), "experiment": settings, "meta": meta}
        folder = root / "records" / name
        _write(folder, record, pd.concat(tables, ignore_index=True), log)
        return load_record(folder)


def _learned_from(experiment: Experiment, data: Path, splits: set[str]) -> list[Case]:
    """The cases that an experiment and all that it builds on were fitted to.

    A checkpoint chosen by test score is one of the faults that the book measures; training on a test case never is.
    """
    cases = [c for split in sorted(splits - {"test"}) for c in _training_cases(experiment, data, split).cases()]
    others = [part for _, part in experiment.parts] + ([experiment.pseudo.experiment] if experiment.pseudo else [])
    for other in others:
        cases += _learned_from(other, data, {"train", other.select} if experiment.select in splits else {"train"})
    return cases


def _judge(model: nn.Module, feed: Feed, test: Test, temperature: float = 1.0) -> pd.DataFrame:
    before = {name: getattr(model, name) for name, _ in test.switches}
    try:
        for name, value in test.switches:
            setattr(model, name, value)
        torch.manual_seed(test.seed)
        table = (
            retrieval(model, feed, test.retrieval, seed=test.seed)
            if test.retrieval
            else evaluate(
                model,
                feed,
                thresholds=test.thresholds,
                tolerance=test.tolerance,
                uncertainty=test.uncertainty,
                saliency=test.saliency,
                slab=test.slab,
                temperature=temperature,
                device=_device(),
            )
        )
    finally:
        for name, value in before.items():
            setattr(model, name, value)
    columns = [column for _, column in test.prompts.columns]
    worded = {c.case_id: any(c.prompts.get(column) is not None for column in columns) for c in feed.cache.cases}
    table.insert(0, "test", test.name)
    return table.assign(worded=table["case_id"].map(worded))


def _check_tests(experiment: Experiment) -> None:
    if experiment.select not in SPLITS:
        raise ValueError(
            f"Arm '{experiment.arm}' chooses its checkpoint by '{experiment.select}': use one of {', '.join(SPLITS)}."
        )
    names = [(test.name, test.dataset) for test in experiment.tests]
    if len(set(names)) < max(1, len(names)):
        twice = f"two tests {max(names, key=names.count)}" if names else "no test"
        raise ValueError(f"Arm '{experiment.arm}' has {twice}: give it tests with a name each.")
    wanted = [(test.name, *switch) for test in experiment.tests for switch in test.switches]
    valid = models.build(experiment.model, **dict(experiment.config)).switches if wanted else {}
    for test, name, value in wanted:
        if value not in valid.get(name, ()):
            offered = "; ".join(f"{known} = {' | '.join(map(str, values))}" for known, values in valid.items())
            raise ValueError(
                f"Test '{test}' of arm '{experiment.arm}' sets {name} = {value!r}, which model '{experiment.model}' "
                f"does not offer: use {offered or 'no switches'}."
            )


# ---- records --------------------------------------------------------------------------------------------------------


def _find(name: str, experiment: Experiment, root: Path, published: Path | None) -> Record | None:
    for folder in (root / "records" / name, *([Path(published) / name] if published else [])):
        if (folder / "record.json").is_file():
            record = load_record(folder)
            weights = record.weights or root / "weights" / f"{record.meta['fit_key']}.safetensors"
            return replace(record, arm=experiment.arm, weights=weights if weights.is_file() else None)
    return None


def _write(folder: Path, record: dict, cases: pd.DataFrame, log: pd.DataFrame) -> None:
    """Write a record folder out of sight and show it when it is whole; floats are cut to DIGITS before."""
    draft = folder.with_name(f".{folder.name}")
    shutil.rmtree(draft, ignore_errors=True)  # what a killed process left
    try:
        draft.mkdir(parents=True)
        for name, table in (("cases", cases), ("log", log)):
            floats = table.select_dtypes("float").columns
            table = table.assign(**{c: [float(f"{x:.{DIGITS}g}") for x in table[c]] for c in floats})
            table.to_csv(draft / f"{name}.csv", index=False, lineterminator="\n")
        (draft / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, folder)
    except OSError as error:
        what = "there is no space left on the disk" if error.errno == errno.ENOSPC else str(error)
        raise OSError(
            error.errno,
            f"The record of arm '{record['arm']}' was not written to {folder}: {what}; "
            "make room and run again, which starts from the trained weights",
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _surroundings(experiment: Experiment, data: Path) -> dict:
    """Where, when, with what and on what a run was made."""
    cards = {name: dataset(data, name).card for name in (*experiment.train, *(t.dataset for t in experiment.tests))}
    return {
        "device": _device_class(),
        "threads": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "datasets": {n: {"title": c.title, "level": c.level, "fingerprint": c.fingerprint} for n, c in cards.items()},
        "levels": {name: card.level for name, card in cards.items()},
        **_machine(),
    }


@cache
def _machine() -> dict:
    def git(*words: str) -> str | None:
        done = subprocess.run(["git", *words], cwd=HOME, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {
        "commit": git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(git("status", "--porcelain", "--", *CODE)),
        "versions": {"python": platform.python_version(), **{n: installed[n] for n in VERSIONS if n in installed}},
        "hardware": {
            "cpu": named[0] if named else platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "ram_gb": round(psutil.virtual_memory().total / 2**30),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def predict(
    record: Record, cases: Sequence[Case], prompts: PromptPolicy, root: Path = Path("runs"), **switches: object
) -> tuple[ImageCache, models.Prediction]:
    """Let a record's trained model segment some cases, with its `switches` set; their images and what it returns.

    Raises ValueError where only the record was kept.
    """
    if record.weights is None:
        raise ValueError(f"The weights of run {record.key[:12]} were not kept: run arm '{record.arm}' again.")
    model, meta = models.load(record.weights, record.meta["weights_sha256"])
    notes = meta["notes"]
    images = ImageCache.load(cases, notes["size"], notes["channels"], spacing=notes.get("spacing"))
    texts = _captions(notes["encoder"], Path(root) / "captions").prompts(texts_for(cases, prompts), notes["tokens"])
    for name, value in switches.items():
        setattr(model, name, value)
    batch = Feed(images, texts).batch(torch.arange(len(images)))
    with torch.no_grad():
        return images, models.segment(model, batch.image, batch.prompts, notes.get("window"))


# ---- many runs ------------------------------------------------------------------------------------------------------


class _Inline(Executor):
    """Does each task at once, in this process."""

    def submit(self, fn, /, *args, **kwargs) -> Future:
        future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def executor(
    kind: str = "process", jobs: int = 2, address: str | None = None, *, retries: int = 0, resources: dict | None = None
) -> Executor:
    """Make an executor: "inline", "process" (spawned, `jobs` at a time), or "dask" (a scheduler's address).

    `retries` and `resources`, such as {"GPU": 1}, are passed on to Dask; its workers must see the same folders.
    """
    if kind == "inline":
        return _Inline()
    if kind == "process":
        threads = max(1, (os.cpu_count() or 1) // jobs)
        return ProcessPoolExecutor(jobs, get_context("spawn"), _prepare_worker, (threads,))
    if kind == "dask":
        try:
            from distributed import Client
            from distributed.cfexecutor import ClientExecutor
        except ImportError as error:
            raise ImportError("Dask is not installed: install it with `pip install .[cluster]`.") from error

        class Cluster(ClientExecutor):
            def shutdown(self, *args, **options) -> None:
                super().shutdown(*args, **options)
                self._client.close()

        return Cluster(Client(address), retries=retries, resources=resources or {}, pure=False)
    raise ValueError(f"Unknown executor '{kind}': use one of inline, process, dask.")


def _prepare_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    # What a worker says ends on a page, where the place of the code on this machine says nothing.
    warnings.formatwarning = lambda message, category, *place, **more: f"{category.__name__}: {message}\n"


def run_all(
    experiments: Sequence[Experiment],
    *,
    executor: Executor | None = None,
    data: Path = Path("data"),
    root: Path = Path("runs"),
    published: Path | None = None,
    progress: bool = True,
) -> list[Record]:
    """Run experiments on an executor (default: one after the other here) and return their records in order.

    Equal experiments run once, and those with the same weights in one task. Where some fail the others are
    finished and kept, and then one RuntimeError names the failed arms.
    """
    data, root = Path(data), Path(root)
    started = time.perf_counter()
    keys = [key(experiment, data, root) for experiment in experiments]
    done: dict[str, Record | Exception] = {}
    tasks: dict[str, dict[str, Experiment]] = {}
    for name, experiment in zip(keys, experiments, strict=True):
        if name not in done and (found := _find(name, experiment, root, published)):
            done[name] = found
        if name not in done:
            tasks.setdefault(fit_key(experiment, data, root), {}).setdefault(name, experiment)
    cached, total = len(done), len(set(keys))
    quiet = not progress or "PAPERMILL" in os.environ

    def collect(task: dict[str, Experiment], future: Future) -> None:
        error = future.exception()
        for name, result in zip(task, [error] * len(task) if error else future.result(), strict=True):
            done[name] = result
            if not quiet:
                outcome = f"failed: {result}" if isinstance(result, Exception) else f"{result.meta['seconds']:.0f} s"
                print(f"[{len(done)}/{total}] {task[name].arm}, seed {task[name].seed}: {outcome}", flush=True)

    pool = executor or _Inline()
    waiting: dict[Future, dict[str, Experiment]] = {}
    try:
        for task in tasks.values():
            future = pool.submit(_run_task, list(task.values()), data, root, published)
            if future.done():
                collect(task, future)
            else:
                waiting[future] = task
        for future in as_completed(waiting):
            collect(waiting[future], future)
    except BaseException:
        for future in waiting:
            future.cancel()
        raise
    arms = dict(zip(keys, experiments, strict=True))
    failed = {name: result for name, result in done.items() if isinstance(result, BaseException)}
    if failed:
        named = "; ".join(f"'{arms[name].arm}' seed {arms[name].seed} ({error})" for name, error in failed.items())
        sentence = f"{len(failed)} of {total} runs failed and the others are kept: {named}."
        raise RuntimeError(sentence) from next(iter(failed.values()))
    if progress:
        seconds = time.perf_counter() - started
        print(f"{total} run{'s'[: total > 1]}: {total - cached} new, {cached} found, {seconds:.0f} s.")
    return [replace(done[name], arm=experiment.arm) for name, experiment in zip(keys, experiments, strict=True)]


def _run_task(experiments: Sequence[Experiment], data: Path, root: Path, published: Path | None) -> list:
    """Run experiments that share their weights, and return a record or the error for each."""
    results = []
    for experiment in experiments:
        try:
            results.append(run(experiment, data=data, root=root, published=published))
        except Exception as error:
            error.add_note(traceback.format_exc())  # the worker's own, which does not travel with an error
            results.append(error)
    return results
