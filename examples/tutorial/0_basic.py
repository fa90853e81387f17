"""Delta tuning from end to end: look, add, freeze, train, save, load.

python examples/tutorial/0_basic.py
"""

from __future__ import annotations

import torch
from sentences import COMPLAINTS, PRAISE, accuracy, backbone, labelled

from opendelta import AutoDeltaModel, LoraModel, Visualization

FOLDER = "delta_checkpoints/basic"


def main() -> None:
    model = backbone()
    Visualization(model).structure_graph()  # the names that `modified_modules` may use

    delta = LoraModel(model, modified_modules=["query", "value"], lora_r=8)
    delta.freeze_module(exclude=["deltas", "classifier"])  # the head is new: it trains as well
    delta.log()

    batch, labels = labelled(COMPLAINTS, PRAISE)
    print(f"Accuracy before: {accuracy(model(**batch).logits, labels):.2f}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)  # frozen ones are left alone
    model.train()
    for step in range(12):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 3 == 2:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    model.eval()
    logits = model(**batch).logits
    print(f"Accuracy after: {accuracy(logits, labels):.2f}")

    delta.save_finetuned(FOLDER)  # what trained, and nothing else
    fresh = backbone()
    AutoDeltaModel.from_finetuned(FOLDER, backbone_model=fresh)
    assert torch.equal(fresh(**batch).logits, logits)
    print(f"Saved in {FOLDER}, loaded into a fresh backbone: the same logits.")


if __name__ == "__main__":
    main()
