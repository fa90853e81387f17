"""Deltas on ModelCenter's BERT, trained by BMTrain on all GPUs of a machine.

    pip install opendelta bmtrain model-center requests
    torchrun --nproc_per_node 2 examples/tutorial/2_with_bmtrain.py --delta lora

Without `--pretrained` the model is tiny and random, and learns whether a text names a number twice;
with it, ModelCenter downloads one (``--pretrained bert-base-uncased``), which learns the same.
"""

from __future__ import annotations

import argparse

import bmtrain as bmt
import torch
from model_center.model import Bert
from model_center.model.config import BertConfig
from torch import Tensor, nn

import opendelta

DELTAS = {
    "lora": (opendelta.LoraModel, ["project_q", "project_v"]),
    "adapter": (opendelta.AdapterModel, ["self_attention", "ffn.ffn"]),
    "compacter": (opendelta.CompacterModel, ["self_attention", "ffn.ffn"]),
    "low_rank_adapter": (opendelta.LowRankAdapterModel, ["self_attention", "ffn.ffn"]),
    "parallel_adapter": (opendelta.ParallelAdapterModel, None),  # None: the method's defaults
    "bitfit": (opendelta.BitFitModel, ["self_att", "ffn", "output_layernorm"]),
}


def texts(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Token ids (count, 8) and whether the first two tokens are the same."""
    ids = torch.randint(5, 30, (count, 8), generator=generator)
    same = torch.rand(count, generator=generator) < 0.5
    ids[same, 1] = ids[same, 0]
    return ids.cuda(), (ids[:, 0] == ids[:, 1]).long().cuda()


class Classifier(nn.Module):
    """BERT with a linear head on the first token."""

    def __init__(self, bert: Bert, width: int) -> None:
        super().__init__()
        self.bert = bert
        self.head = bmt.BMTrainModelWrapper(nn.Linear(width, 2))

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.bert(ids).last_hidden_state[:, 0])
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--delta", choices=DELTAS, default="lora")
    parser.add_argument("--pretrained", help="a model that ModelCenter knows")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save", default="bmtrain_delta", help="folder for the delta")
    options = parser.parse_args()

    bmt.init_distributed(seed=0)
    if options.pretrained:
        bert = Bert.from_pretrained(options.pretrained)
    else:
        sizes = {"dim_model": 32, "dim_head": 8, "num_heads": 4, "dim_ff": 64, "num_layers": 2}
        bert = Bert(BertConfig(vocab_size=30, dropout_p=0.0, half=False, **sizes))
        bmt.init_parameters(bert)
    model = Classifier(bert, bert.config.dim_model)

    method, modules = DELTAS[options.delta]
    delta = method(model, modified_modules=modules, backend="bmt")
    delta.freeze_module(exclude=["deltas", "head"])
    if bmt.rank() == 0:
        delta.log()

    manager = bmt.optim.OptimManager()
    trainable = [p for p in model.parameters() if p.requires_grad]
    manager.add_optimizer(torch.optim.Adam(trainable, lr=5e-3))
    generator = torch.Generator().manual_seed(bmt.rank())  # other texts on each GPU
    for step in range(options.steps):
        ids, labels = texts(64, generator)
        loss = nn.functional.cross_entropy(model(ids).float(), labels)
        manager.zero_grad()
        manager.backward(loss)
        manager.step()
        if step % 20 == 0 or step == options.steps - 1:
            bmt.print_rank(f"step {step}: loss {bmt.sum_loss(loss).item():.3f}")

    delta.save_finetuned(options.save)  # on all ranks: they gather, the first one writes
    bmt.print_rank(f"saved to {options.save}")


if __name__ == "__main__":
    main()
