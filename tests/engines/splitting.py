"""Tensor parallelism: LoRA and DoRA on decoders that are split over ranks with the same rows."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import backbones
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from training import Batch, Losses, Put, Run, batches, both_ways, state_by_rank, steps_of, train

import opendelta
from opendelta import DeltaBase

PLANS: dict[str, Any] = {
    "llama": "auto",
    "llama_dora": "auto",
    "llama_own": "auto",  # with a norm of its own
    "native": None,  # PyTorch's own plan, see `parallelized`
    "phi3": "auto",  # fused projections, gathered
    "phi3_packed": {  # a fused projection of which each rank has a piece of each part
        "model.layers.*.mlp.gate_up_proj": "packed_colwise",
        "model.layers.*.mlp.down_proj": "rowwise",
    },
}


def decoder(case: str) -> nn.Module:
    """A tiny decoder, its weights by name."""
    if not case.startswith("phi3"):
        return backbones.build("llama")
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return Phi3ForCausalLM(Phi3Config(**sizes, **heads, **tokens))


def lora_on_decoder(
    model: nn.Module, seed: int = 1, method: type[DeltaBase] = opendelta.LoraModel, **more: Any
) -> DeltaBase:
    torch.manual_seed(seed)
    delta = method(model, lora_r=4, modified_modules=["self_attn", "mlp", "lm_head"], **more)
    delta.freeze_module()
    return delta


def put_on(case: str) -> Put:
    """What puts the delta of this case on a decoder."""
    method = opendelta.DoraModel if case.endswith("dora") else opendelta.LoraModel
    own = {"own_modules": ["model.norm"]} if case.endswith("own") else {}
    return partial(lora_on_decoder, method=method, **own)


def causal(batch: Batch) -> Batch:
    return {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}


def parallelized(model: nn.Module) -> nn.Module:
    """A decoder whose feed-forward is split by PyTorch's own `parallelize_module`."""
    plan = {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        parallelize_module(layer, mesh, {**plan, "mlp.down_proj": RowwiseParallel()})
    return model


def split_and_sharded(model: nn.Module) -> None:
    """Tensor parallelism of BERT on one dimension of a mesh, FSDP2 on the other."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "tensor"))
    for layer in model.bert.encoder.layer:
        parallelize_module(layer, mesh["tensor"], {"intermediate.dense": ColwiseParallel()})
        fully_shard(layer, mesh=mesh["data"])


def split_decoder(case: str, folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    if case == "native":
        return parallelized(decoder(case))

    if dist.get_rank() == 0:
        decoder(case).save_pretrained(folder / "backbone")
    dist.barrier()
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder / "backbone", tp_plan=PLANS[case], dtype=torch.float32
    )
    return model


def tensor_parallel(case: str, folder: Path) -> Losses:
    def start(put: Put) -> Run:
        model = split_decoder(case, folder).train()
        return state_by_rank(put(model), model)  # the other kind knows no packed shards

    return both_ways(start, put_on(case), folder, causal)


def split_loads(case: str, folder: Path) -> list[list[list[float]]]:
    """Logits of a split backbone that loads the file of a whole one."""
    if dist.get_rank() == 0:
        delta = put_on(case)(decoder(case))
        with torch.no_grad():
            for p in delta.parameters():
                p.normal_(std=0.1)
        delta.save_finetuned(folder / "delta")
    model = split_decoder(case, folder).eval()
    opendelta.AutoDeltaModel.from_finetuned(folder / "delta", model)
    with torch.no_grad():
        logits: Tensor = model(batches()[0]["input_ids"]).logits
    return logits.tolist()


def beside_a_split(case: str, folder: Path) -> dict[str, Any]:
    """An adapter on norms, which are not split: values that differ at first, then training."""
    model = split_decoder("llama", folder).train()
    torch.manual_seed(1 + dist.get_rank())
    delta = opendelta.AdapterModel(model, 4, modified_modules=["input_layernorm"])
    delta.freeze_module()
    losses = train(steps_of(model), causal)
    return {"losses": losses, "values": [p.double().sum().item() for p in delta.parameters()]}
