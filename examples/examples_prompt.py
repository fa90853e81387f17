"""The table of 0.3.2's `examples_prompt`, made by trying: which method works on which backbone.

    python examples/examples_prompt.py

Backbones are tiny and random. A cell says "yes" if the delta goes on with the method's defaults,
lowers the loss by training, is saved and loaded onto another instance with equal outputs, and
comes off again with the backbone as it was; "no" if the method refuses the backbone. Pfeiffer's
adapters sit behind the feed-forward alone, and AdapterDrop leaves out the first block. What 0.3.2
tried on a T5-3b split over GPUs is tried on a T5 whose decoder Accelerate keeps elsewhere and
brings in when it runs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers as hf
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.utils import logging

from opendelta import AutoDeltaModel
from opendelta.exceptions import InsertionError

WIDTH, LAYERS, HEADS, VOCABULARY = 32, 3, 4, 64
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 64,
}
GPT = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": LAYERS,
    "num_heads": HEADS,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
DISTILBERT = {
    "vocab_size": VOCABULARY,
    "dim": WIDTH,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "hidden_dim": 64,
}
CTRL = {**GPT, "dff": 64}
BACKBONES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "T5": (hf.T5ForConditionalGeneration, hf.T5Config, T5),
    "T5, split": (hf.T5ForConditionalGeneration, hf.T5Config, T5),
    "GPT-2": (hf.GPT2LMHeadModel, hf.GPT2Config, GPT),
    "BART": (hf.BartForConditionalGeneration, hf.BartConfig, BART),
    "DistilBERT": (hf.DistilBertForMaskedLM, hf.DistilBertConfig, DISTILBERT),
    "RoBERTa": (hf.RobertaForMaskedLM, hf.RobertaConfig, BERT),
    "BERT": (hf.BertForMaskedLM, hf.BertConfig, BERT),
    "DeBERTa-v2": (hf.DebertaV2ForMaskedLM, hf.DebertaV2Config, BERT),
    "CTRL": (hf.CTRLLMHeadModel, hf.CTRLConfig, CTRL),
}
IN_FF = {"modified_modules": ["ff"], "common_structure": True}
LAST_BLOCKS = {"modified_modules": [r"[r]block\.[1-2]\.(attn|ff)"], "common_structure": True}
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"delta_type": "lora"},
    "Bias tuning": {"delta_type": "bitfit"},
    "Adapter, Houlsby": {"delta_type": "adapter"},
    "Adapter, Pfeiffer": {"delta_type": "adapter", **IN_FF},
    "AdapterDrop": {"delta_type": "adapter", **LAST_BLOCKS},
    "Low-rank adapter": {"delta_type": "low_rank_adapter"},
    "Compacter": {"delta_type": "compacter"},
    "Prefix tuning": {"delta_type": "prefix"},
    "Prompt tuning": {"delta_type": "soft_prompt", "soft_token_num": 8},
}
IDS = torch.tensor([[5, 9, 3, 7, 11], [7, 1, 8, 4, 2]])


def build(backbone: str) -> nn.Module:
    model, config, sizes = BACKBONES[backbone]
    settings = config(**sizes)
    settings.decoder_start_token_id = 0  # T5's has no default
    torch.manual_seed(0)
    made: Any = model(settings).eval()
    if backbone == "T5, split":
        accelerate.cpu_offload(made.get_decoder(), execution_device=torch.device("cpu"))
    return made


def output(model: nn.Module) -> Any:
    return model(input_ids=IDS, labels=IDS)


def works(backbone: str, config: dict[str, Any]) -> bool:
    model = build(backbone)
    bare = output(model).logits
    try:
        delta = AutoDeltaModel.from_config(config, model)
    except InsertionError:
        return False
    delta.freeze_module()
    optimizer = torch.optim.Adam(delta.parameters(), lr=1e-2)
    first = output(model).loss
    for _ in range(5):
        optimizer.zero_grad()
        output(model).loss.backward()
        optimizer.step()
    tuned = output(model)
    with tempfile.TemporaryDirectory() as folder:
        delta.save_finetuned(folder)
        other = build(backbone)
        AutoDeltaModel.from_finetuned(folder, backbone_model=other)
    loaded = torch.allclose(output(other).logits, tuned.logits, atol=1e-5)
    delta.remove()
    restored = torch.equal(output(model).logits, bare)
    return bool(tuned.loss < first and loaded and restored)


def main() -> None:
    parser = argparse.ArgumentParser(description="Which method works on which backbone.")
    parser.add_argument("--results", type=Path, default=Path("delta_checkpoints/supported.json"))
    options = parser.parse_args()
    logging.set_verbosity_error()
    rows = [
        {"backbone": backbone, **{name: works(backbone, c) for name, c in METHODS.items()}}
        for backbone in BACKBONES
    ]
    table = Table("", *METHODS)
    for row in rows:
        table.add_row(str(row["backbone"]), *("yes" if row[name] else "no" for name in METHODS))
    Console(width=130).print(table)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
