"""What is compared: the bare frozen backbone (the floor), PEFT, and this library."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from opendelta import AdapterModel, LoraModel

RANK = 8


class Shape:
    """A backbone of a known shape, with random weights and few layers, and how to call it."""

    def __init__(self, build: Callable[[], nn.Module], targets: tuple[str, str]) -> None:
        self.build, self.targets = build, list(targets)

    def inputs(self, rows: int, tokens: int) -> dict[str, Tensor]:
        ids = torch.randint(1000, (rows, tokens), generator=torch.Generator().manual_seed(0))
        both = self.build is _t5
        return {"input_ids": ids, "decoder_input_ids": ids} if both else {"input_ids": ids}


def _bert(width: int, layers: int, heads: int) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=1000, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False)


def _gpt2() -> nn.Module:
    dropouts = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    config = transformers.GPT2Config(
        vocab_size=1000, n_layer=4, bos_token_id=1, eos_token_id=2, **dropouts
    )
    return transformers.GPT2Model(config)


def _t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=1000, d_model=768, d_ff=3072, num_heads=12, d_kv=64, num_layers=2,
        num_decoder_layers=2, dropout_rate=0.0,
    )  # fmt: skip
    return transformers.T5Model(config)


def llama(width: int = 768, layers: int = 4) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=width * 8 // 3 // 8 * 8,
        num_hidden_layers=layers, num_attention_heads=max(1, width // 64),
    )  # fmt: skip
    return transformers.LlamaModel(config)


SHAPES = {
    "MiniLM": Shape(lambda: _bert(384, 6, 12), ("query", "value")),
    "BERT": Shape(lambda: _bert(768, 4, 12), ("query", "value")),
    "GPT2": Shape(_gpt2, ("c_attn", "c_attn")),
    "T5": Shape(_t5, ("SelfAttention.q", "SelfAttention.v")),
    "LLaMA": Shape(llama, ("q_proj", "v_proj")),
}


def let_gradients_start(host: nn.Module, args: Any, output: Any) -> Any:
    """Where the first delta would sit, gradients begin: a delta's own way back costs the same."""
    return output if output.requires_grad else output.detach().requires_grad_()


def floor(backbone: nn.Module, targets: list[str]) -> nn.Module:
    """The frozen backbone itself, with gradients of activations as a delta on `targets` needs."""
    backbone.requires_grad_(False)
    for name, module in backbone.named_modules():
        if any(name.endswith("." + target) for target in targets):
            module.register_forward_hook(let_gradients_start)
    return backbone


def with_peft(backbone: Any, targets: list[str], dropout: float = 0.0) -> nn.Module:
    config = peft.LoraConfig(
        r=RANK, lora_alpha=16, target_modules=sorted(set(targets)), lora_dropout=dropout
    )
    return peft.get_peft_model(backbone, config)


def with_lora(backbone: nn.Module, targets: list[str], dropout: float = 0.0) -> nn.Module:
    delta = LoraModel(
        backbone, lora_r=RANK, modified_modules=sorted(set(targets)), lora_dropout=dropout
    )
    delta.freeze_module(set_state_dict=False)
    return backbone


def with_adapter(backbone: nn.Module, targets: list[str]) -> nn.Module:
    AdapterModel(backbone, modified_modules=targets).freeze_module()
    return backbone


def contenders(shape: Shape, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Any:
    """name -> model, each with a copy of the same backbone, in training mode.

    In a 16-bit backbone PEFT keeps its factors in float32; so do ours here.
    """
    torch.manual_seed(0)
    backbone = shape.build().to(dtype).train()
    models = {
        "floor": floor(copy.deepcopy(backbone), shape.targets),
        "peft": with_peft(copy.deepcopy(backbone), shape.targets, dropout),
        "ours": with_lora(copy.deepcopy(backbone), shape.targets, dropout),
    }
    for p in models["ours"].parameters():
        if p.requires_grad:
            p.data = p.data.float()
    for model in models.values():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.02)
    return models


def step(model: Any, inputs: dict[str, Tensor]) -> None:
    """One forward and backward."""
    model(**inputs)[0].float().square().mean().backward()
    model.zero_grad(set_to_none=True)


def kept_bytes(model: Any, inputs: dict[str, Tensor]) -> int:
    """Bytes of the tensors that a forward keeps for backward, the model's own left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**inputs)[0]
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
