"""The common ground of the cross-paper chapters: data, prompts, budgets and looks that every network gets alike.

The chapters ask for the same arms by the same words, so that a run that one of them made is found by the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lib.models.entries import ENTRIES
from lib.runs import Experiment, Test, dataset
from lib.text import PromptPolicy
from lib.training import Budget

WORDINGS = (  # a sentence of the same content, then what is wrong or missing in one
    "paraphrase", "synonym", "typo", "other_language", "vague", "swapped_side", "wrong_number", "wrong_attribute",
    "shuffled",
)  # fmt: skip
PAPERS = ("nullbus", "uavls", "unet")  # networks of images that stand beside the common one, at the same budget
SAME = ("paraphrase", "synonym", "typo", "other_language")  # of WORDINGS, what a reader would take for the same


@dataclass(frozen=True)
class Ground:
    """A dataset, the prompt columns that it is asked by, and what of it may differ from the others' settings."""

    dataset: str
    columns: tuple[tuple[str, str], ...]
    dims: int = 2
    inputs: int = 1
    published: tuple[tuple[str, str], ...] = ()  # (look, variant): texts that somebody wrote, beside the rewritten ones
    worded: bool = True  # train on cases that have text only

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(role for role, _ in self.columns)

    @property
    def prompts(self) -> PromptPolicy:
        return PromptPolicy(self.columns)


LVIT = (("other report", "other"),)
TORSO = (("paraphrase", "second"), ("wrong structure", "other"), ("bare name", "plain"))
GROUNDS = {
    "phantom_bus": Ground("phantom_bus", (("local", "local"),), published=(("other lesion", "other"),)),
    "phantom_cxr": Ground("phantom_cxr", (("report", "report"),), published=LVIT),
    "busi": Ground("busi", (("local", "local@medclipseg"),)),
    "bus_bra": Ground("bus_bra", (("local", "local@medclipseg"),)),
    "qata_cov19": Ground("qata_cov19", (("report", "report"),)),
    "kvasir_seg": Ground("kvasir_seg", (("local", "local@medclipseg"),), inputs=3),
    "phantom_torso_ct": Ground("phantom_torso_ct", (("target", "target"),), dims=3, published=TORSO),
    "msd_hippocampus": Ground("msd_hippocampus", (("target", "target"),), dims=3, published=TORSO),
    "sarcoma_multimodal": Ground("sarcoma_multimodal", (("target", "target"),), dims=3, published=TORSO[::2]),
}


@dataclass(frozen=True)
class Scale:
    """What a profile sets, for images and for volumes: sizes and budgets, never the code."""

    net: str
    size: int
    steps: int
    batch: int
    limit: int | None
    val_limit: int | None
    test_limit: int | None
    seeds: int
    lr: float = 2e-3
    stride: int = 1  # of the common network


SCALES = {
    "smoke": {2: Scale("tiny", 32, 4, 8, 24, 8, 8, 1), 3: Scale("tiny", 32, 2, 2, 4, 2, 6, 1, stride=2)},
    "quick": {2: Scale("tiny", 64, 120, 8, 400, 60, 100, 1), 3: Scale("tiny", 48, 150, 2, 60, 6, 24, 1, stride=2)},
    "gpu": {
        2: Scale("small", 128, 4000, 16, None, 200, None, 5, lr=1e-3),
        3: Scale("small", 96, 4000, 4, None, 16, None, 5, lr=1e-3),
    },
    "paper": {
        2: Scale("paper", 224, 20_000, 16, None, 400, None, 5, lr=1e-3),
        3: Scale("paper", 128, 20_000, 4, None, 32, None, 5, lr=1e-3),
    },
}


def ground(name: str, data: Path) -> Ground:
    """Find the ground of a dataset; raises ValueError where it is none of GROUNDS, or its folder lacks a column."""
    if name not in GROUNDS:
        raise ValueError(f"There is no common ground on '{name}': use one of {', '.join(GROUNDS)}.")
    found, card = GROUNDS[name], dataset(data, name).card
    for _, column in found.columns:
        if column not in card.prompts:
            raise ValueError(
                f"'{name}' has no prompt column '{column}', only {', '.join(card.prompts)}: make it again."
            )
    return found


def looks(on: Ground, scale: Scale, names: Sequence[str] = ("present", "absent")) -> tuple[Test, ...]:
    """Make tests by name: "present", "absent", a perturbation of WORDINGS, or one of the ground's published texts.

    All but "present" and "absent" take only cases that have text; "present" and "absent" also score doubt.
    """
    variants = dict(on.published)
    tests = []
    for name in names:
        if name in ("present", "absent"):
            changed = {"prompts": on.prompts if name == "present" else replace(on.prompts, perturbation="absent")}
            changed["uncertainty"] = True
        elif name in variants:
            changed = {"prompts": replace(on.prompts, perturbation=f"published:{variants[name]}"), "worded": True}
        else:
            changed = {"prompts": replace(on.prompts, perturbation=name), "worded": True}
        tests.append(Test(name, on.dataset, limit=scale.test_limit, **changed))
    return tuple(tests)


def every_look(on: Ground) -> tuple[str, ...]:
    """Name all looks that a ground allows: what somebody wrote takes the place of a rewriting of the same name."""
    wordings = WORDINGS if on.dims == 2 else ("typo", "other_language", "shuffled")  # a structure's name has no sides
    written = [name for name, _ in on.published]
    return ("present", "absent", *[name for name in wordings if name not in written], *written)


def arm(
    name: str,
    on: Ground,
    scale: Scale,
    seed: int,
    *,
    model: str = "entries",
    loss: str = "dice_bce",
    dropout: float = 0.0,
    prompts: PromptPolicy | None = None,
    tests: Sequence[Test] | None = None,
    steps: int = 0,
    encoder: str = "minilm",
    tokens: bool | None = None,
    **config,
) -> Experiment:
    """Make one arm: a network on a ground; `config` is the model's, and words are given where it reads words.

    tests: default all of `every_look`; steps: 0 for as many as the scale says.
    """
    if model == "entries":
        config = {
            "dims": on.dims,
            "roles": on.roles,
            "inputs": on.inputs,
            "size": scale.net,
            "stride": scale.stride,
        } | config
        tokens = config.get("entry") in ("attention", "tokens") if tokens is None else tokens
    steps = steps or scale.steps
    return Experiment(
        arm=name,
        model=model,
        config=tuple(sorted(config.items())),
        loss=loss,
        train=(on.dataset,),
        prompts=prompts or on.prompts,
        tests=tuple(tests) if tests is not None else looks(on, scale, every_look(on)),
        prompt_dropout=dropout,
        encoder=encoder,
        tokens=bool(tokens),
        size=scale.size,
        channels=on.inputs,
        augment="photometric",
        limit=scale.limit,
        select_limit=scale.val_limit,
        worded=on.worded,
        seed=seed,
        budget=Budget(steps=steps, batch=scale.batch, lr=scale.lr, validate_every=max(2, steps // 5)),
    )


def network(
    of: str, on: Ground, scale: Scale, seed: int, *, name: str = "", text_dim: int = 384, **given
) -> Experiment:
    """Make an arm of one network: a way in of the common one, or one of PAPERS; `given` is passed on to `arm`.

    All read the ground's one prompt: NullBUS's other role is absent, UA-VLS reads its words. Raises ValueError for
    another name, and for a paper's network of images on volumes.
    """
    given = {"text_dim": text_dim} | given
    if of in ENTRIES:
        return arm(name or of, on, scale, seed, entry=of, **given)
    if of not in PAPERS or on.dims != 2:
        known = (*ENTRIES, *(PAPERS if on.dims == 2 else ()))
        raise ValueError(f"There is no network '{of}' for '{on.dataset}': use one of {', '.join(known)}.")
    if of == "nullbus":
        given["roles"] = (next(role for role in ("global", "local") if role not in on.roles), *on.roles)
    elif of == "uavls":
        given |= {"roles": on.roles, "tokens": True}
    else:
        del given["text_dim"]
    return arm(name or of, on, scale, seed, model=of, size=scale.net, **given)


def methods(on: Ground, scale: Scale, seed: int, **given) -> list[Experiment]:
    """Make an arm for every way in and, on images, for the networks of NullBUS and UA-VLS and an image-only U-Net."""
    return [network(of, on, scale, seed, **given) for of in (*ENTRIES, *(PAPERS if on.dims == 2 else ()))]
