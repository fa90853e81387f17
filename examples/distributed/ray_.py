"""LoRA with Ray Train, which starts the processes: python examples/distributed/ray_.py"""

from __future__ import annotations

import tempfile
from pathlib import Path

import ray
import torch
from ray.train import Checkpoint, RunConfig, ScalingConfig, get_context, report
from ray.train.torch import TorchTrainer, get_device, prepare_model
from tiny import backbone, batch

from opendelta import AutoDeltaModel, LoraModel


def train() -> None:
    """What each process does."""
    rank, world = get_context().get_world_rank(), get_context().get_world_size()
    model = backbone()
    delta = LoraModel(model, lora_r=4)  # before prepare_model, which wraps it in DDP
    delta.freeze_module(exclude=["deltas", "classifier"])
    wrapped = prepare_model(model)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    mine = {k: v.to(get_device()) for k, v in batch(rank, world).items()}
    for step in range(20):
        loss = wrapped(**mine).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and step % 5 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    with tempfile.TemporaryDirectory() as folder:  # Ray copies it to its storage
        if rank == 0:
            delta.save_finetuned(folder)
        report({"loss": loss.item()}, Checkpoint(folder) if rank == 0 else None)


def main() -> None:
    result = TorchTrainer(
        train,
        scaling_config=ScalingConfig(num_workers=2, use_gpu=torch.cuda.is_available()),
        run_config=RunConfig(name="delta_ray", storage_path=str(Path.cwd() / "delta_checkpoints")),
    ).fit()
    ray.shutdown()
    assert result.checkpoint is not None
    AutoDeltaModel.from_finetuned(result.checkpoint.path, backbone())


if __name__ == "__main__":
    main()
