"""One process of a test of BMTrain: trains every method on a backbone, saves, loads, and tells.

``bmt_job.py BACKBONE FOLDER`` runs on BMTrain, in as many processes as ``WORLD_SIZE`` says;
``bmt_job.py BACKBONE FOLDER plain`` runs on torch alone, ModelCenter's own code included, and loads
what the runs on BMTrain left in the folders beside. Results go to FOLDER/result.pt.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import backbones
import torch
import weights
from bmt_on_cpu import install
from torch import Tensor, nn

import opendelta
from opendelta import AutoDeltaModel

STEPS, BATCH, TOKENS, RATE = 5, 4, 6, 0.05
IDS = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS).remainder(97) + 3
NORM = r"[r]^(embeddings\.LayerNorm|model\.norm|encoder\.output_layernorm)$"
METHODS: dict[str, dict[str, Any]] = {
    "LoraModel": {"lora_r": 4},
    "LoraModel with a norm": {"lora_r": 4, "own_modules": [NORM]},
    "AdapterModel": {"bottleneck_dim": 6},
    "LowRankAdapterModel": {"reduction_factor": 4},
    "CompacterModel": {"reduction_factor": 4, "shared_phm_rule": True},
    "ParallelAdapterModel": {"bottleneck_dim": 6},
    "BitFitModel": {},
    "SoftPromptModel": {"soft_token_num": 3},
}


def plain_bmtrain() -> None:
    """Let ModelCenter be built from torch's own modules and parameters: an independent answer."""
    engine: Any = types.ModuleType("bmtrain")
    engine.DistributedModule = nn.Module
    engine.DistributedParameter = PlainParameter
    engine.ParameterInitializer = lambda *args, **kwargs: None
    engine.CheckpointBlock = lambda module: module
    engine.TransformerBlockList = InTurn
    engine.store = types.SimpleNamespace(_save_to_rank0=nn.Module.state_dict)
    sys.modules["bmtrain"] = engine


class PlainParameter:
    """Makes torch's parameters."""

    def __new__(cls, data: Tensor, init_method: Any = None) -> Any:
        return nn.Parameter(data)


class InTurn(nn.ModuleList):
    """What a list of blocks computes, each from the output of the one before."""

    def forward(self, hidden: Any, *rest: Any) -> Any:
        for module in self:
            hidden = module(hidden, *rest)
        return hidden


def built(backbone: str, plain: bool) -> nn.Module:
    """The backbone with weights that follow from their names, on BMTrain or not."""
    if backbone != "modelcenter":
        model = backbones.build(backbone)
        model.config.use_cache = False  # a Block runs its layer twice: the cache would grow twice
        return model if plain else sys.modules["bmtrain"].BMTrainModelWrapper(model)
    from model_center.model import Bert
    from model_center.model.config import BertConfig

    model = Bert(
        BertConfig(
            vocab_size=128,
            dim_model=64,
            num_heads=4,
            dim_head=16,
            dim_ff=128,
            num_layers=2,
            dropout_p=0.0,
            half=False,
        )
    )
    values = {}
    for name, p in model.named_parameters():
        shape = getattr(p, "_original_shape", p.shape)
        values[name] = weights.uniform(name, shape, 0.25) + float(len(shape) == 1)
    nn.Module.load_state_dict(model, values, strict=False)
    return model.eval()


def run(model: nn.Module, ids: Tensor) -> Tensor:
    """The hidden states or logits of the text, without those of a prompt."""
    mask = torch.ones_like(ids)
    mask[:, -1] = 0  # the last token is padding
    output = model(input_ids=ids, attention_mask=mask)
    states = getattr(output, "logits", None)
    states = output.last_hidden_state if states is None else states
    return states[:, -TOKENS:-1]


def trained(model: nn.Module, ids: Tensor, target: Tensor, engine: Any) -> list[float]:
    """Losses of some steps, of the whole batch.

    The optimizer's step is proportional to the gradient: Adam's is as long for a gradient that is
    nothing but rounding, so that another order of sums would be seen in what is learned.
    """
    losses = []
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=RATE, momentum=0.9)
    manager = None
    if engine is not None:
        manager = engine.optim.OptimManager()
        manager.add_optimizer(optimizer)
    model.train()
    for _ in range(STEPS):
        loss = (run(model, ids) - target).square().mean()
        if manager is None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        else:
            manager.zero_grad()  # in place: a Block adds to gradients that are let go
            manager.backward(loss)
            manager.step()
            losses.append(float(engine.sum_loss(loss.detach())))
    model.eval()
    return losses


@torch.no_grad()
def evaluated(model: nn.Module) -> Tensor:
    return run(model, IDS)


def put(method: str, model: nn.Module, plain: bool) -> Any:
    """An untrained delta whose initial values are the same in each process."""
    torch.manual_seed(1)
    options = dict(METHODS[method])
    if not plain and method != "SoftPromptModel":  # which has no such argument
        options["backend"] = "bmt"
    delta = getattr(opendelta, method.split()[0])(model, **options)
    delta.freeze_module()
    return delta


def one(method: str, backbone: str, folder: Path, engine: Any) -> dict[str, Any]:
    """Train a method, save it, load it into a fresh backbone."""
    plain = engine is None
    rank, world = (0, 1) if plain else (engine.rank(), engine.world_size())
    mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    model = built(backbone, plain)
    bare = evaluated(model)
    result: dict[str, Any] = {"hash": opendelta.gen_model_hash(model)}
    delta = put(method, model, plain)
    target = weights.uniform("target", bare.shape, 2.0)
    result |= {
        "places": [name for name, _ in delta.named_parameters()],
        "values": opendelta.inspect_module_statistics(model)["delta_parameters"],
        "losses": trained(model, IDS[mine], target[mine], engine),
        "output": evaluated(model),
    }
    if plain:
        for other in sorted(folder.parent.glob(f"*/{method}")):
            fresh = built(backbone, plain)
            AutoDeltaModel.from_finetuned(other, fresh)
            result[f"loaded {other.parent.name}"] = evaluated(fresh)
        return result
    delta.save_finetuned(folder / method)
    engine.save(model, folder / f"{method}.pt")
    delta.detach()
    result |= {"detached": evaluated(model), "bare": bare}

    fresh = built(backbone, plain)
    AutoDeltaModel.from_finetuned(folder / method, fresh)
    result["loaded"] = evaluated(fresh)
    if world == 1:  # else BMTrain 1.0.1 cannot load what came into a Block after it was made
        fresh = built(backbone, plain)
        put(method, fresh, plain)
        engine.load(fresh, folder / f"{method}.pt", strict=False)
        result["loaded by BMTrain"] = evaluated(fresh)
    return result


def main(backbone: str, folder: Path, plain: bool) -> None:
    engine = None
    if plain:
        plain_bmtrain()
    else:
        engine = install()
        engine.init_distributed(seed=0)
    results = {method: one(method, backbone, folder, engine) for method in METHODS}
    if plain or engine.rank() == 0:
        torch.save(results, folder / "result.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:] == ["plain"])
