"""Time the pairs that the design rests on, side by side in one run, into bench/results.csv.

    make bench                          every pair but the last
    make bench BENCH=bootstrap          one of them
    make bench BENCH=book               `make book` from scratch and unchanged: minutes

The two arms of a pair take turns, so that whatever else the machine does meets both.
"""

import argparse
import csv
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from lib import losses, models
from lib.attributes import ATTRIBUTES
from lib.data import Batch, Feed, ImageCache, load_dataset
from lib.files import atomic_write
from lib.models.saliency import saliency
from lib.models.sam import SamPrompts
from lib.models.scan import selective_scan
from lib.statistics import bootstrap_means
from lib.text import CaptionBank, Prompts, encoder

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results.csv"

Arms = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Pair:
    """Two ways to the same result, the design's first, and how often each is timed."""

    name: str
    what: str
    batch: int
    repeats: int
    arms: Arms


@dataclass(frozen=True)
class Row:
    """One arm of one pair: milliseconds at the median and at the 10th and 90th percentile of n repeats."""

    pair: str
    arm: str
    what: str
    batch: int
    n: int
    p10_ms: float
    p50_ms: float
    p90_ms: float
    device: str
    hardware: str
    threads: int
    load: float  # how busy the machine was at the start: 1-minute load average
    python: str
    torch: str
    monai: str
    transformers: str
    date: str


def caption_bank(device: str, folder: Path) -> Iterator[Pair]:
    """Looking a caption up against encoding it again whenever it is met."""
    shapes, echoes = ("oval", "round", "irregular"), ("hypoechoic", "isoechoic", "hyperechoic", "complex")
    strings = [
        f"an {echo} {shape} lesion in the {side} breast"
        for shape in shapes
        for echo in echoes
        for side in ("left", "right")
    ]
    texts = [strings[i % len(strings)] for i in range(32)]
    text_encoder = encoder("minilm")
    bank = CaptionBank("minilm", folder / "captions")
    bank.embed(strings)
    yield Pair(
        "caption_bank",
        "pooled embeddings of a batch of captions (minilm)",
        len(texts),
        20,
        {
            "caption bank": lambda: bank.prompts({"local": texts}),
            "encoding each time": lambda: text_encoder.encode(texts),
        },
    )


def image_cache(device: str, folder: Path) -> Iterator[Pair]:
    """One epoch of batches from the cache against decoding every PNG again."""
    make_phantoms(folder / "phantom_bus", n=320)
    cases = load_dataset(folder / "phantom_bus").split("train")[:160]
    batch, size = 16, 128
    blank = Prompts(pooled={}, present={})
    feed = Feed(ImageCache.load(cases, size, device=device), blank)
    starts = range(0, len(cases), batch)

    def cached() -> None:
        for start in starts:
            feed.batch(torch.arange(start, min(start + batch, len(cases))))

    def decoded() -> None:
        for start in starts:
            cache = ImageCache.load(cases[start : start + batch], size, device=device)
            Feed(cache, blank).batch(torch.arange(len(cache)))

    yield Pair(
        "image_cache",
        f"an epoch of {len(cases)} images of {size}², no augmentation",
        batch,
        10,
        {"image cache": cached, "decoding PNGs": decoded},
    )


def prompt_change(device: str, folder: Path) -> Iterator[Pair]:
    """A new prompt on an image already encoded against the full forward pass."""
    for size, side, repeats in (("tiny", 64, 30), ("paper", 352, 10)):
        model = models.build("nullbus", size=size, text_dim=384).to(device).eval()
        image = torch.rand(1, 1, side, side, device=device)
        prompts = Prompts(
            pooled={role: torch.randn(1, 384) for role in model.roles},
            present={role: torch.ones(1, dtype=torch.bool) for role in model.roles},
        ).to(device)
        with torch.inference_mode():
            features = model.encode_image(image)
        yield Pair(
            "prompt_change",
            f"NullBUS, {size} widths, {side}²",
            1,
            repeats,
            {
                "decode cached features": torch.inference_mode()(lambda m=model, f=features, p=prompts: m.decode(f, p)),
                "full forward": torch.inference_mode()(lambda m=model, i=image, p=prompts: m(i, p)),
            },
        )


def scan(device: str, folder: Path) -> Iterator[Pair]:
    """The selective scan, forward and backward, against one step after the other by index."""
    batch, channels, states = 8, 48, 16
    for length, repeats in ((24, 30), (784, 5)):  # a text, and the places of a 28x28 map
        drawn = {name: torch.randn(batch, channels, length) for name in ("u", "delta")}
        drawn |= {name: torch.randn(batch, states, length) for name in ("B", "C")}
        drawn |= {"A": -torch.arange(1.0, states + 1).repeat(channels, 1)}
        given = {name: tensor.to(device).requires_grad_() for name, tensor in drawn.items()}

        def both_ways(method: str, given: dict = given) -> None:
            y, _ = selective_scan(**given, softplus=True, method=method)
            torch.autograd.grad(y.sum(), list(given.values()))

        for method in ("loop", "doubling"):
            yield Pair(
                f"scan_{method}_{length}",
                f"{channels} channels, {states} states, {length} steps, forward and backward",
                batch,
                repeats,
                {method: lambda m=method, f=both_ways: f(m), "indexed": lambda f=both_ways: f("indexed")},
            )


def training_captions(device: str, folder: Path) -> Iterator[Pair]:
    """One UA-VLS training step that looks its captions up against one that encodes each as its item is loaded.

    The second is what the released data set does, with a BERT of 12 layers (here with random weights: same cost).
    """
    from transformers import BertConfig, BertModel

    batch, words, width = 8, 24, 768
    bert = BertModel(BertConfig(num_hidden_layers=12, hidden_size=width)).eval()
    ids = torch.randint(1000, 30000, (batch, words))
    image, mask = torch.rand(batch, 1, 64, 64), (torch.rand(batch, 1, 64, 64) > 0.8).float()
    model = models.build("uavls", size="tiny", text_dim=width, pretrained=False).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    criterion = losses.loss("seu")
    there = torch.ones(batch, words, dtype=torch.bool)
    bank = torch.randn(batch, words, width)

    def step(states: torch.Tensor) -> None:
        prompts = Prompts({"report": states[:, 0]}, {"report": there[:, 0]}, {"report": states}, {"report": there})
        loss = criterion(model(image.to(device), prompts.to(device)).logits, mask.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def encode() -> torch.Tensor:
        return torch.cat([bert(row[None]).last_hidden_state for row in ids])  # one item at a time, on the CPU

    for what, finish in (("captions alone", lambda states: None), ("a training step, tiny widths, 64²", step)):
        yield Pair(
            "training_captions",
            f"UA-VLS, {what}, {words} words each",
            batch,
            10,
            {
                "caption bank": lambda finish=finish: finish(bank.clone()),
                "12-layer encoder per item": lambda finish=finish: finish(encode()),
            },
        )


def m2ib(device: str, folder: Path) -> Iterator[Pair]:
    """Saliency of a batch of images at once against one image after the other: equal maps."""
    batch = 16
    towers = models.build("clip", size="tiny", text_dim=64).to(device).eval()
    image = torch.rand(batch, 1, 64, 64, device=device)
    with torch.no_grad():
        text = towers.encode_text(prompts_of(batch, 64, device))[0]
    settings = {"layer": 1, "beta": 1.0, "copies": 4}

    def together() -> torch.Tensor:
        return saliency(towers.tower, image, text, batch=batch, **settings)

    def one_by_one() -> torch.Tensor:
        return torch.cat([saliency(towers.tower, image[i : i + 1], text[i : i + 1], **settings) for i in range(batch)])

    torch.testing.assert_close(together(), one_by_one(), atol=1e-3, rtol=0)
    yield Pair("m2ib", "M2IB maps, tiny tower, 64²", batch, 5, {"batched": together, "one at a time": one_by_one})


def sam_prompts(device: str, folder: Path) -> Iterator[Pair]:
    """Many boxes on one image that is embedded once against embedding it for each of them: equal masks."""
    number, side = 16, 128
    model = models.build("sam", size="small").to(device).eval()
    image = torch.rand(1, 1, side, side, device=device)
    start = torch.rand(1, number, 2, device=device) * side / 2
    boxes = torch.cat([start, start + side / 4], dim=-1)
    there = torch.ones(1, dtype=torch.bool, device=device)
    asked = [SamPrompts(present=there, boxes=boxes[:, i : i + 1]) for i in range(number)]

    @torch.inference_mode()
    def once() -> torch.Tensor:
        features = model.encode_image(image)
        return torch.cat([model.decode(features, prompt).logits for prompt in asked], dim=1)

    @torch.inference_mode()
    def each_time() -> torch.Tensor:
        return torch.cat([model(image, prompt).logits for prompt in asked], dim=1)

    torch.testing.assert_close(once(), each_time())
    what = f"SAM, small, {number} boxes on one image of {side}², one after the other"
    yield Pair("sam_prompts", what, 1, 10, {"embedded once": once, "embedded each time": each_time})


def chain_stages(device: str, folder: Path) -> Iterator[Pair]:
    """Each stage of MedCLIP-SAMv2 from a sentence to a mask, of one image, against the chain as a whole."""
    model = models.build("medclip_samv2", size="small", text_dim=64, roles=("global",)).to(device).eval()
    image, prompts = torch.rand(1, 1, 96, 96, device=device), prompts_of(1, 64, device)

    @torch.inference_mode()
    def whole() -> torch.Tensor:
        return model(image, prompts).logits

    with torch.inference_mode():
        maps, found = model.saliency(image, prompts)
        coarse = model.coarse_mask(maps, found, model.components)
        asked = model.prompts_from_mask(coarse)
        features = model.sam.encode_image(image)
        torch.testing.assert_close(model.segment(features, asked, coarse), whole())
    stages = {
        "saliency": lambda: model.saliency(image, prompts),
        "clean-up": lambda: model.coarse_mask(maps, found, model.components),
        "prompts": lambda: model.prompts_from_mask(coarse),
        "SAM's embedding": lambda: model.sam.encode_image(image),
        "SAM's mask": lambda: model.segment(features, asked, coarse),
    }
    for name, stage in stages.items():
        arms = {f"{name} alone": torch.inference_mode()(stage), "the whole chain": whole}
        yield Pair("chain_stages", f"MedCLIP-SAMv2, small, one image of 96²: {name}", 1, 10, arms)


def duplus_targets(device: str, folder: Path) -> Iterator[Pair]:
    """All targets of a volume in one backbone pass against a pass for each; and one more target, encoded or not."""
    model = small_duplus(device)
    volume = torch.rand(1, 1, 48, 48, 48, device=device)
    for number in (1, 5, 15):
        prompts = volume_prompts(number, 64, device)

        @torch.inference_mode()
        def together(prompts: Prompts = prompts) -> torch.Tensor:
            return model(volume, prompts).logits

        @torch.inference_mode()
        def one_by_one(prompts: Prompts = prompts, number: int = number) -> torch.Tensor:
            return torch.cat([model(volume, prompts[[i]]).logits for i in range(number)], 1)

        torch.testing.assert_close(together(), one_by_one(), atol=1e-3, rtol=1e-3)
        arms = {"one backbone pass": together, "a pass per target": one_by_one}
        yield Pair("duplus_targets", f"DuPLUS, small, 48³, {number} target{'s'[: number > 1]}", 1, 3, arms)

    volume, asked = torch.rand(1, 1, 96, 96, 96, device=device), volume_prompts(1, 64, device)
    with torch.inference_mode():
        features = model.encode_image(volume, asked)

    @torch.inference_mode()
    def switched() -> torch.Tensor:
        return model.decode(features, asked).logits

    arms = {
        "target switch": switched,
        "whole forward pass": torch.inference_mode()(lambda: model(volume, asked).logits),
    }
    yield Pair("duplus_targets", "DuPLUS, small, another target on an encoded 96³", 1, 10, arms)


def duplus_texts(device: str, folder: Path) -> Iterator[Pair]:
    """A DuPLUS training step with its prompts from the bank against one that encodes them anew, as released."""
    model, number = small_duplus(device, dim=384).train(), 7
    volume, mask = torch.rand(2, 1, 32, 32, 32, device=device), torch.ones(2, number, 32, 32, 32, device=device)
    optimizer, text = torch.optim.AdamW(model.parameters(), fused=True), encoder("minilm")
    sentences = [f"A computed tomography scan of structure {i}." for i in range(2 * number)]
    prompts = volume_prompts(2 * number, 384, device, volumes=2)

    def step(target: torch.Tensor) -> None:
        asked = Prompts({**prompts.pooled, "target": target.to(device)}, prompts.present)
        loss = losses.loss("duplus")(model(volume, asked).logits, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    bank = text.encode(sentences).pooled
    arms = {"caption bank": lambda: step(bank), "encoded each step": lambda: step(text.encode(sentences).pooled)}
    yield Pair("duplus_texts", f"DuPLUS, small, a training step at 32³, {2 * number} targets", 2, 5, arms)


def sliding_window(device: str, folder: Path) -> Iterator[Pair]:
    """A volume of 96³ in windows of 48³ with half overlap against the same network on the whole of it."""
    model = small_duplus(device)
    volume, prompts = torch.rand(1, 1, 96, 96, 96, device=device), volume_prompts(3, 64, device)
    windows = torch.inference_mode()(lambda: models.segment(model, volume, prompts, 48).logits)
    whole = torch.inference_mode()(lambda: models.segment(model, volume, prompts).logits)
    assert windows().shape == whole().shape
    yield Pair("sliding_window", "DuPLUS, small, 96³, 3 targets", 1, 3, {"at once": whole, "windows of 48³": windows})


def duplus_compiled(device: str, folder: Path) -> Iterator[Pair]:
    """On a GPU: a DuPLUS training step at the paper's widths, compiled in bfloat16 against eager in float32."""
    if device != "cuda":
        return
    model = models.build("duplus", stems=1).to(device).train()
    volume, mask = torch.rand(2, 1, 96, 96, 96, device=device), torch.ones(2, 4, 96, 96, 96, device=device)
    prompts, fast = volume_prompts(8, 512, device), torch.compile(model)

    def step(network: torch.nn.Module, half: bool) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            logits = network(volume, prompts).logits
        losses.loss("duplus")(logits.float(), mask).backward()
        model.zero_grad()

    arms = {"compiled, bfloat16": lambda: step(fast, True), "eager, float32": lambda: step(model, False)}
    yield Pair("duplus_compiled", "DuPLUS, paper's widths, 96³, a training step, channels last", 2, 10, arms)


def malenia_step(device: str, folder: Path) -> Iterator[Pair]:
    """A Malenia training step on a 96³ crop: masks compared on sampled points against all voxels."""
    sides = {}
    for name, points in (("12,544 points", 12_544), ("all voxels", 0)):
        torch.manual_seed(0)
        model = models.build("malenia", size="small", text_dim=64, upsampled=True, points=points).to(device).train()
        model.calibrate_text(lesion_prompts(4, device))
        sides[name] = partial(malenia_learns, model, lesion_crop(device))
    yield Pair("malenia_step", "Malenia, small, a training step on a 96³ crop with 4 lesions", 1, 3, sides)


def malenia_diseases(device: str, folder: Path) -> Iterator[Pair]:
    """Another list of diseases asked of an encoded 96³ crop against a whole pass, words looked up or embedded anew."""
    model = models.build("malenia", size="small").to(device).eval()
    image, text = torch.rand(1, 1, 96, 96, 96, device=device), encoder("minilm")
    sentences = [f"The lesion is of kind {i}." for i in range(12 * len(model.roles))]
    bank = text.encode(sentences).pooled

    def asked(pooled: torch.Tensor) -> Prompts:
        rows = dict(zip(model.roles, pooled.to(device).chunk(len(model.roles)), strict=True))
        return Prompts(rows, {role: torch.ones(12, dtype=torch.bool, device=device) for role in rows})

    with torch.inference_mode():
        features = model.encode_image(image)
    ways = {
        "another list, looked up": lambda: model.decode(features, asked(bank)).logits,
        "another list, embedded anew": lambda: model.decode(features, asked(text.encode(sentences).pooled)).logits,
    }
    arms = {name: torch.inference_mode()(way) for name, way in ways.items()}
    yield Pair("malenia_diseases", "Malenia, small, 12 diseases with 8 attributes on an encoded 96³ crop", 1, 5, arms)
    arms = {
        "another list, looked up": arms["another list, looked up"],
        "whole forward pass": torch.inference_mode()(lambda: model(image, asked(bank)).logits),
    }
    yield Pair("malenia_diseases", "Malenia, small, 12 diseases, crop encoded before or again", 1, 5, arms)


def compiled_step(device: str, folder: Path) -> Iterator[Pair]:
    """On a GPU: a UA-VLS training step at the paper's size, compiled in bfloat16 and channels-last against eager."""
    if device != "cuda":
        return
    model = models.build("uavls", size="paper", text_dim=768, pretrained=False).to(device).train()
    image, mask = torch.rand(16, 3, 224, 224, device=device), torch.ones(16, 1, 224, 224, device=device)
    states, there = torch.randn(16, 24, 768, device=device), torch.ones(16, 24, dtype=torch.bool, device=device)
    prompts = Prompts({"report": states[:, 0]}, {"report": there[:, 0]}, {"report": states}, {"report": there})
    criterion, fast = losses.loss("seu"), torch.compile(model)

    def step(network: torch.nn.Module, half: bool) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            logits = network(image, prompts).logits
        criterion(logits.float(), mask).backward()
        model.zero_grad()

    arms = {"bf16, compiled": lambda: step(fast, True), "float32, eager": lambda: step(model, False)}
    yield Pair("compiled_step", "UA-VLS training step, paper size, 224²", 16, 10, arms)


def bootstrap(device: str, folder: Path) -> Iterator[Pair]:
    """10,000 resamples of patients for 10 models × 2,000 cases: one matrix product against a loop."""
    rng = np.random.default_rng(0)
    n_models, n_cases, n_patients, resamples = 10, 2000, 1500, 10_000
    scores = rng.random((n_models, n_cases))
    patients = np.concatenate([np.arange(n_patients), rng.integers(n_patients, size=n_cases - n_patients)])
    order = np.argsort(patients, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(patients[order])) + 1)

    def loop() -> np.ndarray:
        draws = np.random.default_rng(0).integers(n_patients, size=(resamples, n_patients))
        return np.stack([scores[:, np.concatenate([groups[i] for i in drawn])].mean(axis=1) for drawn in draws])

    yield Pair(
        "bootstrap",
        f"{resamples:,} resamples of {n_patients:,} patients, {n_models} models, {n_cases:,} cases",
        resamples,
        5,
        {"weights × scores": lambda: bootstrap_means(scores, patients, resamples), "resampling loop": loop},
    )


def book(device: str, folder: Path) -> Iterator[Pair]:
    """The whole book with nothing changed against from scratch, in a copy of the working tree."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())

    def build(*stale: str) -> None:
        for name in stale:
            if (folder / name).exists():
                (folder / name).rename(folder / f"{name}.{time.monotonic_ns()}")
        subprocess.run(
            [sys.executable, "book/build.py", "book", "--profile", "quick"],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(folder)},  # the copy's lib, not the one that .venv points to
            check=True,
            stdout=sys.stderr,
        )

    yield Pair(
        "book",
        "make book, profile quick",
        1,
        1,
        {"unchanged": build, "from scratch": lambda: build("_build", "data", "runs")},
    )


PAIRS = {
    function.__name__: function
    for function in (
        caption_bank,
        image_cache,
        prompt_change,
        scan,
        training_captions,
        m2ib,
        sam_prompts,
        chain_stages,
        duplus_targets,
        duplus_texts,
        sliding_window,
        compiled_step,
        duplus_compiled,
        malenia_step,
        malenia_diseases,
        bootstrap,
        book,
    )
}
SLOW = {"book"}


def prompts_of(batch: int, dim: int, device: str) -> Prompts:
    """A sentence each, as random embeddings."""
    present = {"global": torch.ones(batch, dtype=torch.bool)}
    return Prompts({"global": torch.randn(batch, dim)}, present).to(device)


def volume_prompts(number: int, dim: int, device: str, volumes: int = 1) -> Prompts:
    """Context, target and modality of `number` cases, as random embeddings; those of a volume share its context."""
    pooled = {"target": torch.randn(number, dim), "attribute.modality": torch.ones(number, dim)}
    pooled["context"] = torch.randn(volumes, dim).repeat_interleave(number // volumes, 0)
    return Prompts(pooled, {role: torch.ones(number, dtype=torch.bool) for role in pooled}).to(device)


def small_duplus(device: str, dim: int = 64) -> torch.nn.Module:
    """DuPLUS of the size `small` with a shared stem, ready to judge."""
    return models.build("duplus", size="small", text_dim=dim, stems=1).to(device).eval()


def lesion_prompts(number: int, device: str) -> Prompts:
    """The eight attributes of `number` lesions, each with one of two values, as random embeddings."""
    words, codes = torch.randn(8, 2, 64), torch.randint(2, (number, 8))
    pooled = {f"attribute.{name}": words[i, codes[:, i]] for i, name in enumerate(ATTRIBUTES)}
    return Prompts(pooled, {role: torch.ones(number, dtype=torch.bool) for role in pooled}).to(device)


def lesion_crop(device: str) -> Batch:
    """A crop of 96³ with four lesions."""
    mask = torch.zeros(1, 4, 96, 96, 96, device=device)
    for k, at in enumerate((10, 30, 50, 70)):
        mask[0, k, at : at + 12, at : at + 12, at : at + 12] = 1
    image, unknown = torch.rand(1, 1, 96, 96, 96, device=device), torch.full((1, 2), torch.nan)
    return Batch(image, mask, lesion_prompts(4, device), torch.zeros(1, dtype=torch.long), unknown)


def malenia_learns(model: torch.nn.Module, batch: Batch) -> None:
    """One step forward and back."""
    model.objective(batch, losses.loss("dice_bce")).backward()
    model.zero_grad()


def make_phantoms(folder: Path, n: int) -> None:
    subprocess.run(
        [sys.executable, "data_scripts/phantoms.py", "bus", "--n", str(n), "--out", str(folder)],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )


def take_turns(arms: Arms, repeats: int, device: str) -> dict[str, np.ndarray]:
    """Milliseconds of each repeat of each arm, after one unmeasured turn, last arm first."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(repeats + 1):
        for name in reversed(arms):
            started = time.perf_counter()
            arms[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: np.array(values) for name, values in times.items()}


def hardware(device: str) -> str:
    """The processor's or accelerator's own name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else [])
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def rows_of(pair: Pair, device: str) -> list[Row]:
    """Time a pair."""
    load = round(os.getloadavg()[0], 2)
    return [
        Row(
            pair.name,
            arm,
            pair.what,
            pair.batch,
            len(times),
            *(float(f"{value:.4g}") for value in np.percentile(times, (10, 50, 90))),
            device,
            hardware(device),
            torch.get_num_threads(),
            load,
            platform.python_version(),
            *(version(package) for package in ("torch", "monai", "transformers")),
            date.today().isoformat(),
        )
        for arm, times in take_turns(pair.arms, pair.repeats, device).items()
    ]


def merge(path: Path, rows: list[Row]) -> None:
    """Replace what the file says of these pairs on this device, and keep the rest."""
    kept = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            kept = list(csv.DictReader(file))
    measured = {(row.pair, row.device) for row in rows}
    kept = [row for row in kept if (row["pair"], row["device"]) not in measured]
    with tempfile.TemporaryFile("w+", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(Row.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept + [asdict(row) for row in rows])
        file.seek(0)
        atomic_write(path, file.read())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"pairs, separated by commas: {', '.join(PAIRS)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    names = options.only.split(",") if options.only else [name for name in PAIRS if name not in SLOW]
    if unknown := [name for name in names if name not in PAIRS]:
        parser.error(f"there is no pair '{unknown[0]}': choose from {', '.join(PAIRS)}.")
    rows: list[Row] = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            for pair in PAIRS[name](options.device, Path(folder)):
                ours, other = measured = rows_of(pair, options.device)
                rows += measured
                print(f"\n{pair.name}: {pair.what}, batch {pair.batch}, {options.device}")
                for row in measured:
                    print(
                        f"  {row.arm:24} {row.p50_ms:10.4g} ms   (p10–p90 {row.p10_ms:.4g}–{row.p90_ms:.4g}, n={row.n})"
                    )
                print(f"  {'ratio of medians':24} {other.p50_ms / ours.p50_ms:10.3g}")
    merge(RESULTS, rows)
    print(f"\nWrote {os.path.relpath(RESULTS)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
