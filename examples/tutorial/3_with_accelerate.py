"""A training loop with Hugging Face Accelerate; nothing in it knows of the delta.

accelerate launch examples/tutorial/3_with_accelerate.py   (or plain python)

More engines are in examples/distributed/.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from sentences import COMPLAINTS, PRAISE, accuracy, backbone, labelled
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from opendelta import LoraModel

FOLDER = "delta_checkpoints/with_accelerate"


def main() -> None:
    accelerator = Accelerator()
    model = backbone()
    delta = LoraModel(model)
    delta.freeze_module(exclude=["deltas", "classifier"])  # before the optimizer and `prepare`

    batch, labels = labelled(COMPLAINTS, PRAISE)
    rows = TensorDataset(batch["input_ids"], batch["attention_mask"], labels)
    trainable = [p for p in model.parameters() if p.requires_grad]
    prepared, optimizer, loader = accelerator.prepare(
        model, torch.optim.AdamW(trainable, lr=5e-3), DataLoader(rows, batch_size=8, shuffle=True)
    )
    prepared.train()
    for epoch in range(8):
        for ids, mask, target in loader:
            loss = prepared(input_ids=ids, attention_mask=mask, labels=target).loss
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    prepared.eval()
    found: list[Tensor] = []
    truth: list[Tensor] = []
    with torch.no_grad():
        for ids, mask, target in loader:
            logits = prepared(input_ids=ids, attention_mask=mask).logits
            for kept, value in ((found, logits), (truth, target)):
                kept.append(accelerator.gather_for_metrics(value))
    accelerator.print(f"Accuracy after: {accuracy(torch.cat(found), torch.cat(truth)):.2f}")
    if accelerator.is_main_process:
        delta.save_finetuned(FOLDER)
    accelerator.end_training()


if __name__ == "__main__":
    main()
