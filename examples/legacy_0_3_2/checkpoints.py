"""Tiny random checkpoints under the names that the documentation of 0.3.2 uses.

`from_pretrained("facebook/bart-base")` prefers a folder of that name, so that in a folder made here
the documented code needs no other name and no network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForPreTraining,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from opendelta import AutoDeltaModel

WORDS = "<pad> </s> <unk> Is Harry Poter Potter wrtten written by JKrowling JK Rowling ?".split()
# The deltas that the documentation loads by name: the backbone and the config of each.
DELTAS: dict[str, tuple[str, dict[str, Any]]] = {
    "thunlp/Spelling_Correction_T5_LRAdapter_demo": (
        "t5-large",
        {"delta_type": "low_rank_adapter", "reduction_factor": 4, "low_rank_rank": 4},
    ),
    "thunlp/FactQA_T5-large_Adapter": ("t5-large", {"delta_type": "adapter"}),
    "DeltaHub/lora_t5-base_mrpc": ("t5-base", {"delta_type": "lora"}),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the spelling example."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def save_backbones(folder: Path) -> None:
    """Write every backbone of the documentation into `folder`, under its name."""
    torch.manual_seed(0)
    bert: dict[str, Any] = {
        "vocab_size": 100,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
    }
    for name in ("bert-base-cased", "bert-base-uncased", "bert-large-cased"):
        BertForPreTraining(BertConfig(**bert)).save_pretrained(folder / name)
    RobertaForMaskedLM(RobertaConfig(**bert)).save_pretrained(folder / "roberta-base")
    bart = BartConfig(
        vocab_size=100,
        d_model=48,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
    )
    BartForSequenceClassification(bart).save_pretrained(folder / "facebook/bart-base")
    t5 = T5Config(vocab_size=len(WORDS), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    t5.dropout_rate = 0.0
    t5.decoder_start_token_id = 0
    for name in ("t5-base", "t5-large"):
        T5ForConditionalGeneration(t5).save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)


def publish_deltas(folder: Path, center: str) -> None:
    """Train the documentation's deltas, each on its backbone in `folder`, and push them."""
    words = tokenizer()
    question = words.encode("Is Harry Poter wrtten by JKrowling", return_tensors="pt")
    answer = words.encode("Is Harry Potter written by JK Rowling ? </s>", return_tensors="pt")
    for name, (backbone, config) in DELTAS.items():
        t5 = T5ForConditionalGeneration.from_pretrained(folder / backbone)
        delta = AutoDeltaModel.from_config(config, t5)
        delta.freeze_module()
        optimizer = torch.optim.Adam([p for p in t5.parameters() if p.requires_grad], lr=2e-2)
        for _ in range(60):
            loss = t5(input_ids=question, labels=answer).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        delta.save_finetuned(
            folder / "trained" / name, push_to_dc=True, center=center, center_args={"name": name}
        )
