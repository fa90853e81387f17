"""Small models that several rooms' tests need, and what is read off any model."""

from __future__ import annotations

import backbones
import torch
from cases import randomise
from torch import Tensor, nn

from opendelta import AdapterModel, DeltaBase, LoraModel

BF16 = torch.bfloat16


def linears(count: int = 2, width: int = 8) -> nn.Sequential:
    """A chain of linears."""
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))


def parameter_names(model: nn.Module) -> list[str]:
    """The names of a model's parameters, in their order."""
    return [name for name, _ in model.named_parameters()]


def dtypes(module: nn.Module) -> set[torch.dtype]:
    """The dtypes of a module's parameters."""
    return {p.dtype for p in module.parameters()}


def forward_hooks(model: nn.Module) -> int:
    """How many hooks stand around the forwards of a model's modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def hook_counts(module: nn.Module) -> dict[str, int]:
    """How many hooks of each kind a module has."""
    return {name: len(value) for name, value in vars(module).items() if name.endswith("_hooks")}


def replicate(model: nn.Module) -> nn.Module:
    """What `nn.parallel.replicate` makes: parameters of a copy are plain attributes."""
    modules = list(model.modules())
    copies = [module._replicate_for_data_parallel() for module in modules]
    index = {id(module): i for i, module in enumerate(modules)}
    for module, twin in zip(modules, copies, strict=True):
        twin._former_parameters = {}
        for key, child in module._modules.items():
            if child is None:
                twin._modules[key] = None
            else:
                setattr(twin, key, copies[index[id(child)]])
        for kind in ("_parameters", "_buffers"):
            for key, tensor in getattr(module, kind).items():
                if tensor is None:
                    getattr(twin, kind)[key] = None
                else:
                    setattr(twin, key, tensor.detach() * 1)
    return copies[0]


def part_and_whole() -> tuple[nn.Module, DeltaBase, DeltaBase]:
    """A backbone, an adapter put on its encoder, and LoRA put on the whole."""
    model = backbones.build("bert")
    adapter = AdapterModel(model.encoder, modified_modules=["output.dense"])
    lora = LoraModel(model, modified_modules=["query"])
    for delta in (adapter, lora):
        randomise(delta)
    return model, adapter, lora


class Host(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out
