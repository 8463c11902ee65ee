"""A folder in BiomedCLIP's layout with small random weights, so that its code is exercised without a download."""

import json

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from transformers import BertConfig, BertModel

from lib.models import DOWNLOAD, WEIGHTS

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "breast", "brain", "tumor"]


@pytest.fixture
def biomedclip(tmp_path, monkeypatch):
    """The folder $PROMPT_TO_MASK_WEIGHTS/biomedclip, whose sizes are matrix.BIOMEDCLIP."""
    monkeypatch.setenv(WEIGHTS, str(tmp_path / "weights"))
    monkeypatch.delenv(DOWNLOAD, raising=False)
    folder = tmp_path / "weights" / "biomedclip"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    described = BertConfig(
        vocab_size=30522, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    trunk = VisionTransformer(32, 8, num_classes=0, embed_dim=16, depth=2, num_heads=2)
    parts = {
        "text.transformer.": BertModel(described, add_pooling_layer=False),
        "text.proj.0.": torch.nn.Linear(16, 12, bias=False),
        "text.proj.2.": torch.nn.Linear(12, 8, bias=False),
        "visual.trunk.": trunk,
        "visual.head.proj.": torch.nn.Linear(16, 8, bias=False),
    }
    state = {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.state_dict().items()}
    torch.save(state | {"logit_scale": torch.tensor(4.4)}, folder / "open_clip_pytorch_model.bin")
    described.save_pretrained(folder)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 8}}))
    (folder / "vocab.txt").write_text("\n".join([*WORDS, *(f"[unused{i}]" for i in range(30522 - len(WORDS)))]) + "\n")
    return folder
