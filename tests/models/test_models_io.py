import errno
import json

import pytest
import safetensors.torch
import torch
from matrix import image_for, prompts_for
from safetensors import safe_open

from lib import models
from lib.files import sha256_file

TEXT = {"size": "tiny", "text_dim": 4}


def small(**fields):
    torch.manual_seed(0)
    return models.build("text_only", **TEXT, **fields)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "weights.safetensors"
    return path, models.save(path, small(), "text_only", TEXT)


def rewrite(path, *, tensors=None, **metadata):
    """Write the file again with other tensors or header entries, as damage or another program would."""
    with safe_open(path, "pt") as file:
        header = {**file.metadata(), **metadata}
        names = file.keys()
        kept = {name: file.get_tensor(name) for name in names}
    safetensors.torch.save_file(kept if tensors is None else tensors(kept), path, header)


def sentence(excinfo) -> str:
    text = str(excinfo.value)
    assert text.endswith(".") and "\n" not in text
    return text


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("nullbuss", {}, "no model 'nullbuss'.*nullbus, unet, text_only"),
        ("unet", {"widths": 3}, "UNetConfig has no field 'widths'.*classes, channels"),
        ("nullbus", {"size": "huge"}, "no size 'huge'.*paper, small, tiny"),
        ("nullbus", {"use_tcm": "no"}, "use_tcm is 'no'.*must be a bool"),
        ("nullbus", {"classes": True}, "classes is True.*must be a int"),
        ("nullbus", {"size": "tiny", "null_kind": "none"}, "no null_kind 'none'.*learned, zero"),
        ("nullbus", {"size": "tiny", "roles": ("global",)}, "roles is .* needs 2 entries"),
        ("unet", {"channels": (8, 8)}, "channels is .* needs 5 entries"),
        ("nullbus", {"size": "tiny", "global_backbone": "vgg"}, "no global backbone 'vgg'.*clip-vit-b16"),
        ("nullbus", {"size": "tiny", "local_backbone": "resnet18"}, "set local_channels=\\(64, 64, 128"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(name, config, words):
    with pytest.raises(ValueError, match=words) as excinfo:
        models.build(name, **config)
    sentence(excinfo)


def test_lists_become_tuples_and_integers_floats():
    assert models.build("text_only", **TEXT, roles=["class"]).config.roles == ("class",)


def test_a_preset_is_overridden_by_fields():
    assert models.build("text_only", size="tiny", hidden=7).config.hidden == 7


def test_the_header_is_json_and_complete(saved):
    path, digest = saved
    model, meta = models.load(path)
    assert digest == sha256_file(path)
    assert meta["config"]["text_dim"] == 4 and meta["config"]["hidden"] == model.config.hidden
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_same_weights_make_the_same_bytes(tmp_path):
    model = small()
    digests = {models.save(tmp_path / f"{i}.safetensors", model, "text_only", TEXT) for i in range(8)}
    assert len(digests) == 1


def test_a_preset_that_changes_later_does_not_change_old_files(saved, monkeypatch):
    from lib.models import baselines

    monkeypatch.setitem(baselines.TEXT_ONLY_SIZES, "tiny", {"hidden": 5})
    models.load(saved[0])


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weight file") as excinfo:
        models.load(tmp_path / "none.safetensors")
    sentence(excinfo)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was executed",))


@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.ckpt", "m.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_refused_unopened(tmp_path, name, zipped):
    torch.save(Bomb(), tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="is a pickle") as excinfo:
        models.load(tmp_path / name)
    sentence(excinfo)


def test_another_sha256_is_refused(saved):
    with pytest.raises(ValueError, match="sha256 of .* was expected") as excinfo:
        models.load(saved[0], "0" * 64)
    sentence(excinfo)


def test_a_truncated_file_is_refused(saved):
    path, _ = saved
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable safetensors file") as excinfo:
        models.load(path)
    sentence(excinfo)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"meta": "{not json"}, "header of .* not valid JSON"),
        ({"meta": "[1]"}, "has the format"),
        ({"meta": json.dumps({"format": models.FORMAT, "name": "unet"})}, "lacks config, external"),
        ({"meta": json.dumps({"format": "other"})}, "has the format 'other'.*not 'prompt-to-mask-1'"),
    ],
)
def test_a_bad_header_is_refused(saved, metadata, words):
    rewrite(saved[0], **metadata)
    with pytest.raises(ValueError, match=words) as excinfo:
        models.load(saved[0])
    sentence(excinfo)


def test_a_config_of_another_version_is_refused(saved):
    path, _ = saved
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
    meta["config"]["depth"] = 3
    rewrite(path, meta=json.dumps(meta))
    with pytest.raises(ValueError, match="cannot be rebuilt .* has no field 'depth'") as excinfo:
        models.load(path)
    sentence(excinfo)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "net.0.bias"}, r"lacks tensors net\.0\.bias;"),
        (lambda t: {**t, "extra": torch.zeros(1)}, "has the unexpected tensors extra;"),
        (lambda t: {**t, "net.0.bias": torch.zeros(2)}, r"has another shape for tensors net\.0\.bias;"),
        (lambda t: {"extra": torch.zeros(1)}, r"lacks tensors .* and \d+ more and has the unexpected"),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved, change, words):
    rewrite(saved[0], tensors=change)
    with pytest.raises(ValueError, match=words) as excinfo:
        models.load(saved[0])
    sentence(excinfo)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(saved, monkeypatch):
    path, digest = saved

    def fail(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="Could not write the weights to .*No space left") as excinfo:
        models.save(path, small(), "text_only")
    sentence(excinfo)
    assert [p.name for p in path.parent.iterdir()] == [path.name] and sha256_file(path) == digest


def test_a_trained_null_and_its_statistics_are_stored(tmp_path):
    model = small()
    model.calibrate_text(prompts_for(model.roles, 9, dim=4))
    models.save(tmp_path / "m.safetensors", model, "text_only", TEXT)
    again, _ = models.load(tmp_path / "m.safetensors")
    assert torch.equal(again.prompts[0].mean, model.prompts[0].mean) and again.prompts[0].mean.any()
    absent = prompts_for(model.roles, 2, dim=4).without()
    assert torch.equal(again(image_for(2), absent).logits, model.eval()(image_for(2), absent).logits)


def test_a_tensor_with_two_names_is_stored_once_and_loaded_by_both(tmp_path):
    path = tmp_path / "net.safetensors"
    torch.manual_seed(0)
    model = models.build("dynunet", size="tiny").eval()  # whose network reaches every block by two names
    models.save(path, model, "dynunet")
    with safe_open(path, "pt") as file:
        stored, aliases = set(file.keys()), json.loads(file.metadata()["meta"])["aliases"]
    own = model.state_dict()
    assert aliases and stored | set(aliases) == set(own) and not stored & set(aliases)
    assert all(name in stored and own[name].data_ptr() == own[alias].data_ptr() for alias, name in aliases.items())
    assert len({own[name].data_ptr() for name in stored}) == len(stored)
    again = models.load(path)[0].state_dict()
    assert again.keys() == own.keys() and all(torch.equal(tensor, again[name]) for name, tensor in own.items())


@pytest.mark.parametrize("name", ["text_only", "dynunet"])
def test_a_file_from_before_aliases_is_loaded(tmp_path, name):
    path = tmp_path / "old.safetensors"
    torch.manual_seed(0)
    model = models.build(name, size="tiny")
    models.save(path, model, name)
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
    del meta["aliases"]
    own = {key: tensor.clone() for key, tensor in model.state_dict().items()}  # each stored by all of its names
    rewrite(path, tensors=lambda _: own, meta=json.dumps(meta))
    again = models.load(path)[0].state_dict()
    assert again.keys() == own.keys() and all(torch.equal(tensor, again[key]) for key, tensor in own.items())
