"""The models by name: build one, save its weights, load them again without ever running a pickle."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lib.files import sha256_file

MODELS = {  # name -> "module:builder", imported when asked for
    "nullbus": "lib.models.nullbus:build",
    "unet": "lib.models.baselines:build_unet",
    "text_only": "lib.models.baselines:build_text_only",
    "uavls": "lib.models.uavls:build",
    "sam": "lib.models.sam:build_sam",
    "clip": "lib.models.clip:build_clip",
    "medclip_samv2": "lib.models.medclip_samv2:build",
    "dynunet": "lib.models.snapshots:build",
    "duplus": "lib.models.duplus:build",
    "duplus_prognosis": "lib.models.duplus:build_prognosis",
    "malenia": "lib.models.malenia:build",
    "lesion_or_rest": "lib.models.lesions:build_rest",
    "sam_slices": "lib.models.lesions:build_slices",
    "entries": "lib.models.entries:build",
    "ensemble": "lib.models.ensembles:build_ensemble",
}
FORMAT = "prompt-to-mask-1"
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")

Config = TypeVar("Config")


class Prediction(NamedTuple):
    """What every model returns: logits [B, K, *S], never probabilities, and named extras in `aux`."""

    logits: Tensor
    aux: dict[str, Tensor]


def segment(model: nn.Module, image: Tensor, prompts, window: int | None = None) -> Prediction:
    """Let a model read a batch: at once, or volumes window by window, averaged with Gaussian weights at half overlap.

    image: [B, C, *S]; prompts: of B·K cases; the logits are [B, K, *S], and windows leave no extras in `aux`.
    """
    if window is None or max(image.shape[2:]) <= window:
        return model(image, prompts)
    from monai.inferers import sliding_window_inference  # seconds to import

    each = len(prompts) // len(image)
    volumes = []
    for number, volume in enumerate(image):
        own = prompts[torch.arange(number * each, (number + 1) * each, device=image.device)]

        def read(windows: Tensor, own=own) -> Tensor:
            return model(windows, own[torch.arange(each, device=image.device).repeat(len(windows))]).logits

        volumes.append(
            sliding_window_inference(volume[None], (window,) * (image.ndim - 2), 4, read, overlap=0.5, mode="gaussian")
        )
    return Prediction(torch.cat(volumes), {})


def build(name: str, **config) -> nn.Module:
    """Build a model of MODELS from `size` (a preset of that model) and fields of its config dataclass."""
    if name not in MODELS:
        raise ValueError(f"There is no model '{name}': use one of {', '.join(MODELS)}.")
    module, builder = MODELS[name].split(":")
    return getattr(import_module(module), builder)(**config)


def configure(kind: type[Config], sizes: Mapping[str, dict], size: str, given: Mapping) -> Config:
    """Make a config from a size preset and the given fields; raises ValueError for a wrong name or type."""
    if size not in sizes:
        raise ValueError(f"There is no size '{size}' of {kind.__name__}: use one of {', '.join(sizes)}.")
    defaults = {field.name: field.default for field in fields(kind)}
    values = {**sizes[size], **given}
    for name, value in values.items():
        if name not in defaults:
            raise ValueError(f"{kind.__name__} has no field '{name}': use one of {', '.join(defaults)}.")
        if isinstance(value, list):  # JSON and notebooks write tuples as lists
            values[name] = value = tuple(value)
        wanted = type(defaults[name])
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise ValueError(
                f"{kind.__name__}.{name} is {value!r}, but it must be a {wanted.__name__} "
                f"like its default {defaults[name]!r}."
            )
    return kind(**values)


# ---- pretrained backbones -------------------------------------------------------------------------------

WEIGHTS = "PROMPT_TO_MASK_WEIGHTS"  # a folder with one sub-folder per backbone name
DOWNLOAD = "PROMPT_TO_MASK_DOWNLOAD"  # "1" allows the hub
BACKBONES = {  # name -> hub repository, pinned revision, file
    "clip-vit-b16": (
        "timm/vit_base_patch16_clip_224.openai",
        "977e3dd0ec55ab8da155f2fbeb6b5f54948b6e3d",
        "open_clip_model.safetensors",
    ),
    "resnet50": (
        "timm/resnet50.a1_in1k",
        "767268603ca0cb0bfe326fa87277f19c419566ef",
        "model.safetensors",
    ),
    "convnext-tiny": (
        "timm/convnext_tiny.fb_in1k",
        "b43a6303c9fcf176d2d707478a128c2c91e93528",
        "model.safetensors",
    ),
}


def backbone_file(name: str) -> Path | None:
    """Find a backbone's safetensors file, locally or (if allowed) on the hub; None when it is not offered."""
    if name not in BACKBONES:
        return None
    repository, revision, filename = BACKBONES[name]
    if folder := os.environ.get(WEIGHTS):
        path = Path(folder) / name / filename
        if path.is_file():
            return path
    if os.environ.get(DOWNLOAD) != "1":
        return None
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository, filename, revision=revision))


def offered() -> list[str]:
    """Name the backbones that are offered here, without fetching any: part of a run's key."""
    local = os.environ.get(WEIGHTS)
    return [
        name
        for name, (_, _, filename) in BACKBONES.items()
        if os.environ.get(DOWNLOAD) == "1" or (local and (Path(local) / name / filename).is_file())
    ]


def load_backbone(module: nn.Module, name: str, prefix: str = "") -> str:
    """Fill a module with a backbone's pretrained tensors and return the file's sha256.

    `prefix` is cut from the names in the file; tensors that the module does not have (a classifier, the text
    tower, pruned blocks) are left out. Raises FileNotFoundError when the weights are not offered.
    """
    path = backbone_file(name)
    if path is None:
        filename = BACKBONES[name][2] if name in BACKBONES else "model.safetensors"
        raise FileNotFoundError(
            f"The pretrained backbone '{name}' is not offered: put {filename} into ${WEIGHTS}/{name} "
            f"or set {DOWNLOAD}=1 to fetch it from the hub."
        )
    own = set(module.state_dict())
    with _opened(path) as file:
        tensors = {key: file.get_tensor(prefix + key) for key in own.intersection(_names(file, prefix))}
    _fill(module, tensors, path)
    return sha256_file(path)


# ---- weight files ---------------------------------------------------------------------------------------


def save(path: Path | str, model: nn.Module, name: str, config: Mapping | None = None, **notes) -> str:
    """Write a model as one safetensors file with a JSON header, atomically, and return its sha256.

    The header holds the name, the whole config (`config` is what `build` was given; the model's own resolved
    config completes it), provenance and `notes`. Frozen pretrained backbones (`model.external`: submodule ->
    backbone name) are not stored but obtained again by name.
    """
    path = Path(path)
    external = getattr(model, "external", {})
    header = {
        "format": FORMAT,
        "name": name,
        "config": {**(config or {}), **asdict(model.config)},
        "external": {
            sub: {"backbone": backbone, "sha256": _tensors_sha256(model.get_submodule(sub))}
            for sub, backbone in external.items()
        },
        "provenance": getattr(model, "provenance", {}),
        "notes": notes,
        "aliases": {},
    }
    if hasattr(model, "external"):
        header["config"]["pretrained"] = False  # what is pretrained is stored below or listed as external
    tensors = {
        key: tensor.detach().cpu().contiguous()
        for key, tensor in model.state_dict().items()
        if not any(key.startswith(sub + ".") for sub in external)
    }
    first: dict[tuple, str] = {}  # a tensor that a module reaches by two names is stored by one
    for key, tensor in model.state_dict().items():
        if key in tensors and tensor.numel():
            header["aliases"][key] = first.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), key)
    header["aliases"] = {key: name for key, name in header["aliases"].items() if key != name}
    tensors = {key: tensor for key, tensor in tensors.items() if key not in header["aliases"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # One metadata entry only: safetensors writes several in an order that changes from call to call.
        safetensors.torch.save_file(tensors, temporary, {"meta": json.dumps(header)})
        temporary.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(
            f"Could not write the weights to {path} ({error}): free some space or choose another folder."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return sha256_file(path)


def load(path: Path | str, sha256: str | None = None) -> tuple[nn.Module, dict]:
    """Read a file written by `save` and return the model in evaluation mode with the header.

    Raises FileNotFoundError or ValueError with one sentence: missing file, pickle, wrong sha256, bad header,
    missing, unexpected or misshapen tensors, an external backbone that is not offered or is another one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no weight file {path}: train the model first or correct the path.")
    if path.suffix.lower() in PICKLES:
        raise ValueError(_pickle_sentence(path))
    if sha256 is not None and (found := sha256_file(path)) != sha256:
        raise ValueError(
            f"The sha256 of {path} is {found[:12]}… where {sha256[:12]}… was expected: "
            "the file is damaged or another one, so fetch or train it again."
        )
    with _opened(path) as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in _names(file)}
    meta = _header(path, metadata)
    try:
        model = build(meta["name"], **meta["config"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be rebuilt by this version of the code: {error}") from error
    for sub, source in meta["external"].items():
        backbone = model.get_submodule(sub)
        model.adopt(sub, source["backbone"])
        if _tensors_sha256(backbone) != source["sha256"]:
            raise ValueError(
                f"{path} was saved with another version of the backbone '{source['backbone']}' than the one "
                f"offered here: put the original file into ${WEIGHTS}/{source['backbone']}."
            )
        tensors.update({f"{sub}.{key}": tensor for key, tensor in backbone.state_dict().items()})
    tensors.update({key: tensors[name] for key, name in meta.get("aliases", {}).items() if name in tensors})
    _fill(model, tensors, path)
    model.provenance = meta["provenance"]
    return model.eval(), meta


def _header(path: Path, metadata: Mapping[str, str]) -> dict:
    try:
        meta = json.loads(metadata.get("meta", "{}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"The header of {path} is not valid JSON ({error}): save the model again.") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else meta
        raise ValueError(
            f"{path} has the format {found!r} in its header, not '{FORMAT}': use a file written by lib.models.save."
        )
    required = ("name", "config", "external", "provenance", "notes")
    missing = [k for k in required if k not in meta]
    if missing:
        raise ValueError(f"The header of {path} lacks {', '.join(missing)}: save the model again.")
    return meta


def _opened(path: Path):
    try:
        return safetensors.safe_open(path, framework="pt")
    except safetensors.SafetensorError as error:
        with Path(path).open("rb") as file:
            start = file.read(2)
        if start == b"PK" or start[:1] == b"\x80":  # what torch.save writes: a zip, formerly a bare pickle
            raise ValueError(_pickle_sentence(path)) from error
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}): it is damaged or of another kind, "
            "so fetch or save it again."
        ) from error


def _names(file, prefix: str = "") -> list[str]:
    names = file.keys()
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def _pickle_sentence(path: Path) -> str:
    return (
        f"{path} is a pickle, which can run any code when it is opened: "
        "convert it to safetensors where you trust it, then load that file."
    )


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    own = module.state_dict()
    problems = {
        "lacks": [k for k in own if k not in tensors],
        "has the unexpected": [k for k in tensors if k not in own],
        "has another shape for": [k for k in own if k in tensors and own[k].shape != tensors[k].shape],
    }
    found = [
        f"{verb} tensors {', '.join(sorted(keys)[:3])}" + f" and {len(keys) - 3} more" * (len(keys) > 3)
        for verb, keys in problems.items()
        if keys
    ]
    if found:
        raise ValueError(f"{path} does not fit the model: it {' and '.join(found)}; save it again with this code.")
    module.load_state_dict(tensors)


def _tensors_sha256(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
