"""PEFT's files of prompt tuning and P-tuning: one tensor, and heads trained with it.

PEFT (https://github.com/huggingface/peft) is not needed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from opendelta.delta.config import ConfigFields
from opendelta.delta_models.generated import Generated
from opendelta.delta_models.prompt_layer import PROMPT_KEY
from opendelta.exceptions import CheckpointError, ConfigError
from opendelta.ground.names import lineage
from opendelta.mechanism.ownership import own_modules
from opendelta.saving.peft_files import Fields, PeftConfig, write_adapter

KEY, PREFIX = "prompt_embeddings", "base_model."  # PEFT wraps the backbone once

# What a class of transformers' models is for, by the end of its name, and what PEFT calls that.
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "Model": "FEATURE_EXTRACTION",
}
# Modules that PEFT takes to be trained along, by the task, and looks for in the file.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_FIELDS: Fields = {"num_virtual_tokens": (0, int), "num_transformer_submodules": (1, int)}
_IMMATERIAL = frozenset(  # what it was made for, and how
    "num_layers token_dim num_attention_heads prompt_tuning_init prompt_tuning_init_text "
    "tokenizer_name_or_path tokenizer_kwargs encoder_hidden_size encoder_num_layers "
    "encoder_dropout encoder_reparameterization_type".split()
)


class PeftPrompt(Generated):
    """What `SoftPromptModel` has to do with PEFT."""

    peft_types = ("PROMPT_TUNING", "P_TUNING")

    @classmethod
    def reads_peft(cls, values: dict[str, Any]) -> bool:
        """Whether an adapter with this config is of this method."""
        return values.get("peft_type") in cls.peft_types

    @classmethod
    def from_peft_form(
        cls, config: PeftConfig, tensors: dict[str, Tensor], backbone: nn.Module
    ) -> tuple[ConfigFields, dict[str, Tensor]]:
        """Our config and tensors from PEFT's; modules that PEFT saved become the delta's own.

        Raises:
            CheckpointError: if the vectors are missing, or another module is not there.
            ConfigError: for vectors in encoder and decoder, and other variants.
        """
        settings = config.checked(_FIELDS, _IMMATERIAL, "a soft prompt")
        if KEY not in tensors:
            raise CheckpointError(f"{config.file.parent} holds no {KEY!r}, as a soft prompt does.")
        count, parts = settings["num_virtual_tokens"], settings["num_transformer_submodules"]
        values = tensors[KEY]
        if parts != 1 and len(values) != count:
            raise ConfigError(
                f"{config.file}: num_transformer_submodules={parts}, one prompt of {count} for the "
                "encoder and one for the decoder: here a prompt goes before the encoder's text "
                "alone, so it cannot be read."
            )
        trained = {n.removeprefix(PREFIX): t for n, t in tensors.items() if n != KEY}
        modules = dict(own_modules(backbone))
        wanted = set(settings["modules_to_save"])
        places: list[str] = []
        for name in trained:
            outer = [module for module in lineage(name)[1:] if module in modules]
            place = next((m for m in outer if m.rpartition(".")[2] in wanted), None)
            if place is None and outer:
                place = outer[0]
            if place is None:
                raise CheckpointError(
                    f"{config.file.parent} holds {name!r}, which is no part of this "
                    f"{type(backbone).__name__}."
                )
            places.append(place)
        places = sorted(set(places))
        made = cls.config_class(
            soft_token_num=len(values), token_init=False, own_modules=places or None
        )
        return made, {PROMPT_KEY: values} | trained

    def export_peft(self, path: str | os.PathLike[str]) -> None:
        """Write this delta as a PEFT adapter: ``PeftModel.from_pretrained(backbone, path)``.

        PEFT puts a prompt before the padding on the left of a row: the two compute the same where
        rows are not padded there. Heads of the tasks of PEFT's go along, trained or not.

        Args:
            path: the folder; it is made if it does not exist.

        Raises:
            ConfigError: if something else than a head was trained with it, or PEFT has no task for
                the model.
            CheckpointError: if `path` is a file.
        """
        kind = type(self.backbone_model).__name__
        task = next((t for end, t in TASKS.items() if kind.endswith(end)), None)
        if task is None:
            raise ConfigError(
                f"PEFT runs prompts by the task of a model, and {kind} is none of "
                f"{', '.join('...' + end for end in TASKS)}."
            )
        trained = self.checkpoint_tensors()
        name = next(name for name in trained if f".{name}".endswith(f".{PROMPT_KEY}"))
        values = trained.pop(name)
        heads: dict[str, Tensor] = {}
        for place, module in own_modules(self.backbone_model, originals=True):
            if place.rpartition(".")[2] in HEADS.get(task, ()):
                heads |= {f"{place}.{n}": t for n, t in module.state_dict().items()}
        others = [name for name in trained if name not in heads]
        if others:
            raise ConfigError(
                f"{others[0]!r} was trained with this {type(self).__name__}, which a PEFT adapter "
                f"for {task} does not hold: save_finetuned does."
            )
        backbone_config = getattr(self.backbone_model, "config", None)
        config = {
            "peft_type": self.peft_types[0],
            "task_type": task,
            "base_model_name_or_path": getattr(backbone_config, "_name_or_path", None),
            "inference_mode": True,
            "modules_to_save": None,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": len(values),
            "token_dim": values.shape[1],
        }
        tensors = {PREFIX + name: tensor for name, tensor in (heads | trained).items()}
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        write_adapter(Path(path), config, {**tensors, KEY: values.detach().cpu().contiguous()})
